"""A soak: tiny studies on a small Ray cluster of its own, with kills at random moments, and a check of everything at the end.

    python studies/soak.py --kills 300 --seed 0
    python studies/soak.py --kills 20 --out soak_files          # keep the studies, to look at

The cluster is a head, where the driver lives, and two worker nodes with one trial each, all on this machine. What is killed:

    trial     the process of a running trial, with SIGKILL
    driver    with SIGKILL; it is started again with --resume
    node      a worker node with all its processes; another one joins
    stop      SIGTERM to the driver: it ends when the running epochs have ended, and is started again

A study that is over before the kills are used up is checked, and the next one begins. Kinds, pauses and studies are drawn
from --seed; the moments are the machine's, so a failure may take several tries to come again. Only processes that the
soak has started are killed, by their number. Linux only: the trials' processes are found in /proc.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the repository's root, not studies/, belongs on the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import yaml
from tqdm import tqdm

from mmm4rec.config import from_dict, to_dict
from mmm4rec.data.demo import DemoConfig, write_demo
from studies.soak_checks import Violated, check_study
from studies.spec import Spec

ROOT = Path(__file__).resolve().parent.parent
KINDS = {"trial": 4, "driver": 3, "node": 1, "stop": 2}  # how often, relative to each other
SHOPS = DemoConfig(
    sources=("bazaar",), targets=("attic", "cellar"), source_users=80, source_items=40, target_users=60, target_items=40, dimensions=8
)
TRIAL = b"ImplicitFunc.train"  # in the command line of a trial's process
DEADLINE_SECONDS = 900  # for a study to end when nothing is killed any more
STOP_SECONDS = 120  # for a driver to end after SIGTERM


@dataclass
class Soak:
    """What the soak has so far: `kills` of the study that runs now, `done` of all, by kind."""

    out: Path
    cluster: Any
    address: str
    draw: random.Random
    pause_seconds: float
    kills: int = 0
    done: Counter[str] = field(default_factory=Counter)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 every invariant held, 1 one did not or it was interrupted, 2 bad input."""
    told = _parser().parse_args(arguments)
    if not Path("/proc/self/stat").exists() or min(told.kills, told.trials) < 1:
        print("error: the soak needs Linux's /proc, and at least one kill and one trial.", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: cluster and driver are taken down
    began, out = time.monotonic(), (told.out or Path(tempfile.mkdtemp(prefix="soak_"))).resolve()
    trials = studies = 0
    checked: Counter[str] = Counter()  # the kills of the studies that were checked
    with small_cluster() as cluster, tqdm(total=told.kills, unit="kill") as bar:
        soak = Soak(out, cluster, cluster.address, random.Random(told.seed), told.pause)
        try:
            while sum(soak.done.values()) < told.kills:
                spec = make_spec(told.seed + studies, told.trials)
                run_study(soak, spec, told.kills, bar)
                trials += check_study(spec, out, random.Random(spec.seed), reruns=told.reruns, kills=soak.kills)
                studies += 1
                checked = soak.done.copy()
        except KeyboardInterrupt:
            print(f"\nInterrupted; {spec.study} and its {soak.kills} kills are not checked. Its files: {out / spec.study}", file=sys.stderr)
        except Violated as error:
            print(f"\nVIOLATED: {error}\nIts files: {out / spec.study}", file=sys.stderr)
            return 1
    seconds, whole = time.monotonic() - began, checked.total() >= told.kills
    killed = ", ".join(f"{kind} {count}" for kind, count in sorted(checked.items()))
    print(f"{checked.total()} kills ({killed}), {studies} studies, {trials} trials, {seconds:.0f} s: every invariant held.")
    if told.out is None and whole:
        shutil.rmtree(out)
    return 0 if whole else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300, help="how many kills; default: 300, an hour or so")
    parser.add_argument("--seed", type=int, default=0, help="of the kinds, the pauses and the studies; default: 0")
    parser.add_argument("--trials", type=int, default=8, help="search trials of each cell; more for longer studies; default: 8")
    parser.add_argument("--pause", type=float, default=8.0, help="mean seconds between two kills; default: 8")
    parser.add_argument("--reruns", type=int, default=3, help="trials of each study that are run again alone and compared; default: 3")
    parser.add_argument(
        "--out", type=Path, help="a folder for the studies, which stay; default: a temporary one, kept only after a failure"
    )
    return parser


def make_spec(seed: int, search_trials: int) -> Spec:
    """A study of four cells and a popularity baseline, two trials at once."""
    told = {
        "study": f"soak_{seed}",
        "seed": seed,
        "domains": {"prepare": {name: name for name in SHOPS.targets}},
        "model": {"width": 16, "ffn_width": 16, "head_width": 8, "state": 8, "max_len": 8},
        "training": {"batch_size": 512, "accumulation": 1, "patience": 18},
        "space": {"training.learning_rate": {"low": 1e-3, "high": 1e-1, "log": True}, "model.dropout": {"low": 0.0, "high": 0.5}},
        "arms": {"scratch": {}, "text_only": {"model": {"modalities": "text"}}, "popularity": {"recommender": "popularity"}},
        "cells": [{"domains": list(SHOPS.targets), "arms": ["scratch", "text_only", "popularity"]}],
        "budget": {"search_trials": search_trials, "epochs": 18, "grace_epochs": 2, "reduction": 3, "confirm_seeds": 2},
        "resources": {"concurrent": 2, "cpus": 1},
    }
    return from_dict(Spec, told, source="the soak's study")


