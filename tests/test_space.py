"""Facts about search spaces: conditions hold in what is drawn, and what Optuna draws survives a new driver."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from test_state import SPEC, begin, row, spec

from mmm4rec.config import from_dict
from mmm4rec.errors import BadInput
from mmm4rec.models.mmm4rec import ModelConfig
from studies.plan import Plan
from studies.space import Parameter, broken_condition, walk, within
from studies.spec import load_spec
from studies.study import check
from studies.suggestions import Suggestions, sqlite_url
from studies.transfer_sweep import main

LOSS = Parameter(choices=("full", "sampled"))
NEGATIVES = Parameter(low=64, high=1024, log=True, integer=True, when={"training.loss": ("sampled",)})
POWER = Parameter(low=0.0, high=1.0, when={"training.negatives": (64,)})
CONDITIONAL = {"training.loss": LOSS, "training.negatives": NEGATIVES, "training.negative_power": POWER}
SEARCHED = {
    "training.loss": {"choices": ["full", "sampled", "in_batch"]},
    "training.negatives": {"low": 64, "high": 1024, "log": True, "integer": True, "when": {"training.loss": ["sampled"]}},
    "training.negative_power": {"low": 0.0, "high": 1.0, "when": {"training.loss": ["sampled"]}},
}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"training.loss": "full", "training.negatives": 64}, ["training.loss"]),
        ({"training.loss": "sampled", "training.negatives": 65}, ["training.loss", "training.negatives"]),
        ({"training.loss": "sampled", "training.negatives": 64, "training.negative_power": 0.5}, list(CONDITIONAL)),
    ],
)
def test_a_parameter_is_drawn_where_its_condition_holds_and_not_where_its_parent_is_absent(values: dict, expected: list[str]) -> None:
    asked = []

    def value_of(name: str, parameter: Parameter) -> object:
        asked.append(name)
        return values[name]

    assert walk(CONDITIONAL, value_of) == {name: values[name] for name in expected}
    assert asked == expected


def test_all_conditions_of_a_parameter_must_hold() -> None:
    space = {"a": Parameter(choices=(1, 2)), "b": Parameter(choices=(1, 2)), "c": Parameter(0, 1, when={"a": (1,), "b": (2,)})}
    drawn = {(a, b): "c" in walk(space, lambda name, _, a=a, b=b: {"a": a, "b": b, "c": 0.5}[name]) for a in (1, 2) for b in (1, 2)}
    assert [pair for pair, has in drawn.items() if has] == [(1, 2)]


def test_a_condition_names_an_earlier_parameter_and_values_that_it_can_have() -> None:
    assert broken_condition(CONDITIONAL) is None
    late = {"training.negatives": NEGATIVES, "training.loss": LOSS}
    assert broken_condition(late) == "'training.negatives' depends on 'training.loss', which is not searched before it."
    never = {"training.loss": Parameter(choices=("full",)), "training.negatives": NEGATIVES}
    assert broken_condition(never) == "'training.negatives' depends on 'training.loss' being 'sampled', which it never is."
    outside = {**CONDITIONAL, "training.negative_power": Parameter(0.0, 1.0, when={"training.negatives": (2048,)})}
    assert "being 2048" in (broken_condition(outside) or "")
    itself = {"a": Parameter(0, 1, when={"a": (1,)})}
    assert "'a' depends on 'a'" in (broken_condition(itself) or "")


def test_what_a_range_and_choices_hold() -> None:
    whole, real, choice = Parameter(1, 8, integer=True), Parameter(0.1, 1.0, log=True), Parameter(choices=(2, "x", False))
    assert [value for value in (0, 1, 2.0, 2.5, 8, 9, True, "3") if whole.holds(value)] == [1, 2.0, 8]
    assert [value for value in (0, 0.1, 1, 1.1, None) if real.holds(value)] == [0.1, 1]
    assert [value for value in (2, "x", False, 3, "y", None) if choice.holds(value)] == [2, "x", False]
    assert within({"a": whole, "b": real}, {"a": 9, "b": 0.5, "c": 1}) == {"b": 0.5}
    assert all(isinstance(end, int) for end in whole.ends())


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"low": 1.5, "high": 4, "integer": True}, "whole numbers"),
        ({"choices": [1, 2], "integer": True}, "whole numbers"),
        ({"low": 0, "high": 1, "log": True}, "above 0"),
        ({"choices": [1, 1]}, "must differ"),
        ({"choices": []}, "must be one"),
        ({"low": 0, "high": 1, "choices": [0]}, "either low and high, or choices"),
    ],
)
def test_a_parameter_that_cannot_be_searched_is_refused(told: dict, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        spec(space={"training.learning_rate": told})


@pytest.mark.parametrize(
    ("when", "message"),
    [
        ({"training.los": ["sampled"]}, r"cell 'a/scratch' is wrong: .* depends on 'training.los', which is not searched before it"),
        ({"training.loss": ["other"]}, "being 'other', which it never is"),
    ],
)
def test_a_broken_condition_is_bad_input_before_anything_runs(tmp_path: Path, when: dict, message: str) -> None:
    space = {**SEARCHED, "training.negatives": {**SEARCHED["training.negatives"], "when": when}}
    with pytest.raises(BadInput, match=message):
        begin(tmp_path, spec(space=space, cells=[{"domains": ["a"], "arms": ["scratch"]}]))


def test_an_arm_that_takes_the_parent_away_must_take_the_child_too(tmp_path: Path) -> None:
    alone: dict = {"space": SEARCHED, "cells": [{"domains": ["a"], "arms": ["x"]}]}
    with pytest.raises(BadInput, match=r"depends on 'training\.loss'"):
        begin(tmp_path, spec(arms={"x": {"space": {"training.loss": None}}}, **alone))
    plan = begin(tmp_path, spec(arms={"x": {"space": dict.fromkeys(SEARCHED) | {"model.dropout": {"low": 0, "high": 0.5}}}}, **alone))
    assert list(plan.cells["a/x"].space) == ["model.dropout"]


def search(path: Path, trials: int) -> tuple[Plan, Suggestions]:
    """A plan whose one cell has searched the conditional space so far with Optuna; many negatives are good."""
    wanted = spec(space=SEARCHED, cells=[{"domains": ["a"], "arms": ["scratch"]}], budget={**SPEC["budget"], "search_trials": 40})
    plan = begin(path, wanted)
    suggestions = Suggestions(plan.journal, sqlite_url(path / "optuna.sqlite3"), study="tiny", seed=0)
    for _ in range(trials):
        trial = plan.next_trial(suggestions.suggest)
        assert trial is not None
        plan.journal.add_report(trial.trial_key, row(1, 0.0), trial.config.get("training.negatives", 0) / 1024)
        plan.journal.end(trial.trial_key, "finished", result={})
        suggestions.tell(plan.cells["a/scratch"], plan.journal.trial(trial.trial_key))
    return plan, suggestions


def test_optuna_draws_conditional_parameters_and_a_rebuilt_study_holds_the_same_trials(tmp_path: Path) -> None:
    plan, suggestions = search(tmp_path, 16)
    cell = plan.cells["a/scratch"]
    configs = [trial.config for trial in plan.journal.trials()]
    for config in configs:
        names = list(SEARCHED) if config["training.loss"] == "sampled" else ["training.loss"]
        assert list(config) == names
        assert isinstance(config.get("training.negatives", 64), int)
    assert {len(config) for config in configs} == {1, 3}

    def held() -> list[tuple]:
        (summary,) = optuna.get_all_study_names(sqlite_url(tmp_path / "optuna.sqlite3"))
        study = optuna.load_study(study_name=summary, storage=sqlite_url(tmp_path / "optuna.sqlite3"))
        return [(trial.number, trial.params, trial.distributions, trial.value, trial.state) for trial in study.get_trials()]

    before, following = held(), suggestions.suggest(cell, 16, {})
    assert [params for _, params, *_ in before] == configs
    again = Suggestions(plan.journal, sqlite_url(tmp_path / "optuna.sqlite3"), study="tiny", seed=0)
    assert again.suggest(cell, 16, {}) == following, "a new driver's sampler goes on as the old one would have"
    assert held()[:16] == before


def test_a_given_value_is_taken_and_the_rest_is_drawn(tmp_path: Path) -> None:
    plan, suggestions = search(tmp_path, 0)
    config = suggestions.suggest(plan.cells["a/scratch"], 0, {"training.loss": "sampled", "training.negatives": 100})
    assert (config["training.loss"], config["training.negatives"]) == ("sampled", 100)
    assert 0 <= config["training.negative_power"] <= 1
    config = suggestions.suggest(plan.cells["a/scratch"], 1, {"training.loss": "full", "training.negatives": 100})
    assert config == {"training.loss": "full"}, "what has no place in the space under these values is not drawn"


@pytest.mark.parametrize(
    ("name", "cells", "confirm"), [("paper", 5 * 17, 5 * (14 * 5 + 3)), ("ablation", 3 * 9, 3 * 9 * 5)], ids=["paper", "ablation"]
)
def test_every_run_that_the_specs_of_the_paper_can_ask_for_is_a_valid_one(
    name: str, cells: int, confirm: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--spec", name, "--dry-run"]) == 0
    assert f"{cells} cells, " in (told := capsys.readouterr().out)
    assert f" search and {confirm} confirm trials" in told
    spaces = {cell.name: cell.space for cell in check(load_spec(name))}
    timeless = {cell for cell, space in spaces.items() if space and "model.filter_size" not in space}
    assert {cell.rpartition("/")[2] for cell in timeless} == {"no_time", "no_filter", "no_cross", "text_only", "image_only"}


def test_the_papers_learning_rate_and_whole_filter_lie_in_the_papers_space() -> None:
    cells = {cell.name: cell for cell in check(load_spec("paper"))}
    cell = cells["Scientific/pretrained"]
    model, pretrained = from_dict(ModelConfig, cell.run["model"], source="test"), load_spec("paper").pretrain
    assert within(cell.space, {"training.learning_rate": 1e-4, "model.filter_size": model.frequencies}).keys() == cell.space.keys()
    assert (model.width, model.layers, model.max_len, model.dropout) == (256, 1, 20, 0.4)
    assert pretrained is not None
    assert pretrained.model == {"layers": 2}
    assert (cell.run["training"]["batch_size"], cell.run["training"]["accumulation"]) == (1024, 8)
