"""A study as its tracked runs tell it: cells with their search and confirm trials. All tables and figures are made from this.

The study may be running: what it has finished is there, and reading holds it up nowhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from mmm4rec.errors import BadInput
from mmm4rec.tracking import mlflow_name
from mmm4rec.training.metrics import METRIC_NAMES
from studies.runs import Runs

METRICS = METRIC_NAMES
DEFAULT_METRIC = "ndcg@10"  # of validation, of studies whose runs do not name theirs
DATA = ("tags.mmm4rec.users", "tags.mmm4rec.items", "tags.mmm4rec.split")
PROTOCOL = {"split": "splits", "metrics": "definitions of metrics"}  # tags that must agree over a study


@dataclass(frozen=True)
class UserRanks:
    """The test ranks of a run, by user."""

    users: np.ndarray  # [U] the domain's user numbers
    rank: np.ndarray  # [U] from 1; halves are ties


@dataclass(frozen=True)
class TrackedTrial:
    """A finished confirm trial."""

    run_id: str
    seed: int
    fingerprint: str
    test: Mapping[str, float]  # by our metric names
    best_valid: float  # of the study's metric
    best_steps: int  # optimizer steps to the best epoch
    best_epoch: int
    curve: tuple[tuple[int, float], ...]  # (optimizer steps, validation value), by steps
    epochs: tuple[int, ...] = ()  # of the curve's points
    seconds: tuple[float, ...] = ()  # of training and validation, until then
    params: Mapping[str, str] = field(default_factory=dict)
    checkpoint: str = ""  # the hash of the weights that it began from; empty: none
    url: str = ""  # of its page on a tracking server


@dataclass(frozen=True)
class SearchTrial:
    """A search trial that is over: what it tried and what came of it."""

    run_id: str
    number: int
    pruned: bool
    config: Mapping[str, str]  # of the searched parameters
    value: float  # its best validation value
    epochs: int


@dataclass(frozen=True)
class TrackedCell:
    """A cell with its finished confirm trials, by seed."""

    domain: str
    arm: str
    init: str
    besides_init: str  # equal where two arms of a domain differ in nothing but init
    search_trials: int
    epochs: int  # the budget
    baseline: str | None  # the arm that the study's spec compares the others with
    trials: tuple[TrackedTrial, ...]
    ledger: Mapping[str, float] = field(default_factory=dict)  # what the cell was given and has used, by name
    searched: tuple[SearchTrial, ...] = ()  # by number
    space: Mapping[str, Any] = field(default_factory=dict)  # parameter: [low, high, log, choices]
    metric: str = DEFAULT_METRIC  # of validation: of its curves, and what it was chosen by
    users: int | None = None  # of the domain
    items: int | None = None
    split: str | None = None

    @property
    def name(self) -> str:
        return f"{self.domain}/{self.arm}"

    @property
    def trains(self) -> bool:
        """Whether it took optimizer steps. What took none gives the same numbers under every seed."""
        steps = [steps for trial in self.trials for steps, _ in trial.curve]
        return max(steps) > 0 if steps else self.search_trials > 0

    def of_first(self, name: str) -> str | None:
        """A parameter of its confirm trials, as text; None where they do not tell it."""
        return self.trials[0].params.get(name) if self.trials else None

    @property
    def ids(self) -> str:
        """Whether its model has item ids: on, off, or - where its trials do not tell."""
        return {"True": "on", "False": "off"}.get(self.of_first("model.ids") or "", "-")

    @property
    def patience(self) -> int | None:
        told = self.of_first("training.patience")
        return int(told) if told is not None and told.isdigit() else None


@dataclass(frozen=True)
class Pretraining:
    """What the pre-training of a study took, before any of its arms began."""

    optimizer_steps: int
    best_steps: int  # of them, until the epoch whose weights the arms start from
    epochs: int
    seconds: float  # of training and validation


@dataclass(frozen=True)
class TrackedStudy:
    """All of a study that is tracked."""

    name: str
    cells: tuple[TrackedCell, ...]  # in the spec's order
    pretraining: Pretraining | None = None  # None: it had none of its own, or it has not ended


ReadRanks = Callable[[TrackedTrial], UserRanks | None]


def read_study(source: Runs) -> TrackedStudy:
    """The study in the runs.

    Raises BadInput where there is no cell yet, where one trial has two runs, and where runs of one domain have other
    fingerprints, splits or metrics: their numbers do not mean the same and stand in no common table.
    """
    runs = source.runs
    runs = runs if "tags.mmm4rec.phase" in runs else runs.assign(**{"tags.mmm4rec.phase": None})
    phases, outcomes = runs["tags.mmm4rec.phase"], _column(runs, "tags.mmm4rec.outcome")
    whole = runs["status"] != "RUNNING"  # it is told last; a store that is written to may show a run's tags before its metrics
    cells = runs[(phases == "cell") & (outcomes != "superseded")]
    cells = cells[[_fact(row, "position") is not None for row in _rows(cells)]]  # a run's facts are written after it
    if cells.empty:
        raise BadInput("the store has no cell of this study yet.", remedy="Run the study first, or correct its folder or --store.")
    confirmed = runs[(phases == "confirm") & (outcomes == "finished") & whole]
    searched = runs[(phases == "search") & outcomes.isin(["finished", "pruned"]) & whole]
    _check(confirmed)
    metrics = sorted(set(_column(cells, "tags.mmm4rec.metric").fillna(DEFAULT_METRIC)))
    ours = pd.concat([confirmed, searched])
    curves = _curves(source, list(ours["run_id"]), metrics)
    ordered = cells.assign(position=[int(_fact(row, "position")) for row in _rows(cells)]).sort_values("position")
    trials = {name: _rows(part) for name, part in confirmed.groupby("tags.mmm4rec.cell")}
    tried = {name: _rows(part) for name, part in searched.groupby("tags.mmm4rec.cell")}
    read = tuple(
        _cell(row, trials.get(key, []), tried.get(key, []), curves) for row in _rows(ordered) for key in [row["tags.mmm4rec.cell"]]
    )
    return TrackedStudy(
        str(cells.iloc[0]["experiment"]), read, _pretraining(source, runs[(phases == "pretrain") & (outcomes == "finished")])
    )


def ranks_reader(source: Runs) -> ReadRanks:
    """Reads a trial's test ranks, each once."""
    kept: dict[str, UserRanks | None] = {}

    def read(trial: TrackedTrial) -> UserRanks | None:
        if trial.run_id not in kept:
            table = source.ranks(trial.run_id)
            test = None if table is None else table[table["split"] == "test"]
            kept[trial.run_id] = None if test is None else UserRanks(test["user"].to_numpy(), test["rank"].to_numpy(dtype=np.float64))
        return kept[trial.run_id]

    return read


