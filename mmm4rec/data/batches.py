"""Domain -> Batch: the only home of padding, truncation and time gaps.

Dimensions: B examples of a batch, W windows, Q positions of a window, T = max_len.

Histories are much shorter than max_len in the mean, so they are not padded to it: several are packed, whole, into each
window. What works position by position sees a dense array [W, Q]; what looks back (convolution, scan) stops at a
history's start, which `Packing` knows. Time signals mix all T positions of an example and stay [B, T]. How the histories
are packed changes no number but the order of dropout.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from mmm4rec.data.at_once import at_once
from mmm4rec.data.domain import Domain, Examples
from mmm4rec.data.features import ItemFeatures

POSITIONS_AT_ONCE = {"cpu": 2048, "cuda": 65_536}  # of histories that are encoded together
COUNTED_AT_ONCE = 2**22  # examples


@dataclass(frozen=True)
class Group:
    """Some of the histories of a batch, which are about as long."""

    examples: Tensor  # [b] int64
    longest: int  # positions, at most


@dataclass(frozen=True)
class Packing:
    """Where the histories of B examples stand in windows."""

    positions: Tensor  # [W, Q] int64: the place in its own history, from 0; -1 where no history stands
    examples: Tensor  # [W, Q] int64: whose history; 0 where none stands
    last: Tensor  # [B] int64: where each history ends, counted over all W * Q
    lengths: Tensor  # [B] int64, 1..T

    def stacked(self, copies: int) -> Packing:
        """The packing of `copies` arrays [W, Q, ...] put one behind the other, as of copies * B examples."""
        if copies == 1:
            return self
        steps = torch.arange(copies, device=self.last.device)
        examples = self.examples + (steps * len(self.last))[:, None, None]  # [copies, W, Q]
        last = self.last + (steps * self.positions.numel())[:, None]  # [copies, B]
        return Packing(self.positions.repeat(copies, 1), examples.flatten(0, 1), last.flatten(), self.lengths.repeat(copies))

    def spread(self, signal: Tensor) -> Tensor:
        """A signal [B, H, T] over an example's positions -> [W, Q, H], where the positions stand."""
        B, H, T = signal.shape
        places = self.examples * T + self.positions.clamp(min=0)  # [W, Q]
        return signal.transpose(1, 2).reshape(B * T, H)[places]

    def at_last(self, x: Tensor) -> Tensor:
        """x [W, Q, ...] -> [B, ...], at the end of each history."""
        return x.flatten(0, 1)[self.last]

    @property
    def to_end(self) -> Tensor:
        """How many positions follow in its own history, [W, Q]; where none stands it means nothing."""
        return self.lengths[self.examples] - 1 - self.positions

    def at_tokens(self, x: Tensor) -> Tensor:
        """x [B, ...] -> [W, Q, ...], an example's at all positions of its history."""
        return x[self.examples]

    def sum_up(self, x: Tensor) -> Tensor:
        """x [W, Q, ...] -> [B, ...], summed over each history; where none stands x is 0."""
        return x.new_zeros(len(self.last), *x.shape[2:]).index_add(0, self.examples.flatten(), x.flatten(0, 1))

    def padded(self, x: Tensor, group: Group | None = None) -> Tensor:
        """x [W, Q, ...] -> [B, Q, ...], each history from position 0 on and 0 behind its end; of a group alone [b, longest, ...]."""
        if group is None:
            group = Group(torch.arange(len(self.last), device=self.last.device), self.positions.shape[1])
        place = torch.arange(group.longest, device=self.last.device).expand(len(group.examples), -1)
        return self._at(x, group.examples, place)

    def padded_before(self, x: Tensor, length: int, examples: Tensor) -> Tensor:
        """x [W, Q, ...] -> [b, length, ...], the histories of these examples [b], each up to the end and 0 before its start."""
        place = torch.arange(length, device=self.last.device) - (length - self.lengths[examples])[:, None]
        return self._at(x, examples, place)

    def _at(self, x: Tensor, examples: Tensor, place: Tensor) -> Tensor:
        """x at these places [b, L] of the examples' histories, 0 where there is none: [b, L, ...]."""
        lengths, first = self.lengths[examples, None], (self.last - self.lengths + 1)[examples, None]
        exists = (place >= 0) & (place < lengths)
        found = x.flatten(0, 1)[(first + place).where(exists, 0)]
        return found * exists.view(*exists.shape, *[1] * (x.dim() - 2)).to(x.dtype)

    def groups(self) -> list[Group]:
        """Histories of 1, 2, 3-4, 5-8, ... positions apart, so that padding a group wastes little."""
        groups, low, Q = [], 0, self.positions.shape[1]
        while low < Q:
            high = min(max(1, 2 * low), Q)
            own = torch.nonzero((self.lengths > low) & (self.lengths <= high))[:, 0]
            groups += [Group(own, high)] if len(own) else []
            low = high
        return groups

    def recent(self, count: int) -> tuple[Tensor, Tensor]:
        """The ends of the histories: places [B, count] over all W * Q, latest first, and which of them exist [B, count]."""
        back = torch.arange(count, device=self.last.device)
        return (self.last[:, None] - back).clamp(min=0), back < self.lengths[:, None]


