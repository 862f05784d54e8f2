"""What the study engine costs beside its trials: studies run through Ray, the journal, Optuna and MLflow as any other.

Two studies, a fresh process each. In one the trials sleep, so that all the rest is the engine's. In the other they are real
and tiny, and each tells where its time goes. A trial's overhead is the time from the end of the trial before it in its slot
to its own end, less its epochs' training and validation.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ["RAY_ADDRESS"] = "local"  # a Ray of this machine's own, whatever else runs here

import ray

from mmm4rec import execute as execution
from mmm4rec.config import from_dict
from mmm4rec.data.demo import DemoConfig, write_demo
from mmm4rec.data.domain import write_atomically
from mmm4rec.training import checkpoint
from studies import engine
from studies.benchmark_cases import in_fresh_process
from studies.spec import Spec
from studies.state import Trial
from studies.storage import Storage
from studies.study import Study, open_study

SLOTS = 2
SLEEP_SECONDS = 1.0
ARMS = 4  # a cell each
CONFIRM_SEEDS = 5  # of a cell
REAL_TRIALS = 40
FEWEST_TRIALS = ARMS * (CONFIRM_SEEDS + 1)
MARKS = (0.1, 0.5, 1.0)  # shares of the trials after which the driver's memory is told
PARTS = {
    "assemble": "opening the domain, building the model",
    "save_last": "last.ckpt, after each epoch",
    "save_model": "best.safetensors, after each best epoch and at the end",
    "_finish": "the last ranking and its files, best.safetensors among them",
    "tell": "waiting for the driver's word",
}
SHOPS = DemoConfig(
    sources=("bazaar",), targets=("attic",), source_users=80, source_items=40, target_users=60, target_items=40, dimensions=8
)

Trainable = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class DriverNote:
    """Where the driver stood when a trial had ended."""

    cpu_seconds: float
    memory_bytes: int  # resident


def measure(out: Path, trials: int, machine: dict[str, Any]) -> str:
    """Run both studies, write benchmark_engine.json and .md into `out`; the Markdown."""
    found: dict[str, Any] = {"machine": machine | {"cores": os.cpu_count()}}
    for name, part, size in (("real", run_real, REAL_TRIALS), ("sleeping", run_sleeping, trials)):
        found[name] = in_fresh_process(part, size)
        write_atomically(out / "benchmark_engine.json", (json.dumps(found, indent=2) + "\n").encode())
    text = table(found)
    write_atomically(out / "benchmark_engine.md", text.encode())
    return text


def spec(trials: int, epochs: int) -> Spec:
    """A study of so many trials, in as many cells as there are arms."""
    plain = {
        "study": "engine",
        "domains": {"demo": True},
        "model": {"width": 16, "ffn_width": 16, "head_width": 8, "state": 8, "max_len": 8},
        "training": {"batch_size": 64, "accumulation": 1},
        "space": {
            "training.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
            "training.weight_decay": {"low": 1e-6, "high": 1e-2, "log": True},
            "model.dropout": {"low": 0.0, "high": 0.5},
            "model.filter_size": {"choices": [2, 4]},
        },
        "arms": {f"arm_{number}": {} for number in range(ARMS)},
        "cells": [{"domains": ["attic"], "arms": [f"arm_{number}" for number in range(ARMS)]}],
        "budget": {
            "search_trials": trials // ARMS - CONFIRM_SEEDS,
            "epochs": epochs,
            "grace_epochs": epochs,
            "confirm_seeds": CONFIRM_SEEDS,
        },
        "resources": {"concurrent": SLOTS, "cpus": 1},
    }
    return from_dict(Spec, plain, source="the engine's benchmark")


def sleeping_trial(config: dict[str, Any]) -> None:
    """Stands in for a trial: sleeps, tells one epoch and leaves the result that a run would."""
    began, out, seed = time.time(), _folder(config), config["run"]["seed"]
    out.mkdir(parents=True, exist_ok=True)
    time.sleep(SLEEP_SECONDS)
    valid = {"ndcg@10": (seed * 2654435761 % 2**32) / 2**32}  # any values that differ
    row = {"epoch": 1, "optimizer_steps": 10, "train_loss": 1.0, "train_seconds": SLEEP_SECONDS, "valid_seconds": 0.0, "valid": valid}
    engine.tell({"row": row})
    result = {"best_epoch": 1, "valid": valid, "test": valid, "config": config["run"], "train_seconds": SLEEP_SECONDS, "valid_seconds": 0.0}
    write_atomically(out / "result.json", json.dumps(result).encode())
    _note(out, began, {})


def timed_trial(config: dict[str, Any]) -> None:
    """A real trial that notes where its time went."""
    began, out = time.time(), _folder(config)
    with (
        timed(execution, ["assemble", "save_model", "_finish"]) as own,
        timed(checkpoint, ["save_last"]) as saved,
        timed(engine, ["tell"]) as told,
    ):
        engine.run_trial(config)
    _note(out, began, own | saved | told)


@contextmanager
def timed(module: Any, names: Sequence[str]) -> Iterator[dict[str, float]]:
    """Inside, the seconds spent in these functions of a module, by name."""
    seconds, before = dict.fromkeys(names, 0.0), {name: getattr(module, name) for name in names}

    def clocked(name: str, *given: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return before[name](*given, **named)
        finally:
            seconds[name] += time.perf_counter() - began

    for name in names:
        setattr(module, name, partial(clocked, name))
    try:
        yield seconds
    finally:
        for name in names:
            setattr(module, name, before[name])


def _folder(config: dict[str, Any]) -> Path:
    folder = Storage(config["out"]).path
    assert folder is not None  # the benchmark's studies have no shared storage
    return folder


def _note(out: Path, began: float, seconds: dict[str, float]) -> None:
    read = Path("/proc/self/io")
    from_disk = int(read.read_text().partition("\nread_bytes: ")[2].partition("\n")[0]) if read.exists() else 0
    note = {"process": os.getpid(), "began": began, "ended": time.time(), "seconds": seconds, "disk_bytes": from_disk}
    (out / "times.json").write_text(json.dumps(note), encoding="utf-8")


def run_sleeping(trials: int) -> dict[str, Any]:
    with study_of(spec(trials, epochs=1)) as study:
        told = run(study, sleeping_trial)
        times = trial_times(study)
    wall_seconds, ideal_seconds = told["wall_seconds"], told["trials"] * SLEEP_SECONDS / SLOTS
    return told | {
        "cells": ARMS,
        "ideal_seconds": ideal_seconds,
        "times_the_ideal": wall_seconds / ideal_seconds,
        "processes": len({note["process"] for note in times}),
        "overhead_seconds": spread(overheads(times)),
    }


def run_real(trials: int) -> dict[str, Any]:
    with study_of(spec(trials, epochs=3)) as study:
        told = run(study, timed_trial)
        times = trial_times(study)
    inside = {name: spread([note["seconds"][name] for note in times]) for name in PARTS}
    inside["whole"] = spread([note["ended"] - note["began"] for note in times])
    inside["epochs"] = spread([note["epochs_seconds"] for note in times])
    return told | {
        "processes": len({note["process"] for note in times}),
        "overhead_seconds": spread(overheads(times)),
        "between_seconds": spread(gaps(times)),
        "inside_seconds": inside,
        "disk_bytes": disk_bytes(times),
    }


@contextmanager
def study_of(told: Spec) -> Iterator[Study]:
    """The study, open, on a small demo domain in a folder that does not stay. What it prints goes to nowhere."""
    with tempfile.TemporaryDirectory(prefix="m") as name, Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        folder = Path(name)
        (folder / told.study).mkdir()
        write_demo(folder / told.study / "domains", config=SHOPS)
        with open_study(told, folder, data=None) as study:
            yield study


def run(study: Study, trainable: Trainable) -> dict[str, Any]:
    """Run the study's cells, each trial as `trainable`; what the driver needed for them."""
    began, load = time.perf_counter(), os.getloadavg()[0]
    engine.start_ray(study.spec.resources)
    try:
        conductor = study.conductor()
        notes, tidy = [driver_note()], conductor.tidy

        def note(trial: Trial) -> None:
            tidy(trial)
            notes.append(driver_note())

        conductor.tidy = note
        start_seconds, began = time.perf_counter() - began, time.perf_counter()
        engine.run_cells(conductor, places=study.places, pretrained=None, trainable=trainable)
        wall_seconds = time.perf_counter() - began
        study.tracker.flush()
    finally:
        ray.shutdown()
    outcomes = {trial.outcome for trial in study.plan.journal.trials()}
    if outcomes != {"finished"}:
        raise RuntimeError(f"trials of the benchmark ended as {', '.join(sorted(outcomes))}")
    trials = len(notes) - 1
    return {
        "trials": trials,
        "load_average_before": load,
        "wall_seconds": wall_seconds,
        "ray_start_seconds": start_seconds,
        "mlflow_behind_seconds": time.perf_counter() - began - wall_seconds,
        "driver_cpu_seconds": driver_note().cpu_seconds - notes[0].cpu_seconds,
        "driver_memory_bytes": {str(mark): notes[max(1, round(mark * trials))].memory_bytes for mark in MARKS},
    }


