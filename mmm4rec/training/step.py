"""The gradient of one optimizer step, whatever the loss, as fast and as small as it comes.

Dimensions: B examples of a chunk, n candidates, I items, D width.

Accumulated micro-batches are one sum over examples, so three things are free to choose, and chosen here:
- Histories are encoded in chunks of about as many positions (`POSITIONS_AT_ONCE`), however the micro-batches cut them.
- Item vectors are computed once a step: the chunks read copies, whose gradients are summed and carried back together.
- The scores never exist as a whole (losses.py). A catalogue of more than one block is never whole either: then the users
  are encoded first, the loss goes over the blocks, and every chunk is encoded again to carry its gradient back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mmm4rec.data.batches import Batch, DomainData, Plan
from mmm4rec.models.recommender import Catalogue, Recommender
from mmm4rec.training import distributed
from mmm4rec.training.losses import cross_entropy, in_batch_weights, sampled_weights, streamed_cross_entropy

if TYPE_CHECKING:
    from mmm4rec.training.loop import Run

POSITIONS_AT_ONCE = {"cpu": 2048, "cuda": 65_536}


@dataclass(frozen=True)
class Chunk:
    """Examples that are encoded together."""

    ids: Tensor  # [u] the items of the histories, ascending
    batch: Batch  # its items are rows of `ids`
    scale: Tensor  # [B] what each example's gradient is multiplied with
    seed: int  # of its dropout


@dataclass(frozen=True)
class Share:
    """This worker's examples of one micro-batch; they and their scale are [B]."""

    users: np.ndarray
    ends: np.ndarray
    scale: np.ndarray


@dataclass
class StepItems:
    """Item vectors that the chunks of a step read, and the sum of their gradients."""

    ids: Tensor | None  # [n] ascending; None: all, 0..I
    catalogue: Catalogue  # with its graph
    gradients: Catalogue = field(init=False)

    def __post_init__(self) -> None:
        inputs = {name: torch.zeros_like(vectors) for name, vectors in self.catalogue.inputs.items()}
        self.gradients = Catalogue(inputs, torch.zeros_like(self.catalogue.candidates))

    def rows(self, ids: Tensor) -> Tensor:
        return ids if self.ids is None else torch.searchsorted(self.ids, ids)

    def encode(self, model: Recommender, chunk: Chunk) -> tuple[Tensor, Callable[[Tensor], None]]:
        """The users [B, D] of a chunk, and what carries their gradient back to the parameters and to these vectors."""
        rows = self.rows(chunk.ids)
        copies = {name: vectors.detach()[rows].requires_grad_() for name, vectors in self.catalogue.inputs.items()}
        torch.manual_seed(chunk.seed)
        users = model.users(chunk.batch, Catalogue(copies, self.catalogue.candidates.detach()))

        def carry_back(d_users: Tensor) -> None:
            users.backward(d_users)
            for name, copy in copies.items():
                if copy.grad is not None:
                    self.gradients.inputs[name].index_add_(0, rows, copy.grad)

        return users.detach(), carry_back

    def carry_back(self) -> None:
        """Carry the gradients that have come together on to the parameters."""
        vectors = [*self.catalogue.inputs.values(), self.catalogue.candidates]
        gradients = [*self.gradients.inputs.values(), self.gradients.candidates]
        learned = [pair for pair in zip(vectors, gradients, strict=True) if pair[0].requires_grad]
        torch.autograd.backward(*(list(part) for part in zip(*learned, strict=True)))


def add_gradient(run: Run, plans: Sequence[Plan]) -> float:
    """Add the gradient of the mean loss over the examples of these micro-batches, this worker's part of it, to the parameters'.

    Returns the loss summed over this worker's examples. With the quirk `summed_accumulation` the gradient is the sum of the
    micro-batches' means.
    """
    examples = sum(len(plan.users) for plan in plans)
    loss, seed = torch.zeros((), dtype=torch.float64, device=run.device), _Seeds(run)
    for number, data in enumerate(run.data):
        own = [plan for plan in plans if plan.domain == number]
        shares = [_share(plan, len(plan.users) if run.quirks.summed_accumulation else examples) for plan in own]
        if not sum(len(share.users) for share in shares):
            continue
        if run.config.loss != "full":
            loss += _over_candidates(run, data, own, shares, seed)
        elif data.features.one_block:
            loss += _over_catalogue(run, data, _joined(shares), seed)
        else:
            loss += _over_streamed_catalogue(run, data, _joined(shares), seed)
    return float(loss)


def _over_catalogue(run: Run, data: DomainData, share: Share, seed: _Seeds) -> Tensor:
    """The loss over all items, whose vectors are computed at once."""
    items = StepItems(None, run.model.items(data.features))
    first = 0 if run.quirks.padding_class else 1
    candidates, gradient = items.catalogue.candidates.detach()[first:], items.gradients.candidates[first:]
    loss = candidates.new_zeros(())
    for chunk in _chunks(run, data, share, seed):
        users, carry_back = items.encode(run.model, chunk)
        targets, temperature = chunk.batch.targets - first, run.model.temperature
        part, d_users = cross_entropy(users, candidates, targets, temperature=temperature, scale=chunk.scale, gradient=gradient)
        carry_back(d_users)
        loss += part
    items.carry_back()
    return loss


