"""One Ray Tune run for all cells of a study: a searcher, a scheduler and a trainable, thin around the conductor.

The trainable tells each epoch and waits; the scheduler passes it on and answers with the conductor's word; the searcher
asks for the next trial. Ray keeps nothing that matters: a driver that comes after a kill starts a new Tuner, and each
unfinished trial goes on from its own `last.ckpt`. A trial's own failure is told like an epoch, so that its actor lives on;
Ray speaks of failures only where a process or a machine was lost, and it never retries: the journal decides.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import tempfile
from collections.abc import Callable
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
from mmm4rec.run import RunConfig
from studies.cells import Cell, nested
from studies.conductor import Conductor, run_trial_files
from studies.files import logged
from studies.places import Places, domain_here, scratch, weights_here
from studies.spec import Resources
from studies.state import FailureKind, Trial
from studies.storage import Storage
from studies.trial_folder import trial_folder

ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard files beside ours
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # the journal and our progress lines say it
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "600",
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",  # a stopped trial may take so long to close before its actor is used again
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # Ray's own snapshots of the experiment are never read
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "MALLOC_ARENA_MAX": "1",  # every trial is a new thread of its actor: with an arena each, glibc's memory grows and grows
}


REACH_SECONDS = 10.0


def start_ray(resources: Resources, *, workers: int = 1) -> None:
    """Join the cluster that this machine belongs to or RAY_ADDRESS names, or start Ray on this machine alone.

    Raises BadInput where a trial, or the pre-training's `workers` together, ask for more than this machine alone has, and
    where RAY_ADDRESS leads nowhere.
    """
    waiting = {"TUNE_MAX_PENDING_TRIALS_PG": str(max(2, resources.concurrent))}  # an autoscaler adds machines for those that it sees wait
    for name, value in (ENVIRONMENT | waiting).items():
        os.environ.setdefault(name, value)
    if len(tempfile.gettempdir()) > 40:  # Ray's socket paths must stay below 107 bytes
        os.environ.setdefault("RAY_TMPDIR", "/tmp")
    _reach_ray()
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    for name in ("ray", "ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if len(ray.nodes()) > 1 or os.environ.get("RAY_ADDRESS", "local") != "local":
        return  # a cluster may grow: trials wait for what is not there yet
    there = ray.cluster_resources()
    for kind, wanted in (("CPU", resources.cpus), ("GPU", resources.gpus)):
        if there.get(kind, 0) < wanted:
            rule = f"a trial asks for {wanted} {kind}s, and Ray has {there.get(kind, 0):g}."
            raise BadInput(rule, remedy="Lower resources in the spec.")
        if there.get(kind, 0) < (together := workers * (max(wanted, 1) if wanted and kind == "GPU" else wanted)):
            rule = f"pre-training asks for {together} {kind}s, and Ray has {there.get(kind, 0):g}."
            raise BadInput(rule, remedy="Lower pretrain.workers in the spec.")


def _reach_ray() -> None:
    """Raise BadInput where RAY_ADDRESS names a place that nothing listens on: Ray itself would wait for minutes."""
    address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.rpartition(":")
    if not host or "://" in address or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=REACH_SECONDS).close()
    except OSError as error:
        rule = f"RAY_ADDRESS is {address}, and nothing answers there ({error})."
        raise BadInput(rule, remedy="Start the cluster, correct RAY_ADDRESS, or unset it for this machine alone.") from error


def run_config(cell: Cell, trial: Trial, pretrained: str | Path | None) -> RunConfig:
    """What a trial runs: the cell's run with the trial's config and seed."""
    told = {
        "data": {"domains": [cell.source.path], "shuffle_features": trial.seed if cell.shuffle_features else None},
        "init": str(pretrained) if cell.init == "pretrained" else None,
        "seed": trial.seed,
        "test": trial.phase == "confirm",
    }
    return from_dict(RunConfig, merge(merge(cell.run, nested(trial.config)), told), source=f"cell {cell.name}")


def run_trial(config: dict[str, Any]) -> None:
    """The trainable: one trial, in its folder, from where it stands.

    Only one process works in a trial's folder: a worker that outlives a killed driver keeps the next one waiting.
    """
    torch.set_num_threads(config["cpus"])
    if 0 < config["gpus"] < 1:  # trials that share a GPU keep to their part of its memory
        torch.cuda.set_per_process_memory_fraction(config["gpus"])
    run = config["run"]
    with trial_folder(config["out"], scratch(config["out"])) as folder, logged(folder.path / "log.txt"):
        here = {
            "data": {"domains": [domain_here(place, fingerprint) for place, fingerprint in config["domains"]]},
            "init": None if run["init"] is None else weights_here(run["init"]),
        }
        run_trial_files(config | {"run": merge(run, here)}, folder.path, tell, keep=folder.keep)


def tell(message: dict[str, Any]) -> None:
    """Ray's loggers want flat metrics; the conductor wants the message as it is."""
    tune.report({"epoch": message.get("row", {}).get("epoch", -1), "message": json.dumps(message)})