Row = dict[str, Any]
Curve = list[tuple[int, float, int, float]]  # (steps, value, epoch, seconds)
Curves = dict[tuple[str, str], Curve]  # by run and metric


def _rows(table: pd.DataFrame) -> list[Row]:
    """Rows as dictionaries, without what is missing."""
    return [{str(key): value for key, value in row.items() if not pd.isna(value)} for row in table.to_dict("records")]


def _column(table: pd.DataFrame, name: str) -> pd.Series[Any]:
    return table[name] if name in table else pd.Series(None, index=table.index, dtype=object)


def _fact(row: Row, name: str, default: Any = None) -> Any:
    """What a run says of its cell. Earlier versions wrote parameters instead of tags."""
    return row.get(f"tags.mmm4rec.{name}", row.get(f"params.{name}", default))


def _check(confirmed: pd.DataFrame) -> None:
    """Refuse runs that must not stand side by side. Runs of versions that did not name split and metrics had those of today."""
    by_key: dict[str, Row] = {}
    first: dict[tuple[str, str], Row] = {}
    for row in _rows(confirmed):
        twin = by_key.setdefault(row["tags.mmm4rec.trial_key"], row)
        if twin is not row:
            rule = f"trial {row['tags.mmm4rec.trial_key']} has two runs: {twin['run_id']} and {row['run_id']}."
            raise BadInput(rule, remedy="Delete one of them in MLflow.")
        for name, among in ({"fingerprint": f"domain '{row['tags.mmm4rec.domain']}'"} | dict.fromkeys(PROTOCOL, "the study")).items():
            if (told := row.get(f"tags.mmm4rec.{name}")) is None:
                continue
            other = first.setdefault((among, name), row)
            if (before := other[f"tags.mmm4rec.{name}"]) != told:
                rule = (
                    f"{among} had two {PROTOCOL.get(name, 'fingerprints')}: {before} in run {other['run_id']} ({other['name']}),"
                    f" {told} in run {row['run_id']} ({row['name']})."
                )
                raise BadInput(rule, remedy="Their numbers cannot be compared: run both on the same prepared domain.")


def _curves(source: Runs, run_ids: list[str], metrics: list[str]) -> Curves:
    """The curves of runs, by steps; a value that came twice for a step stands once, the later one."""
    names = {mlflow_name(f"valid {metric}"): metric for metric in metrics}
    table = source.curves(run_ids, [*names, "epoch", "seconds"])
    wide = table.drop_duplicates(["run_id", "metric", "step"], keep="last").pivot(
        index=["run_id", "step"], columns="metric", values="value"
    )
    wide = wide.reset_index().sort_values(["run_id", "step"])
    curves: Curves = {}
    for name, metric in names.items():
        if name not in wide:
            continue
        told = wide[wide[name].notna()]
        epochs, seconds = (_column(told, column).astype(float).fillna(0.0) for column in ("epoch", "seconds"))
        for run, *point in zip(told["run_id"], told["step"], told[name], epochs, seconds, strict=True):
            curves.setdefault((run, metric), []).append((int(point[0]), float(point[1]), int(point[2]), float(point[3])))
    return curves


