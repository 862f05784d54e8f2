"""Facts about intervals, p-values and marks: by hand, against brute force, and over hundreds of studies whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t as student
from scipy.stats import ttest_1samp

from mmm4rec.training.metrics import metrics
from studies.effects import study_effects, study_leads
from studies.significance import Interval, aggregate, holm, interval, resampled_user_means, satterthwaite
from studies.tracked import ReadRanks, TrackedCell, TrackedTrial, UserRanks

ARMS, SEEDS, USERS = ("a", "b"), range(5), 300


def test_holm_is_that_of_a_worked_example() -> None:
    """Four p-values: .01 x 4, .02 x 3, .03 x 2 raised to what came before, .5 x 1; one that is missing does not count."""
    assert holm([0.03, 0.01, None, 0.5, 0.02]) == pytest.approx([0.06, 0.04, None, 0.5, 0.06], nan_ok=True)
    assert holm([0.4, 0.9]) == [0.8, 0.9]
    assert holm([0.6, 0.9]) == [1.0, 1.0]


def test_degrees_of_freedom_are_those_of_the_part_that_decides() -> None:
    assert satterthwaite([(1.0, 4)]) == 4
    assert satterthwaite([(1.0, 4), (1.0, 4)]) == 8
    assert satterthwaite([(1.0, 4), (1e-9, 1000)]) == pytest.approx(4, rel=1e-6)


def test_where_only_seeds_vary_the_interval_is_students() -> None:
    """300 users of whom each has the seed's difference: five numbers, whose t-test is known."""
    by_seed = np.array([0.01, 0.03, 0.02, 0.05, -0.01])
    differences = np.repeat(by_seed[:, None], USERS, axis=1)
    found = interval(differences, resampled_user_means(differences))
    expected = ttest_1samp(by_seed, 0)
    assert found.freedom == pytest.approx(4, rel=0.02)
    assert found.p == pytest.approx(expected.pvalue, abs=0.01)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()), abs=2e-3)
    assert found.size is None, "no user differs from another"


def test_what_could_have_been_shown_is_found_four_times_in_five() -> None:
    """Many users of known spread, one true difference: the detectable one."""
    draw, spread, users, found = np.random.default_rng(0), 0.3, 200, 0
    probe = draw.normal(0, spread, (5, 1, users)).repeat(1, axis=1)[:, 0]
    least = interval(probe, resampled_user_means(probe)).detectable
    assert least is not None
    for _ in range(200):
        differences = least + draw.normal(0, spread, (5, users))
        p = interval(differences, resampled_user_means(differences)).p
        found += p is not None and p < 0.05
    assert 0.7 < found / 200 < 0.97  # the interaction counts twice in the error, in both alike


def test_domains_are_averaged_with_their_errors() -> None:
    one, other = Interval(0.02, 0, 0, 0.01, error=0.003, freedom=10), Interval(0.04, 0, 0, 0.01, error=0.004, freedom=20)
    found = aggregate([one, other])
    assert (found.mean, found.error) == pytest.approx((0.03, 0.0025))
    assert found.freedom == pytest.approx((9e-6 + 16e-6) ** 2 / (81e-12 / 10 + 256e-12 / 20))
    assert found.high == pytest.approx(0.03 + 0.0025 * student.ppf(0.975, found.freedom))
    assert aggregate([one, Interval(0.1)]).low is None, "one of them has no interval"


def study(draw: np.random.Generator, lift: float) -> tuple[list[TrackedCell], ReadRanks]:
    """Two arms whose users share their difficulty, whose seeds are better or worse as a whole, and which differ by `lift`."""
    hard, ranks, cells = draw.normal(3.0, 1.2, USERS), {}, []
    for arm in ARMS:
        trials = []
        for seed in SEEDS:
            level = hard + draw.normal(0, 0.08) + draw.normal(0, 0.6, USERS) - lift * (arm == "b")
            ranks[f"{arm}-{seed}"] = UserRanks(np.arange(USERS), np.maximum(1, np.exp(level).round()))
            test = metrics(ranks[f"{arm}-{seed}"].rank)
            trials.append(TrackedTrial(f"{arm}-{seed}", seed, "print", test, 0.0, 0, 0, ()))
        cells.append(TrackedCell("toys", arm, "scratch", arm, 1, 1, "a", tuple(trials)))
    return cells, lambda trial: ranks[trial.run_id]


def test_two_arms_that_are_the_same_are_marked_in_a_twentieth_of_studies_at_most() -> None:
    draw, marked = np.random.default_rng(7), {"leads": 0, "effects": 0}
    for _ in range(200):
        cells, read = study(draw, lift=0.0)
        marked["leads"] += any(lead.marked for lead in study_leads(cells, read))
        marked["effects"] += any(effect.marked for effect in study_effects(cells, read))
    assert max(marked.values()) <= 10, marked
    assert marked["effects"] > 0, "a test that never marks anything is no test"


def test_a_planted_winner_is_found_with_the_right_sign() -> None:
    draw, found = np.random.default_rng(8), 0
    for _ in range(20):
        cells, read = study(draw, lift=0.5)
        (effect,) = study_effects(cells, read)
        leads = {lead.metric: lead for lead in study_leads(cells, read)}
        found += effect.marked and effect.ndcg.mean > 0 and leads["ndcg@10"].marked and leads["ndcg@10"].arm == "b"
    assert found == 20
