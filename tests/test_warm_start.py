"""Facts about priors carried on: who waits for whom, what a search begins with, where that came from and what it had cost."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from test_state import SPEC, row, spec

from mmm4rec.errors import BadInput
from studies.cells import Source, build_cells
from studies.ledger import cell_ledger
from studies.plan import Plan
from studies.space import Parameter
from studies.spec import Spec
from studies.state import Journal, Trial
from studies.suggestions import Suggestions, sqlite_url
from studies.warm_start import Prior, blended, noted_cost, noted_priors

RATE, FILTER = "training.learning_rate", "model.filter_size"
ORDER = {"domains": ["a", "b", "c"]}
CELLS = [{"domains": ["a", "b", "c"], "arms": ["pretrained", "scratch"]}]


def warm_spec(**changes: Any) -> Spec:
    return spec(**{"warm_start_from": ORDER, "cells": CELLS, **changes})


def begin(path: Path, wanted: Spec) -> Plan:
    """A plan on domains a, b and c, of a journal that is there or begins."""
    path.mkdir(exist_ok=True)
    journal = Journal(path / "study.sqlite3")
    cells, _ = build_cells(wanted, {name: Source(f"/{name}", f"print-{name}", True) for name in "abc"})
    journal.add_cells([cell.name for cell in cells])
    return Plan(journal, cells, wanted.budget, wanted.seed, warm=wanted.warm_start_from)


def suggest(cell: Any, number: int, given: Any) -> dict[str, Any]:
    """A sampler that draws rates by the domain and the trial's number, and takes what is given."""
    return {RATE: 0.001 * (1 + "abc".index(cell.domain)) + 0.0001 * number, FILTER: 3, **given}


def value_of(trial: Trial) -> float:
    """The fourth search trial is the best of its cell."""
    return 0.5 if trial.number == 3 else 0.1 + 0.01 * trial.number


def end(plan: Plan, trial: Trial, *, epochs: int = 2) -> None:
    for epoch in range(1, epochs + 1):
        plan.journal.add_report(trial.trial_key, row(epoch, 0.0), value_of(trial))
    plan.journal.end(trial.trial_key, "finished", result={"best_epoch": 1})


def run(plan: Plan, *cells: str) -> None:
    """Run what is left of these cells' searches; every trial of another cell is a fault."""
    while any(len(plan.journal.trials(cell, "search")) < plan.cells[cell].search_trials for cell in cells):
        trial = plan.next_trial(suggest)
        assert trial is not None
        end(plan, trial)


def finish(plan: Plan) -> None:
    while trial := plan.next_trial(suggest):
        end(plan, trial)


def searches(plan: Plan, cell: str) -> list[tuple[str | None, float]]:
    return [(trial.origin, trial.config[RATE]) for trial in plan.journal.trials(cell, "search")]


def test_a_search_waits_for_the_same_arm_in_the_domains_before_while_other_cells_work(tmp_path: Path) -> None:
    plan = begin(tmp_path, warm_spec())
    first = [plan.next_trial(suggest) for _ in range(12)]
    assert all(first), "six search trials in each cell of the first domain"
    assert {trial.cell for trial in first if trial} == {"a/pretrained", "a/scratch"}
    assert plan.next_trial(suggest) is None, "all searches of the first domain run, and the others wait"
    assert not plan.done()
    for trial in first:
        assert trial is not None
        if trial.cell == "a/scratch":
            end(plan, trial)
    following = [trial for _ in range(10) if (trial := plan.next_trial(suggest))]
    assert {(trial.cell, trial.phase) for trial in following} == {("a/scratch", "confirm"), ("b/scratch", "search")}
    finish(plan)
    assert {trial.cell for trial in plan.journal.trials(phase="search")} == {"a/pretrained", "a/scratch", "b/scratch"}
    for trial in first:
        assert trial is not None
        if trial.cell == "a/pretrained":
            end(plan, trial)
    for trial in following:
        if plan.journal.trial(trial.trial_key).outcome == "running":
            end(plan, trial)
    finish(plan)
    assert plan.done()
    assert len(plan.journal.trials()) == 6 * (6 + 2)


