"""Plain cross-entropy with its gradient, in blocks: no array of all examples by all items exists at any time.

Dimensions: B examples, n candidates, I items, D width.

The score of candidate j is users . candidates_j / temperature, and every loss is the same sum over the examples,

    - log( exp(score of the target) / (exp(score of the target) + sum over j other than the target of weight_j exp(score_j)) )

which differ in their candidates and weights alone: over the whole catalogue all weights are 1; within a batch they say how
often an item is a target; of a sample they correct for how likely each item was drawn. `gbce` alone is another: gSASRec's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmm4rec.data.at_once import at_once

SCORES_AT_ONCE = {"cpu": 2**23, "cuda": 2**28}  # elements: 32 MiB, 1 GiB in float32


def cross_entropy(
    users: Tensor,
    candidates: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    log_weights: Tensor | None = None,
    target_weighs_one: bool = True,
    scale: Tensor | float = 1.0,
    gradient: Tensor,
    workspace: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss summed over the examples, and its gradient by the users; that by the candidates is added to `gradient`.

    Args:
        users [B, D]; candidates [n, D]; targets [B], rows of the candidates; log_weights [n], None: all 0.
        target_weighs_one: an example's own target weighs 1 in its sum, whatever log_weights says.
        scale: what each example's gradient is multiplied with, [B] or one for all; the loss is not.
        gradient: [n, D].
        workspace: what `scores_workspace` gave, used for the scores; None: a new one.
    """
    workspace = scores_workspace(users) if workspace is None else workspace
    loss, d_users = users.new_zeros(()), torch.empty_like(users)
    scale = torch.as_tensor(scale, dtype=users.dtype, device=users.device).expand(len(users))[:, None] / temperature
    for rows in row_blocks(len(users), len(candidates), _at_once(users.device)):
        own = targets[rows, None]
        scores = _scores(users[rows], candidates, temperature, workspace)  # [r, n]
        target = scores.gather(1, own)  # [r, 1]
        if log_weights is not None:
            scores += log_weights
            if target_weighs_one:
                scores.scatter_(1, own, target)
        highest = scores.amax(1, keepdim=True)
        shares = scores.sub_(highest).exp_()  # [r, n], of `total`
        total = shares.sum(1, keepdim=True)  # [r, 1]
        loss += (highest + total.log() - target).sum()
        shares.scatter_add_(1, own, -total)  # the gradient by the scores, times `total`
        torch.mm(shares, candidates, out=d_users[rows]).div_(total)
        gradient.addmm_(shares.T, users[rows] * (scale[rows] / total))
    return loss, d_users.mul_(scale)