def _over_streamed_catalogue(run: Run, data: DomainData, share: Share, seed: _Seeds) -> Tensor:
    """The loss over all items, whose vectors are computed block by block; every chunk is encoded twice, with the same dropout."""
    model, features, chunks = run.model, data.features, list(_chunks(run, data, share, seed))
    ids = torch.cat([chunk.ids for chunk in chunks]).unique()
    items = StepItems(ids, model.items(features, ids))
    with torch.no_grad():
        users = torch.cat([items.encode(model, chunk)[0] for chunk in chunks])
    targets, scale = (torch.cat(parts) for parts in zip(*((chunk.batch.targets, chunk.scale) for chunk in chunks), strict=True))
    blocks = features.blocks()
    if run.quirks.padding_class:
        blocks[0] = slice(0, blocks[0].stop)
    loss, d_users = streamed_cross_entropy(
        users, blocks, lambda block: model.items(features, block).candidates, targets, temperature=model.temperature, scale=scale
    )
    for chunk, gradient in zip(chunks, d_users.split([len(chunk.scale) for chunk in chunks]), strict=True):
        items.encode(model, chunk)[1](gradient)
    items.carry_back()
    return loss


def _over_candidates(run: Run, data: DomainData, plans: Sequence[Plan], shares: Sequence[Share], seed: _Seeds) -> Tensor:
    """The loss of each micro-batch over its own candidates: the targets of all workers' shares, and with `sampled` a sample of items.

    Each worker knows them from the plan and computes their vectors itself, so that any number of workers gives the gradient
    of one.
    """
    of_plans = [_candidates(run, data, plan, number) for number, plan in enumerate(plans)]
    chunks = [list(_chunks(run, data, share, seed)) for share in shares]
    needed = [torch.from_numpy(ids).to(run.device) for ids, _ in of_plans] + [chunk.ids for part in chunks for chunk in part]
    ids = torch.cat(needed).unique()
    items = StepItems(ids, run.model.items(data.features, ids))
    loss = items.catalogue.candidates.new_zeros(())
    for (_, log_weights), columns, part in zip(of_plans, needed, chunks, strict=False):
        rows = items.rows(columns)
        candidates = items.catalogue.candidates.detach()[rows]  # [n, D]
        gradient, weights = torch.zeros_like(candidates), torch.from_numpy(log_weights).to(candidates)
        for chunk in part:
            users, carry_back = items.encode(run.model, chunk)
            part_loss, d_users = cross_entropy(
                users,
                candidates,
                torch.searchsorted(columns, chunk.batch.targets),
                temperature=run.model.temperature,
                log_weights=weights,
                target_weighs_one=not (run.config.loss == "in_batch" and run.quirks.duplicate_negatives),
                scale=chunk.scale,
                gradient=gradient,
            )
            carry_back(d_users)
            loss += part_loss
        items.gradients.candidates.index_add_(0, rows, gradient)
    items.carry_back()
    return loss


def _candidates(run: Run, data: DomainData, plan: Plan, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Items [n], ascending, and their log_weights [n]: the targets of a micro-batch, or those and a sample of all items.

    An item is drawn with a probability that grows with how often it is a target, + 1, to the power `negative_power`.
    """
    targets = data.domain.items[data.domain.offsets[plan.users] + plan.ends].astype(np.int64)
    if run.config.loss == "in_batch":
        items, counts = np.unique(targets, return_counts=True)
        return items, in_batch_weights(counts)
    random = np.random.default_rng([run.seed, run.state.optimizer_steps, plan.domain, number])
    upper = np.cumsum((data.target_counts[1:] + 1.0) ** run.config.negative_power)  # [I]
    drawn = 1 + np.searchsorted(upper, random.random(run.config.negatives) * upper[-1], side="right")
    items, often = np.unique(np.concatenate([targets, drawn]), return_counts=True)
    often -= np.bincount(np.searchsorted(items, targets), minlength=len(items))
    return items, sampled_weights(often, np.diff(upper, prepend=0.0)[items - 1] / upper[-1])


def _share(plan: Plan, examples: int) -> Share:
    mine = slice(distributed.rank(), None, distributed.world_size())
    return Share(plan.users[mine], plan.ends[mine], np.full(len(plan.users[mine]), 1 / examples))


def _joined(shares: Sequence[Share]) -> Share:
    return Share(*(np.concatenate(parts) for parts in zip(*(vars(share).values() for share in shares), strict=True)))


def _chunks(run: Run, data: DomainData, share: Share, seed: _Seeds) -> Iterator[Chunk]:
    """The examples in their order, cut where about equally many positions have passed."""
    positions = np.cumsum(np.minimum(share.ends, data.max_len))
    if not len(positions):
        return
    parts = -(-positions[-1] // POSITIONS_AT_ONCE.get(run.device.type, POSITIONS_AT_ONCE["cpu"]))
    cuts = np.searchsorted(positions, positions[-1] / parts * np.arange(1, parts))
    for users, ends, scale in zip(*(np.split(part, cuts) for part in vars(share).values()), strict=True):
        if len(users):
            ids, batch = data.batch(users, ends).compact()
            yield Chunk(ids.to(run.device), batch.to(run.device), torch.from_numpy(scale).to(run.device), seed.next())


class _Seeds:
    """The seeds of an optimizer step's chunks: a function of (seed, optimizer step, worker), so that a resumed run draws the same."""

    def __init__(self, run: Run) -> None:
        self._of = np.random.SeedSequence([run.seed, run.state.optimizer_steps, distributed.rank()])

    def next(self) -> int:
        return int(self._of.spawn(1)[0].generate_state(1, np.uint64)[0])
