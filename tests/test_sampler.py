"""Facts about the sampler: every example once a pass, shares by power, the same micro-batches whoever asks and from wherever."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from mmm4rec.data.domain import Domain, Examples
from mmm4rec.data.sampler import Plan, Sampler, permuted


def many(users: int, each: int = 1) -> Examples:
    return Examples(np.arange(users), np.ones(users, dtype=np.int64), np.arange(1, users + 1) * each)


def pairs(plans: list[Plan], domain: int) -> list[tuple[int, int]]:
    shares = [share for plan in plans for share in plan.shares if share.domain == domain]
    return [(int(u), int(e)) for share in shares for u, e in zip(share.users, share.ends, strict=True)]


def test_examples_are_numbered_user_by_user(make_domain: Callable[..., Domain]) -> None:
    domain = make_domain()
    for split in ("train", "valid", "test", "all"):
        expected = [
            (user, end)
            for user, length in enumerate(np.diff(domain.offsets))
            for end in {"train": range(1, length - 2), "valid": [length - 2], "test": [length - 1], "all": range(1, length)}[split]
        ]
        users, ends = domain.examples(split)  # type: ignore[arg-type]
        assert list(zip(users, ends, strict=True)) == expected
        numbers = np.array([3, 0, len(expected) - 1, 3])
        assert list(zip(*domain.examples(split).at(numbers), strict=True)) == [expected[number] for number in numbers]  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 100, 4097])
def test_a_permutation_meets_every_number_once(size: int) -> None:
    assert sorted(permuted(np.arange(size), size, (1, 2))) == list(range(size))


def test_permutations_favour_no_place() -> None:
    """Chi-square of where 20 numbers go under 20,000 keys: 361 degrees of freedom, a standard deviation of 27."""
    counts = np.zeros((20, 20))
    for key in range(20_000):
        counts[np.arange(20), permuted(np.arange(20), 20, (key,))] += 1
    assert ((counts - 1000) ** 2 / 1000).sum() < 361 + 5 * 27
    large = permuted(np.arange(50_000), 50_000, (7,))
    assert abs(np.corrcoef(large[:-1], large[1:])[0, 1]) < 0.02


@pytest.mark.parametrize("mixed", [False, True])
def test_an_epoch_meets_each_example_once_and_the_next_one_in_another_order(make_domain: Callable[..., Domain], mixed: bool) -> None:
    examples = [make_domain("a").examples("train"), make_domain("b", users=20, seed=1).examples("train")]
    sampler = Sampler(examples, 32, seed=3, mixed=mixed)
    for domain, part in enumerate(examples):
        orders = [pairs(list(sampler.plans(epoch)), domain) for epoch in (1, 2)]
        assert sorted(orders[0]) == sorted(orders[1]) == sorted(zip(*part, strict=True))
        assert orders[0] != orders[1]
    for plan in sampler.plans(1):
        assert len(plan) <= 32
        assert len(plan.shares) == (2 if mixed else 1)


def test_a_cut_epoch_goes_on_where_it_was(make_domain: Callable[..., Domain]) -> None:
    sampler = Sampler([make_domain().examples("all")], 10, seed=0)
    whole, rest = pairs(list(sampler.plans(2)), 0), pairs(list(sampler.plans(2, first=7)), 0)
    assert whole[70:] == rest


@pytest.mark.parametrize(("power", "expected"), [(1.0, [900, 90, 10]), (0.0, [333, 333, 333]), (0.5, [703, 222, 74])])
def test_shares_follow_the_power(power: float, expected: list[int]) -> None:
    """900, 90 and 10 examples; by hand, sqrt: 30 : 9.49 : 3.16 of 42.65, times 1,000 = 703, 222, 74 (the total is 1,000)."""
    sampler = Sampler([many(900), many(90), many(10)], 64, seed=0, power=power)
    assert sampler.taken == expected
    assert [round(share, 2) for share in sampler.shares] == [round(taken / sum(expected), 2) for taken in expected]


@pytest.mark.parametrize("mixed", [False, True])
def test_over_the_epochs_no_example_comes_twice_within_a_pass(mixed: bool) -> None:
    """A domain of 10 of which an epoch takes 14 or 15: after any number of epochs its examples differ by one visit at most."""
    sampler = Sampler([many(30), many(10)], 8, seed=1, power=0.3, mixed=mixed, epoch_examples=36)
    seen: Counter[tuple[int, int]] = Counter()
    for epoch in range(1, 6):
        seen.update(pairs(list(sampler.plans(epoch)), 1))
        assert sum(seen.values()) == epoch * sampler.taken[1]
        assert max(seen.values()) - min(seen.values()) <= 1


def test_a_short_epoch_takes_the_next_stretch() -> None:
    sampler = Sampler([many(100)], 8, seed=1, epoch_examples=25)
    four = [pair for epoch in range(1, 5) for pair in pairs(list(sampler.plans(epoch)), 0)]
    assert sorted(four) == sorted(zip(*many(100), strict=True))


def test_memory_does_not_grow_with_the_examples() -> None:
    """A micro-batch of 10 thousand users with a million examples each: not a hundredth of a list of them."""
    examples = many(10_000, each=1_000_000)
    assert len(examples) == 10**10
    tracemalloc.start()
    sampler = Sampler([examples], 1024, seed=0)
    assert len(sampler.plan(3, 5)) == 1024
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2e6
