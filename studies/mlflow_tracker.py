"""The study in MLflow: study → cell → trial as nested runs, a mirror of the journal.

One thread writes, from a queue, so that a slow store holds no trial up. What it writes is a function of the
journal (times too), and MLflow takes a metric row that it has already as the same row: writing again is harmless.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # MLflow calls home otherwise; whoever wants that sets "false"

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from mmm4rec.tracking import mlflow_name
from studies.cells import Cell, flat
from studies.spec import Spec
from studies.state import Journal, Outcome, Report, Trial, now_ms

STATUS: dict[Outcome, str] = {"finished": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}  # MLflow knows no pruned run
METRICS_PER_CALL = 900  # MLflow takes 1,000
PARAMS_PER_CALL = 90  # MLflow takes 100
RANKS = "ranks.parquet"  # a confirm trial's ranks by user: among its files, and as an artifact of its run

log = logging.getLogger(__name__)
logging.getLogger("mlflow").setLevel(logging.WARNING)


def store_uri(folder: Path) -> str:
    """The MLflow store of the study in `folder`."""
    return f"sqlite:///{(folder / 'mlflow.db').resolve()}"


class MlflowTracker:
    """Mirrors a study into its MLflow store."""

    def __init__(self, folder: Path, spec: Spec, cells: Sequence[Cell], journal: Path) -> None:
        self._folder, self._spec, self._journal_path = folder, spec, journal
        self._cells = {cell.name: (position, cell) for position, cell in enumerate(cells)}
        self._runs: dict[tuple[str, str], str] = {}  # (phase, key) -> run id
        self._logged: dict[str, int] = {}  # trial_key -> epochs in MLflow
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._failed: list[tuple[Callable[[], None], Exception]] = []  # what MLflow did not take, and its word
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def baseline(self) -> None:
        """Tell each cell's run the baseline of the spec as it is now. Returns at once."""
        tag = {"mmm4rec.baseline": self._spec.baseline or ""}
        for name in self._cells:
            self._jobs.put(partial(self._tag_cell, name, tag))

    def trial(self, trial_key: str) -> None:
        """Something is new about this trial. Returns at once."""
        self._jobs.put(lambda: self._mirror(trial_key))

    def pretraining(self, curve: Sequence[Mapping[str, Any]], result: Mapping[str, Any] | None) -> None:
        """The lines of pre-training's curve, and its result when it is over. Returns at once."""
        self._jobs.put(lambda: self._mirror_pretraining(curve, result))

    def flush(self) -> None:
        """Wait until MLflow has everything. Raises what MLflow raised, if it still does when asked again."""
        self._jobs.join()
        again, self._failed = self._failed, []
        for job, _ in again:
            self._jobs.put(job)
        self._jobs.join()
        if self._failed:
            raise self._failed[0][1]

    def finish(self, artifacts: Iterable[Path]) -> None:
        """End the runs of the study and its cells, with the study's files; nothing stays RUNNING."""
        self._jobs.put(lambda: self._end_all(list(artifacts)))
        self.flush()

    def close(self) -> None:
        """Let the thread end when its queue is empty."""
        self._jobs.put(None)
        self._thread.join()

    # What follows runs in the thread.

    @cached_property
    def _client(self) -> MlflowClient:
        return MlflowClient(tracking_uri=store_uri(self._folder))

    @cached_property
    def _journal(self) -> Journal:
        return Journal(self._journal_path)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception as error:
                self._failed.append((job, error))
                log.warning("MLflow did not take something (it is tried again at the end): %s", error)
            finally:
                self._jobs.task_done()
        self._jobs.task_done()
        if "_journal" in vars(self):
            self._journal.close()

    def _mirror(self, trial_key: str) -> None:
        trial = self._journal.trial(trial_key)
        if trial.tracked:
            return
        run, reports = self._trial_run(trial), self._journal.reports(trial_key)
        seconds = 0.0
        metrics: list[Metric] = []
        for place, report in enumerate(reports):
            seconds += report.row["train_seconds"] + report.row["valid_seconds"]
            if place >= self._logged.get(trial_key, 0):
                metrics += _epoch_metrics(report.row, seconds, report.reported_ms)
        self._log(run, metrics)
        self._logged[trial_key] = len(reports)
        if trial.outcome != "running":
            self._end(run, trial, reports)
            self._journal.set_tracked(trial_key)

    def _end(self, run: str, trial: Trial, reports: Sequence[Report]) -> None:
        tags = {"mmm4rec.outcome": trial.outcome} | ({"mmm4rec.reason": trial.reason[:5000]} if trial.reason else {})
        if trial.result is not None:
            tags |= _result_tags(trial.result)
            steps = next((r.row["optimizer_steps"] for r in reports if r.epoch == trial.result["best_epoch"]), 0)
            self._log(run, _result_metrics(trial.result, steps, trial.ended_ms or 0))
        ranks = self._folder / "trials" / trial.trial_key / RANKS
        if (trial.phase, trial.outcome) == ("confirm", "finished") and ranks.is_file():
            self._client.log_artifact(run, str(ranks))  # a copy: once more is the same file
        searched = set(trial.config)  # MLflow has these from the start, and takes no parameter twice
        told = {} if trial.result is None else flat(trial.result["config"])
        self._set(run, tags, {key: value for key, value in told.items() if key not in searched})
        self._client.set_terminated(run, STATUS[trial.outcome], end_time=trial.ended_ms)

    def _trial_run(self, trial: Trial) -> str:
        cell = self._cells[trial.cell][1]
        tags = {**_cell_tags(cell), "mmm4rec.trial_key": trial.trial_key, "mmm4rec.outcome": "running"}
        params = {**trial.config, "seed": trial.seed, "number": trial.number}
        name, parent = f"{trial.cell} {trial.phase} {trial.number}", self._cell_run(trial.cell)
        return self._run(trial.phase, trial.trial_key, name=name, start_ms=trial.started_ms, tags=tags, params=params, parent=parent)

    def _cell_run(self, name: str) -> str:
        position, cell = self._cells[name]
        besides_init = hashlib.sha256(json.dumps([cell.run, cell.shuffle_features], sort_keys=True).encode()).hexdigest()[:8]
        params = {
            "position": position,
            "init": cell.init,
            "besides_init": besides_init,  # equal where arms differ in nothing but init
            "search_trials": cell.search_trials,
            "epochs": self._spec.budget.epochs,
            "confirm_seeds": cell.confirm_seeds,
            "space": json.dumps({key: [p.low, p.high, p.log, p.choices] for key, p in cell.space.items()}),
        }
        return self._run("cell", name, name=name, start_ms=self._begun_ms(), tags=_cell_tags(cell), params=params, parent=self._study_run())

    def _tag_cell(self, name: str, tags: Mapping[str, str]) -> None:
        self._set(self._cell_run(name), tags, {})

    def _study_run(self) -> str:
        name, params = self._spec.study, {"seed": self._spec.seed, "cells": len(self._cells)}
        return self._run("study", name, name=name, start_ms=self._begun_ms(), tags={}, params=params, parent=None)

    def _begun_ms(self) -> int:
        return int(self._journal.fact("begun_ms") or now_ms())

    def _mirror_pretraining(self, curve: Sequence[Mapping[str, Any]], result: Mapping[str, Any] | None) -> None:
        name, begun_ms = "pretrain", self._begun_ms()
        run = self._run(name, name, name=name, start_ms=begun_ms, tags={}, params={}, parent=self._study_run())
        seconds, metrics, steps = 0.0, [], {}
        for row in curve:
            seconds += row["train_seconds"] + row["valid_seconds"]
            steps[row["epoch"]] = row["optimizer_steps"]
            metrics += _epoch_metrics(row, seconds, begun_ms + int(seconds * 1000))
        self._log(run, metrics)
        if result is not None:
            ended_ms = begun_ms + int(seconds * 1000)
            self._log(run, _result_metrics(result, steps.get(result["best_epoch"], 0), ended_ms))
            self._set(run, _result_tags(result) | {"mmm4rec.outcome": "finished"}, flat(result["config"]))
            self._client.set_terminated(run, "FINISHED", end_time=ended_ms)

    def _end_all(self, artifacts: Sequence[Path]) -> None:
        for name in self._cells:
            run, chosen = self._cell_run(name), self._journal.chosen(name)
            self._set(run, {"mmm4rec.outcome": "finished"}, {f"chosen.{key}": value for key, value in (chosen or {}).items()})
            self._client.set_terminated(run, "FINISHED")
        for folder in artifacts:
            self._client.log_artifacts(self._study_run(), str(folder), artifact_path=folder.name)
        self._set(self._study_run(), {"mmm4rec.outcome": "finished"}, {})
        self._client.set_terminated(self._study_run(), "FINISHED")

    def _run(
        self, phase: str, key: str, *, name: str, start_ms: int, tags: Mapping[str, str], params: Mapping[str, Any], parent: str | None
    ) -> str:
        """The run of this phase and key: looked up before it is made."""
        if (phase, key) not in self._runs:
            experiment = self._experiment()
            identity = {"mmm4rec.phase": phase, "mmm4rec.key": key}
            wanted = " and ".join(f"tags.`{tag}` = '{value}'" for tag, value in identity.items())
            found = self._client.search_runs([experiment], wanted, max_results=1)
            nesting = {} if parent is None else {"mlflow.parentRunId": parent}
            every = {"mmm4rec.study": self._spec.study, **identity, **nesting, **tags}
            run = found[0] if found else self._client.create_run(experiment, start_time=start_ms, tags=every, run_name=name)
            self._set(run.info.run_id, {}, params)
            self._runs[phase, key] = run.info.run_id
        return self._runs[phase, key]

    def _experiment(self) -> str:
        found = self._client.get_experiment_by_name(self._spec.study)
        if found is not None:
            return str(found.experiment_id)
        return str(self._client.create_experiment(self._spec.study, artifact_location=(self._folder / "artifacts").resolve().as_uri()))

    def _log(self, run: str, metrics: Sequence[Metric]) -> None:
        for start in range(0, len(metrics), METRICS_PER_CALL):
            self._client.log_batch(run, metrics=metrics[start : start + METRICS_PER_CALL])

    def _set(self, run: str, tags: Mapping[str, str], params: Mapping[str, Any]) -> None:
        told = [Param(key, str(value)[:6000]) for key, value in params.items()]
        for start in range(0, max(len(told), 1), PARAMS_PER_CALL):
            first = [RunTag(key, value) for key, value in tags.items()] if start == 0 else []
            self._client.log_batch(run, params=told[start : start + PARAMS_PER_CALL], tags=first)