@contextmanager
def small_cluster() -> Iterator[Any]:
    """A Ray cluster on this machine: a head without room for trials, and two worker nodes with room for one each."""
    folder = tempfile.mkdtemp(prefix="rs", dir="/tmp")  # short: Ray's socket paths must stay below 107 bytes
    os.environ.update({"RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"})
    os.environ.pop("RAY_ADDRESS", None)
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        cluster.add_node(num_cpus=0, include_dashboard=False)
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        yield cluster
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def run_study(soak: Soak, spec: Spec, wanted: int, bar: Any) -> None:
    """Run a study to its end, with kills until there were as many as wanted. Raises Violated where its driver gives up."""
    soak.out.mkdir(parents=True, exist_ok=True)
    if not (soak.out / "domains").exists():
        write_demo(soak.out / "domains", config=SHOPS)
    (soak.out / f"{spec.study}.yaml").write_text(yaml.safe_dump(to_dict(spec)), encoding="utf-8")
    soak.kills, driver, deadline = 0, start_driver(soak, spec), float("inf")
    try:
        while True:
            over = sum(soak.done.values()) >= wanted
            deadline = min(deadline, time.monotonic() + DEADLINE_SECONDS) if over else float("inf")
            pause = DEADLINE_SECONDS if over else soak.draw.expovariate(1 / soak.pause_seconds)
            if ended_within(driver, pause):
                if driver.returncode == 0:
                    return
                raise Violated(f"the driver ended with status {driver.returncode} on its own:\n{_last_lines(soak, spec)}")
            if over:
                raise Violated(f"the study did not end within {DEADLINE_SECONDS} s after the last kill:\n{_last_lines(soak, spec)}")
            kind = soak.draw.choices(list(KINDS), list(KINDS.values()))[0]
            if kill(soak, kind, driver):
                soak.kills += 1
                soak.done[kind] += 1
                bar.update()
                bar.set_postfix_str(f"{spec.study}, {kind}")
            if driver.poll() is not None and not (kind == "stop" and driver.returncode == 0):
                driver = start_driver(soak, spec)
    finally:
        driver.kill()
        driver.wait()


def start_driver(soak: Soak, spec: Spec) -> subprocess.Popen[bytes]:
    """`transfer_sweep.py` on the soak's cluster; what it prints goes to the end of a file."""
    command = [sys.executable, str(ROOT / "studies" / "transfer_sweep.py"), "--spec", str(soak.out / f"{spec.study}.yaml")]
    command += ["--out", str(soak.out), "--data", str(soak.out / "domains")]
    command += ["--resume"] if (soak.out / spec.study / "study.sqlite3").is_file() else []
    with (soak.out / f"{spec.study}.log").open("ab") as log:
        return subprocess.Popen(command, env={**os.environ, "RAY_ADDRESS": soak.address}, stdout=log, stderr=log)


def kill(soak: Soak, kind: str, driver: subprocess.Popen[bytes]) -> bool:
    """Kill something of this kind. Whether there was one. Raises Violated where a driver does not stop."""
    if kind == "trial":
        workers = processes_below(os.getpid(), TRIAL)
        if not workers:
            return False
        with suppress(ProcessLookupError):
            os.kill(soak.draw.choice(workers), signal.SIGKILL)
    elif kind == "node":
        replace_node(soak.cluster, soak.draw)
    elif kind == "driver":
        driver.kill()
        driver.wait()
    else:
        driver.terminate()
        if not ended_within(driver, STOP_SECONDS):
            raise Violated(f"the driver still runs {STOP_SECONDS} s after SIGTERM")
        if driver.returncode not in (0, 1, -signal.SIGTERM):  # the last: before it could listen
            raise Violated(f"the driver ended with status {driver.returncode} after SIGTERM")
    return True


def replace_node(cluster: Any, draw: random.Random) -> None:
    """Kill a worker node with all its processes; another one joins."""
    node = draw.choice(sorted(cluster.worker_nodes, key=lambda node: str(node.unique_id)))
    cluster.remove_node(node, allow_graceful=False)
    cluster.add_node(num_cpus=1)


def processes_below(top: int, name: bytes) -> list[int]:
    """The processes below this one whose command line has this in it: Ray names an actor's after what it runs."""
    parents: dict[int, int] = {}
    names: dict[int, bytes] = {}
    for process in (path for path in Path("/proc").iterdir() if path.name.isdigit()):
        with suppress(OSError):
            parents[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(process.name)] = (process / "cmdline").read_bytes()

    def is_below(pid: int) -> bool:
        return pid == top or (pid in parents and is_below(parents[pid]))

    return sorted(pid for pid, told in names.items() if name in told and is_below(pid))


def ended_within(driver: subprocess.Popen[bytes], seconds: float) -> bool:
    with suppress(subprocess.TimeoutExpired):
        driver.wait(timeout=seconds)
        return True
    return False


def _last_lines(soak: Soak, spec: Spec) -> str:
    return "\n".join((soak.out / f"{spec.study}.log").read_text(encoding="utf-8", errors="replace").splitlines()[-20:])


if __name__ == "__main__":
    raise SystemExit(main())
