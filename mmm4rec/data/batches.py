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
    gap_seconds: Tensor | None  # [b, T] float32: gap to the item before, 0 at the first item and where not timed
    timed: Tensor  # [b, T] bool: the position's gap may be read


@dataclass(frozen=True)
class Batch:
    """Examples with their targets, in the order of the groups."""

    groups: tuple[Group, ...]
    targets: Tensor  # [B] int64, the item that follows
    users: np.ndarray  # [B] int64
    ends: np.ndarray  # [B] int64, interactions before the target

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


@dataclass(frozen=True)
class TimeView:
    """Which timestamps the model sees: those of the items, and what the release adds (models/quirks.py)."""

    label_time: bool = False  # the target's, behind the last item
    zero_stamps: bool = False  # a stamp of 0 at every position of the padding

    def gaps(self, stamps: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gaps to the position before, and which of them may be read.

        Args: stamps [b, T] int64, laid out as the release does: the items' stamps, the target's at position
        `length` where there is room, then what stands in the padding; lengths [b].
        Returns: seconds [b, T] int64, 0 where nothing may be read, and timed [b, T] bool.
        """
        positions = np.arange(stamps.shape[1])  # [T]
        behind_last = positions == lengths[:, None]  # [b, T]
        if self.zero_stamps:
            timed = np.ones(stamps.shape, dtype=bool)
            stamps = stamps if self.label_time else np.where(behind_last, 0, stamps)
        else:
            timed = (positions < lengths[:, None]) | (behind_last & self.label_time)
        gaps = np.diff(stamps, axis=1, prepend=stamps[:, :1])
        return np.where(timed, gaps, 0), timed


def make_batch(
    domain: Domain,
    users: np.ndarray,
    ends: np.ndarray,
    *,
    max_len: int,
    time: bool,
    view: TimeView = TimeView(),
    with_targets: bool = True,
) -> Batch:
    """The batch of the examples (users[k], ends[k]): inputs are the last max_len items before `end`.

    Examples are put in the order of their length (ties keep their order). Without targets (a whole
    history has none) they are 0, and no view shows their time.
    """
    lengths = np.minimum(ends, max_len)
    order = np.argsort(lengths, kind="stable")
    users, ends, lengths = users[order], ends[order], lengths[order]
    targets = domain.items[domain.offsets[users] + ends] if with_targets else np.zeros(len(users))
    view = view if with_targets else replace(view, label_time=False)
    bounds = np.searchsorted(lengths, (0, *GROUP_LENGTHS, max_len), side="right")
    groups = tuple(
        _make_group(domain, users[low:high], ends[low:high], lengths[low:high], max_len=max_len, time=time, view=view)
        for low, high in pairwise(bounds)
        if high > low
    )
    return Batch(groups, torch.from_numpy(targets.astype(np.int64)), users, ends)


def _make_group(
    domain: Domain, users: np.ndarray, ends: np.ndarray, lengths: np.ndarray, *, max_len: int, time: bool, view: TimeView
) -> Group:
    positions = np.arange(max_len)  # [T]
    first = (domain.offsets[users] + ends - lengths)[:, None]  # [b, 1] row of the first input
    longest = int(lengths[-1])
    real = positions[:longest] < lengths[:, None]  # [b, L]
    items = np.where(real, domain.items[np.where(real, first + positions[:longest], first)], 0)  # [b, L]
    gaps, timed = None, positions < lengths[:, None]
    if time and domain.timestamps is not None:
        stamped = positions < lengths[:, None] + view.label_time  # [b, T]
        stamps = np.where(stamped, domain.timestamps[np.where(stamped, first + positions, first)], 0)
        gaps, timed = view.gaps(stamps, lengths)
    return Group(
        items=torch.from_numpy(items.astype(np.int64)),
        lengths=torch.from_numpy(lengths.astype(np.int64)),
        gap_seconds=None if gaps is None else torch.from_numpy(gaps.astype(np.float32)),
        timed=torch.from_numpy(timed),
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
    view: TimeView = TimeView()
    mask_seen: bool = False  # evaluation: items of the history before the target are no candidates

    @property
    def fingerprint(self) -> str:
        """The domain's, and whether seen items are ranked: all that decides what a metric on this data means."""
        return self.domain.fingerprint + ("+mask_seen" if self.mask_seen else "")

    def batch(self, users: np.ndarray, ends: np.ndarray) -> Batch:
        """The examples (users[k], ends[k]) with their targets."""
        return make_batch(self.domain, users, ends, max_len=self.max_len, time=self.time, view=self.view)

    def mask(self, scores: Tensor, batch: Batch) -> None:
        """With `mask_seen`, put -inf into scores [B, I + 1] for the items of each history: all of it, not the last max_len."""
        if self.mask_seen:
            rows = np.repeat(np.arange(len(batch)), batch.ends)
            within = np.arange(len(rows)) - np.repeat(np.cumsum(batch.ends) - batch.ends, batch.ends)
            seen = self.domain.items[self.domain.offsets[batch.users][rows] + within].astype(np.int64)
            scores[torch.from_numpy(rows), torch.from_numpy(seen)] = -torch.inf

    def inputs(self, users: np.ndarray, ends: np.ndarray) -> Batch:
        """The examples without targets, so that `end` may be the length of the history."""
        return make_batch(self.domain, users, ends, max_len=self.max_len, time=self.time, view=self.view, with_targets=False)


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
