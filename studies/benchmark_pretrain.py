"""What pre-training costs: memory as the data grows, and interactions a second on one worker and on two.

Memory: three generated domains, each ten times the one before, prepared and read as any other, item ids off. A fresh process
assembles the run, trains some optimizer steps, ranks some held-out users and keeps a checkpoint; told is the most memory
that it holds beside the mapped files. Throughput: the demo's sources, the demo's model, through Ray Train, at the demo's
batch size and at a larger one (what every worker does for itself, small steps' overhead above all, weighs less there); each
worker has one thread.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from mmm4rec.config import to_dict
from mmm4rec.data.domain import open_domain, write_atomically, write_domain
from mmm4rec.data.features import MODALITIES, add_features
from mmm4rec.run import DataConfig, RunConfig, assemble
from mmm4rec.training import step
from mmm4rec.training.checkpoint import save_last
from mmm4rec.training.evaluate import evaluate
from mmm4rec.training.loop import TrainingConfig, _optimizer_step
from studies.benchmark_cases import in_fresh_process, peak_memory, seconds
from studies.spec import load_spec

SIZES = ((1_000_000, 100_000), (10_000_000, 1_000_000), (100_000_000, 10_000_000))  # interactions, items; ten interactions a user
A_USER = 10
FEATURES = 32  # of each modality, float16
STEPS, BATCH, RANKED_USERS = 10, 1024, 64
THROUGHPUT = ((256, 3, 10), (2048, 12, 5))  # examples a step of all workers, epochs, steps between reports
ROOT = Path(__file__).resolve().parent.parent


def measure(out: Path, sizes: int, machine: dict[str, Any]) -> str:
    """Measure the first `sizes` sizes and the throughput, write benchmark_pretrain.json and .md into `out`; the Markdown."""
    found: dict[str, Any] = {"machine": machine | {"cores": os.cpu_count()}, "memory": []}
    for interactions, items in SIZES[:sizes]:
        with tempfile.TemporaryDirectory(prefix="pretrain") as folder:
            in_fresh_process(generate, Path(folder) / "shop", interactions, items)
            found["memory"].append({"interactions": interactions, "items": items, **in_fresh_process(train, Path(folder))})
        write_atomically(out / "benchmark_pretrain.json", (json.dumps(found, indent=2) + "\n").encode())
    found["throughput"] = [through_ray(workers, *told) for told in THROUGHPUT for workers in (1, 2)]
    write_atomically(out / "benchmark_pretrain.json", (json.dumps(found, indent=2) + "\n").encode())
    text = table(found)
    write_atomically(out / "benchmark_pretrain.md", text.encode())
    return text


def generate(folder: Path, interactions: int, items: int) -> dict[str, Any]:
    """A domain with features of both modalities, random, in a folder."""
    random = np.random.default_rng(0)
    offsets = np.arange(0, interactions + 1, A_USER)
    times = np.repeat(random.integers(1_500_000_000, 1_600_000_000, len(offsets) - 1), A_USER)
    times += np.tile(np.arange(A_USER) * 3600, len(offsets) - 1)
    write_domain(
        folder,
        name="shop",
        offsets=offsets,
        items=random.integers(1, items + 1, interactions, dtype=np.int32),
        timestamps=times,
        item_table=pd.DataFrame({"item": np.arange(items).astype(str), "text": None, "image": None}),
        user_ids=np.arange(len(offsets) - 1).astype(str).tolist(),
        tie_break="none",
        provenance={},
    )
    domain = open_domain(folder)
    block = random.standard_normal((2**16, FEATURES)).astype(np.float16)
    vectors = np.resize(block, (items, FEATURES))
    for modality in MODALITIES:
        add_features(domain, modality, vectors, np.ones(items, dtype=bool), encoder="random")
    return {}


def train(folder: Path) -> dict[str, Any]:
    """Some steps of a run on the domain in the folder: its memory and times."""
    data = DataConfig((str(folder / "shop"),), examples="all", most_heldout_users=RANKED_USERS)
    training = TrainingConfig(loss="in_batch", batch_size=BATCH, accumulation=1, learning_rate=1e-3)
    config = RunConfig(data, replace(RunConfig(data).model, width=64, ffn_width=64, ids=False), training, device="cpu")
    found: dict[str, Any] = {}
    with peak_memory() as memory:
        found["assemble_seconds"] = seconds(lambda: found.update(assembled=assemble(config)))
        assembled = found.pop("assembled")
        run = assembled.run
        run.model.train()

        def train_steps() -> None:
            for number, plan in enumerate(islice(run.sampler.plans(1), STEPS)):
                _optimizer_step(run, step.prepare(run, [plan], number), "")

        found["step_seconds"] = seconds(train_steps) / STEPS
        users, ends = run.data[0].valid
        found["ranking_seconds_a_user"] = seconds(lambda: evaluate(run.model, run.data[0], users, ends, run.device)) / len(users)
        save_last(folder / "last.ckpt", run, assembled.description)
    files = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return found | memory | {"examples": len(run.data[0].train), "file_bytes": files}


def through_ray(workers: int, batch_size: int, epochs: int, steps: int) -> dict[str, Any]:
    """Interactions a second of the demo's pre-training, by its own reports, the first of them left out."""
    spec = load_spec("demo")
    assert spec.pretrain is not None
    changes = {"batch_size": batch_size, "epochs": epochs, "patience": epochs, "steps_between_reports": steps}
    training = {**spec.pretrain.training, **changes}
    told = replace(spec, pretrain=replace(spec.pretrain, workers=workers, training=training, zero_shot=False))
    with tempfile.TemporaryDirectory(prefix="m") as name:
        file = Path(name) / "demo.yaml"
        file.write_text(yaml.safe_dump(to_dict(told)), encoding="utf-8")
        command = [sys.executable, str(ROOT / "studies" / "pretrain.py"), "--spec", str(file), "--out", name]
        subprocess.run(command, env={**os.environ, "RAY_ADDRESS": "local"}, check=True, capture_output=True)
        place = Path(name) / "demo" / "pretrain"
        rows = [json.loads(line) for line in (place / "steps.jsonl").read_text(encoding="utf-8").splitlines()][1:]
        peak = json.loads((place / "result.json").read_text(encoding="utf-8"))["peak_memory_bytes"]
    rates = [row["examples_per_second"] for row in rows]
    told_of = {"batch_size": batch_size, "workers": workers, "reports": len(rates)}
    return told_of | {"interactions_per_second": statistics.median(rates), "low": min(rates), "high": max(rates), "peak_memory_bytes": peak}


