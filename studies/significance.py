"""How far a difference between two arms would move with other users and other seeds, and what it could have shown at all.

The same users recur under every seed: their pairs are no independent observations, and p-values of single seeds are neither
pooled nor averaged. A bootstrap crossed over users and seeds (Owen, 2007, "The pigeonhole bootstrap") gives the standard error:
RESAMPLES times U - 1 of the U users are drawn with replacement, the same for all seeds and both arms, and S - 1 of the S
seeds, and the mean is taken; one less than there are, for the variance of few seeds comes out too small otherwise (Rao and
Wu, 1988). The interval is mean ± t · standard error, its degrees of freedom Satterthwaite's of the parts of users and seeds:
near S - 1 where seeds decide, near U - 1 where users do. The parts share their interaction, which therefore counts
twice: without a difference an interval of 95 % misses 0 as often as it may where seeds decide, and less often elsewhere
(tests/test_significance.py).

It speaks of the users of this shop and of seeds of the confirmed config, not of other shops, nor of what another search
would have chosen. Holm's correction is over a table. Fewer than MARK_SEEDS seeds get no mark.

Dimensions: R resamples, U users, S seeds, K rows of differences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.stats import t as student

from mmm4rec.training.metrics import CUTOFFS, METRIC_NAMES

RESAMPLES = 2_000
SEED = 20_250_602  # fixed: the same runs give the same interval
MARK_SEEDS = 5  # that a mark needs
ALPHA, POWER = 0.05, 0.8
DECIMALS = 12  # kept: the order of a matrix product's sums, which machines choose, decides what comes after
COUNTS_AT_ONCE = 2_000_000  # of R × U: 16 MB


@dataclass(frozen=True)
class Interval:
    """A mean difference, the bounds of its 95 % interval where there is one, and what goes with them."""

    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None  # two-sided, of no difference; uncorrected
    error: float | None = None  # standard error
    freedom: float | None = None  # degrees, of that error
    size: float | None = None  # the mean over the standard deviation of users' differences (averaged over seeds): Cohen's d, paired

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @property
    def detectable(self) -> float | None:
        """The true difference that would have been found in POWER of such comparisons."""
        if self.error is None or self.freedom is None:
            return None
        return float((student.ppf(1 - ALPHA / 2, self.freedom) + student.ppf(POWER, self.freedom)) * self.error)

    def text(self) -> str:
        """`+0.0012 [-0.0003, +0.0027]`, or `+0.0012 (mean only)`."""
        if self.low is None or self.high is None:
            return f"{self.mean:+.4f} (mean only)"
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def gains(rank: np.ndarray, names: Sequence[str] = METRIC_NAMES) -> np.ndarray:
    """What each user adds to each metric, [names, U], of ranks [U] that count from 1; the means over users are the metrics."""
    rows = {f"hit@{k}": (rank <= k).astype(np.float64) for k in CUTOFFS}
    rows |= {f"ndcg@{k}": (rank <= k) / np.log2(rank + 1) for k in CUTOFFS} | {"mrr": 1 / rank}
    return np.stack([rows[name] for name in names])


def resampled_user_means(rows: np.ndarray) -> np.ndarray:
    """Means [R, K] of rows [K, U] over U - 1 users drawn with replacement, the same users for all rows."""
    users = rows.shape[1]
    blocks = _kept_counts(users) if RESAMPLES * users <= COUNTS_AT_ONCE else _counts(users)
    return np.concatenate([block @ rows.T for block in blocks]) / max(1, users - 1)


def _counts(users: int) -> Iterator[np.ndarray]:
    """How often each resample drew each user, [R, U] in blocks."""
    random, at_once = np.random.default_rng(SEED), max(1, COUNTS_AT_ONCE // users)
    for start in range(0, RESAMPLES, at_once):
        draws = range(min(at_once, RESAMPLES - start))
        yield np.stack([np.bincount(random.integers(users, size=max(1, users - 1)), minlength=users) for _ in draws]).astype(np.float64)


@lru_cache(maxsize=2)
def _kept_counts(users: int) -> tuple[np.ndarray, ...]:
    return tuple(_counts(users))


def interval(differences: np.ndarray, user_means: np.ndarray) -> Interval:
    """The mean of differences [S, U] and its interval, from their `resampled_user_means`, [R, S].

    A resample's seeds are drawn here; how many there are decides which, so that arms of equally many seeds share them.
    One seed has no interval.
    """
    seeds, users = differences.shape
    mean, spread = round(float(differences.mean()), DECIMALS), float(differences.mean(axis=0).std(ddof=1)) if users > 1 else 0.0
    size = round(mean / spread, DECIMALS) if round(spread, DECIMALS) > 0 else None
    if seeds < 2 or users < 2:
        return Interval(mean, size=size)
    drawn = np.random.default_rng((SEED, seeds)).integers(seeds, size=(len(user_means), seeds - 1))
    error = round(float(np.take_along_axis(user_means, drawn, axis=1).mean(axis=1).std(ddof=1)), DECIMALS)
    if error == 0:
        return Interval(mean, mean, mean, float(mean == 0), 0.0, float(seeds - 1), size)
    of_seeds = min(float(differences.mean(axis=1).var(ddof=1)) / seeds, error**2)
    freedom = satterthwaite([(of_seeds, seeds - 1), (error**2 - of_seeds, users - 1)])
    return from_error(mean, error, freedom, size)


def from_error(mean: float, error: float, freedom: float, size: float | None = None) -> Interval:
    """The interval of a mean with this standard error."""
    half = float(student.ppf(1 - ALPHA / 2, freedom)) * error
    p = float(2 * student.sf(abs(mean) / error, freedom))
    low, high, p, freedom = (round(value, DECIMALS) for value in (mean - half, mean + half, p, freedom))
    return Interval(mean, low, high, p, error, freedom, size)


def satterthwaite(parts: Sequence[tuple[float, float]]) -> float:
    """Degrees of freedom of a sum of variances, each with its own."""
    total = sum(variance for variance, _ in parts)
    return total**2 / sum(variance**2 / freedom for variance, freedom in parts)


def aggregate(intervals: Sequence[Interval]) -> Interval:
    """The mean of differences over domains: these domains, whose users and seeds vary independently; no claim on others."""
    mean = round(float(np.mean([one.mean for one in intervals])), DECIMALS)
    parts = [(one.error**2, one.freedom) for one in intervals if one.error is not None and one.freedom is not None]
    total = sum(variance for variance, _ in parts)
    if len(parts) < len(intervals) or total == 0:
        return Interval(mean)
    return from_error(mean, round(float(np.sqrt(total)) / len(intervals), DECIMALS), satterthwaite(parts))


def is_sure(corrected: float | None, seeds: int) -> bool:
    """Whether a difference gets a mark."""
    return corrected is not None and corrected < ALPHA and seeds >= MARK_SEEDS


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's corrected p-values (1979), in the given order; None stays, and does not count."""
    told = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, place) in enumerate(told):
        highest = max(highest, min(1.0, p * (len(told) - rank)))
        corrected[place] = highest
    return corrected