def gbce(
    users: Tensor,
    candidates: Tensor,
    targets: Tensor,
    *,
    draws: Tensor,
    beta: float,
    temperature: float = 1.0,
    scale: Tensor | float = 1.0,
    gradient: Tensor,
    workspace: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """gSASRec's loss (arXiv 2308.07192, equation 9), -beta log sigmoid(target's score) - sum of log(1 - sigmoid(score)) over the draws.

    Args: as `cross_entropy`; draws [n]: how often each candidate was drawn (an example's own target counts 0 times); beta: `gbce_beta`.
    Returns: the loss summed over the examples, and its gradient by the users.
    """
    workspace = scores_workspace(users) if workspace is None else workspace
    loss, d_users = users.new_zeros(()), torch.empty_like(users)
    scale = torch.as_tensor(scale, dtype=users.dtype, device=users.device).expand(len(users))[:, None] / temperature
    for rows in row_blocks(len(users), len(candidates), _at_once(users.device)):
        own = targets[rows, None]
        scores = _scores(users[rows], candidates, temperature, workspace)  # [r, n]
        target = scores.gather(1, own)
        weights = draws.expand_as(scores).scatter(1, own, 0.0)
        loss += beta * F.softplus(-target).sum() + (weights * F.softplus(scores)).sum()
        slopes = weights.mul_(scores.sigmoid_()).scatter_(1, own, -beta * torch.sigmoid(-target))
        torch.mm(slopes, candidates, out=d_users[rows])
        gradient.addmm_(slopes.T, users[rows] * scale[rows])
    return loss, d_users.mul_(scale)


def gbce_beta(negatives: int, items: int, calibration: float) -> float:
    """The target's exponent for so many draws from a catalogue and the calibration t (equation 10): 1 for t = 0, draws a item for t = 1."""
    rate = negatives / (items - 1)
    return rate * (calibration * (1 - 1 / rate) + 1 / rate)


def streamed_cross_entropy(
    users: Tensor,
    blocks: Sequence[slice],
    candidates: Callable[[slice], Tensor],
    targets: Tensor,
    *,
    temperature: float = 1.0,
    scale: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`cross_entropy` over the whole of a catalogue that is never whole in memory: its rows are computed block by block, twice.

    Args: blocks: ranges of items that cover the catalogue; candidates: the vectors [n, D] of such a range, with their
    graph, through which the gradient is carried back at once; targets [B]: items.
    Returns: the losses [B] and the gradient of their sum by the users; memory grows with the largest block alone.
    """
    scale = torch.as_tensor(scale, dtype=users.dtype, device=users.device).expand(len(users))[:, None] / temperature
    log_sum, target = users.new_full((len(users), 1), -torch.inf), torch.empty_like(users[:, :1])
    with torch.no_grad():
        for block in blocks:
            for rows, scores, own, here in _scores_of_block(users, candidates(block), block, targets, temperature):
                target[rows] = torch.where(here, scores.gather(1, own), target[rows])
                log_sum[rows] = torch.logaddexp(log_sum[rows], scores.logsumexp(1, keepdim=True))
    d_users = torch.zeros_like(users)
    for block in blocks:
        vectors = candidates(block)
        gradient = torch.zeros_like(vectors)
        for rows, scores, own, here in _scores_of_block(users, vectors.detach(), block, targets, temperature):
            share = scores.sub_(log_sum[rows]).exp_()
            share.scatter_add_(1, own, -here.to(share.dtype))
            d_users[rows].addmm_(share, vectors.detach())
            gradient.addmm_(share.T, users[rows] * scale[rows])
        vectors.backward(gradient)
    return (log_sum - target)[:, 0], d_users.mul_(scale)


def in_batch_weights(counts: np.ndarray) -> np.ndarray:
    """log_weights [n] of the distinct targets of a micro-batch that occur `counts` [n] times: each counts as often as it is one."""
    return np.log(counts)


def sampled_weights(drawn: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """log_weights [n] of candidates drawn `drawn` [n] times with replacement, each time with `probability` [n]; -inf if never.

    The logQ correction: the sum over the sample is, in the mean over samples, the sum over the whole catalogue.
    """
    with np.errstate(divide="ignore"):
        return np.log(drawn) - np.log(drawn.sum() * probability)


def scores_workspace(users: Tensor) -> Tensor:
    """Memory for the scores of a block, to use again and again: fresh pages cost more than the numbers in them."""
    return users.new_empty(_at_once(users.device))


def _scores(users: Tensor, candidates: Tensor, temperature: float, workspace: Tensor) -> Tensor:
    """[r, n], in the workspace where they fit."""
    shape = len(users), len(candidates)
    out = workspace[: shape[0] * shape[1]].view(shape) if shape[0] * shape[1] <= len(workspace) else users.new_empty(shape)
    return torch.mm(users / temperature, candidates.T, out=out)


def _at_once(device: torch.device) -> int:
    return at_once(SCORES_AT_ONCE, device.type)


def row_blocks(rows: int, columns: int, at_once: int) -> Iterator[slice]:
    """Ranges of rows of an array [rows, columns], each of at most `at_once` elements (but one row at least)."""
    step = max(1, at_once // columns)
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


def _scores_of_block(
    users: Tensor, vectors: Tensor, block: slice, targets: Tensor, temperature: float
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Rows r of the users, their scores [r, n], the column of each target [r, 1] (0 where it is not here), and whether it is."""
    workspace = scores_workspace(users)
    for rows in row_blocks(len(users), len(vectors), _at_once(users.device)):
        own = targets[rows, None] - block.start
        here = (own >= 0) & (own < len(vectors))
        yield rows, _scores(users[rows], vectors, temperature, workspace), own.where(here, 0), here
