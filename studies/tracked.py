"""Reads a study's confirm trials from its MLflow store: all that tables and figures are made from.

A user's ranks are an artifact of the run, and read only where they are asked for.
"""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import numpy as np
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Run

from mmm4rec.errors import BadInput
from mmm4rec.tracking import mlflow_name
from studies.mlflow_tracker import RANKS, store_uri

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

    @property
    def name(self) -> str:
        return f"{self.domain}/{self.arm}"


@dataclass(frozen=True)
class UserRanks:
    """The test ranks of a run, by user."""

    users: np.ndarray  # [U] the domain's user numbers
    rank: np.ndarray  # [U] from 1; halves are ties


def read_study(folder: Path) -> list[TrackedCell]:
    """The study's cells in the spec's order.

    Raises BadInput where there is no store, where one trial has two runs, and where runs of one domain have
    different fingerprints: their numbers do not mean the same and stand in no common table.
    """
    if not (folder / "mlflow.db").is_file():
        raise BadInput("holds no mlflow.db.", file=folder, remedy="Give the folder of a study, for instance results/demo.")
    client = MlflowClient(tracking_uri=store_uri(folder))
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    cells = _runs(client, experiments, "tags.`mmm4rec.phase` = 'cell'")
    confirmed = _runs(client, experiments, "tags.`mmm4rec.phase` = 'confirm' and tags.`mmm4rec.outcome` = 'finished'")
    if not cells:
        raise BadInput("holds no cell of a study yet.", file=folder / "mlflow.db", remedy="Run the study first.")
    _check(confirmed)
    trials = defaultdict(list)
    for run in confirmed:
        trials[run.data.tags["mmm4rec.cell"]].append(_trial(client, run))
    return [_cell(run, trials[run.data.tags["mmm4rec.cell"]]) for run in sorted(cells, key=lambda run: int(run.data.params["position"]))]


def read_ranks(folder: Path, trial: TrackedTrial) -> UserRanks | None:
    """The test ranks that MLflow keeps with a trial's run; None where it has none (runs of earlier versions).

    MLflow notes where artifacts lie when a study begins; of a study that was moved since, they are found in its folder.
    """
    client = MlflowClient(tracking_uri=store_uri(folder))
    file = folder / "artifacts" / trial.run_id / "artifacts" / RANKS
    if any(artifact.path == RANKS for artifact in client.list_artifacts(trial.run_id)):
        file = Path(client.download_artifacts(trial.run_id, RANKS))
    if not file.is_file():
        return None
    table = pd.read_parquet(file, columns=["split", "user", "rank"])
    test = table[table["split"] == "test"]
    return UserRanks(test["user"].to_numpy(), test["rank"].to_numpy(dtype=np.float64))


def _runs(client: MlflowClient, experiments: list[str], wanted: str) -> list[Run]:
    runs, token = [], None
    while True:
        page = client.search_runs(experiments, wanted, max_results=1000, page_token=token)
        runs += list(page)
        token = page.token
        if not token:
            return runs


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


def _cell(run: Run, trials: list[TrackedTrial]) -> TrackedCell:
    tags, params = run.data.tags, run.data.params
    return TrackedCell(
        domain=tags["mmm4rec.domain"],
        arm=tags["mmm4rec.arm"],
        init=params["init"],
        besides_init=params["besides_init"],
        search_trials=int(params["search_trials"]),
        epochs=int(params["epochs"]),
        baseline=tags.get("mmm4rec.baseline") or None,
        trials=tuple(sorted(trials, key=lambda trial: trial.seed)),
    )
