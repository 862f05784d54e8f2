"""The study in MLflow: study → cell → trial as nested runs, a mirror of the journal.

One thread writes, from an outbox, so that a slow store holds no trial up. What it writes is a function of the
journal (times too), and MLflow takes a metric row that it has already as the same row: writing again is harmless.
A run is looked up before it is made wherever it may exist: a kill, or an answer that was lost, makes no second one.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # MLflow calls home otherwise; whoever wants that sets "false"

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag

from studies.cells import Cell, flat
from studies.files import KEPT
from studies.mlflow_facts import cell_facts, cell_tags, epoch_metrics, note, result_metrics, result_tags, step_metrics, trial_params
from studies.mlflow_store import fold_wal, is_away, is_database, open_store, search, shown, store_uri
from studies.outbox import Outbox
from studies.spec import Spec
from studies.state import Journal, Report, Trial, now_ms

STATUS = {"finished": "FINISHED", "pruned": "KILLED", "superseded": "KILLED", "failed": "FAILED"}  # MLflow knows no pruned run
METRICS_PER_CALL = 900  # MLflow takes 1,000
PARAMS_PER_CALL = 90  # MLflow takes 100
PARAM_LENGTH, TAG_LENGTH = 6000, 5000  # what MLflow keeps of a text
PATIENCE_SECONDS = 600.0  # how long `flush` waits for a store that takes nothing

log = logging.getLogger(__name__)


class MlflowTracker:
    """Mirrors a study into an MLflow store. No method but `flush`, `finish` and `close` waits."""

    def __init__(self, folder: Path, spec: Spec, cells: Sequence[Cell], journal: Path, uri: str | None = None) -> None:
        """Args: uri: of the store, a database's or a server's; None: an sqlite file in the study's folder."""
        self._folder, self._spec, self._journal_path = folder, spec, journal
        self._uri, self._own = uri or store_uri(folder), uri is None
        self._cells = {cell.name: cell for cell in cells}
        self._runs: dict[tuple[str, str], str] = {}  # (phase, key) -> run id, of runs that are not over
        self._told: set[str] = set()  # cells whose run has their facts
        self._doubtful: set[tuple[str, str]] = set()  # whose creation failed: they may exist all the same
        self._pretrain_steps = 0  # of pre-training, whose reports MLflow has from this process
        self._logged: dict[str, int] = {}  # trial_key -> epochs in MLflow, of trials that run
        self._outbox = Outbox("MLflow", is_away=is_away, in_words=lambda error: shown(error, self._uri), at_end=self._let_go)

    def start(self) -> None:
        self._outbox.start()

    def baseline(self) -> None:
        """Tell each cell's run what the spec says of it now, the baseline too."""
        for name in list(self._cells):
            self._outbox.put(("cell", name), partial(self._tag_cell, name))

    def add_cells(self, cells: Iterable[Cell]) -> None:
        """Cells that joined the study, or changed. Where all are given, their order is the tables' order."""
        given = {cell.name: cell for cell in cells}
        self._cells = given if given.keys() >= self._cells.keys() else self._cells | given
        self.baseline()

    def catch_up(self) -> None:
        """Set aside the runs of cells that the spec has no more, and of trials that the journal does not know.

        It may come from a snapshot, and a server is ahead of it then.
        """
        self._outbox.put("strangers", self._set_strangers_aside)

    def trial(self, trial_key: str) -> None:
        """Something is new about this trial."""
        self._outbox.put(("trial", trial_key), partial(self._mirror, trial_key))

    def pretraining(self, curve: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]], result: Mapping[str, Any] | None) -> None:
        """The lines of pre-training's curve.jsonl and steps.jsonl so far, and its result when it is over."""
        self._outbox.put("pretrain", lambda: self._mirror_pretraining(curve, steps, result))

    def ledger(self, cell_name: str, values: Mapping[str, float]) -> None:
        """What the cell was given and has used, as metrics `ledger/<name>` of its run."""
        self._outbox.put(("ledger", cell_name), partial(self._mirror_ledger, cell_name, dict(values), now_ms()))

    def flush(self, patience_seconds: float = PATIENCE_SECONDS) -> None:
        """Wait until MLflow has everything. Raises NotWritten where it refuses, or takes nothing for `patience_seconds`."""
        self._outbox.flush(patience_seconds)

    def finish(self, artifacts: Iterable[Path], patience_seconds: float = PATIENCE_SECONDS) -> None:
        """End the runs of the study and its cells, with the study's files and folders; nothing stays RUNNING."""
        self._outbox.flush(patience_seconds)
        self._outbox.put("end", partial(self._end_all, list(artifacts)))
        self._outbox.flush(patience_seconds)

    def close(self) -> None:
        """Write what is left, unless the store is away: then the next driver writes it, from the journal."""
        if left := self._outbox.close():
            log.warning("%d writes to MLflow are left; the study's next start with --resume does them.", left)

    # What follows runs in the outbox's thread.

    def _let_go(self) -> None:
        if "_journal" in vars(self):
            self._journal.close()
        if "_client" in vars(self):
            fold_wal(self._uri)

    @cached_property
    def _client(self) -> MlflowClient:
        return open_store(self._uri)

    @cached_property
    def _journal(self) -> Journal:
        return Journal(self._journal_path)

    @cached_property
    def _left_over(self) -> frozenset[str]:
        """Trials that may have a run from before this process."""
        return frozenset(trial.trial_key for trial in self._journal.trials() if not trial.tracked)

    def _mirror(self, trial_key: str) -> None:
        left_over, trial = self._left_over, self._journal.trial(trial_key)
        if trial.tracked:
            return
        if trial.outcome == "superseded":
            for known in self._find(trial.phase, trial_key):
                self._set_aside(known, trial.ended_ms)
            self._over(trial)
            return
        run, reports = self._trial_run(trial, may_exist=trial_key in left_over), self._journal.reports(trial_key)
        logged = self._logged.get(trial_key)
        params = trial_params(self._cells[trial.cell], trial) if logged is None else {}
        if logged is None:
            there = {metric.step for metric in self._client.get_metric_history(run, "epoch")} if trial_key in left_over else set()
            logged = sum(report.row["optimizer_steps"] in there for report in reports)
        seconds = 0.0
        metrics: list[Metric] = []
        for place, report in enumerate(reports):
            seconds += report.row["train_seconds"] + report.row["valid_seconds"]
            if place >= logged:
                metrics += epoch_metrics(report.row, seconds, report.reported_ms)
        if trial.outcome == "running":
            self._write(run, metrics=metrics, params=params)
            self._logged[trial_key] = len(reports)
        else:
            self._end(run, trial, reports, metrics, params)
            self._over(trial)

    def _end(self, run: str, trial: Trial, reports: Sequence[Report], metrics: list[Metric], params: dict[str, Any]) -> None:
        tags = {"mmm4rec.outcome": trial.outcome} | ({"mmm4rec.reason": trial.reason} if trial.reason else {})
        if trial.result is not None:
            tags |= result_tags(trial.result)
            steps = next((r.row["optimizer_steps"] for r in reports if r.epoch == trial.result["best_epoch"]), 0)
            metrics = metrics + result_metrics(trial.result, steps, trial.ended_ms or 0)
            # what was searched comes last: MLflow takes no parameter with another value
            params = flat(trial.result["config"]) | trial_params(self._cells[trial.cell], trial)
        if (trial.phase, trial.outcome) == ("confirm", "finished"):
            for file in (self._folder / "trials" / trial.trial_key / name for name in KEPT):
                if file.is_file():
                    self._client.log_artifact(run, str(file))  # a copy: once more is the same file
        self._write(run, metrics=metrics, params=params, tags=tags)
        self._client.set_terminated(run, STATUS[trial.outcome], end_time=trial.ended_ms)

    def _over(self, trial: Trial) -> None:
        self._journal.set_tracked(trial.trial_key)
        self._logged.pop(trial.trial_key, None)
        self._runs.pop((trial.phase, trial.trial_key), None)

    def _trial_run(self, trial: Trial, *, may_exist: bool) -> str:
        tags = {**cell_tags(self._cells[trial.cell]), "mmm4rec.trial_key": trial.trial_key, "mmm4rec.outcome": "running"}
        tags |= {"mmm4rec.config": json.dumps(trial.config)} | ({} if trial.origin is None else {"mmm4rec.origin": trial.origin})
        parent = self._cell_run(trial.cell)
        return self._run(
            trial.phase, trial.trial_key, name=trial.name, start_ms=trial.started_ms, tags=tags, parent=parent, may_exist=may_exist
        )

    def _cell_run(self, name: str) -> str:
        run = self._run("cell", name, name=name, start_ms=self._begun_ms(), tags=cell_tags(self._cells[name]), parent=self._study_run())
        if name not in self._told:  # a store that went away after the run was made has not been told
            back = self._client.get_run(run).data.tags.get("mmm4rec.outcome") == "superseded"  # it had been taken out of the spec
            self._write(run, tags=self._cell_facts(name) | ({"mmm4rec.outcome": "running"} if back else {}))
            self._told.add(name)
        return run

    def _cell_facts(self, name: str) -> dict[str, str]:
        return cell_facts(self._cells[name], list(self._cells).index(name), self._spec)

    def _tag_cell(self, name: str) -> None:
        self._write(self._cell_run(name), tags=self._cell_facts(name))

    def _mirror_ledger(self, cell_name: str, values: Mapping[str, float], at_ms: int) -> None:
        """A value that stands already is left as it is."""
        run = self._cell_run(cell_name)
        stands = self._client.get_run(run).data.metrics
        told = {f"ledger/{name}": float(value) for name, value in values.items()}
        self._write(run, metrics=[Metric(name, value, at_ms, 0) for name, value in told.items() if stands.get(name) != value])

    def _study_run(self) -> str:
        return self._run("study", self._spec.study, name=self._spec.study, start_ms=self._begun_ms(), tags={})

    def _begun_ms(self) -> int:
        return int(self._journal.fact("begun_ms") or now_ms())

    def _mirror_pretraining(
        self, curve: Sequence[Mapping[str, Any]], reports: Sequence[Mapping[str, Any]], result: Mapping[str, Any] | None
    ) -> None:
        name, begun_ms = "pretrain", self._begun_ms()
        run = self._run(name, name, name=name, start_ms=begun_ms, tags={}, parent=self._study_run())
        seconds, metrics, steps = 0.0, [], {}
        for row in curve:
            seconds += row["train_seconds"] + row["valid_seconds"]
            steps[row["epoch"]] = row["optimizer_steps"]
            metrics += epoch_metrics(row, seconds, begun_ms + int(seconds * 1000))
        fresh = [row for row in reports if row["optimizer_steps"] > self._pretrain_steps]
        self._write(run, metrics=metrics + [metric for row in fresh for metric in step_metrics(row)])
        self._pretrain_steps = fresh[-1]["optimizer_steps"] if fresh else self._pretrain_steps
        if result is not None:
            ended_ms = begun_ms + int(seconds * 1000)
            best = result_metrics(result, steps.get(result["best_epoch"], 0), ended_ms)
            self._write(run, metrics=best, params=flat(result["config"]), tags=result_tags(result) | {"mmm4rec.outcome": "finished"})
            self._client.set_terminated(run, "FINISHED", end_time=ended_ms)

    def _end_all(self, artifacts: Sequence[Path]) -> None:
        for name in list(self._cells):
            run, chosen = self._cell_run(name), self._journal.chosen(name)
            told = {f"mmm4rec.chosen.{key}": str(value) for key, value in (chosen or {}).items()}
            self._write(run, tags=told | {"mmm4rec.outcome": "finished"})
            self._client.set_terminated(run, "FINISHED")
        self._tell_newcomers(self._experiment)
        study = self._study_run()
        for path in artifacts:
            if path.is_dir():
                self._client.log_artifacts(study, str(path), artifact_path=path.name)
            else:
                self._client.log_artifact(study, str(path))
        self._write(study, params={"seed": self._spec.seed}, tags={"mmm4rec.outcome": "finished", "mmm4rec.cells": str(len(self._cells))})
        self._client.set_terminated(study, "FINISHED")
        self._sweep()

    def _sweep(self) -> None:
        """End what still runs though its trial is over, and delete what was made twice: a create whose answer was lost may come late."""
        trials = {trial.trial_key: trial for trial in self._journal.trials()}
        for run in search(self._client, [self._experiment], "attributes.status = 'RUNNING'"):
            phase, key = run.data.tags["mmm4rec.phase"], run.data.tags["mmm4rec.key"]
            if any(twin.info.status != "RUNNING" for twin in self._find(phase, key)):
                self._client.delete_run(run.info.run_id)
            elif phase in ("search", "confirm") and key in trials and trials[key].outcome == "running":
                continue
            else:
                self._set_aside(run, None)

    def _set_strangers_aside(self) -> None:
        known = {trial.trial_key for trial in self._journal.trials()}
        for run in search(self._client, [self._experiment], "tags.`mmm4rec.outcome` != 'superseded'"):
            phase, key = run.data.tags["mmm4rec.phase"], run.data.tags["mmm4rec.key"]
            if (phase in ("search", "confirm") and key not in known) or (phase == "cell" and key not in self._cells):
                self._set_aside(run, None)

    def _set_aside(self, run: Run, ended_ms: int | None) -> None:
        """Take a run out of the tables: its trial, or its cell, is none of the study's any more."""
        self._write(run.info.run_id, tags={"mmm4rec.outcome": "superseded"})
        self._client.set_terminated(run.info.run_id, STATUS["superseded"], end_time=ended_ms)

    def _run(
        self,
        phase: str,
        key: str,
        *,
        name: str,
        start_ms: int,
        tags: Mapping[str, str],
        parent: str | None = None,
        may_exist: bool = True,
    ) -> str:
        """The run of this phase and key; made, if there is none. Looked up where `may_exist`, or its creation failed before."""
        if (phase, key) not in self._runs:
            found = self._find(phase, key) if may_exist or (phase, key) in self._doubtful else []
            if found:
                self._runs[phase, key] = found[0].info.run_id
            else:
                identity = {"mmm4rec.study": self._spec.study, "mmm4rec.phase": phase, "mmm4rec.key": key}
                nesting = {} if parent is None else {"mlflow.parentRunId": parent}
                experiment = self._experiment
                self._doubtful.add((phase, key))
                run = self._client.create_run(experiment, start_time=start_ms, tags={**identity, **nesting, **tags}, run_name=name)
                self._runs[phase, key] = run.info.run_id
            self._doubtful.discard((phase, key))
        return self._runs[phase, key]

    def _find(self, phase: str, key: str) -> list[Run]:
        return search(self._client, [self._experiment], f"tags.`mmm4rec.phase` = '{phase}' and tags.`mmm4rec.key` = '{key}'")

    @cached_property
    def _experiment(self) -> str:
        """The study's own experiment: named as it is, or with its id where another study of that name has the store too."""
        study_id = self._journal.remember("study_id", secrets.token_hex(8))
        for name in (self._spec.study, f"{self._spec.study} {study_id[:6]}"):
            found = self._client.get_experiment_by_name(name)
            if found is None or self._own or found.tags.get("mmm4rec.study_id") == study_id:
                break
        self._journal.replace("mlflow_experiment", name)
        if found is not None:
            return str(found.experiment_id)
        place = (self._folder / "artifacts").resolve().as_uri() if is_database(self._uri) else None  # a server has its own place
        experiment = str(self._client.create_experiment(name, artifact_location=place, tags={"mmm4rec.study_id": study_id}))
        self._tell_newcomers(experiment)
        return experiment

    def _tell_newcomers(self, experiment: str) -> None:
        domains = list(dict.fromkeys(cell.domain for cell in self._cells.values()))
        self._client.set_experiment_tag(experiment, "mlflow.note.content", note(experiment, domains))

    def _write(
        self,
        run: str,
        *,
        metrics: Sequence[Metric] = (),
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """In few calls; the tags come last, so that what they say is true."""
        told = [Param(key, str(value)[:PARAM_LENGTH]) for key, value in (params or {}).items()]
        last = [RunTag(key, value[:TAG_LENGTH]) for key, value in (tags or {}).items()]
        calls = max(-(-len(metrics) // METRICS_PER_CALL), -(-len(told) // PARAMS_PER_CALL), int(bool(last)))
        for call in range(calls):
            self._client.log_batch(
                run,
                metrics=metrics[call * METRICS_PER_CALL : (call + 1) * METRICS_PER_CALL],
                params=told[call * PARAMS_PER_CALL : (call + 1) * PARAMS_PER_CALL],
                tags=last if call == calls - 1 else [],
            )
