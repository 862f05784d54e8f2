"""Facts about the spec, the journal and the plan: what a study does next, without Ray."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from pathlib import Path

import pytest

from mmm4rec.config import from_dict
from mmm4rec.errors import BadInput
from studies.cells import Cell, Source, build_cells
from studies.plan import Plan, survives
from studies.spec import Budget, Spec, load_spec
from studies.state import Journal, Trial, locked

SPACE = {
    "training.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
    "model.filter_size": {"choices": [3, 5]},
}
SPEC = {
    "study": "tiny",
    "domains": {"demo": True},
    "pretrain": {"sources": ["s"]},
    "space": SPACE,
    "arms": {
        "pretrained": {"init": "pretrained"},
        "scratch": {},
        "no_time": {"model": {"time": False}},
        "popularity": {"recommender": "popularity"},
    },
    "cells": [{"domains": ["a", "b"], "arms": ["pretrained", "scratch"]}],
    "budget": {"search_trials": 6, "epochs": 9, "grace_epochs": 1, "reduction": 3, "confirm_seeds": 2},
}


def spec(**changes: object) -> Spec:
    return from_dict(Spec, {**SPEC, **changes}, source="test")


def cells_of(wanted: Spec, *, timestamps: bool = True) -> tuple[Cell, ...]:
    return build_cells(wanted, {name: Source(f"/{name}", f"print-{name}", timestamps) for name in "ab"})[0]


def row(epoch: int, value: float) -> dict:
    return {
        "epoch": epoch,
        "optimizer_steps": 10 * epoch,
        "train_loss": 1.0,
        "train_seconds": 1.0,
        "valid_seconds": 0.1,
        "valid": {"ndcg@10": value},
    }


def begin(path: Path, wanted: Spec) -> Plan:
    journal, cells = Journal(path / "study.sqlite3"), cells_of(wanted)
    journal.add_cells([cell.name for cell in cells])
    return Plan(journal, cells, wanted.budget, wanted.seed)


def drive(
    plan: Plan, curves: dict[tuple[str, str, int], list[float]], *, concurrent: int, seed: int, stop_after: int | None = None
) -> list[tuple]:
    """Run the plan without training: trials tell prepared curves in a random order. Returns what was told, in order."""
    order, running, told = random.Random(seed), [], []
    while stop_after is None or len(told) < stop_after:
        while len(running) < concurrent and (
            trial := plan.next_trial(lambda cell, number, given: {"training.learning_rate": 0.001 * (number + 1)})
        ):
            running.append((trial, iter(enumerate(curves[trial.cell, trial.phase, trial.number], start=1))))
        if not running:
            return told
        entry = order.choice(running)
        trial, (epoch, value) = entry[0], next(entry[1])
        keep = plan.report(trial.trial_key, row(epoch, value))
        told.append((trial, epoch, value, keep))
        if keep and epoch == len(curves[trial.cell, trial.phase, trial.number]):
            plan.journal.end(trial.trial_key, "finished", result={"best_epoch": 1})
        elif keep:
            continue
        running.remove(entry)
    return told


def random_curves(plan: Plan, seed: int) -> dict[tuple[str, str, int], list[float]]:
    """Rising curves with ties among them; some end early, as patience makes them."""
    draw = random.Random(seed)
    numbers = itertools.product(plan.cells, ("search", "confirm"), range(10))
    return {key: [round(draw.random(), 1) for _ in range(draw.choice((2, 5, 9)))] for key in numbers}


def test_trial_key_names_cell_config_seed_and_phase_and_not_the_place_on_disk() -> None:
    cell = cells_of(spec())[0]
    moved = build_cells(spec(), {name: Source(f"/elsewhere/{name}", f"print-{name}", True) for name in "ab"})[0][0]
    key = cell.trial_key({"x": 0.1}, 3, "search")
    assert key == moved.trial_key({"x": 0.1}, 3, "search")
    changed = [cell.trial_key({"x": 0.2}, 3, "search"), cell.trial_key({"x": 0.1}, 4, "search"), cell.trial_key({"x": 0.1}, 3, "confirm")]
    changed += [other.trial_key({"x": 0.1}, 3, "search") for other in cells_of(spec())[1:]]
    assert len({key, *changed}) == 7


@pytest.mark.parametrize("seed", range(5))
def test_pruning_is_asynchronous_halving_within_the_cell(tmp_path: Path, seed: int) -> None:
    plan = begin(tmp_path, spec())
    told = drive(plan, random_curves(plan, seed), concurrent=3, seed=seed)
    seen: dict[str, dict[str, list[float]]] = defaultdict(dict)  # cell -> trial -> values so far
    ended: set[str] = set()
    curves = random_curves(plan, seed)
    for trial, epoch, value, keep in told:
        if trial.phase == "confirm":
            assert keep
            continue
        mine = seen[trial.cell]
        mine.setdefault(trial.trial_key, []).append(value)
        rung = [max(values[:epoch]) for key, values in mine.items() if len(values) >= epoch or key in ended]
        better = sum(other > max(mine[trial.trial_key]) for other in rung)
        assert keep == (epoch not in (1, 3) or better < max(1, len(rung) // 3))
        if keep and epoch == len(curves[trial.cell, "search", trial.number]):
            ended.add(trial.trial_key)
    assert any(not keep for *_, keep in told)


def test_a_tie_survives_and_a_lone_trial_does() -> None:
    assert survives(0.5, [0.5], 3)
    assert survives(0.5, [0.5, 0.5, 0.5], 3)
    assert not survives(0.4, [0.5, 0.4], 3)
    assert survives(0.4, [0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0, 0.0, 0.0], 3)
    assert not survives(None, [0.5, None], 3)


def test_an_early_stopped_trial_counts_in_later_rungs(tmp_path: Path) -> None:
    plan = begin(tmp_path, spec(cells=[{"domains": ["a"], "arms": ["scratch"]}]))
    first, second = (plan.next_trial(lambda cell, number, given: {"n": number}) for _ in range(2))
    assert first is not None
    assert second is not None
    assert plan.report(first.trial_key, row(1, 0.9))
    plan.journal.end(first.trial_key, "finished", result={})
    plan.journal.add_report(second.trial_key, row(1, 0.1), 0.1)
    plan.journal.add_report(second.trial_key, row(2, 0.2), 0.2)
    assert not plan.report(second.trial_key, row(3, 0.3))  # epoch 3 is a rung that only the second trial reached
    assert plan.journal.trial(second.trial_key).outcome == "pruned"


def test_told_again_a_curve_changes_nothing(tmp_path: Path) -> None:
    plan = begin(tmp_path, spec())
    told = drive(plan, random_curves(plan, 0), concurrent=3, seed=0)
    facts = [(trial, plan.journal.reports(trial.trial_key)) for trial in plan.journal.trials()]
    for trial, epoch, _, keep in told:
        assert plan.report(trial.trial_key, row(epoch, 0.0)) == keep
        plan.journal.end(trial.trial_key, "failed", reason="too late")
    assert facts == [(trial, plan.journal.reports(trial.trial_key)) for trial in plan.journal.trials()]


def test_a_study_has_its_trials_and_fresh_confirm_seeds(tmp_path: Path) -> None:
    plan = begin(tmp_path, spec())
    drive(plan, random_curves(plan, 1), concurrent=2, seed=1)
    assert plan.done()
    assert plan.cells_done() == 4
    seeds = {(cell, phase): [t.seed for t in plan.journal.trials(cell, phase)] for cell in plan.cells for phase in ("search", "confirm")}
    assert all(len(seeds[cell, "search"]) == 6 and len(seeds[cell, "confirm"]) == 2 for cell in plan.cells)
    searched = {seed for (_, phase), found in seeds.items() if phase == "search" for seed in found}
    confirmed = {tuple(found) for (_, phase), found in seeds.items() if phase == "confirm"}
    assert len(confirmed) == 1, "arms are compared on the same seeds"
    assert not searched & set(*confirmed)


def test_the_config_is_chosen_by_the_best_validation_value_and_ties_go_to_the_earlier_trial(tmp_path: Path) -> None:
    plan = begin(tmp_path, spec(cells=[{"domains": ["a"], "arms": ["scratch"]}], budget={**SPEC["budget"], "search_trials": 4}))
    (cell,) = plan.cells.values()
    trials = [plan.next_trial(lambda cell, number, given: {"n": number}) for _ in range(4)]
    for trial, value, outcome in zip(trials, (0.9, 0.5, 0.5, 0.4), ("failed", "finished", "finished", "finished"), strict=True):
        assert trial is not None
        plan.journal.add_report(trial.trial_key, row(2, value), value)
        plan.journal.end(trial.trial_key, outcome, result={"test": {"ndcg@10": 1.0 - value}})
    confirm = plan.next_trial(lambda cell, number, given: {})
    assert confirm is not None
    assert (confirm.phase, confirm.config) == ("confirm", {"n": 1})
    assert plan.journal.chosen(cell.name) == {"n": 1}


def test_a_cell_whose_search_all_failed_ends_and_the_study_goes_on(tmp_path: Path) -> None:
    plan = begin(tmp_path, spec(cells=[{"domains": ["a"], "arms": ["scratch"]}]))
    while trial := plan.next_trial(lambda cell, number, given: {"n": number}):
        plan.journal.end(trial.trial_key, "failed", reason="broken")
    assert plan.done()
    assert plan.journal.trials(phase="confirm") == []


@pytest.mark.parametrize("stop_after", [1, 7, 20, 35])
def test_a_new_driver_takes_up_what_runs_and_repeats_nothing_that_ended(tmp_path: Path, stop_after: int) -> None:
    plan = begin(tmp_path, spec())
    curves = random_curves(plan, 2)
    drive(plan, curves, concurrent=2, seed=2, stop_after=stop_after)
    ended = {trial.trial_key: trial for trial in plan.journal.trials() if trial.outcome != "running"}
    running = [trial.trial_key for trial in plan.journal.trials() if trial.outcome == "running"]
    plan.journal.close()

    again = begin(tmp_path, spec())
    first = [again.next_trial(lambda cell, number, given: {}) for _ in running]
    assert [trial and trial.trial_key for trial in first] == running
    again = begin(tmp_path, spec())
    drive(again, curves, concurrent=2, seed=3)
    assert again.done()
    assert len(again.journal.trials()) == 4 * (6 + 2)
    assert all(again.journal.trial(key) == trial for key, trial in ended.items())
    for trial in again.journal.trials():
        assert [report.epoch for report in again.journal.reports(trial.trial_key)] == list(
            range(1, len(again.journal.reports(trial.trial_key)) + 1)
        )


def test_a_changed_fact_is_told_key_by_key_and_nothing_changes_before_it_is_pinned(tmp_path: Path) -> None:
    journal = begin(tmp_path, spec()).journal
    assert journal.change("spec", {"seed": 1}) == ""
    journal.pin("spec", {"seed": 1, "model": {"width": 8}})
    assert journal.change("spec", {"model": {"width": 8}, "seed": 1}) == ""
    told = {"seed": 1, "model": {"width": 16}}
    assert journal.change("spec", told) == journal.change("spec", told) == "  model.width: 8 then, 16 now\n"
    journal.pin("spec", told)
    assert journal.change("spec", told) == ""


def test_only_one_process_works_on_a_study(tmp_path: Path) -> None:
    with locked(tmp_path / ".lock", wait=False), pytest.raises(BadInput, match="another process"), locked(tmp_path / ".lock", wait=False):
        pass


def test_a_domain_without_timestamps_turns_time_off_and_searches_no_filter() -> None:
    cells, warnings = build_cells(spec(), {"a": Source("/a", "", False), "b": Source("/b", "", True)})
    by_name = {cell.name: cell for cell in cells}
    assert by_name["a/scratch"].run["model"]["time"] is False
    assert list(by_name["a/scratch"].space) == ["training.learning_rate"]
    assert list(by_name["b/scratch"].space) == list(SPACE)
    assert len(warnings) == 1
    assert "'a' has no timestamps" in warnings[0]


def test_an_arm_that_searches_a_filter_it_has_not_is_refused() -> None:
    arms = {"no_time": {"model": {"time": False}, "space": {"model.filter_size": {"choices": [3]}}}}
    with pytest.raises(BadInput, match=r"searches model\.filter_size"):
        cells_of(spec(arms=arms, cells=[{"domains": ["a"], "arms": ["no_time"]}]))


def test_a_cell_without_a_fourier_filter_searches_no_filter_size() -> None:
    arms = {"text": {"model": {"modalities": "text"}}, "add": {"model": {"cross": "add"}}, "sum": {"model": {"filter": False}}}
    for cell in cells_of(spec(arms=arms, cells=[{"domains": ["a"], "arms": list(arms)}])):
        assert list(cell.space) == ["training.learning_rate"]


def test_a_domain_that_was_pre_trained_on_is_no_target() -> None:
    with pytest.raises(BadInput, match="pre-trains on 'a', test targets included"):
        cells_of(spec(pretrain={"sources": ["a"]}))
    twins = {"s": Source("/s", "same", True), "a": Source("/a", "same", True), "b": Source("/b", "other", True)}
    with pytest.raises(BadInput, match="pre-trains on 's', test targets included, and has cells of it as 'a'"):
        build_cells(spec(), twins)


def test_an_arm_takes_a_parameter_away_or_changes_it_and_a_baseline_searches_nothing() -> None:
    arms = {
        "x": {"space": {"model.filter_size": None, "model.dropout": {"low": 0, "high": 0.5}}},
        "popularity": {"recommender": "popularity"},
    }
    x, popularity = cells_of(spec(arms=arms, cells=[{"domains": ["a"], "arms": ["x", "popularity"]}]))
    assert list(x.space) == ["training.learning_rate", "model.dropout"]
    assert (popularity.space, popularity.search_trials, popularity.confirm_seeds) == ({}, 0, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": "red"}, "unknown key colour"),
        ({"budget": {"trials": 3}}, "unknown key trials"),
        ({"cells": [{"domains": ["a"], "arms": ["other"]}]}, "unknown arm other"),
        ({"cells": [{"domains": ["a", "a"], "arms": ["scratch"]}]}, "none twice"),
        ({"space": {"model.dropout": {"low": 0.5, "high": 0.1}}}, "must rise"),
        ({"space": {"model.dropout": {"low": 0.5}}}, "low and high, or choices"),
        ({"training": {"epochs": 3}}, "budget.epochs"),
        ({"pretrain": None}, "no `pretrain`"),
        ({"domains": {"demo": False}}, "demo: true"),
    ],
)
def test_a_wrong_spec_is_refused_with_the_rule(changes: dict, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        spec(**changes)


def test_a_spec_is_found_by_name_and_an_unknown_one_names_the_known() -> None:
    assert load_spec("demo").study == "demo"
    with pytest.raises(BadInput, match="demo"):
        load_spec("no_such_spec")


def test_rungs_lie_below_the_budget() -> None:
    assert Budget(epochs=27, grace_epochs=1, reduction=3).rungs() == (1, 3, 9)
    assert Budget(epochs=28, grace_epochs=1, reduction=3).rungs() == (1, 3, 9, 27)
    assert Budget(epochs=2, grace_epochs=2).rungs() == ()


def test_a_trial_reads_back_as_it_was_noted(tmp_path: Path) -> None:
    plan = begin(tmp_path, spec())
    cell = next(iter(plan.cells.values()))
    trial = plan.journal.start(cell, "search", 0, 7, {"training.learning_rate": 0.1})
    plan.journal.end(trial.trial_key, "finished", result={"test": {"mrr": 0.1}})
    back = plan.journal.trial(trial.trial_key)
    assert isinstance(back, Trial)
    assert (back.seed, back.config, back.result, back.outcome) == (7, {"training.learning_rate": 0.1}, {"test": {"mrr": 0.1}}, "finished")
