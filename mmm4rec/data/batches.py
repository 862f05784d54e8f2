"""Domain -> Batch: the only home of padding, truncation and time gaps.

Dimensions: B examples of a batch, b examples of a group, L positions of a group, T = max_len.

The item path of the model is causal and right-padded, so positions after an example's last item need
not exist: a batch is sorted by length and cut into groups that are only as long as they must be. The
time signals mix positions and keep all T columns. Grouping changes no number but the order of dropout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from mmm4rec.data.domain import Domain
from mmm4rec.data.features import ItemFeatures

GROUP_LENGTHS = (1, 2, 3, 5, 8, 12, 20, 32, 50, 80, 128, 200, 320, 512)


@dataclass(frozen=True)
class Group:
    """Examples of similar length."""

    items: Tensor  # [b, L] int64, right-padded with 0
    lengths: Tensor  # [b] int64, 1..L
    gap_seconds: Tensor | None  # [b, T] float32: gap to the item before, 0 at the first item and in the padding
    real: Tensor  # [b, T] bool: the position holds an item


@dataclass(frozen=True)
class Batch:
    """Examples with their targets, in the order of the groups."""

    groups: tuple[Group, ...]
    targets: Tensor  # [B] int64, the item that follows
    users: np.ndarray  # [B] int64

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device) -> Batch:
        groups = tuple(
            Group(*(None if part is None else part.to(device, non_blocking=True) for part in vars(group).values()))  # type: ignore[arg-type]
            for group in self.groups
        )
        return replace(self, groups=groups, targets=self.targets.to(device, non_blocking=True))

    def compact(self) -> tuple[Tensor, Batch]:
        """The item ids that the batch holds, ascending, and the batch with rows of that list in place of ids."""
        parts = [group.items.flatten() for group in self.groups]
        ids, rows = torch.unique(torch.cat([*parts, self.targets]), return_inverse=True)
        *group_rows, targets = rows.split([*(len(part) for part in parts), len(self)])
        groups = tuple(replace(group, items=row.view_as(group.items)) for group, row in zip(self.groups, group_rows, strict=True))
        return ids, replace(self, groups=groups, targets=targets)


def make_batch(domain: Domain, users: np.ndarray, ends: np.ndarray, *, max_len: int, time: bool, with_targets: bool = True) -> Batch:
    """The batch of the examples (users[k], ends[k]): inputs are the last max_len items before `end`.

    Examples are put in the order of their length (ties keep their order). Without targets (a whole
    history has none) they are 0.
    """
    lengths = np.minimum(ends, max_len)
    order = np.argsort(lengths, kind="stable")
    users, ends, lengths = users[order], ends[order], lengths[order]
    targets = domain.items[domain.offsets[users] + ends] if with_targets else np.zeros(len(users))
    bounds = np.searchsorted(lengths, (0, *GROUP_LENGTHS, max_len), side="right")
    groups = tuple(
        _make_group(domain, users[low:high], ends[low:high], lengths[low:high], max_len=max_len, time=time)
        for low, high in pairwise(bounds)
        if high > low
    )
    return Batch(groups, torch.from_numpy(targets.astype(np.int64)), users)


def _make_group(domain: Domain, users: np.ndarray, ends: np.ndarray, lengths: np.ndarray, *, max_len: int, time: bool) -> Group:
    positions = np.arange(max_len)  # [T]
    real = positions < lengths[:, None]  # [b, T]
    first = domain.offsets[users] + ends - lengths  # [b] row of the first input
    rows = np.where(real, first[:, None] + positions, first[:, None])  # [b, T]
    longest = int(lengths[-1])
    items = np.where(real[:, :longest], domain.items[rows[:, :longest]], 0)  # [b, L]
    gaps = None
    if time and domain.timestamps is not None:
        stamps = domain.timestamps[rows]  # [b, T]
        gaps = np.zeros(stamps.shape, dtype=np.float32)
        gaps[:, 1:] = np.where(real[:, 1:], np.diff(stamps, axis=1), 0)
    return Group(
        items=torch.from_numpy(items.astype(np.int64)),
        lengths=torch.from_numpy(lengths.astype(np.int64)),
        gap_seconds=None if gaps is None else torch.from_numpy(gaps),
        real=torch.from_numpy(real),
    )


@dataclass(frozen=True)
class DomainData:
    """A domain as a run reads it."""

    domain: Domain
    features: ItemFeatures  # on the run's device
    train: tuple[np.ndarray, np.ndarray]  # (users, ends)
    valid: tuple[np.ndarray, np.ndarray]
    max_len: int  # T
    time: bool

    def batch(self, users: np.ndarray, ends: np.ndarray) -> Batch:
        """The examples (users[k], ends[k]) with their targets."""
        return make_batch(self.domain, users, ends, max_len=self.max_len, time=self.time)

    def inputs(self, users: np.ndarray, ends: np.ndarray) -> Batch:
        """The examples without targets, so that `end` may be the length of the history."""
        return make_batch(self.domain, users, ends, max_len=self.max_len, time=self.time, with_targets=False)


@dataclass(frozen=True)
class Plan:
    """The micro-batches of an epoch: which domain, which of its examples. Equal on every worker."""

    domain: int
    users: np.ndarray
    ends: np.ndarray


def plan_epoch(examples: Sequence[tuple[np.ndarray, np.ndarray]], batch_size: int, *, seed: int, epoch: int) -> list[Plan]:
    """Each domain's examples shuffled and cut into batches of one domain each, the batches then shuffled.

    The order is a function of (seed, epoch) alone, so that a resumed run meets the same batches.
    """
    random = np.random.default_rng([seed, epoch])
    plans = []
    for domain, (users, ends) in enumerate(examples):
        order = random.permutation(len(users))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            plans.append(Plan(domain, users[chosen], ends[chosen]))
    return [plans[i] for i in random.permutation(len(plans))] if len(examples) > 1 else plans


def in_order(users: np.ndarray, ends: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Examples in blocks of batch_size, in their order."""
    for start in range(0, len(users), batch_size):
        yield users[start : start + batch_size], ends[start : start + batch_size]
