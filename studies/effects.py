"""What an arm changes: its test gains minus those of the study's baseline arm, paired over users and seeds.

A pair is one user and one seed: the same user's target, ranked by two arms whose runs drew the same seed. The gains
are those of the metrics: Hit@10 is 1 where rank <= 10, NDCG@10 there 1 / log2(rank + 1) (one relevant item), 0 elsewhere.

The interval is the middle 95 % of a bootstrap crossed over users and seeds (Owen, 2007, "The pigeonhole bootstrap"):
RESAMPLES times, as many users are drawn with replacement as there are, the same for every seed and both arms, and as
many seeds as there are, and the mean over users × seeds is taken. It says how far the mean difference would move with
other users of this shop and other seeds of the confirmed config. It knows nothing of what another search would have
chosen or of other shops; of few seeds it makes too little (S seeds vary as if their variance were (S - 1) / S of what it
is); and each interval stands for itself: nothing is corrected for their number, and no p-values are made, nor any pooled
over seeds. With fewer than two common seeds there is no interval.

Dimensions: R resamples, U users, S seeds, K = rows of differences (arms × gains × seeds).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mmm4rec.errors import BadInput
from studies.tracked import TrackedCell, TrackedTrial, UserRanks

RESAMPLES = 2_000
SEED = 20_250_602  # fixed: the same runs give the same interval
CUTOFF = 10
DECIMALS = 12  # kept: the order of a matrix product's sums, which machines choose, decides what comes after
COUNTS_AT_ONCE = 2_000_000  # of R × U: 16 MB


@dataclass(frozen=True)
class Interval:
    """A mean difference, and the bounds of its 95 % interval where there is one."""

    mean: float
    low: float | None = None
    high: float | None = None

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def text(self) -> str:
        """`+0.0012 [-0.0003, +0.0027]`, or `+0.0012 (mean only)`."""
        if self.low is None or self.high is None:
            return f"{self.mean:+.4f} (mean only)"
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


@dataclass(frozen=True)
class Effect:
    """An arm minus the baseline, in a domain, over the users and the seeds that both have."""

    domain: str
    arm: str
    baseline: str
    seeds: int
    users: int
    baseline_ndcg: tuple[float, ...]  # NDCG@10 by seed
    ndcg: Interval
    hit: Interval


ReadRanks = Callable[[TrackedTrial], UserRanks | None]


def study_effects(cells: Sequence[TrackedCell], read_ranks: ReadRanks) -> list[Effect]:
    """The effects of a study, by domain and then arm, in the spec's order.

    Left out: domains without the baseline arm, and arms that share no seed with it of which both runs kept their ranks.
    Raises BadInput where two runs of a domain rank other users, or in another order.
    """
    found: list[Effect] = []
    for domain in dict.fromkeys(cell.domain for cell in cells):
        here = [cell for cell in cells if cell.domain == domain]
        baseline = next((cell for cell in here if cell.arm == cell.baseline), None)
        if baseline is not None:
            found += _domain_effects(baseline, [cell for cell in here if cell is not baseline], read_ranks)
    return found


def gains(rank: np.ndarray) -> np.ndarray:
    """The gains of NDCG@10 and Hit@10, [2, U], of ranks [U] that count from 1."""
    hit = rank <= CUTOFF
    return np.stack([hit / np.log2(rank + 1), hit.astype(np.float64)])


def resampled_user_means(rows: np.ndarray) -> np.ndarray:
    """Means [R, K] of rows [K, U] over users drawn with replacement, the same users for all rows."""
    users, random = rows.shape[1], np.random.default_rng(SEED)
    at_once = max(1, COUNTS_AT_ONCE // users)
    parts = []
    for start in range(0, RESAMPLES, at_once):
        draws = range(min(at_once, RESAMPLES - start))
        counts = np.stack([np.bincount(random.integers(users, size=users), minlength=users) for _ in draws])  # multinomial
        parts.append(counts.astype(np.float64) @ rows.T / users)
    return np.concatenate(parts)


def interval(mean: float, user_means: np.ndarray) -> Interval:
    """The mean with its percentile interval, from `resampled_user_means` of each seed's differences, [R, S].

    A resample's seeds are drawn here; how many there are decides which, so that arms of equally many seeds share them.
    """
    seeds, mean = user_means.shape[1], round(mean, DECIMALS)
    if seeds < 2:
        return Interval(mean)
    drawn = np.random.default_rng((SEED, seeds)).integers(seeds, size=(len(user_means), seeds))
    means = np.take_along_axis(user_means, drawn, axis=1).mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5)).round(DECIMALS)
    return Interval(mean, float(low), float(high))


def _domain_effects(baseline: TrackedCell, arms: Sequence[TrackedCell], read_ranks: ReadRanks) -> list[Effect]:
    """All of a domain's differences are resampled together: drawing the users is most of the work."""
    base, first = _gains_by_seed(baseline, read_ranks, None)
    paired = []  # (arm, its common seeds, differences [2, S, U])
    for cell in arms:
        own, first = _gains_by_seed(cell, read_ranks, first)
        seeds = sorted(base.keys() & own.keys())
        if seeds:
            paired.append((cell, seeds, np.stack([own[seed] - base[seed] for seed in seeds], axis=1)))
    if not paired:
        return []
    user_means = resampled_user_means(np.concatenate([part.reshape(-1, part.shape[2]) for _, _, part in paired]))
    found, start = [], 0
    for cell, seeds, part in paired:
        count, users = part.shape[1:]
        blocks = (user_means[:, start : start + count], user_means[:, start + count : start + 2 * count])
        ndcg, hit = (interval(float(rows.mean()), block) for rows, block in zip(part, blocks, strict=True))
        levels = tuple(float(base[seed][0].mean()) for seed in seeds)
        found.append(Effect(cell.domain, cell.arm, baseline.arm, count, users, levels, ndcg, hit))
        start += 2 * count
    return found


First = tuple[str, UserRanks]  # the domain's first run, in words, and its ranks


def _gains_by_seed(cell: TrackedCell, read_ranks: ReadRanks, first: First | None) -> tuple[dict[int, np.ndarray], First | None]:
    """Gains [2, U] of the cell's runs that kept their ranks, by seed. Raises BadInput unless all users are those of `first`."""
    found = {}
    for trial in cell.trials:
        ranks, name = read_ranks(trial), f"{trial.run_id} ({cell.name}, seed {trial.seed})"
        if ranks is None:
            continue
        first = first or (name, ranks)
        if not np.array_equal(first[1].users, ranks.users):
            rule = f"runs {first[0]} and {name} rank other users, or in another order: they cannot be paired."
            raise BadInput(rule, remedy="Run both on the same prepared domain.")
        found[trial.seed] = gains(ranks.rank)
    return found, first