def _cell_tags(cell: Cell) -> dict[str, str]:
    return {
        "mmm4rec.cell": cell.name,
        "mmm4rec.domain": cell.domain,
        "mmm4rec.arm": cell.arm,
        "mmm4rec.fingerprint": cell.fingerprint,
    }


def _result_tags(result: Mapping[str, Any]) -> dict[str, str]:
    named = {"fingerprint": "fingerprint", "code_version": "code_version", "checkpoint": "checkpoint"}
    return {f"mmm4rec.{tag}": str(result[key]) for tag, key in named.items() if result.get(key) is not None}


def _epoch_metrics(row: Mapping[str, Any], seconds: float, timestamp_ms: int) -> list[Metric]:
    """An epoch's metrics at its optimizer step; `seconds` is the trial's time up to here."""
    values: dict[str, float] = {"epoch": row["epoch"], "seconds": seconds}
    if row["train_loss"] is not None:
        values["train loss"] = row["train_loss"]
    values |= {f"valid {name}": value for name, value in row["valid"].items()}
    return [Metric(mlflow_name(name), float(value), timestamp_ms, row["optimizer_steps"]) for name, value in values.items()]


def _result_metrics(result: Mapping[str, Any], steps: int, timestamp_ms: int) -> list[Metric]:
    """The metrics at the best epoch, at that epoch's optimizer step; and the most memory that the run held."""
    values = {f"best_valid {name}": value for name, value in result["valid"].items()}
    values |= {f"test {name}": value for name, value in result.get("test", {}).items()}
    values |= {"peak_memory_bytes": result["peak_memory_bytes"]} if "peak_memory_bytes" in result else {}
    return [Metric(mlflow_name(name), float(value), timestamp_ms, steps) for name, value in values.items()]