def table(found: dict[str, Any]) -> str:
    """What was measured, as Markdown."""
    where = found["machine"]
    alone = {told["batch_size"]: told["interactions_per_second"] for told in found["throughput"] if told["workers"] == 1}
    rows = [
        f"| {row['interactions']:,} | {row['items']:,} | {row['file_bytes'] / 1e9:.2f} GB | {row['peak_bytes'] / 1e9:.2f} GB"
        f" | {row['assemble_seconds']:.1f} s | {row['step_seconds']:.2f} s | {row['ranking_seconds_a_user']:.2f} s |"
        for row in found["memory"]
    ]
    rates = []
    for told in found["throughput"]:
        batch, count, rate = told["batch_size"], told["workers"], told["interactions_per_second"]
        spread, share = f"{rate:,.0f} ({told['low']:,.0f} to {told['high']:,.0f})", rate / count / alone[batch]
        rates.append(f"| {batch:,} | {count} | {spread} | {rate / count:,.0f} | {share:.0%} | {told['peak_memory_bytes'] / 1e9:.2f} GB |")
    return "\n".join(
        [
            "# What pre-training costs",
            "",
            "Made by `python studies/benchmark.py --pretrain`; every figure is in `benchmark_pretrain.json`.",
            "",
            f"{BATCH:,} examples a step, width 64, no ids, {FEATURES}-dim float16 features of two modalities; memory without mapped files:",
            "",
            "| interactions | items | files | peak memory | to begin | a step | ranking a user |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
            "The demo's sources through Ray Train, each worker with one thread; medians (lowest and highest) of the reports:",
            "",
            "| examples a step | workers | interactions a second | per worker | efficiency | memory of worker 0 |",
            "| --- | --- | --- | --- | --- | --- |",
            *rates,
            "",
            f"({where['name']}, {where['cores']} cores, torch {where['torch']}, code {where['code_version']}. More workers, other",
            "machines and GPUs were not run: unproven.)",
            "",
        ]
    )
