"""Reads a study's confirm trials from its MLflow store: all that tables and figures are made from.

A user's ranks are an artifact of the run, and read only where they are asked for. The study may be running: what it
has finished is there, and reading holds it up nowhere.
"""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # before MLflow is imported

import numpy as np
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from mmm4rec.errors import BadInput
from mmm4rec.tracking import mlflow_name
from studies.files import RANKS
from studies.mlflow_store import open_store, search, shown, store_uri
from studies.state import Journal

METRICS = ("hit@10", "hit@20", "hit@50", "ndcg@10", "ndcg@20", "ndcg@50", "mrr")
CURVE = "ndcg@10"  # of validation: the metric of convergence


@dataclass(frozen=True)
class TrackedTrial:
    """A finished confirm trial."""

    run_id: str
    seed: int
    fingerprint: str
    test: dict[str, float]  # by our metric names
    best_valid: float  # of CURVE
    best_steps: int  # optimizer steps to the best epoch
    best_epoch: int
    curve: tuple[tuple[int, float], ...]  # (optimizer steps, validation CURVE), by steps


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
    ledger: dict[str, float] = field(default_factory=dict)  # what the cell was given and has used, by name

    @property
    def name(self) -> str:
        return f"{self.domain}/{self.arm}"


@dataclass(frozen=True)
class Pretraining:
    """What the pre-training of a study took, before any of its arms began."""

    optimizer_steps: int
    best_steps: int  # of them, until the epoch whose weights the arms start from
    epochs: int
    seconds: float  # of training and validation


@dataclass(frozen=True)
class UserRanks:
    """The test ranks of a run, by user."""

    users: np.ndarray  # [U] the domain's user numbers
    rank: np.ndarray  # [U] from 1; halves are ties


def read_study(folder: Path, uri: str | None = None) -> list[TrackedCell]:
    """The study's cells in the spec's order, as the store at `uri` has them; None: the one in the study's folder.

    Raises BadInput where there is no store, where one trial has two runs, and where runs of one domain have
    different fingerprints: their numbers do not mean the same and stand in no common table.
    """
    if uri is None and not (folder / "mlflow.db").is_file():
        raise BadInput("holds no mlflow.db.", file=folder, remedy="Give the folder of a study, for instance results/demo.")
    place = uri or store_uri(folder)
    try:
        return _read(open_store(place), folder, None if uri is None else _experiment_name(folder))
    except (MlflowException, SQLAlchemyError) as error:
        told = shown(error, place).strip().splitlines()[0]
        raise BadInput(f"MLflow at {shown(place, place)} does not answer: {told}", remedy="Start it, or correct its address.") from None


def read_pretraining(folder: Path, uri: str | None = None) -> Pretraining | None:
    """What the study's own pre-training took; None where it had none, or it has not ended. The store is that of `read_study`."""
    client = open_store(uri or store_uri(folder))
    experiments = _experiments(client, None if uri is None else _experiment_name(folder))
    found = search(client, experiments, "tags.`mmm4rec.phase` = 'pretrain' and tags.`mmm4rec.outcome` = 'finished'")
    if not found:
        return None
    run = found[0].info.run_id
    epochs, seconds, best = (client.get_metric_history(run, name)[-1] for name in ("epoch", "seconds", mlflow_name(f"best_valid {CURVE}")))
    return Pretraining(epochs.step, best.step, int(epochs.value), seconds.value)


def _experiments(client: MlflowClient, name: str | None) -> list[str]:
    """The ids of the experiment of that name; None: of all."""
    return [str(found.experiment_id) for found in client.search_experiments() if name in (None, found.name)]


def _experiment_name(folder: Path) -> str:
    """What the study is called in a store that it may share with others."""
    if not (folder / "study.sqlite3").is_file():
        return folder.resolve().name
    journal = Journal(folder / "study.sqlite3")
    try:
        return journal.fact("mlflow_experiment") or folder.resolve().name
    finally:
        journal.close()


