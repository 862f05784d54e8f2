"""One Ray Tune run for all cells of a study: a searcher, a scheduler and a trainable, thin around the journal.

The trainable tells each epoch and waits; the scheduler writes it into the journal and answers with ASHA's word; the
searcher asks the plan for the next trial. Ray keeps nothing that matters: a driver that comes after a kill starts a
new Tuner, and each unfinished trial goes on from its own `last.ckpt`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray calls home otherwise; whoever wants that sets "1"

import ray
import torch
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from mmm4rec.config import from_dict, merge, to_dict
from mmm4rec.errors import BadInput
from mmm4rec.execute import execute
from mmm4rec.run import Assembled, RunConfig
from studies.cells import Cell, nested
from studies.mlflow_tracker import MlflowTracker
from studies.plan import Plan
from studies.progress import Progress
from studies.spec import Resources
from studies.state import Trial, locked
from studies.suggestions import Suggestions

ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard files beside ours
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # the journal and our progress lines say it
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "600",
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",  # a stopped trial may take so long to close before its actor is used again
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "MALLOC_ARENA_MAX": "1",  # every trial is a new thread of its actor: with an arena each, glibc's memory grows and grows
}


RETRIES = 1  # of a trial that failed, from its last.ckpt, before its failure is recorded


def start_ray(resources: Resources, *, workers: int = 1) -> None:
    """Join the cluster that this machine belongs to or RAY_ADDRESS names, or start Ray on this machine alone.

    Raises BadInput where a trial, or the pre-training's `workers` together, ask for more than there is.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if len(tempfile.gettempdir()) > 40:  # Ray's socket paths must stay below 107 bytes
        os.environ.setdefault("RAY_TMPDIR", "/tmp")
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    for name in ("ray", "ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    there = ray.cluster_resources()
    for kind, wanted in (("CPU", resources.cpus), ("GPU", resources.gpus)):
        if there.get(kind, 0) < wanted:
            rule = f"a trial asks for {wanted} {kind}s, and Ray has {there.get(kind, 0):g}."
            raise BadInput(rule, remedy="Lower resources in the spec.")
        if there.get(kind, 0) < (together := workers * (max(wanted, 1) if wanted and kind == "GPU" else wanted)):
            rule = f"pre-training asks for {together} {kind}s, and Ray has {there.get(kind, 0):g}."
            raise BadInput(rule, remedy="Lower pretrain.workers in the spec.")


def run_config(cell: Cell, trial: Trial, pretrained: Path | None) -> RunConfig:
    """What a trial runs: the cell's run with the trial's config and seed."""
    told = {
        "data": {"domains": [cell.source.path], "shuffle_features": trial.seed if cell.shuffle_features else None},
        "init": str(pretrained) if cell.init == "pretrained" else None,
        "seed": trial.seed,
        "test": trial.phase == "confirm",
    }
    return from_dict(RunConfig, merge(merge(cell.run, nested(trial.config)), told), source=f"cell {cell.name}")


def run_trial(config: dict[str, Any]) -> None:
    """The trainable: tells its curve so far, then goes on from where it stands, epoch by epoch.

    Only one process works in a trial's folder: a worker that outlives a killed driver keeps the next one waiting.
    """
    torch.set_num_threads(config["cpus"])
    if 0 < config["gpus"] < 1:  # trials that share a GPU keep to their part of its memory
        torch.cuda.set_per_process_memory_fraction(config["gpus"])
    out = Path(config["out"])
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / ".lock", wait=True):
        if (out / "result.json").exists():
            for row in read_curve(out):
                _tell(row)
            return
        run = from_dict(RunConfig, config["run"], source=f"trial {out.name}")
        with closing(execute(run, out, resume=True, on_start=_tell_history)) as reports:
            for report in reports:
                _tell(to_dict(report))


def _tell_history(assembled: Assembled) -> None:
    """What last.ckpt knows: a kill may have come before the last of it was told."""
    for report in assembled.run.state.history:
        _tell(to_dict(report))


def _tell(row: dict[str, Any]) -> None:
    tune.report({"epoch": row["epoch"], "row": json.dumps(row)})


