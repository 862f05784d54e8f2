"""What must hold of a finished study, whatever was killed while it ran."""

from __future__ import annotations

import json
import random
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from mmm4rec.config import to_dict
from mmm4rec.execute import execute
from mmm4rec.tracking import mlflow_name
from studies.cells import Cell, build_cells
from studies.domains import make_domains
from studies.engine import run_config
from studies.mlflow_store import search, store_uri
from studies.plan import survives
from studies.spec import Spec
from studies.state import Journal, Report, Trial

Curves = dict[str, list[Report]]  # by trial_key


class Violated(Exception):
    """An invariant does not hold."""


def check_study(spec: Spec, out: Path, draw: random.Random, *, reruns: int, kills: int) -> int:
    """Check a finished study; how many trials it has. Raises Violated.

    Args:
        out: holds the study's folder, and the prepared domains in `domains/`.
        reruns: how many trials are run again, alone, and compared.
        kills: how often something was killed while the study ran.
    """
    folder = out / spec.study
    sources = make_domains(spec.domains, folder / "domains", data=out / "domains", seed=spec.seed)
    cells = {cell.name: cell for cell in build_cells(spec, sources)[0]}
    with closing(Journal(folder / "study.sqlite3")) as journal:
        trials = journal.trials()
        curves = {trial.trial_key: journal.reports(trial.trial_key) for trial in trials}
        attempts = {trial.trial_key: [attempt.kind for attempt in journal.attempts(trial.trial_key)] for trial in trials}
    check_trials(trials, cells)
    check_failures(spec, trials, attempts)
    check_curves(trials, curves, folder)
    check_rungs(spec, trials, curves)
    check_begins(trials, folder, kills)
    check_mlflow(spec, trials, curves, folder)
    for trial in draw.sample(trials, min(reruns, len(trials))):
        check_alone(cells[trial.cell], trial, curves[trial.trial_key])
    return len(trials)


def _require(holds: bool, rule: str) -> None:
    if not holds:
        raise Violated(rule)


def check_trials(trials: Sequence[Trial], cells: dict[str, Cell]) -> None:
    """Every trial is there once and is over."""
    for cell in cells.values():
        for phase, wanted in (("search", cell.search_trials), ("confirm", cell.confirm_seeds)):
            numbers = sorted(trial.number for trial in trials if (trial.cell, trial.phase) == (cell.name, phase))
            _require(numbers == list(range(wanted)), f"{cell.name} has the {phase} trials {numbers}; {wanted} were asked for")
    for trial in trials:
        ends = ("finished", "failed") if trial.phase == "confirm" else ("finished", "pruned", "failed")
        _require(trial.outcome in ends, f"{trial.name} is {trial.outcome}")
        _require(
            (trial.result is not None) == (trial.outcome == "finished"), f"{trial.name} is {trial.outcome}, its result is {trial.result}"
        )


def check_failures(spec: Spec, trials: Sequence[Trial], attempts: Mapping[str, Sequence[str]]) -> None:
    """A trial is failed only after more tries than are allowed, and says why."""
    for trial in trials:
        tries = Counter(attempts[trial.trial_key])
        _require(not tries["error"], f"{trial.name} raised an error, and nothing but kills happened here")
        if trial.outcome == "failed":
            _require(tries["lost"] > spec.resources.lost_retries, f"{trial.name} failed after it was lost {tries['lost']} times only")
            _require(bool((trial.reason or "").strip()), f"{trial.name} failed without a reason")


def check_curves(trials: Sequence[Trial], curves: Curves, folder: Path) -> None:
    """Epochs are contiguous and there once, and the trial's own file says the same."""
    for trial in trials:
        reports = curves[trial.trial_key]
        epochs = [report.epoch for report in reports]
        first = 0 if trial.cell.endswith("/popularity") else 1
        _require(epochs == list(range(first, first + len(epochs))), f"{trial.name} has the epochs {epochs}")
        lines = (folder / "trials" / trial.trial_key / "curve.jsonl").read_text(encoding="utf-8").splitlines()
        kept = [json.loads(line) for line in lines][: len(reports)]  # a pruned trial's process may be an epoch ahead
        _require(kept == [report.row for report in reports], f"{trial.name}: its curve.jsonl is not what the journal has")
        if trial.result is not None:
            _require(
                trial.result["epochs"] == epochs[-1], f"{trial.name} ended at epoch {trial.result['epochs']}; its curve at {epochs[-1]}"
            )