def _cell(row: Row, trials: list[Row], tried: list[Row], curves: Curves) -> TrackedCell:
    metric = str(_fact(row, "metric", DEFAULT_METRIC))
    space = json.loads(_fact(row, "space", "{}"))
    confirmed = [_trial(trial, curves.get((trial["run_id"], metric), []), metric) for trial in trials]
    searched = [_search_trial(trial, curves.get((trial["run_id"], metric), []), space) for trial in tried]
    users, items, split = (next((trial[key] for trial in trials if key in trial), None) for key in DATA)
    return TrackedCell(
        domain=_fact(row, "domain"),
        arm=_fact(row, "arm"),
        init=_fact(row, "init"),
        besides_init=_fact(row, "besides_init"),
        search_trials=int(_fact(row, "search_trials")),
        epochs=int(_fact(row, "epochs")),
        baseline=_fact(row, "baseline") or None,
        trials=tuple(sorted(confirmed, key=lambda trial: trial.seed)),
        ledger={name.removeprefix("metrics.ledger/"): value for name, value in row.items() if name.startswith("metrics.ledger/")},
        searched=tuple(sorted(searched, key=lambda trial: trial.number)),
        space=space,
        metric=metric,
        users=None if users is None else int(users),
        items=None if items is None else int(items),
        split=split,
    )


def _trial(row: Row, curve: Curve, metric: str) -> TrackedTrial:
    wanted = {name: f"metrics.{mlflow_name(f'test {name}')}" for name in METRICS}
    if not curve or (missing := [name for name, key in wanted.items() if key not in row]):
        lacks = f"test {missing[0]}" if curve else f"a curve of {metric}"
        raise BadInput(f"run {row['run_id']} ({row['name']}) lacks {lacks}.", remedy="It was changed, or written only in part: delete it.")
    best_steps, best_valid, best_epoch, _ = max(curve, key=lambda point: (point[1], point[0]))  # the latest of equals
    return TrackedTrial(
        run_id=row["run_id"],
        seed=int(row["params.seed"]),
        fingerprint=row["tags.mmm4rec.fingerprint"],
        test={name: row[key] for name, key in wanted.items()},
        best_valid=best_valid,
        best_steps=best_steps,
        best_epoch=best_epoch,
        curve=tuple((steps, value) for steps, value, _, _ in curve),
        epochs=tuple(epoch for _, _, epoch, _ in curve),
        seconds=tuple(seconds for _, _, _, seconds in curve),
        params={name.removeprefix("params."): value for name, value in row.items() if name.startswith("params.")},
        checkpoint=row.get("tags.mmm4rec.began_from", ""),
        url=row.get("url", ""),
    )


def _search_trial(row: Row, curve: Curve, space: Mapping[str, Any]) -> SearchTrial:
    told = row.get("tags.mmm4rec.config")  # what was drawn: of a condition that did not hold there is a default among the parameters
    config = {name: row[f"params.{name}"] for name in space if f"params.{name}" in row} if told is None else json.loads(told)
    config = {name: str(value) for name, value in config.items() if name in space and _holds(space[name], str(value))}
    value = max((value for _, value, _, _ in curve), default=float("nan"))
    pruned = row["tags.mmm4rec.outcome"] == "pruned"
    return SearchTrial(row["run_id"], int(row.get("params.number", 0)), pruned, config, value, curve[-1][2] if curve else 0)


def _holds(dimension: Sequence[Any], text: str) -> bool:
    """Whether a value lies in a dimension [low, high, log, choices]."""
    low, high, _, choices = dimension
    if choices is not None:
        return text in map(str, choices)
    try:
        return low <= float(text) <= high
    except ValueError:
        return False


def _pretraining(source: Runs, runs: pd.DataFrame) -> Pretraining | None:
    if runs.empty:
        return None
    run = runs.iloc[0]["run_id"]
    told = runs.iloc[0].get("params.training.valid_metric")
    metric = told if isinstance(told, str) else DEFAULT_METRIC
    curve = _curves(source, [run], [metric]).get((run, metric), [])
    if not curve:
        return None
    best = max(curve, key=lambda point: (point[1], point[0]))
    return Pretraining(curve[-1][0], best[0], curve[-1][2], curve[-1][3])
