"""A soak of pre-training: it is killed at random moments until it has been often enough, and must end as if it had not been.

    python studies/soak_pretrain.py --kills 20 --seed 0

On a small Ray cluster of its own, as studies/soak.py: a head with the driver, and two nodes with room for one worker each.
One pre-training is left alone. Then others, of the same seed, are killed:

    worker    the process of one of the two workers, with SIGKILL
    driver    with SIGKILL; the same command is given again
    node      a worker node with all its processes; another one joins, and until then one worker goes on alone

At the end every curve must be that of the one that was left alone: losses and weights to float tolerance, for one worker and
two sum in another order. No step may be missing or twice, in the files and in MLflow, and no restart may have taken away more
than the checkpoints allow.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the repository's root, not studies/, belongs on the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import yaml
from mlflow import MlflowClient
from safetensors.numpy import load_file
from tqdm import tqdm

from mmm4rec.config import from_dict, to_dict
from mmm4rec.data.demo import DemoConfig, write_demo
from studies.mlflow_store import search, store_uri
from studies.soak import ROOT, ended_within, processes_below, replace_node, small_cluster
from studies.soak_checks import Violated
from studies.spec import Spec

KINDS = {"worker": 4, "driver": 2, "node": 2}  # how often, relative to each other
WORKER = b"RayTrainWorker"  # in the command line of a worker's process
EVERY_STEPS, BETWEEN_REPORTS = 10, 5
SHOPS = DemoConfig(targets=("attic",), source_users=120, source_items=60, target_users=60, target_items=40, dimensions=8)
IN_TRAINING = 0.8  # of the kills; the others come at any moment, Ray's start among them
LIMIT_SECONDS = 1800  # for one pre-training, its kills among it
RELATIVE, ABSOLUTE = 1e-4, 1e-5  # float tolerance of losses and weights


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 every invariant held, 1 one did not, 2 bad input."""
    told = _parser().parse_args(arguments)
    if not Path("/proc/self/stat").exists() or told.kills < 1:
        print("error: the soak needs Linux's /proc, and at least one kill.", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: cluster and driver are taken down
    began, out, draw = time.monotonic(), (told.out or Path(tempfile.mkdtemp(prefix="soak_"))).resolve(), random.Random(told.seed)
    done: Counter[str] = Counter()
    again: list[int] = []  # steps done again, each time that a run went on from a checkpoint
    number = 0
    with small_cluster() as cluster, tqdm(total=told.kills, unit="kill") as bar:
        try:
            run(cluster, make_spec("alone", told.epochs, workers=2), out, None)
            while done.total() < told.kills:
                number += 1
                name, allowed = f"killed_{number}", min(told.kills - done.total(), told.kills_each)
                killer = Killer(cluster, draw, told.pause, allowed, bar)
                run(cluster, make_spec(name, told.epochs, workers=2), out, killer)
                done += killer.done
                again += check(out, name, killer.done.total())
        except Violated as error:
            print(f"\nVIOLATED: {error}\nIts files: {out}", file=sys.stderr)
            return 1
    killed = ", ".join(f"{kind} {count}" for kind, count in sorted(done.items()))
    did = f"{number} pre-trainings, {len(again)} times on from a checkpoint, {sum(again)} steps done again"
    print(f"{done.total()} kills ({killed}), {did}, {time.monotonic() - began:.0f} s: all held.")
    if told.out is None:
        shutil.rmtree(out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how many kills; default: 20, half an hour or so")
    parser.add_argument("--kills-each", type=int, default=4, help="at most so many of one pre-training; default: 4")
    parser.add_argument("--seed", type=int, default=0, help="of the kinds and the pauses; default: 0")
    parser.add_argument("--epochs", type=int, default=24, help="of a pre-training; default: 24")
    parser.add_argument("--pause", type=float, default=4.0, help="mean seconds from a sign of training to a kill; default: 4")
    parser.add_argument("--out", type=Path, help="a folder for the files, which stay; default: a temporary one, kept only after a failure")
    return parser


def make_spec(name: str, epochs: int, *, workers: int) -> Spec:
    """A pre-training on the demo's sources, tiny, without dropout."""
    told = {
        "study": name,
        "domains": {"demo": True},
        "model": {"width": 16, "ffn_width": 16, "head_width": 8, "state": 8, "max_len": 8, "dropout": 0.0},
        "pretrain": {
            "sources": ["bazaar", "market", "warehouse"],
            "training": {
                "epochs": epochs,
                "batch_size": 32,
                "accumulation": 2,
                "learning_rate": 3e-3,
                "patience": epochs,
                "mixed_batches": True,
                "sampling_power": 0.5,
                "steps_between_reports": BETWEEN_REPORTS,
            },
            "workers": workers,
            "min_workers": 1,
            "max_failures": 1000,
            "checkpoint_every_steps": EVERY_STEPS,
        },
        "space": {"training.learning_rate": {"low": 1e-3, "high": 1e-1, "log": True}},
        "arms": {"pretrained": {"init": "pretrained"}},
        "cells": [{"domains": ["attic"], "arms": ["pretrained"]}],
        "budget": {"search_trials": 1, "epochs": 1, "confirm_seeds": 1},
        "resources": {"concurrent": 2, "cpus": 1},
    }
    return from_dict(Spec, told, source="the soak's spec")


class Killer:
    """Kills something after each pause, so often as told."""

    def __init__(self, cluster: Any, draw: random.Random, pause_seconds: float, kills: int, bar: Any) -> None:
        self._cluster, self._draw, self._kills, self._bar = cluster, draw, kills, bar
        self._pause_seconds = pause_seconds
        self.done: Counter[str] = Counter()

    def waits(self, driver: subprocess.Popen[bytes], steps: Path) -> bool:
        """Wait for the next moment to kill, for ever when there were enough; whether the driver ended meanwhile.

        Most moments lie in training: the pause begins when `steps`, the file of its reports, has changed. Others are any.
        """
        if self.done.total() >= self._kills:
            return ended_within(driver, LIMIT_SECONDS)
        if self._draw.random() < IN_TRAINING:
            before = _version(steps)
            while _version(steps) == before:
                if ended_within(driver, 0.2):
                    return True
        return ended_within(driver, self._draw.expovariate(1 / self._pause_seconds))

    def kill(self, driver: subprocess.Popen[bytes]) -> None:
        kind = self._draw.choices(list(KINDS), list(KINDS.values()))[0]
        if kind == "driver":
            driver.kill()
            driver.wait()
        elif kind == "node":
            replace_node(self._cluster, self._draw)
        else:
            workers = processes_below(os.getpid(), WORKER)
            if not workers:
                return
            with suppress(ProcessLookupError):
                os.kill(self._draw.choice(workers), signal.SIGKILL)
        self.done[kind] += 1
        self._bar.update()
        self._bar.set_postfix_str(kind)


def run(cluster: Any, spec: Spec, out: Path, killer: Killer | None) -> None:
    """Pre-train to the end, with kills. Raises Violated where it gives up."""
    (out / spec.study).mkdir(parents=True, exist_ok=True)
    write_demo(out / spec.study / "domains", config=SHOPS)
    (out / f"{spec.study}.yaml").write_text(yaml.safe_dump(to_dict(spec)), encoding="utf-8")
    driver, deadline = start(cluster, spec, out), time.monotonic() + LIMIT_SECONDS
    try:
        while time.monotonic() < deadline:
            if (
                ended_within(driver, LIMIT_SECONDS)
                if killer is None
                else killer.waits(driver, out / spec.study / "pretrain" / "steps.jsonl")
            ):
                if driver.returncode == 0:
                    return
                said = (out / f"{spec.study}.log").read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
                raise Violated("the driver gave up:\n" + "\n".join(said))
            if killer is not None:
                killer.kill(driver)
                if driver.poll() is not None:
                    driver = start(cluster, spec, out)
        raise Violated(f"{spec.study} was not over after {LIMIT_SECONDS} s")
    finally:
        driver.kill()
        driver.wait()


def _version(file: Path) -> tuple[int, int] | None:
    with suppress(FileNotFoundError):
        state = file.stat()
        return state.st_ino, state.st_size
    return None


def start(cluster: Any, spec: Spec, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "studies" / "pretrain.py"), "--spec", str(out / f"{spec.study}.yaml"), "--out", str(out)]
    with (out / f"{spec.study}.log").open("ab") as log:
        return subprocess.Popen(command, env={**os.environ, "RAY_ADDRESS": cluster.address}, stdout=log, stderr=log)


def check(out: Path, name: str, kills: int) -> list[int]:
    """Compare a killed pre-training with the one that was left alone; the steps done again at each going on. Raises Violated."""
    alone, killed = out / "alone" / "pretrain", out / name / "pretrain"
    for file, keys in (("curve.jsonl", ("train_loss",)), ("steps.jsonl", ("train_loss", "gradient_norm"))):
        expected, found = (_lines(folder / file) for folder in (alone, killed))
        places = [[row["optimizer_steps"] for row in rows] for rows in (expected, found)]
        _require(places[0] == places[1], f"{name}/{file} has the steps {places[1]}; alone: {places[0]}")
        for key in keys:
            one, other = np.array([[row[key] for row in rows] for rows in (expected, found)], dtype=float)
            same = np.allclose(one, other, rtol=RELATIVE, atol=ABSOLUTE)
            _require(same, f"{name}/{file}: {key} differs by {np.abs(one - other).max()}")
    weights = [load_file(folder / "best.safetensors") for folder in (alone, killed)]
    off = max(float(np.abs(weights[0][key] - weights[1][key]).max()) for key in weights[0])
    _require(off < 1e-2, f"{name}: a weight differs by {off}")
    _check_mlflow(out / name, [row["optimizer_steps"] for row in _lines(killed / "steps.jsonl")])
    log = (killed / "log.txt").read_text(encoding="utf-8")
    begins = log.count("begins or goes on")
    _require(begins <= 1 + 2 * kills, f"{name} began {begins} times, with {kills} kills")
    again = [int(at) - int(left) for at, left in re.findall(r"had come to step (\d+).*\n.*goes on from (\d+)\.ckpt", log)]
    _require(max(again, default=0) <= 2 * EVERY_STEPS, f"{name} did {max(again, default=0)} steps again after a kill")
    return again


def _check_mlflow(folder: Path, steps: list[int]) -> None:
    """One run, over, and each report of steps once."""
    client = MlflowClient(tracking_uri=store_uri(folder))
    runs = search(client, [experiment.experiment_id for experiment in client.search_experiments()], "tags.`mmm4rec.phase` = 'pretrain'")
    _require([run.info.status for run in runs] == ["FINISHED"], f"{folder.name}: MLflow has {len(runs)} runs of pre-training")
    for metric in ("step/loss", "step/gradient_norm"):
        told = sorted(point.step for point in client.get_metric_history(runs[0].info.run_id, metric))
        _require(told == steps, f"{folder.name}: {metric} in MLflow is of the steps {told}; the file's: {steps}")


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _require(holds: bool, rule: str) -> None:
    if not holds:
        raise Violated(rule)


if __name__ == "__main__":
    raise SystemExit(main())
