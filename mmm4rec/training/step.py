"""The gradient of one optimizer step, whatever the loss, as fast and as small as it comes.

Dimensions: B examples of a chunk, n candidates, I items, D width.

Accumulated micro-batches are one sum over examples, so three things are free to choose, and chosen here:
- Histories are encoded in chunks of about as many positions (`cut`), however the micro-batches cut them.
- Item vectors are computed once a step: the chunks read copies, whose gradients are summed and carried back together.
- The scores never exist as a whole (losses.py). A catalogue of more than one block is never whole either: then the users
  are encoded first, the loss goes over the blocks, and every chunk is encoded again to carry its gradient back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mmm4rec.data.batches import Batch, DomainData, cut
from mmm4rec.data.features import ItemFeatures
from mmm4rec.data.sampler import Plan, Share
from mmm4rec.models.recommender import Catalogue, Recommender, full_precision, items_in_blocks, joined
from mmm4rec.training import distributed
from mmm4rec.training.losses import (
    cross_entropy,
    gbce,
    gbce_beta,
    in_batch_weights,
    sampled_weights,
    scores_workspace,
    streamed_cross_entropy,
)

if TYPE_CHECKING:
    from mmm4rec.training.loop import Run


ITEM_NOISE = 2**32 - 1  # sets items' seeds apart from those of dropout in the encoder


@dataclass(frozen=True)
class Chunk:
    """Examples of one domain that are encoded together."""

    domain: int
    ids: Tensor  # [u] the items of the histories, ascending
    batch: Batch  # its items are rows of `ids`
    scale: Tensor  # [B] what each example's gradient is multiplied with
    seed: int  # of its dropout


@dataclass(frozen=True)
class Candidates:
    """What the examples of a micro-batch are scored against."""

    items: dict[int, Tensor]  # by domain: [n_d] items, ascending
    weights: Tensor  # [n], of all of them, domain by domain: logarithms, or with `gbce` how often each was drawn


@dataclass(frozen=True)
class Part:
    """Examples, in chunks, whose loss is over the same candidates."""

    chunks: list[Chunk]
    candidates: Candidates | None  # None: all items of their domain, alike


class StepItems:
    """Item vectors that the chunks of a step read, computed a block at a time, and the sum of their gradients."""

    def __init__(self, model: Recommender, features: ItemFeatures, seed: int, ids: Tensor | None = None) -> None:
        """Args: seed: of what is random in the items' vectors; ids [n]: the items, ascending; None: all, 0..I."""
        torch.manual_seed(seed)
        self.ids, self._blocks = ids, items_in_blocks(model, features, ids)  # with their graphs
        self.vectors = joined(self._blocks)
        inputs = {name: torch.zeros_like(vectors) for name, vectors in self.vectors.inputs.items()}
        self.gradients = Catalogue(inputs, torch.zeros_like(self.vectors.candidates))

    def rows(self, ids: Tensor) -> Tensor:
        return ids if self.ids is None else torch.searchsorted(self.ids, ids)

    def encode(self, model: Recommender, chunk: Chunk) -> tuple[Tensor, Callable[[Tensor], None]]:
        """The users [B, D] of a chunk, and what carries their gradient back to the parameters and to these vectors."""
        rows = self.rows(chunk.ids)
        copies = {name: vectors[rows].requires_grad_() for name, vectors in self.vectors.inputs.items()}
        torch.manual_seed(chunk.seed)
        users = full_precision(model.users(chunk.batch, Catalogue(copies, self.vectors.candidates)))

        def carry_back(d_users: Tensor) -> None:
            users.backward(d_users)
            for name, copy in copies.items():
                if copy.grad is not None:
                    self.gradients.inputs[name].index_add_(0, rows, copy.grad)

        return users.detach(), carry_back

    def carry_back(self) -> None:
        """Carry the gradients that have come together on to the parameters."""
        first = 0
        for block in self._blocks:
            rows = slice(first, first := first + len(block.candidates))
            pairs = [(block.candidates, self.gradients.candidates[rows])]
            pairs += [(vectors, self.gradients.inputs[name][rows]) for name, vectors in block.inputs.items()]
            learned = [pair for pair in pairs if pair[0].requires_grad]
            torch.autograd.backward([vectors for vectors, _ in learned], [gradient for _, gradient in learned])