def test_a_search_begins_with_the_blend_and_then_the_bests_and_says_where_they_come_from(tmp_path: Path) -> None:
    plan = begin(tmp_path, warm_spec())
    finish(plan)
    for arm in ("pretrained", "scratch"):
        bests = {domain: searches(plan, f"{domain}/{arm}")[3][1] for domain in "ab"}
        assert {origin for origin, _ in searches(plan, f"a/{arm}")} == {None}
        assert searches(plan, f"b/{arm}")[:2] == [(f"warm start: a/{arm} search 3", bests["a"]), (None, 0.0021)]
        blend, *two, own = searches(plan, f"c/{arm}")[:4]
        assert blend[0] == f"warm start: blend of a/{arm} search 3, b/{arm} search 3"
        assert blend[1] == pytest.approx(math.sqrt(bests["a"] * bests["b"])), "a rate is searched on a logarithmic scale"
        assert two == [(f"warm start: {domain}/{arm} search 3", bests[domain]) for domain in "ab"]
        assert own[0] is None


@pytest.mark.parametrize(("search_trials", "expected"), [(6, 3), (5, 2), (2, 1), (1, 1)])
def test_at_most_half_of_the_trials_are_priors_and_their_number_is_the_budgets(tmp_path: Path, search_trials: int, expected: int) -> None:
    plan = begin(tmp_path, warm_spec(budget={**SPEC["budget"], "search_trials": search_trials}))
    finish(plan)
    for arm in ("pretrained", "scratch"):
        found = searches(plan, f"c/{arm}")
        assert len(found) == search_trials
        assert sum(origin is not None for origin, _ in found) == expected
        assert noted_cost(plan.journal, f"c/{arm}") == (2 * search_trials, 4 * search_trials), "a best that found no place had its cost too"


def test_without_an_order_no_search_waits_and_none_begins_elsewhere(tmp_path: Path) -> None:
    plan = begin(tmp_path, warm_spec(warm_start_from=None))
    assert {trial.cell for _ in range(6) if (trial := plan.next_trial(suggest))} == set(plan.cells)
    finish(plan)
    assert {trial.origin for trial in plan.journal.trials()} == {None}


def test_a_new_driver_goes_on_with_the_priors_that_were_noted(tmp_path: Path) -> None:
    plan = begin(tmp_path, warm_spec())
    while not any(trial.cell == "c/scratch" for trial in plan.journal.trials()):
        trial = plan.next_trial(suggest)
        assert trial is not None
        end(plan, trial)
    noted = noted_priors(plan.journal, "c/scratch")
    assert len(noted) == 3
    better = plan.journal.trials("a/scratch", "search")[0]
    plan.journal.add_report(better.trial_key, row(9, 0.0), 0.9)  # would be the best of the first domain now
    plan.journal.close()
    again = begin(tmp_path, warm_spec())
    finish(again)
    assert noted_priors(again.journal, "c/scratch") == noted
    assert searches(again, "c/scratch")[:3] == [(prior.origin, prior.config[RATE]) for prior in noted]
    again.journal.supersede("c/scratch")
    assert noted_priors(again.journal, "c/scratch") == [], "a search that begins anew asks anew"


def earlier_study(path: Path, **space: Any) -> str:
    """A finished study of domain b: its folder."""
    wanted = spec(study=path.name, cells=[{"domains": ["b"], "arms": ["pretrained", "scratch"]}], space={**SPEC["space"], **space})
    plan = begin(path, wanted)
    finish(plan)
    plan.journal.close()
    return str(path)


def test_a_search_begins_with_the_bests_of_the_same_arm_in_finished_studies(tmp_path: Path) -> None:
    studies = [earlier_study(tmp_path / "may"), earlier_study(tmp_path / "june")]
    plan = begin(tmp_path / "now", warm_spec(warm_start_from={"studies": studies}))
    assert {trial.cell for _ in range(6) if (trial := plan.next_trial(suggest))} == set(plan.cells), "nobody waits"
    assert searches(plan, "a/scratch") == [("warm start: may, b/scratch search 3", pytest.approx(0.0023))], "the two bests are one config"
    assert plan.journal.trials("c/pretrained")[0].origin == "warm start: may, b/pretrained search 3"


