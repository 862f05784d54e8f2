"""Facts about the convergence audit, the transfer matrix and the searched parameters, on trials whose answers are worked out here."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from studies.audit import convergence_table, cost_to_end, cost_until, is_censored, quality_table
from studies.sensitivity import bins, importances, marginal_table, points, sensitivity_table
from studies.table import Sample
from studies.tracked import ReadRanks, SearchTrial, TrackedCell, TrackedTrial, UserRanks
from studies.transfer import transfer_gains, transfer_matrix

METRIC = {"ndcg@10": 0.5}


def trial(seed: int, values: list[float], *, patience: int = 2) -> TrackedTrial:
    """Epochs of 10 steps and 3 seconds, from epoch 1."""
    best = max(range(len(values)), key=lambda place: values[place])
    return TrackedTrial(
        f"run-{seed}",
        seed,
        "print",
        METRIC,
        values[best],
        10 * (best + 1),
        best + 1,
        tuple((10 * (place + 1), value) for place, value in enumerate(values)),
        epochs=tuple(range(1, len(values) + 1)),
        seconds=tuple(3.0 * (place + 1) for place in range(len(values))),
        params={"training.patience": str(patience)},
    )


def cell(
    arm: str, trials: list[TrackedTrial], *, init: str = "scratch", besides: str = "x", domain: str = "toys", cap: int = 6
) -> TrackedCell:
    ledger = {"seconds": 100.0, "gpu_hours": 50.0 / 3600}  # half a GPU
    return TrackedCell(domain, arm, init, besides, 1, cap, "scratch", tuple(trials), ledger)


SLOW, FAST = [0.1, 0.2, 0.3, 0.4, 0.35, 0.3], [0.36, 0.5, 0.4, 0.4]


def test_a_quality_is_paid_for_when_it_is_first_reached() -> None:
    slow = trial(0, SLOW)
    reached = cost_until(slow, 0.3)
    assert reached is not None
    assert (reached.epochs, reached.steps, reached.seconds) == (3, 30, 9.0)
    assert cost_until(slow, 0.41) is None
    assert cost_to_end(slow).epochs == 6


def test_a_run_is_censored_where_its_cap_came_before_its_patience() -> None:
    ended = trial(0, SLOW)  # the best is epoch 4, its patience of 2 ended it at its cap of 6: both at once
    assert not is_censored(ended, cell("a", [ended]))
    cut = trial(0, [0.1, 0.2, 0.3, 0.4, 0.45, 0.44])
    assert is_censored(cut, cell("a", [cut]))
    assert not is_censored(cut, cell("a", [cut], cap=7))


def test_the_convergence_table_counts_patience_in() -> None:
    cells = [cell("pretrained", [trial(0, FAST), trial(1, FAST)], init="pretrained"), cell("scratch", [trial(0, SLOW), trial(1, SLOW)])]
    table = convergence_table(cells)
    fast, slow = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    assert (fast["epochs to best"], fast["epochs to end"]) == (Sample((2, 2), digits=1), Sample((4, 4), digits=1))
    assert fast["GPU hours to end"] == Sample((12 * 0.5 / 3600,) * 2, digits=3)
    assert (fast["times the reference's steps"], fast["reference"], fast["censored"]) == ("0.50", "scratch", "0/2")
    assert slow["times the reference's steps"] == "1.00"


def test_a_seed_that_never_gets_there_makes_a_bound() -> None:
    cells = [cell("scratch", [trial(0, SLOW), trial(1, [0.1, 0.15, 0.12, 0.11])])]
    rows = {row[3]: dict(zip(quality_table(cells).columns, row, strict=True)) for row in quality_table(cells).rows}
    fixed = rows["95% of scratch's mean best"]  # .95 x (.4 + .15) / 2 = .26125
    assert (fixed["epochs"], fixed["reached"]) == (Sample((3, 4), digits=1, at_least=True), "1/2")
    assert rows["90% of its best"]["epochs"] == Sample((4, 2), digits=1)  # .36 and .135
    assert rows["100% of its best"]["reached"] == "2/2"


def ranked(ranks: dict[tuple[str, str], int]) -> ReadRanks:
    """The same rank for every user but one, whose rank is 1, by (domain, arm)."""

    def read(trial: TrackedTrial) -> UserRanks:
        domain, arm, _ = trial.run_id.split("-")
        return UserRanks(np.arange(30), np.array([1.0, *[float(ranks[domain, arm])] * 29]))

    return read


def named(one: TrackedCell) -> TrackedCell:
    """With runs that say whose they are, and facts of what ran."""
    facts = {"model.modalities": "text", "model.ids": "False"}
    return replace(one, trials=tuple(replace(t, run_id=f"{one.domain}-{one.arm}-{t.seed}", params=facts) for t in one.trials))


def test_the_matrix_has_a_gain_over_the_control_and_flags_negative_transfer() -> None:
    seeds = [trial(seed, SLOW) for seed in range(5)]
    cells = [
        named(cell(arm, seeds, init=init, besides=besides, domain=domain))
        for domain in ("toys", "games")
        for arm, init, besides in (("pre", "pretrained", "x"), ("scratch", "scratch", "x"), ("odd", "pretrained", "y"))
    ]
    ranks = {("toys", "pre"): 1, ("toys", "scratch"): 3, ("games", "pre"): 7, ("games", "scratch"): 3}
    gains = transfer_gains(cells, ranked(ranks | {("toys", "odd"): 1, ("games", "odd"): 1}))
    toys, games = gains
    assert [(gain.domain, gain.arm, gain.control, gain.modalities, gain.ids) for gain in gains] == [
        ("toys", "pre", "scratch", "text", "off"),
        ("games", "pre", "scratch", "text", "off"),
    ]
    assert toys.difference.mean == pytest.approx(29 / 30 * 0.5)  # 1 / log2(2) - 1 / log2(4), of 29 users
    assert games.difference.mean == pytest.approx(29 / 30 * (1 / 3 - 1 / 2))
    assert (toys.verdict, games.verdict) == ("gain*", "NEGATIVE TRANSFER*")
    assert games.percent == pytest.approx(100 * games.difference.mean / ((1 + 29 * 0.5) / 30))  # of the control on the same seeds
    assert transfer_matrix(gains, cells).notes == ("No scratch control differs in init alone, so no gain: odd.",)


def test_without_ranks_a_gain_has_no_interval_and_says_so() -> None:
    cells = [named(cell(arm, [trial(0, SLOW)], init=init)) for arm, init in (("pre", "pretrained"), ("scratch", "scratch"))]
    (gain,) = transfer_gains(cells, lambda trial: None)
    assert gain.verdict == "no interval"


def test_a_reference_that_was_cut_off_turns_a_ratio_into_an_upper_bound() -> None:
    rising = [0.1, 0.2, 0.3, 0.4, 0.45, 0.5]
    cells = [cell("pretrained", [trial(0, FAST)], init="pretrained"), cell("scratch", [trial(0, rising)])]
    table = convergence_table(cells)
    assert [row[table.columns.index("times the reference's steps")] for row in table.rows] == ["≤ 0.33", "1.00"]
    both = convergence_table([cell("pretrained", [trial(0, rising)], init="pretrained"), cells[1]])
    assert both.rows[0][both.columns.index("times the reference's steps")] == "-"
    own = next(row for row in quality_table(cells).rows if row[1] == "scratch" and row[3] == "100% of its best")
    assert isinstance(own[5], Sample)
    assert own[5].at_least, "the best of a run that was cut off is a bound"
    without = [replace(one, ledger={}) for one in cells]
    assert convergence_table(without).rows[0][8] == Sample((), digits=3)


SPACE = {"lr": [1e-4, 1e-1, True, None], "size": [None, None, False, [2, 4, 8]]}


def searched(count: int = 24) -> TrackedCell:
    """The score follows the learning rate alone."""
    draw, trials = np.random.default_rng(0), []
    for number in range(count):
        rate, size = 10 ** draw.uniform(-4, -1), int(draw.choice([2, 4, 8]))
        score = 0.5 - 0.1 * (np.log10(rate) + 2.5) ** 2
        trials.append(SearchTrial(f"r{number}", number, number % 3 == 0, {"lr": str(rate), "size": str(size)}, score, 3))
    return replace(cell("scratch", [trial(0, SLOW)]), searched=tuple(trials), space=SPACE)


def test_importance_finds_the_parameter_that_matters_and_is_the_same_each_time() -> None:
    found = importances([searched()])
    assert found["lr"] > 0.9
    assert found == importances([searched()])
    assert importances([searched(3)]) == {}, "three trials say nothing"
    rows = {row[3]: row for row in sensitivity_table([searched()]).rows}
    assert float(str(rows["lr"][5])) == pytest.approx(10**-2.5, rel=0.5)


def test_marginals_are_shares_of_the_cells_best_in_equally_filled_bins() -> None:
    told = points([searched()], "lr")
    assert max(point.share for point in told) == 1
    parts = bins(told)
    assert [len(part) for _, part in parts] == [6, 6, 6, 6]
    edges = [(min(p.value for p in part), max(p.value for p in part)) for _, part in parts]
    assert all(low[1] < high[0] for low, high in pairwise(edges))
    assert [label for label, _ in bins(points([searched()], "size"))] == ["2", "4", "8"]
    assert {row[0] for row in marginal_table([searched()]).rows} == {"lr", "size"}