def prepare(run: Run, plans: Sequence[Plan], optimizer_step: int) -> list[Part]:
    """What this worker reads in an optimizer step over these micro-batches: all that needs no weights, on the run's device.

    Over all items, a domain's examples are one part. With the quirk `summed_accumulation` an example weighs as in the sum of
    the micro-batches' means.
    """
    seeds = np.random.SeedSequence([run.seed, optimizer_step, distributed.rank()])
    total = sum(map(len, plans))
    weights = [1 / (len(plan) if run.quirks.summed_accumulation else total) for plan in plans]

    def chunks(shares: Sequence[tuple[Share, float]]) -> list[Chunk]:
        """Of one domain, with what an example of each weighs."""
        if not shares:
            return []
        users, ends = (np.concatenate([getattr(share, name) for share, _ in shares]) for name in ("users", "ends"))
        scale, domain = np.repeat([weight for _, weight in shares], [len(share.users) for share, _ in shares]), shares[0][0].domain
        blocks = cut(np.minimum(ends, run.data[domain].max_len), run.device)
        return [_chunk(run, domain, users[block], ends[block], scale[block], seeds.spawn(1)[0]) for block in blocks]

    mine = [[(_mine(share), weight) for share in plan.shares] for plan, weight in zip(plans, weights, strict=True)]
    if run.config.loss == "full":
        of_domains = [[pair for own in mine for pair in own if pair[0].domain == domain] for domain in range(len(run.data))]
        return [Part(own, None) for own in map(chunks, of_domains) if own]
    parts = []
    for number, (plan, own) in enumerate(zip(plans, mine, strict=True)):
        if together := [chunk for pair in own for chunk in chunks([pair])]:
            shares = [share for share, _ in own if len(share.users)] if run.config.loss == "in_batch_local" else plan.shares
            parts.append(Part(together, _candidates(run, shares, np.random.default_rng([run.seed, optimizer_step, number]))))
    return parts


def _mine(share: Share) -> Share:
    """This worker's examples of a share, which all workers see whole; of many small shares each worker is first in some."""
    workers = distributed.world_size()
    own = slice((distributed.rank() + share.domain) % workers, None, workers)
    return Share(share.domain, share.users[own], share.ends[own])


def _chunk(run: Run, domain: int, users: np.ndarray, ends: np.ndarray, scale: np.ndarray, seed: np.random.SeedSequence) -> Chunk:
    ids, batch = run.data[domain].batch(users, ends).compact()
    dropout_seed = int(seed.generate_state(1, np.uint64)[0])
    return Chunk(domain, ids.to(run.device), batch.to(run.device), torch.from_numpy(scale).to(run.device), dropout_seed)


def _candidates(run: Run, shares: Sequence[Share], random: np.random.Generator) -> Candidates:
    """The targets of these examples, or those and a sample of all items.

    Where the shares are those of all workers, each worker computes the vectors of all candidates itself, rather than gather
    them: an item's vector is a few small products, its gradient then needs no way back, and any number of workers gives the
    gradient of one (where nothing in the vectors is random). With `logq` a target counts for less the more often it is one in
    the whole of the data. A sampled item is drawn with a probability that grows with how often it is a target, + 1, to the
    power `negative_power`.
    """
    items, all_weights = {}, []
    for share in shares:
        data, config = run.data[share.domain], run.config
        targets = data.domain.items[data.domain.offsets[share.users] + share.ends].astype(np.int64)
        own, counts = np.unique(targets, return_counts=True)
        weights = in_batch_weights(counts)
        if config.loss in ("sampled", "gbce"):
            upper = np.cumsum((data.target_counts[1:] + 1.0) ** config.negative_power)  # [I]
            drawn = 1 + np.searchsorted(upper, random.random(config.negatives) * upper[-1], side="right")
            own = np.union1d(own, drawn)
            often = np.bincount(np.searchsorted(own, drawn), minlength=len(own))
            chances = np.diff(upper, prepend=0.0)[own - 1] / upper[-1]
            weights = often.astype(np.float64) if config.loss == "gbce" else sampled_weights(often, chances)
        elif config.logq:
            weights = sampled_weights(counts, data.target_counts[own] / len(data.train))
        items[share.domain] = torch.from_numpy(own).to(run.device)
        all_weights.append(weights)
    return Candidates(items, torch.from_numpy(np.concatenate(all_weights)).to(run.device))


def ahead(prepared: Iterator[list[Part]], device: torch.device) -> Iterator[list[Part]]:
    """The same; while a GPU works on one, a thread makes the next."""
    if device.type == "cpu":
        yield from prepared
        return
    with ThreadPoolExecutor(max_workers=1) as loader:
        coming = loader.submit(next, prepared, None)
        while (parts := coming.result()) is not None:
            coming = loader.submit(next, prepared, None)
            yield parts


def add_gradient(run: Run, parts: Sequence[Part]) -> list[tuple[Chunk, float]]:
    """Add the gradient of the mean loss over a step's examples, this worker's part of it, to the parameters' gradients.

    Returns each chunk with the loss summed over its examples.
    """
    if run.config.loss != "full":
        losses = _over_candidates(run, parts)
    else:
        losses = []
        for part in parts:
            data = run.data[part.chunks[0].domain]
            losses += (_over_catalogue if data.features.one_block else _over_streamed_catalogue)(run, data, part)
    if not losses:
        return []
    values = torch.stack([loss.double() for _, loss in losses]).tolist()  # a GPU is waited for once
    return [(chunk, value) for (chunk, _), value in zip(losses, values, strict=True)]


def _item_seed(run: Run, domain: int) -> int:
    """Of what is random in a domain's item vectors (dropout, noisy gates), drawn once a step for all of them, another in every step.

    Workers that read other items draw otherwise: with such a model more workers are another sample of the same noise.
    """
    return int(np.random.SeedSequence([run.seed, run.state.optimizer_steps, domain, ITEM_NOISE]).generate_state(1)[0])