def check_rungs(spec: Spec, trials: Sequence[Trial], curves: Curves) -> None:
    """The word on each report, to go on or not, is what its rung said at that moment: with what was reported before it."""
    for trial in (trial for trial in trials if trial.phase == "search"):
        others = [other for other in trials if (other.cell, other.phase) == (trial.cell, "search") and other is not trial]
        for report in curves[trial.trial_key]:
            words = {True}
            if report.epoch in spec.budget.rungs():
                own = _best(curves[trial.trial_key], report.epoch)
                words = set()
                for until_ms in (report.reported_ms - 1, report.reported_ms):  # two reports of one millisecond: either came first
                    rung = [
                        _best(curves[other.trial_key], report.epoch) for other in others if _in_rung(other, curves, report.epoch, until_ms)
                    ]
                    words.add(survives(own, [own, *rung], spec.budget.reduction))
            _require(report.keep in words, f"{trial.name} was told {report.keep} at epoch {report.epoch}; its rung says otherwise")


def _in_rung(trial: Trial, curves: Curves, epoch: int, until_ms: int) -> bool:
    """Whether a trial counts in a rung at a moment: it had come so far, or had finished early."""
    known = [report.epoch for report in curves[trial.trial_key] if report.reported_ms <= until_ms]
    return epoch in known or (bool(known) and trial.outcome == "finished" and (trial.ended_ms or 0) <= until_ms)


def _best(reports: Sequence[Report], until_epoch: int) -> float | None:
    return max((report.value for report in reports if report.epoch <= until_epoch and report.value is not None), default=None)


def check_begins(trials: Sequence[Trial], folder: Path, kills: int) -> None:
    """Each begin of a trial does at most one epoch again (it goes on from last.ckpt), and only a kill makes one begin again."""
    for trial in trials:
        log = (folder / "trials" / trial.trial_key / "log.txt").read_text(encoding="utf-8")
        begins = log.count("begins or goes on")
        _require(1 <= begins <= 1 + kills, f"{trial.name} began {begins} times, with {kills} kills")


def check_mlflow(spec: Spec, trials: Sequence[Trial], curves: Curves, folder: Path) -> None:
    """MLflow has each trial once, with the journal's outcome and curve, and no run that still runs."""
    client = MlflowClient(tracking_uri=store_uri(folder))
    runs = search(client, [experiment.experiment_id for experiment in client.search_experiments()], "")
    running = [run.info.run_name for run in runs if run.info.status == "RUNNING"]
    _require(not running, f"runs of MLflow are left RUNNING: {running}")
    counts = Counter((run.data.tags["mmm4rec.phase"], run.data.tags["mmm4rec.key"]) for run in runs)
    twice = [key for key, count in counts.items() if count > 1]
    _require(not twice, f"MLflow has runs twice: {twice}")
    tracked = {run.data.tags["mmm4rec.trial_key"]: run for run in runs if "mmm4rec.trial_key" in run.data.tags}
    _require(set(tracked) == set(curves), f"MLflow and the journal differ in the trials {sorted(set(tracked) ^ set(curves))}")
    for trial in trials:
        run = tracked[trial.trial_key]
        _require(run.data.tags["mmm4rec.outcome"] == trial.outcome, f"{trial.name} is {trial.outcome}, and not so in MLflow")
        history = client.get_metric_history(run.info.run_id, mlflow_name(f"valid {spec.metric}"))
        curve = [(report.row["optimizer_steps"], report.value) for report in curves[trial.trial_key]]
        _require(sorted((point.step, point.value) for point in history) == curve, f"{trial.name}: its curve in MLflow is not the journal's")


def check_alone(cell: Cell, trial: Trial, reports: Sequence[Report]) -> None:
    """A trial that is run again alone, uninterrupted, gives the same curve."""
    with tempfile.TemporaryDirectory() as folder, closing(execute(run_config(cell, trial, None), Path(folder) / "alone")) as alone:
        for report in reports:
            again = _metrics(to_dict(next(alone)))
            _require(again == _metrics(report.row), f"{trial.name}, epoch {report.epoch}: {_metrics(report.row)}; alone: {again}")


def _metrics(row: dict[str, Any]) -> dict[str, Any]:
    """An epoch's line without its seconds."""
    return {key: value for key, value in json.loads(json.dumps(row)).items() if not key.endswith("seconds")}