@dataclass(frozen=True)
class Batch:
    """Examples with their targets."""

    items: Tensor  # [W, Q] int64, 0 where no history stands
    packing: Packing
    gap_seconds: Tensor | None  # [B, T] float32: gap to the item before, 0 at the first item and where not timed
    timed: Tensor  # [B, T] bool: the position's gap may be read
    targets: Tensor  # [B] int64, the item that follows
    users: np.ndarray  # [B] int64
    ends: np.ndarray  # [B] int64, interactions before the target

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device) -> Batch:
        def move(part: Tensor) -> Tensor:
            return part.to(device, non_blocking=True)

        return replace(
            self,
            items=move(self.items),
            packing=Packing(*map(move, vars(self.packing).values())),
            gap_seconds=None if self.gap_seconds is None else move(self.gap_seconds),
            timed=move(self.timed),
            targets=move(self.targets),
        )

    def compact(self) -> tuple[Tensor, Batch]:
        """The ids in the histories, ascending, and the batch whose items are rows of that list in place of ids."""
        ids, rows = torch.unique(self.items, return_inverse=True)
        return ids, replace(self, items=rows)


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

    Without targets (a whole history has none) they are 0, and no view shows their time.
    """
    lengths = np.minimum(ends, max_len)
    offsets = domain.offsets[users]
    first = offsets + ends - lengths  # [B] row of the first input
    items, packing = pack(domain.items[ranges(first, lengths)], lengths)
    targets = domain.items[offsets + ends] if with_targets else np.zeros(len(users))
    gaps, timed = None, np.arange(max_len) < lengths[:, None]  # [B, T]
    if time and domain.timestamps is not None:
        view = view if with_targets else replace(view, label_time=False)
        stamped = np.arange(max_len) < lengths[:, None] + view.label_time  # [B, T]
        stamps = np.where(stamped, domain.timestamps[np.where(stamped, first[:, None] + np.arange(max_len), first[:, None])], 0)
        gaps, timed = view.gaps(stamps, lengths)
    return Batch(
        items=items,
        packing=packing,
        gap_seconds=None if gaps is None else torch.from_numpy(gaps.astype(np.float32)),
        timed=torch.from_numpy(timed),
        targets=torch.from_numpy(targets.astype(np.int64)),
        users=users,
        ends=ends,
    )


def pack(items: np.ndarray, lengths: np.ndarray) -> tuple[Tensor, Packing]:
    """Histories, one behind the other in `items`, with their lengths [B] >= 1 -> windows of items [W, Q] and their packing."""
    Q = int(lengths.max(initial=1))
    starts, W = fit_into_windows(lengths, Q)
    places = ranges(starts, lengths)  # [total] of W * Q
    windows, positions, examples = np.zeros(W * Q, dtype=np.int64), np.full(W * Q, -1), np.zeros(W * Q, dtype=np.int64)
    windows[places] = items
    positions[places] = places - np.repeat(starts, lengths)
    examples[places] = np.repeat(np.arange(len(lengths)), lengths)
    in_windows, where, whose = (torch.from_numpy(part.reshape(W, Q)) for part in (windows, positions, examples))
    return in_windows, Packing(where, whose, torch.from_numpy(starts + lengths - 1), torch.from_numpy(lengths.astype(np.int64)))


def fit_into_windows(lengths: np.ndarray, window: int) -> tuple[np.ndarray, int]:
    """Starts [B] of histories of these lengths in windows of `window` positions, counted over all windows; and their number.

    Every window takes the longest history that still fits until none does. Windows that come out alike are filled at once.
    """
    order = np.argsort(lengths, kind="stable")
    known, begins, counts = (part.tolist() for part in np.unique(lengths[order], return_index=True, return_counts=True))
    starts = np.empty(len(lengths), dtype=np.int64)
    windows = 0
    while known:
        content, room, k = [], window, len(known)  # content: (which length, how often, where it begins)
        while (k := min(k, bisect_right(known, room))) > 0:
            k -= 1
            often = min(counts[k], room // known[k])
            content.append((k, often, window - room))
            room -= often * known[k]
        alike = min(counts[k] // often for k, often, _ in content)
        for k, often, begin in content:
            chosen = order[begins[k] : begins[k] + alike * often]
            inside = begin + known[k] * np.arange(often)
            starts[chosen] = (window * np.arange(windows, windows + alike)[:, None] + inside).ravel()
            begins[k], counts[k] = begins[k] + alike * often, counts[k] - alike * often
        windows += alike
        left = [k for k, count in enumerate(counts) if count]
        known, begins, counts = ([part[k] for k in left] for part in (known, begins, counts))
    return starts, windows


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... of every range, one behind the other: [sum of lengths]."""
    return np.arange(lengths.sum()) + np.repeat(starts - np.cumsum(lengths) + lengths, lengths)