def _read(client: MlflowClient, folder: Path, experiment: str | None) -> list[TrackedCell]:
    """The cells in the experiment of that name; None: in any."""
    experiments = _experiments(client, experiment)
    cells = search(client, experiments, "tags.`mmm4rec.phase` = 'cell'") if experiments else []
    cells = [run for run in cells if run.data.tags.get("mmm4rec.outcome") != "superseded"]
    if not cells:
        raise BadInput("has no cell of a study in MLflow yet.", file=folder, remedy="Run the study first.")
    confirmed = search(client, experiments, "tags.`mmm4rec.phase` = 'confirm' and tags.`mmm4rec.outcome` = 'finished'")
    _check(confirmed)
    trials = defaultdict(list)
    for run in confirmed:
        trials[run.data.tags["mmm4rec.cell"]].append(_trial(client, run))
    ordered = sorted(cells, key=lambda run: int(_facts(run)["position"]))
    return [_cell(run, trials[run.data.tags["mmm4rec.cell"]]) for run in ordered]


def read_ranks(folder: Path, trial: TrackedTrial, uri: str | None = None) -> UserRanks | None:
    """The test ranks that MLflow keeps with a trial's run; None where it has none (runs of earlier versions).

    MLflow notes where artifacts lie when a study begins; of a study that was moved since, they are found in its folder.
    """
    client = open_store(uri or store_uri(folder))
    with tempfile.TemporaryDirectory() as room:
        file = folder / "artifacts" / trial.run_id / "artifacts" / RANKS
        if any(artifact.path == RANKS for artifact in client.list_artifacts(trial.run_id)):
            file = Path(client.download_artifacts(trial.run_id, RANKS, dst_path=room))
        if not file.is_file():
            return None
        table = pd.read_parquet(file, columns=["split", "user", "rank"])
    test = table[table["split"] == "test"]
    return UserRanks(test["user"].to_numpy(), test["rank"].to_numpy(dtype=np.float64))


def _check(runs: list[Run]) -> None:
    """Refuse runs that must not stand side by side."""
    by_key: dict[str, Run] = {}
    first: dict[str, Run] = {}
    for run in runs:
        tags = run.data.tags
        twin = by_key.setdefault(tags["mmm4rec.trial_key"], run)
        if twin is not run:
            rule = f"trial {tags['mmm4rec.trial_key']} has two runs: {twin.info.run_id} and {run.info.run_id}."
            raise BadInput(rule, remedy="Delete one of them in MLflow.")
        other = first.setdefault(tags["mmm4rec.domain"], run)
        if other.data.tags["mmm4rec.fingerprint"] != tags["mmm4rec.fingerprint"]:
            rule = (
                f"domain '{tags['mmm4rec.domain']}' had two fingerprints:"
                f" {other.data.tags['mmm4rec.fingerprint']} in run {other.info.run_id} ({other.info.run_name}),"
                f" {tags['mmm4rec.fingerprint']} in run {run.info.run_id} ({run.info.run_name})."
            )
            raise BadInput(rule, remedy="Their numbers cannot be compared: run both on the same prepared domain.")


def _trial(client: MlflowClient, run: Run) -> TrackedTrial:
    history = client.get_metric_history(run.info.run_id, mlflow_name(f"valid {CURVE}"))
    epochs = {metric.step: int(metric.value) for metric in client.get_metric_history(run.info.run_id, "epoch")}
    best = client.get_metric_history(run.info.run_id, mlflow_name(f"best_valid {CURVE}"))[-1]
    return TrackedTrial(
        run_id=run.info.run_id,
        seed=int(run.data.params["seed"]),
        fingerprint=run.data.tags["mmm4rec.fingerprint"],
        test={name: run.data.metrics[mlflow_name(f"test {name}")] for name in METRICS},
        best_valid=best.value,
        best_steps=best.step,
        best_epoch=epochs.get(best.step, 0),
        curve=tuple(sorted((metric.step, metric.value) for metric in history)),
    )


def _facts(run: Run) -> dict[str, str]:
    """What a cell's run says of its cell, by name. Earlier versions wrote parameters instead of tags."""
    tags = {name.removeprefix("mmm4rec."): value for name, value in run.data.tags.items() if name.startswith("mmm4rec.")}
    return {**run.data.params, **tags}


def _cell(run: Run, trials: list[TrackedTrial]) -> TrackedCell:
    facts = _facts(run)
    return TrackedCell(
        domain=facts["domain"],
        arm=facts["arm"],
        init=facts["init"],
        besides_init=facts["besides_init"],
        search_trials=int(facts["search_trials"]),
        epochs=int(facts["epochs"]),
        baseline=facts.get("baseline") or None,
        trials=tuple(sorted(trials, key=lambda trial: trial.seed)),
        ledger={name.removeprefix("ledger/"): value for name, value in run.data.metrics.items() if name.startswith("ledger/")},
    )
