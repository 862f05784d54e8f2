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
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mmm4rec.data.batches import Batch, DomainData, Plan, cut
from mmm4rec.data.features import ItemFeatures
from mmm4rec.models.recommender import Catalogue, Recommender, items_in_blocks, joined
from mmm4rec.training import distributed
from mmm4rec.training.losses import cross_entropy, in_batch_weights, sampled_weights, scores_workspace, streamed_cross_entropy

if TYPE_CHECKING:
    from mmm4rec.training.loop import Run


@dataclass(frozen=True)
class Chunk:
    """Examples that are encoded together."""

    ids: Tensor  # [u] the items of the histories, ascending
    batch: Batch  # its items are rows of `ids`
    scale: Tensor  # [B] what each example's gradient is multiplied with
    seed: int  # of its dropout


@dataclass(frozen=True)
class Part:
    """Examples of one domain, in chunks, whose loss is over the same candidates."""

    domain: int
    chunks: list[Chunk]
    candidates: tuple[Tensor, Tensor] | None  # [n] items, ascending, and their log_weights [n]; None: all items, alike


class StepItems:
    """Item vectors that the chunks of a step read, computed a block at a time, and the sum of their gradients."""

    def __init__(self, model: Recommender, features: ItemFeatures, ids: Tensor | None = None) -> None:
        """ids [n]: the items, ascending; None: all, 0..I."""
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
        users = model.users(chunk.batch, Catalogue(copies, self.vectors.candidates))

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

    Over all items, the micro-batches of a domain are one part. With the quirk `summed_accumulation` an example weighs as in
    the sum of the micro-batches' means.
    """
    seeds = np.random.SeedSequence([run.seed, optimizer_step, distributed.rank()])
    examples = sum(len(plan.users) for plan in plans)
    mine = slice(distributed.rank(), None, distributed.world_size())
    parts: list[Part] = []
    for number, (domain, together) in enumerate(_together(plans, run.config.loss)):
        users, ends = (np.concatenate([getattr(plan, name)[mine] for plan in together]) for name in ("users", "ends"))
        weigh = [1 / (len(plan.users) if run.quirks.summed_accumulation else examples) for plan in together]
        scale = np.repeat(weigh, [len(plan.users[mine]) for plan in together])
        chunks = [
            _chunk(run, run.data[domain], users[block], ends[block], scale[block], seeds.spawn(1)[0])
            for block in cut(np.minimum(ends, run.data[domain].max_len), run.device)
        ]
        if chunks:
            candidates = None if run.config.loss == "full" else _candidates(run, together[0], optimizer_step, number)
            parts.append(Part(domain, chunks, candidates))
    return parts


def _together(plans: Sequence[Plan], loss: str) -> Iterator[tuple[int, list[Plan]]]:
    """The domains with the micro-batches whose losses have the same candidates."""
    by_domain = groupby(sorted(plans, key=attrgetter("domain")), key=attrgetter("domain"))
    for domain, own in by_domain:
        for together in [list(own)] if loss == "full" else ([plan] for plan in own):
            yield domain, together


def _chunk(run: Run, data: DomainData, users: np.ndarray, ends: np.ndarray, scale: np.ndarray, seed: np.random.SeedSequence) -> Chunk:
    ids, batch = data.batch(users, ends).compact()
    dropout_seed = int(seed.generate_state(1, np.uint64)[0])
    return Chunk(ids.to(run.device), batch.to(run.device), torch.from_numpy(scale).to(run.device), dropout_seed)


def _candidates(run: Run, plan: Plan, optimizer_step: int, number: int) -> tuple[Tensor, Tensor]:
    """Items [n], ascending, and their log_weights [n]: the targets of a micro-batch, or those and a sample of all items.

    The targets are those of all workers' shares: each worker computes their vectors itself, so that any number of workers
    gives the gradient of one. An item is drawn with a probability that grows with how often it is a target, + 1, to the
    power `negative_power`.
    """
    data = run.data[plan.domain]
    targets = data.domain.items[data.domain.offsets[plan.users] + plan.ends].astype(np.int64)
    items, counts = np.unique(targets, return_counts=True)
    log_weights = in_batch_weights(counts)
    if run.config.loss == "sampled":
        random = np.random.default_rng([run.seed, optimizer_step, plan.domain, number])
        upper = np.cumsum((data.target_counts[1:] + 1.0) ** run.config.negative_power)  # [I]
        drawn = 1 + np.searchsorted(upper, random.random(run.config.negatives) * upper[-1], side="right")
        items = np.union1d(items, drawn)
        often = np.bincount(np.searchsorted(items, drawn), minlength=len(items))
        log_weights = sampled_weights(often, np.diff(upper, prepend=0.0)[items - 1] / upper[-1])
    return torch.from_numpy(items).to(run.device), torch.from_numpy(log_weights).to(run.device)


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


def add_gradient(run: Run, parts: Sequence[Part]) -> float:
    """Add the gradient of the mean loss over a step's examples, this worker's part of it, to the parameters' gradients.

    Returns the loss summed over this worker's examples.
    """
    loss = torch.zeros((), dtype=torch.float64, device=run.device)
    for domain, own in groupby(parts, key=attrgetter("domain")):
        data = run.data[domain]
        if run.config.loss != "full":
            loss += _over_candidates(run, data, list(own))
        elif data.features.one_block:
            loss += _over_catalogue(run, data, next(own))
        else:
            loss += _over_streamed_catalogue(run, data, next(own))
    return float(loss)


def _over_catalogue(run: Run, data: DomainData, part: Part) -> Tensor:
    """The loss over all items, whose vectors are computed at once."""
    items, first = StepItems(run.model, data.features), 0 if run.quirks.padding_class else 1
    candidates, gradient = items.vectors.candidates[first:], items.gradients.candidates[first:]
    loss, workspace = candidates.new_zeros(()), scores_workspace(candidates)
    for chunk in part.chunks:
        loss += _through(run, items, chunk, candidates, chunk.batch.targets - first, gradient=gradient, workspace=workspace)
    items.carry_back()
    return loss


def _over_candidates(run: Run, data: DomainData, parts: Sequence[Part]) -> Tensor:
    """The loss of each part over its own candidates."""
    of_parts = [part.candidates for part in parts if part.candidates is not None]
    ids = torch.cat([columns for columns, _ in of_parts] + [chunk.ids for part in parts for chunk in part.chunks]).unique()
    items = StepItems(run.model, data.features, ids)
    loss, workspace = items.vectors.candidates.new_zeros(()), scores_workspace(items.vectors.candidates)
    for (columns, log_weights), part in zip(of_parts, parts, strict=True):
        rows = items.rows(columns)
        candidates = items.vectors.candidates[rows]  # [n, D]
        gradient = torch.zeros_like(candidates)
        for chunk in part.chunks:
            loss += _through(
                run,
                items,
                chunk,
                candidates,
                torch.searchsorted(columns, chunk.batch.targets),
                log_weights=log_weights.to(candidates.dtype),
                target_weighs_one=not (run.config.loss == "in_batch" and run.quirks.duplicate_negatives),
                gradient=gradient,
                workspace=workspace,
            )
        items.gradients.candidates.index_add_(0, rows, gradient)
    items.carry_back()
    return loss


def _through(run: Run, items: StepItems, chunk: Chunk, candidates: Tensor, targets: Tensor, **told: Any) -> Tensor:
    """Encode a chunk, take its loss, carry its gradient back; returns the loss."""
    users, carry_back = items.encode(run.model, chunk)
    loss, d_users = cross_entropy(users, candidates, targets, temperature=run.model.temperature, scale=chunk.scale, **told)
    carry_back(d_users)
    return loss


def _over_streamed_catalogue(run: Run, data: DomainData, part: Part) -> Tensor:
    """The loss over all items, whose vectors are computed block by block; every chunk is encoded twice, with the same dropout."""
    model, features, chunks = run.model, data.features, part.chunks
    ids = torch.cat([chunk.ids for chunk in chunks]).unique()
    items = StepItems(model, features, ids)
    with torch.no_grad():
        users = torch.cat([items.encode(model, chunk)[0] for chunk in chunks])
    targets, scale = torch.cat([chunk.batch.targets for chunk in chunks]), torch.cat([chunk.scale for chunk in chunks])
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
