"""What a large study's tables cost: a store of thousands of runs, written as the tracker writes them, then read as anyone reads it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # before MLflow is imported

import numpy as np
import pandas as pd
from mlflow.entities import Metric, Param, RunTag
from tqdm import tqdm

from mmm4rec.data.domain import write_atomically
from mmm4rec.tracking import mlflow_name
from mmm4rec.training.metrics import metrics
from studies.files import RANKS
from studies.ledger import GIVEN
from studies.mlflow_store import open_store, store_uri

ARMS, SEARCH, CONFIRM = 10, 5, 5  # arms a domain; trials a cell
EPOCHS, USERS = 10, 400
RATE = "training.learning_rate"
SPACE = {RATE: [1e-4, 1e-1, True, None], "model.dropout": [0.0, 0.5, False, None]}


def measure(out: Path, runs: int, machine: dict[str, Any]) -> str:
    """Write a store of so many trials, time `studies/tables.py` on it in processes of their own; writes benchmark_tables.json and .md."""
    with tempfile.TemporaryDirectory(prefix="tables") as room:
        folder = Path(room) / "large"
        domains = max(1, round(runs / (ARMS * (SEARCH + CONFIRM))))
        made = write_store(folder, domains)
        root = Path(__file__).resolve().parent.parent
        took = {}
        for name, command in {
            "tables from MLflow": ["tables.py", str(folder)],
            "export to parquet": ["runs.py", str(folder)],
            "tables from the export": ["tables.py", str(folder), "--export"],
        }.items():
            began = time.monotonic()
            subprocess.run([sys.executable, str(root / "studies" / command[0]), *command[1:]], check=True, stdout=subprocess.DEVNULL)
            took[name] = time.monotonic() - began
        size = (folder / "index.html").stat().st_size
    found = {"machine": machine, "trials": made, "domains": domains, "arms": ARMS, "users": USERS, "seconds": took, "page_bytes": size}
    lines = [
        f"# What tables cost: {made:,} trials in MLflow (sqlite)",
        "",
        f"Written by `studies/benchmark.py --tables`: {domains} domains of {USERS} users, {ARMS} arms, {SEARCH} search and",
        f"{CONFIRM} confirm trials a cell, {EPOCHS} epochs. All tables, figures and the page ({size / 1e6:.1f} MB); Python's start and its",
        "imports included.",
        f"Machine: {machine['name']}, code {machine['code_version']}.",
        "",
        "| what | seconds |",
        "| --- | --- |",
        *(f"| {name} | {seconds:.1f} |" for name, seconds in took.items()),
        "",
    ]
    text = "\n".join(lines)
    write_atomically(out / "benchmark_tables.json", (json.dumps(found, indent=2) + "\n").encode())
    write_atomically(out / "benchmark_tables.md", text.encode())
    return text


def write_store(folder: Path, domains: int) -> int:
    """A finished study in `folder`: how many trials it has."""
    folder.mkdir(parents=True)
    client, draw, made = open_store(store_uri(folder)), np.random.default_rng(0), 0
    experiment = client.create_experiment("large", artifact_location=str(folder / "artifacts"))
    for domain in tqdm([f"shop_{n}" for n in range(domains)], unit="domain"):
        for number in range(ARMS):
            cell = {"mmm4rec.cell": f"{domain}/arm_{number}", "mmm4rec.domain": domain, "mmm4rec.arm": f"arm_{number}"}
            init = "pretrained" if number % 2 else "scratch"
            facts = {"position": str(made), "init": init, "besides_init": str(number // 2), "search_trials": str(SEARCH)}
            facts |= {"epochs": str(EPOCHS), "baseline": "arm_0", "space": json.dumps(SPACE)}
            ledger = dict.fromkeys(GIVEN, 1.0) | {"search_trials_used": SEARCH, "confirm_trials_used": CONFIRM, "seconds": 100.0}
            tags = cell | {f"mmm4rec.{key}": value for key, value in facts.items()} | {"mmm4rec.phase": "cell"}
            run = client.create_run(experiment, tags=tags, run_name=cell["mmm4rec.cell"]).info.run_id
            client.log_batch(run, [Metric(f"ledger/{key}", float(value), 0, 0) for key, value in ledger.items()])
            for phase, count in (("search", SEARCH), ("confirm", CONFIRM)):
                for trial in range(count):
                    write_trial(folder, client, experiment, cell, phase, trial, draw)
                    made += 1
    return made


def write_trial(
    folder: Path, client: Any, experiment: str, cell: dict[str, str], phase: str, number: int, draw: np.random.Generator
) -> None:
    """One trial's run: a curve, and for a confirm trial its test metrics and ranks."""
    key = f"{cell['mmm4rec.cell']} {phase} {number}"
    tags = cell | {"mmm4rec.phase": phase, "mmm4rec.outcome": "finished", "mmm4rec.trial_key": key, "mmm4rec.fingerprint": "print"}
    run = client.create_run(experiment, tags=tags, run_name=key).info.run_id
    top = draw.uniform(0.1, 0.3)
    curve = [{"epoch": epoch, "seconds": 2.0 * epoch, "train loss": 1 / epoch} for epoch in range(1, EPOCHS + 1)]
    names = metrics(np.ones(1))
    told = [Metric(mlflow_name(key), float(value), 0, 10 * int(row["epoch"])) for row in curve for key, value in row.items()]
    for row in curve:
        told += [Metric(mlflow_name(f"valid {name}"), top * (1 - 0.5 ** row["epoch"]), 0, 10 * int(row["epoch"])) for name in names]
    params = {"seed": str(number), "number": str(number), RATE: str(10 ** draw.uniform(-4, -1)), "model.dropout": str(draw.uniform(0, 0.5))}
    if phase == "confirm":
        rank = np.maximum(1, np.exp(draw.normal(3, 1.2, USERS)).round())
        told += [Metric(mlflow_name(f"test {name}"), value, 0, 10 * EPOCHS) for name, value in metrics(rank).items()]
        place = folder / "artifacts" / run / "artifacts"
        place.mkdir(parents=True)
        pd.DataFrame({"domain": "d", "split": "test", "user": np.arange(USERS), "rank": rank}).to_parquet(place / RANKS, index=False)
    client.log_batch(run, told, [Param(key, value) for key, value in params.items()], [RunTag("mmm4rec.metrics", "by hand")])
    client.set_terminated(run)