ChunkLosses = list[tuple[Chunk, Tensor]]


def _over_catalogue(run: Run, data: DomainData, part: Part) -> ChunkLosses:
    """The loss over all items, whose vectors are computed at once."""
    items, first = StepItems(run.model, data.features, _item_seed(run, part.chunks[0].domain)), 0 if run.quirks.padding_class else 1
    candidates, gradient = items.vectors.candidates[first:], items.gradients.candidates[first:]
    workspace = scores_workspace(candidates)
    losses = [
        (chunk, _through(run, items, chunk, candidates, chunk.batch.targets - first, gradient=gradient, workspace=workspace))
        for chunk in part.chunks
    ]
    items.carry_back()
    return losses


def _over_candidates(run: Run, parts: Sequence[Part]) -> ChunkLosses:
    """The loss of each part over its own candidates, of whatever domains."""
    read: dict[int, list[Tensor]] = {}
    for part in parts:
        assert part.candidates is not None
        for domain, ids in [*part.candidates.items.items(), *((chunk.domain, chunk.ids) for chunk in part.chunks)]:
            read.setdefault(domain, []).append(ids)
    items = {
        domain: StepItems(run.model, run.data[domain].features, _item_seed(run, domain), torch.cat(ids).unique())
        for domain, ids in read.items()
    }
    losses: ChunkLosses = []
    workspace = scores_workspace(next(iter(items.values())).vectors.candidates) if items else torch.empty(0)
    for part in parts:
        assert part.candidates is not None
        columns = part.candidates.items
        rows = {domain: items[domain].rows(ids) for domain, ids in columns.items()}
        candidates = torch.cat([items[domain].vectors.candidates[own] for domain, own in rows.items()])  # [n, D]
        firsts = dict(zip(columns, [0, *accumulate(map(len, columns.values()))], strict=False))
        gradient = torch.zeros_like(candidates)
        weighing = _weighing(run, part.candidates, candidates)
        for chunk in part.chunks:
            targets = firsts[chunk.domain] + torch.searchsorted(columns[chunk.domain], chunk.batch.targets)
            loss = _through(run, items[chunk.domain], chunk, candidates, targets, gradient=gradient, workspace=workspace, **weighing)
            losses.append((chunk, loss))
        for (domain, own), part_of in zip(rows.items(), gradient.split([len(own) for own in rows.values()]), strict=True):
            items[domain].gradients.candidates.index_add_(0, own, part_of)
    for of_domain in items.values():
        of_domain.carry_back()
    return losses


def _weighing(run: Run, of_part: Candidates, candidates: Tensor) -> dict[str, Any]:
    """What the loss is told of its candidates."""
    weights = of_part.weights.to(candidates.dtype)
    if run.config.loss == "gbce":
        items = sum(run.data[domain].domain.n_items for domain in of_part.items)
        return {"draws": weights, "beta": gbce_beta(run.config.negatives * len(of_part.items), items, run.config.calibration)}
    duplicates = run.config.loss.startswith("in_batch") and run.quirks.duplicate_negatives
    return {"log_weights": weights, "target_weighs_one": not duplicates}


def _through(run: Run, items: StepItems, chunk: Chunk, candidates: Tensor, targets: Tensor, **told: Any) -> Tensor:
    """Encode a chunk, take its loss, carry its gradient back; returns the loss."""
    users, carry_back = items.encode(run.model, chunk)
    function = gbce if run.config.loss == "gbce" else cross_entropy
    loss, d_users = function(users, candidates, targets, temperature=run.model.temperature, scale=chunk.scale, **told)
    carry_back(d_users)
    return loss


def _over_streamed_catalogue(run: Run, data: DomainData, part: Part) -> ChunkLosses:
    """The loss over all items, whose vectors are computed block by block; every chunk is encoded twice, with the same dropout."""
    model, features, chunks = run.model, data.features, part.chunks
    ids = torch.cat([chunk.ids for chunk in chunks]).unique()
    domain = chunks[0].domain
    items = StepItems(model, features, _item_seed(run, domain), ids)
    with torch.no_grad():
        users = torch.cat([items.encode(model, chunk)[0] for chunk in chunks])
    targets, scale = torch.cat([chunk.batch.targets for chunk in chunks]), torch.cat([chunk.scale for chunk in chunks])
    blocks = features.blocks()
    if run.quirks.padding_class:
        blocks[0] = slice(0, blocks[0].stop)

    def candidates(block: slice) -> Tensor:
        torch.manual_seed(_item_seed(run, domain) + block.start)  # both times the same
        return full_precision(model.items(features, block).candidates)

    losses, d_users = streamed_cross_entropy(users, blocks, candidates, targets, temperature=model.temperature, scale=scale)
    sizes = [len(chunk.scale) for chunk in chunks]
    for chunk, gradient in zip(chunks, d_users.split(sizes), strict=True):
        items.encode(model, chunk)[1](gradient)
    items.carry_back()
    return [(chunk, loss.sum()) for chunk, loss in zip(chunks, losses.split(sizes), strict=True)]
