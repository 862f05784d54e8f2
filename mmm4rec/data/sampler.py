"""Which examples each micro-batch holds: a function of (seed, epoch, number of the micro-batch) alone, equal on every worker.

Every domain's examples are an endless stream: pass after pass over all of them, each pass in another order. An epoch takes
the next stretch of each stream, so that no example comes twice within a pass or is left out, wherever a run is cut. Nothing
is listed: an order is a permutation that is computed number by number, and memory grows with no one's examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mmm4rec.data.domain import Examples

ROUNDS = 6  # of the Feistel network


@dataclass(frozen=True)
class Share:
    """A domain's examples in a micro-batch."""

    domain: int
    users: np.ndarray  # [b] int64
    ends: np.ndarray  # [b] int64


@dataclass(frozen=True)
class Plan:
    """The examples of a micro-batch, by domain."""

    shares: tuple[Share, ...]

    @classmethod
    def of_one(cls, domain: int, users: np.ndarray, ends: np.ndarray) -> Plan:
        return cls((Share(domain, users, ends),))

    def __len__(self) -> int:
        return sum(len(share.users) for share in self.shares)


@dataclass(frozen=True)
class Sampler:
    """The micro-batches of every epoch over some domains' examples."""

    domains: Sequence[Examples]
    batch_size: int
    seed: int
    power: float = 1.0  # a domain of n examples weighs n ** power, 1 / temperature: 1 is proportional, 0 uniform
    mixed: bool = False  # each micro-batch holds every domain's part of the epoch; else it is of one domain
    epoch_examples: int | None = None  # that an epoch draws; None: as many as there are

    @cached_property
    def taken(self) -> list[int]:
        """How many examples an epoch takes of each domain, at least 1."""
        sizes = np.array([len(examples) for examples in self.domains], dtype=np.float64)
        weights = sizes**self.power
        total = self.epoch_examples or sizes.sum()
        return [max(1, round(total * share)) for share in weights / weights.sum()]

    @property
    def shares(self) -> list[float]:
        """Each domain's share of the examples."""
        return [taken / sum(self.taken) for taken in self.taken]

    @cached_property
    def _counts(self) -> list[int]:
        """With micro-batches of one domain: how many of an epoch are of each."""
        return [-(-taken // self.batch_size) for taken in self.taken]

    def __len__(self) -> int:
        """Micro-batches an epoch."""
        return -(-sum(self.taken) // self.batch_size) if self.mixed else sum(self._counts)

    def plan(self, epoch: int, number: int) -> Plan:
        """Micro-batch `number`, from 0, of an epoch, from 1."""
        if self.mixed:
            places = [(domain, number * taken // len(self), (number + 1) * taken // len(self)) for domain, taken in enumerate(self.taken)]
            return Plan(tuple(self._share(epoch, *place) for place in places if place[1] < place[2]))
        place = int(permuted(np.array([number]), len(self), (self.seed, epoch))[0])
        domain = int(np.searchsorted(np.cumsum(self._counts), place, side="right"))
        first = (place - sum(self._counts[:domain])) * self.batch_size
        return Plan((self._share(epoch, domain, first, min(first + self.batch_size, self.taken[domain])),))

    def plans(self, epoch: int, first: int = 0) -> Iterator[Plan]:
        """An epoch's micro-batches from number `first` on."""
        return (self.plan(epoch, number) for number in range(first, len(self)))

    def _share(self, epoch: int, domain: int, first: int, stop: int) -> Share:
        """A stretch of what an epoch takes of a domain."""
        examples = self.domains[domain]
        passes, places = np.divmod((epoch - 1) * self.taken[domain] + np.arange(first, stop), len(examples))
        numbers = np.concatenate(
            [permuted(places[passes == one], len(examples), (self.seed, domain, int(one))) for one in np.unique(passes)]
        )
        return Share(domain, *examples.at(numbers))


def permuted(numbers: np.ndarray, size: int, key: Sequence[int]) -> np.ndarray:
    """Where numbers in 0..size - 1 go in the permutation that `key` names: a Feistel network over the next power of 4.

    What falls outside is sent through again until it is inside (cycle walking), which leaves a permutation.
    """
    half = np.uint64(max(1, (int(size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)
    result, outside = numbers.astype(np.uint64), np.arange(len(numbers))
    while len(outside):
        left, right = result[outside] >> half, result[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_mixed(right + round_key) & mask)
        result[outside] = (left << half) | right
        outside = outside[result[outside] >= size]
    return result.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """A hash of 64 bits: the finalizer of splitmix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