def test_a_study_that_is_not_there_is_bad_input(tmp_path: Path) -> None:
    plan = begin(tmp_path / "now", warm_spec(warm_start_from={"studies": [str(tmp_path / "never")]}))
    with pytest.raises(BadInput, match="holds no study to begin from"):
        plan.next_trial(suggest)


def test_what_the_space_does_not_hold_is_left_out_and_drawn_here(tmp_path: Path) -> None:
    studies = [earlier_study(tmp_path / "may")]  # its best: rate 0.0023, filter 3
    space = {RATE: {"low": 1e-4, "high": 1e-3, "log": True}, FILTER: {"choices": [3, 5]}, "model.dropout": {"low": 0.0, "high": 0.5}}
    plan = begin(tmp_path / "now", warm_spec(warm_start_from={"studies": studies}, space=space))
    suggestions = Suggestions(plan.journal, sqlite_url(tmp_path / "optuna.sqlite3"), study="now", seed=0)
    trial = plan.next_trial(suggestions.suggest)
    assert trial is not None
    assert noted_priors(plan.journal, trial.cell)[0].config == {FILTER: 3}
    assert trial.config[FILTER] == 3
    assert 1e-4 <= trial.config[RATE] <= 1e-3
    assert 0 <= trial.config["model.dropout"] <= 0.5
    assert trial.origin == "warm start: may, b/pretrained search 3"


def test_the_ledger_counts_what_the_searches_elsewhere_had_cost_each_once(tmp_path: Path) -> None:
    plan = begin(tmp_path, warm_spec())
    finish(plan)
    for arm in ("pretrained", "scratch"):
        ledgers = {domain: cell_ledger(plan, plan.cells[f"{domain}/{arm}"]) for domain in "abc"}
        assert [ledgers[domain]["prior_trials"] for domain in "abc"] == [0, 6, 12]
        assert [ledgers[domain]["prior_epochs"] for domain in "abc"] == [0, 12, 24]
        assert {ledger["search_trials_used"] for ledger in ledgers.values()} == {6}, "a prior's trial counts in the budget"


def test_a_failed_search_passes_nothing_on_and_keeps_nobody_waiting(tmp_path: Path) -> None:
    plan = begin(tmp_path, warm_spec())
    while trial := plan.next_trial(suggest):
        if trial.cell == "a/scratch":
            plan.journal.end(trial.trial_key, "failed", reason="broken")
        else:
            end(plan, trial)
    assert plan.done()
    assert {origin for origin, _ in searches(plan, "b/scratch")} == {None}
    assert searches(plan, "c/scratch")[0][0] == "warm start: b/scratch search 3"


def test_the_blend_is_a_mean_on_the_parameters_scale_and_the_commonest_choice() -> None:
    space = {
        "rate": Parameter(1e-4, 1e-1, log=True),
        "drop": Parameter(0.0, 0.6),
        "count": Parameter(1, 9, integer=True),
        "size": Parameter(choices=(2, 4, 8)),
        "rare": Parameter(0.0, 1.0, when={"size": (8,)}),
    }
    configs: list[dict[str, Any]] = [
        {"rate": 1e-3, "drop": 0.1, "count": 2, "size": 8, "rare": 0.25},
        {"rate": 1e-2, "drop": 0.3, "count": 3, "size": 4},
        {"rate": 1e-1, "drop": 0.2, "count": 8, "size": 4},
    ]
    found = [Prior(config, f"warm start: {number}", 10, 100) for number, config in enumerate(configs)]
    blend, *rest = blended(found, space)
    assert blend.config == {"rate": pytest.approx(1e-2), "drop": pytest.approx(0.2), "count": 4, "size": 4, "rare": 0.25}
    assert (blend.origin, blend.trials, blend.epochs) == ("warm start: blend of 0, 1, 2", 30, 300)
    assert rest == found
    assert blended(found[:1], space) == found[:1]
    assert blended([found[0], found[0]], space) == found[:1]
    assert blended([], space) == []