class StudySearcher(Searcher):
    """Asks the conductor for the next trial."""

    def __init__(self, conductor: Conductor, launch: Callable[[Trial], dict[str, Any]]) -> None:
        super().__init__()
        self._conductor, self._launch = conductor, launch

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        trial = self._conductor.next_trial()
        if trial is not None:
            return self._launch(trial)
        return Searcher.FINISHED if self._conductor.over() else None  # type: ignore[return-value]

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The scheduler has heard it."""

    def save(self, checkpoint_path: str) -> None:
        """Ray's own restore is never used."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class StudyScheduler(FIFOScheduler):
    """Passes on what trials tell, and the conductor's word on who goes on."""

    def __init__(self, conductor: Conductor) -> None:
        super().__init__()
        self._conductor = conductor
        self._failed: set[str] = set()  # Tune's ids of trials that told their failure and have not ended yet

    def on_trial_result(self, controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        key, message = trial.config["trial_key"], json.loads(result["message"])
        if "failure" in message:
            self._failed.add(trial.trial_id)
            self._conductor.failed(key, message["failure"], message["reason"])
            return self.STOP
        return self.CONTINUE if self._conductor.report(key, message["row"]) else self.STOP

    def on_trial_complete(self, controller: Any, trial: TuneTrial, result: dict[str, Any]) -> None:
        if trial.trial_id in self._failed:
            self._failed.remove(trial.trial_id)
            return
        told = Storage(trial.config["out"]).read("result.json")
        self._conductor.ended(trial.config["trial_key"], None if told is None else json.loads(told))

    def on_trial_error(self, controller: Any, trial: TuneTrial) -> None:
        reason = _read_error(trial)
        kind: FailureKind = "out_of_memory" if "OutOfMemory" in reason else "lost"
        self._conductor.failed(trial.config["trial_key"], kind, reason)

    def __getstate__(self) -> dict[str, Any]:
        return {}


def run_cells(
    conductor: Conductor, *, places: Places, pretrained: Path | None, trainable: Callable[[dict[str, Any]], None] = run_trial
) -> None:
    """Run what the plan still wants, until it is done or the conductor stops. Args: trainable: runs a trial; a benchmark has its own."""
    plan, resources, weights = conductor.plan, conductor.resources, places.publish_weights(pretrained)
    published: dict[str, str] = {}  # where nodes get a domain, by its path here

    def launch(trial: Trial) -> dict[str, Any]:
        cell = plan.cells[trial.cell]
        if cell.source.path not in published:
            published.update(places.publish({cell.domain: cell.source}))
        run = to_dict(run_config(cell, trial, weights))
        asked = {"cpus": resources.cpus, "gpus": resources.gpus, "halvings": conductor.halvings(trial)}
        domains = [(published[cell.source.path], cell.source.fingerprint)]
        return {"trial_key": trial.trial_key, "out": places.trial(trial.trial_key).uri, "run": run, "domains": domains, **asked}

    rays_own = places.root.sub("ray")
    rays_own.sub("tune").delete()
    tune.Tuner(
        tune.with_resources(trainable, {"cpu": resources.cpus, "gpu": resources.gpus}),
        tune_config=tune.TuneConfig(
            search_alg=StudySearcher(conductor, launch),
            scheduler=StudyScheduler(conductor),
            num_samples=-1,
            max_concurrent_trials=resources.concurrent,
            reuse_actors=True,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_folder,
        ),
        run_config=tune.RunConfig(name="tune", verbose=0, **rays_own.for_ray()),
    ).fit()


def _read_error(trial: TuneTrial) -> str:
    file = Path(trial.error_file or "")
    return file.read_text(encoding="utf-8") if file.is_file() else "its process died"


def _trial_name(trial: TuneTrial) -> str:
    return str(trial.config["trial_key"])


def _trial_folder(trial: TuneTrial) -> str:
    """A trial that is tried again has another folder of Ray's."""
    return f"{trial.config['trial_key']}_{trial.trial_id}"