def read_curve(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's curve; a line that a kill cut short is left out."""
    file = out / "curve.jsonl"
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


class StudySearcher(Searcher):
    """Asks the plan for the next trial."""

    def __init__(
        self, plan: Plan, suggestions: Suggestions, launch: Callable[[Trial], dict[str, Any]], give_up: Callable[[str], None]
    ) -> None:
        super().__init__()
        self._plan, self._suggestions, self._launch, self._give_up = plan, suggestions, launch, give_up

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        trial = self._plan.next_trial(self._suggestions.suggest)
        if trial is not None:
            return self._launch(trial)
        return Searcher.FINISHED if self._plan.done() else None  # type: ignore[return-value]

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Of an end the scheduler has heard; but only a searcher is not told of a failure that Tune retries."""
        if error:
            self._give_up(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Ray's own restore is never used."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class StudyScheduler(FIFOScheduler):
    """Writes what trials tell into the journal, and passes on who goes on."""

    def __init__(self, plan: Plan, suggestions: Suggestions, tracker: MlflowTracker, progress: Progress) -> None:
        super().__init__()
        self._plan, self._suggestions, self._tracker, self._progress = plan, suggestions, tracker, progress
        self._erring: dict[str, TuneTrial] = {}  # by Tune's id

    def on_trial_result(self, controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        key = trial.config["trial_key"]
        row = json.loads(result["row"])
        keep = self._plan.report(key, row)
        self._tracker.trial(key)
        self._progress.epoch(key, row)
        return self.CONTINUE if keep else self.STOP

    def on_trial_complete(self, controller: Any, trial: TuneTrial, result: dict[str, Any]) -> None:
        file = Path(trial.config["out"]) / "result.json"
        if file.exists():
            self._end(trial, "finished", result=json.loads(file.read_text(encoding="utf-8")))
        else:  # changes nothing where the trial was pruned
            self._end(trial, "failed", reason="ended without a result.json")

    def on_trial_error(self, controller: Any, trial: TuneTrial) -> None:
        """Called for a failure that Tune retries as for a last one."""
        self._erring[trial.trial_id] = trial

    def give_up(self, trial_id: str) -> None:
        """The failure was the last."""
        trial = self._erring[trial_id]
        self._end(trial, "failed", reason=_read_error(trial))

    def _end(self, trial: TuneTrial, outcome: Any, **facts: Any) -> None:
        key = trial.config["trial_key"]
        self._plan.journal.end(key, outcome, **facts)
        ended = self._plan.journal.trial(key)
        if ended.phase == "search":
            self._suggestions.tell(self._plan.cells[ended.cell], ended)
        self._tracker.trial(key)
        self._progress.ended(ended)

    def __getstate__(self) -> dict[str, Any]:
        return {}


def run_cells(
    plan: Plan, suggestions: Suggestions, tracker: MlflowTracker, *, folder: Path, resources: Resources, pretrained: Path | None
) -> None:
    """Run what the plan still wants, until it is done or the user interrupts."""

    def launch(trial: Trial) -> dict[str, Any]:
        run = to_dict(run_config(plan.cells[trial.cell], trial, pretrained))
        out = (folder / "trials" / trial.trial_key).resolve()
        return {"trial_key": trial.trial_key, "out": str(out), "run": run, "cpus": resources.cpus, "gpus": resources.gpus}

    scheduler = StudyScheduler(plan, suggestions, tracker, Progress(plan))
    storage = (folder / "ray").resolve()
    shutil.rmtree(storage / "tune", ignore_errors=True)
    tune.Tuner(
        tune.with_resources(run_trial, {"cpu": resources.cpus, "gpu": resources.gpus}),
        tune_config=tune.TuneConfig(
            search_alg=StudySearcher(plan, suggestions, launch, scheduler.give_up),
            scheduler=scheduler,
            num_samples=-1,
            max_concurrent_trials=resources.concurrent,
            reuse_actors=True,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name="tune", storage_path=str(storage), verbose=0, failure_config=tune.FailureConfig(max_failures=RETRIES)
        ),
    ).fit()


def _read_error(trial: TuneTrial) -> str:
    file = Path(trial.error_file or "")
    return file.read_text(encoding="utf-8") if file.is_file() else "its process died"


def _trial_name(trial: TuneTrial) -> str:
    return str(trial.config["trial_key"])
