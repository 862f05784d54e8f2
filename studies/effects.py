"""What an arm changes: its test gains minus those of another arm, paired over users and seeds.

A pair is one user and one seed: the same user's target, ranked by two arms whose runs drew the same seed. An arm that fits
nothing on the domain (popularity, zero-shot) has one run, which stands beside every seed of the other.
What an interval means stands in studies/significance.py.

Dimensions: U users, S seeds, M metrics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import mean

import numpy as np

from mmm4rec.errors import BadInput
from studies.significance import Interval, aggregate, gains, holm, interval, is_sure, resampled_user_means
from studies.tracked import METRICS, ReadRanks, TrackedCell, UserRanks

SHOWN = ("ndcg@10", "hit@10")  # of an effect


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
    corrected: float | None = None  # p of NDCG@10, by Holm over all effects of the study

    @property
    def marked(self) -> bool:
        return is_sure(self.corrected, self.seeds)


@dataclass(frozen=True)
class Lead:
    """The best arm of a domain by a metric, minus the second."""

    domain: str
    metric: str
    arm: str
    second: str
    seeds: int
    difference: Interval
    corrected: float | None = None  # p, by Holm over all leads of the study

    @property
    def marked(self) -> bool:
        """Ahead on the common seeds too, which the comparison rests on."""
        return self.difference.mean > 0 and is_sure(self.corrected, self.seeds)


def study_effects(cells: Sequence[TrackedCell], read_ranks: ReadRanks) -> list[Effect]:
    """The effects of a study, by domain and then arm, in the spec's order.

    Left out: domains without the baseline arm, and arms that share no seed with it of which both runs kept their ranks.
    Raises BadInput where two runs of a domain rank other users, or in another order.
    """
    found: list[Effect] = []
    for here in by_domain(cells):
        baseline = next((cell for cell in here if cell.arm == cell.baseline), None)
        if baseline is None:
            continue
        pairs = Pairs(here, read_ranks, SHOWN)
        for cell, (seeds, parts) in pairs.minus(baseline, [cell for cell in here if cell is not baseline]):
            levels = tuple(float(pairs.by_seed(baseline, seed)[0].mean()) for seed in seeds)
            users = pairs.by_seed(baseline, seeds[0]).shape[1]
            ndcg, hit = parts
            found.append(Effect(cell.domain, cell.arm, baseline.arm, len(seeds), users, levels, ndcg, hit))
    corrected = holm([effect.ndcg.p for effect in found])
    return [replace(effect, corrected=p) for effect, p in zip(found, corrected, strict=True)]


def study_leads(cells: Sequence[TrackedCell], read_ranks: ReadRanks) -> list[Lead]:
    """Who leads by each metric in each domain of two arms or more, and by how much; without an interval where ranks are missing."""
    found: list[Lead] = []
    for here in by_domain(cells):
        ranked = [cell for cell in here if cell.trials]
        if len(ranked) < 2:
            continue
        pairs = Pairs(ranked, read_ranks, METRICS)
        compared: dict[tuple[str, str], list[tuple[TrackedCell, Minus]]] = {}
        for place, metric in enumerate(METRICS):
            best, second = sorted(ranked, key=partial(mean_of, metric=metric), reverse=True)[:2]
            difference, seeds = Interval(mean_of(best, metric) - mean_of(second, metric)), 0
            if (best.arm, second.arm) not in compared:
                compared[best.arm, second.arm] = pairs.minus(second, [best])
            for _, (common, parts) in compared[best.arm, second.arm]:
                difference, seeds = parts[place], len(common)
            found.append(Lead(best.domain, metric, best.arm, second.arm, seeds, difference))
    corrected = holm([lead.difference.p for lead in found])
    return [replace(lead, corrected=p) for lead, p in zip(found, corrected, strict=True)]


@dataclass(frozen=True)
class Overall:
    """An arm minus the baseline over all domains that have both."""

    arm: str
    domains: int
    won: int  # domains in which it is above the baseline in the mean
    ndcg: Interval


def over_domains(effects: Sequence[Effect]) -> list[Overall]:
    """The effects of each arm, averaged over its domains."""
    found = []
    for arm in dict.fromkeys(effect.arm for effect in effects):
        own = [effect.ndcg for effect in effects if effect.arm == arm]
        found.append(Overall(arm, len(own), sum(one.mean > 0 for one in own), aggregate(own)))
    return found


def mean_of(cell: TrackedCell, metric: str) -> float:
    """The mean of a test metric over the cell's confirm trials."""
    return mean(trial.test[metric] for trial in cell.trials)