@dataclass(frozen=True)
class DomainData:
    """A domain as a run reads it."""

    domain: Domain
    features: ItemFeatures  # on the run's device
    train: Examples
    valid: Examples
    max_len: int  # T
    time: bool
    view: TimeView = TimeView()
    mask_seen: bool = False  # evaluation: items of the history before the target are no candidates

    @cached_property
    def target_counts(self) -> np.ndarray:
        """How often each item 0..I is a training target, [I + 1]."""
        counts = np.zeros(self.domain.n_items + 1, dtype=np.int64)
        for first in range(0, len(self.train), COUNTED_AT_ONCE):
            users, ends = self.train.at(np.arange(first, min(first + COUNTED_AT_ONCE, len(self.train))))
            counts += np.bincount(self.domain.items[self.domain.offsets[users] + ends], minlength=len(counts))
        return counts

    @property
    def fingerprint(self) -> str:
        """The domain's, and whether seen items are ranked: all that decides what a metric on this data means."""
        return self.domain.fingerprint + ("+mask_seen" if self.mask_seen else "")

    def batch(self, users: np.ndarray, ends: np.ndarray) -> Batch:
        """The examples (users[k], ends[k]) with their targets."""
        return make_batch(self.domain, users, ends, max_len=self.max_len, time=self.time, view=self.view)

    def mask(self, scores: Tensor, users: np.ndarray, ends: np.ndarray, first: int = 0) -> None:
        """With `mask_seen`, put -inf into scores [B, n] of the items from `first` on for the items of each history, all of it."""
        if self.mask_seen:
            rows = torch.from_numpy(np.repeat(np.arange(len(users)), ends))
            seen = torch.from_numpy(self.domain.items[ranges(self.domain.offsets[users], ends)].astype(np.int64)) - first
            here = (seen >= 0) & (seen < scores.shape[1])
            scores[rows[here], seen[here]] = -torch.inf

    def inputs(self, users: np.ndarray, ends: np.ndarray) -> Batch:
        """The examples without targets, so that `end` may be the length of the history."""
        return make_batch(self.domain, users, ends, max_len=self.max_len, time=self.time, view=self.view, with_targets=False)


def in_order(users: np.ndarray, ends: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Examples in blocks of batch_size, in their order."""
    for start in range(0, len(users), batch_size):
        yield users[start : start + batch_size], ends[start : start + batch_size]


def cut(lengths: np.ndarray, device: torch.device) -> list[slice]:
    """Ranges of examples with histories of these lengths that are encoded together: of about equally many positions."""
    if not len(lengths):
        return []
    positions = np.cumsum(lengths)
    parts = -(-int(positions[-1]) // at_once(POSITIONS_AT_ONCE, device.type))
    cuts = np.searchsorted(positions, positions[-1] / parts * np.arange(1, parts))
    bounds = np.unique([0, *cuts, len(lengths)]).tolist()
    return [slice(first, last) for first, last in pairwise(bounds)]
