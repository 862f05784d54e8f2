"""How fast every recommender trains and ranks: python studies/benchmark.py --models.

One process, the models in turns, a generated domain whose histories are as long as those of Amazon Scientific. An interaction
is an example that is predicted: in training with the loss over the whole catalogue, forward, backward and the optimizer's
step; in ranking against the whole catalogue, whose vectors count too. All have the same width and history length; the rest is
each one's default.
"""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mmm4rec.data.domain import Domain, write_atomically
from mmm4rec.data.features import ItemFeatures
from mmm4rec.models.kinds import KINDS, NAMES, Name, Shop
from mmm4rec.run import DataConfig, RunConfig, domain_data
from mmm4rec.training.evaluate import evaluate
from mmm4rec.training.loop import Run, TrainingConfig
from studies.benchmark_cases import Case, first_plans, generated_domain, generated_features, seconds, spread, train_step

CASE = Case(items=5_000, feature_width=512, width=64, max_len=20, batch=1024)
EXAMPLES, RANKED = 8192, 1024
OWN: dict[str, dict[str, Any]] = {"mmm4rec": {"ffn_width": 64, "head_width": 64, "state": 32}}  # as in --spec baselines


def measure(out: Path, repeats: int, machine: dict[str, Any]) -> str:
    """Write DIR/benchmark_models.json and .md; returns the table."""
    sizes = {"items": CASE.items, "features": CASE.feature_width, "batch": CASE.batch, "width": CASE.width, "max_len": CASE.max_len}
    found = {"machine": machine, **sizes, "rows": rates(repeats)}
    write_atomically(out / "benchmark_models.json", (json.dumps(found, indent=2) + "\n").encode())
    text = table(found)
    write_atomically(out / "benchmark_models.md", text.encode())
    return text


def rates(repeats: int, case: Case = CASE) -> list[dict[str, Any]]:
    """Interactions a second of every model, in training and in ranking; each round visits every model once."""
    domain, features = generated_domain(case, examples=EXAMPLES), generated_features(case)
    runs = {name: assemble(name, case, domain, features) for name in NAMES}
    taken: dict[tuple[str, str], list[float]] = {}
    for round_ in tqdm(range(repeats + 1), unit="round", desc="models"):
        for name, run in runs.items():
            found = {"rank": _rank(run)} | ({"train": _train(run)} if KINDS[name].trained else {})
            if round_:
                for what, rate in found.items():
                    taken.setdefault((name, what), []).append(rate)
    return [
        {"model": name, "parameters": sum(part.numel() for part in run.model.parameters())}
        | {what: spread(taken[name, what]) for what in ("train", "rank") if (name, what) in taken}
        for name, run in runs.items()
    ]


def assemble(name: Name, case: Case, domain: Domain, features: ItemFeatures) -> Run:
    """A run of this model on the generated domain, without files."""
    sizes = {"width": case.width, "max_len": case.max_len, **OWN.get(name, {})}
    config = KINDS[name].config(**{key: value for key, value in sizes.items() if key in {part.name for part in fields(KINDS[name].config)}})
    read = {modality: features.vectors[modality] for modality in config.streams}
    features = replace(features, vectors=read, present={modality: features.present[modality] for modality in read})
    torch.manual_seed(0)
    model = KINDS[name].build(config, Shop(domain, case.items, features.dimensions))
    told = RunConfig(DataConfig(("generated",)), config, recommender=name)
    data = domain_data(told, domain, features, domain.examples("train"), domain.examples("test"))
    return Run(model, [data], TrainingConfig(batch_size=case.batch, accumulation=1), 0, torch.device("cpu"))


def _train(run: Run) -> float:
    run.model.train()
    plans = first_plans(run, 1)
    return sum(map(len, plans)) / seconds(lambda: train_step(run, plans))


def _rank(run: Run) -> float:
    users, ends = (part[:RANKED] for part in run.data[0].valid)
    return len(users) / seconds(lambda: evaluate(run.model, run.data[0], users, ends, run.device))


def table(found: dict[str, Any]) -> str:
    """As Markdown, the fastest in training first."""
    machine = found["machine"]
    where = f"{machine['name']}, {machine['threads']} threads, torch {machine['torch']}"
    lines = [
        f"{where}: a generated domain of {found['items']:,} items with two features of {found['features']} numbers, width",
        f"{found['width']}, micro-batches of {found['batch']:,}; medians of rounds in turns (lowest to highest).",
        "",
        "| model | parameters | interactions/s, training | interactions/s, ranking |",
        "| --- | --- | --- | --- |",
    ]
    rows = sorted(found["rows"], key=lambda row: -row.get("train", {"median": 0})["median"])
    lines += [f"| {row['model']} | {row['parameters']:,} | {_rate(row.get('train'))} | {_rate(row['rank'])} |" for row in rows]
    return "\n".join(lines) + "\n"


def _rate(value: dict[str, float] | None) -> str:
    return "-" if value is None else f"{value['median']:,.0f} ({value['low']:,.0f} to {value['high']:,.0f})"