def by_domain(cells: Sequence[TrackedCell]) -> list[list[TrackedCell]]:
    return [[cell for cell in cells if cell.domain == domain] for domain in dict.fromkeys(cell.domain for cell in cells)]


Minus = tuple[list[int], list[Interval]]  # common seeds; a difference a metric


class Pairs:
    """Pairs the runs of one domain. Its differences are resampled together: drawing the users is most of the work."""

    def __init__(self, cells: Sequence[TrackedCell], read_ranks: ReadRanks, metrics: Sequence[str]) -> None:
        """Raises BadInput unless all runs that kept their ranks rank the same users in the same order."""
        self._gains: dict[tuple[str, int], np.ndarray] = {}  # (arm, seed): [M, U]
        self._metrics, first = len(metrics), None
        for cell in cells:
            for trial in cell.trials:
                if (ranks := read_ranks(trial)) is None:
                    continue
                named = (f"{trial.run_id} ({cell.name}, seed {trial.seed})", ranks)
                first = first or named
                _check_users(first, named)
                self._gains[cell.arm, trial.seed] = gains(ranks.rank, metrics)
        self._cells = {cell.arm: cell for cell in cells}

    def by_seed(self, cell: TrackedCell, seed: int) -> np.ndarray:
        """The gains [M, U] of an arm under a seed: under any, where it fits nothing."""
        return self._gains[cell.arm, seed] if (cell.arm, seed) in self._gains else self._gains[cell.arm, self._seeds(cell)[0]]

    def minus(self, baseline: TrackedCell, cells: Sequence[TrackedCell]) -> list[tuple[TrackedCell, Minus]]:
        """Each of the cells that shares a seed with the baseline, minus the baseline."""
        paired = []  # (cell, common seeds, differences [M, S, U])
        for cell in cells:
            if seeds := self._common(cell, baseline):
                rows = [self.by_seed(cell, seed) - self.by_seed(baseline, seed) for seed in seeds]
                paired.append((cell, seeds, np.stack(rows, axis=1)))
        if not paired:
            return []
        means = resampled_user_means(np.concatenate([part.reshape(-1, part.shape[2]) for _, _, part in paired]))
        found, start = [], 0
        for cell, seeds, part in paired:
            own = np.split(means[:, start : start + part.shape[0] * len(seeds)], self._metrics, axis=1)  # [R, S] a metric
            found.append((cell, (seeds, [interval(rows, block) for rows, block in zip(part, own, strict=True)])))
            start += part.shape[0] * len(seeds)
        return found

    def _common(self, one: TrackedCell, other: TrackedCell) -> list[int]:
        seeds, others = self._seeds(one), self._seeds(other)
        if seeds and not one.trains and other.trains:
            return others
        if others and not other.trains and one.trains:
            return seeds
        if not one.trains and not other.trains:
            return seeds[: len(others)][:1]
        return sorted(set(seeds) & set(others))

    def _seeds(self, cell: TrackedCell) -> list[int]:
        return sorted(seed for arm, seed in self._gains if arm == cell.arm)


def _check_users(first: tuple[str, UserRanks], other: tuple[str, UserRanks]) -> None:
    if not np.array_equal(first[1].users, other[1].users):
        rule = f"runs {first[0]} and {other[0]} rank other users, or in another order: they cannot be paired."
        raise BadInput(rule, remedy="Run both on the same prepared domain.")