def driver_note() -> DriverNote:
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return DriverNote(time.process_time(), pages * os.sysconf("SC_PAGE_SIZE"))


def trial_times(study: Study) -> list[dict[str, Any]]:
    """What the trials noted, in the order of their ends, with the seconds of their epochs."""
    found = []
    for trial in study.plan.journal.trials():
        note = json.loads((study.folder / "trials" / trial.trial_key / "times.json").read_text(encoding="utf-8"))
        assert trial.result is not None
        found.append(note | {"epochs_seconds": trial.result["train_seconds"] + trial.result["valid_seconds"]})
    return sorted(found, key=lambda note: note["ended"])


def overheads(times: Sequence[dict[str, Any]]) -> list[float]:
    """Seconds from the end of a slot's trial to the end of its next one, less that one's epochs."""
    return [after["ended"] - before["ended"] - after["epochs_seconds"] for before, after in neighbours(times)]


def gaps(times: Sequence[dict[str, Any]]) -> list[float]:
    """Seconds from the end of a slot's trial to the beginning of its next one."""
    return [after["began"] - before["ended"] for before, after in neighbours(times)]


def neighbours(times: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Trials that follow one another in a slot. A process keeps its slot; a new one takes that whose trial ended last."""
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = []
    latest: list[dict[str, Any]] = []  # each slot's last trial so far
    for note in sorted(times, key=lambda note: note["began"]):
        free = [other for other in latest if other["ended"] <= note["began"]]
        if free:
            before = max(free, key=lambda other: (other["process"] == note["process"], other["ended"]))
            latest.remove(before)
            pairs.append((before, note))
        latest.append(note)
    return pairs


def disk_bytes(times: Sequence[dict[str, Any]]) -> dict[str, int]:
    """What the trials' processes had read from the disk itself after their first trial, and what all later trials read."""
    by_process: dict[int, list[int]] = {}
    for note in times:
        by_process.setdefault(note["process"], []).append(note["disk_bytes"])
    return {
        "first_trials": sum(read[0] for read in by_process.values()),
        "later_trials": sum(read[-1] - read[0] for read in by_process.values()),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and 90th percentile."""
    return {"median": statistics.median(values), "percentile_90": statistics.quantiles(values, n=10, method="inclusive")[8]}


def table(found: dict[str, Any]) -> str:
    """What was measured beside the targets, as Markdown."""
    sleeping, real, where = found["sleeping"], found["real"], found["machine"]
    memory = ", ".join(f"{used / 1e6:.0f}" for used in sleeping["driver_memory_bytes"].values())
    marks = ", ".join(f"{float(mark):.0%}".replace("%", " %") for mark in sleeping["driver_memory_bytes"])
    inside, disk = real["inside_seconds"], real["disk_bytes"]
    trials = f"{sleeping['trials']:,} trials of {SLEEP_SECONDS:.0f} s, {sleeping['cells']} cells, {SLOTS} slots"
    rows_sleeping = [
        (f"{trials}: times the ideal {sleeping['ideal_seconds']:.0f} s", f"{sleeping['times_the_ideal']:.2f}", "at most 1.3 (of 1,000)"),
        ("overhead a trial: all but its sleep", _spread(sleeping["overhead_seconds"]), "median at most 0.25 s"),
        ("the driver's CPU time a trial, MLflow's thread included", f"{_driver_milliseconds(sleeping):.0f} ms", ""),
        (f"the driver's memory after {marks} of the trials", f"{memory} MB", "flat"),
        ("processes that ran trials", str(sleeping["processes"]), f"{SLOTS}: actors are reused"),
        ("MLflow behind at the end", f"{sleeping['mlflow_behind_seconds']:.1f} s", ""),
        ("starting Ray", f"{sleeping['ray_start_seconds']:.1f} s", ""),
    ]
    rows_real = [
        ("overhead a trial: all but training and validation", _spread(real["overhead_seconds"]), "median at most 0.25 s"),
        ("of it between two trials, in the driver and Ray", _spread(real["between_seconds"]), ""),
        *((f"of it in the trial: {what}", _spread(inside[name]), "") for name, what in PARTS.items()),
        ("training and validation", _spread(inside["epochs"]), ""),
        ("processes that ran trials", str(real["processes"]), f"{SLOTS}: actors are reused"),
        (
            "read from the disk: first trials of the processes, all later ones",
            f"{disk['first_trials'] / 1e6:.1f} MB, {disk['later_trials'] / 1e6:.1f} MB",
            "a domain once a node",
        ),
    ]
    load = f"load average before the parts {sleeping['load_average_before']:.1f} and {real['load_average_before']:.1f}"
    return "\n".join(
        [
            "# What the study engine costs",
            "",
            "Made by `python studies/benchmark.py --engine`; every figure is in `benchmark_engine.json`. Medians (90th percentiles).",
            "",
            "## Trials that sleep",
            "",
            *_lines(rows_sleeping),
            f"## Real trials, tiny ({real['trials']})",
            "",
            *_lines(rows_real),
            f"({where['name']}, {where['cores']} cores; {load}; torch {where['torch']}; code {where['code_version']})",
            "",
        ]
    )


def _lines(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    return ["| what | measured | target |", "| --- | --- | --- |", *(f"| {' | '.join(row)} |" for row in rows), ""]


def _driver_milliseconds(told: dict[str, Any]) -> float:
    return 1000 * told["driver_cpu_seconds"] / told["trials"]


def _spread(seconds: dict[str, float]) -> str:
    return f"{seconds['median']:.3f} s ({seconds['percentile_90']:.3f})"
