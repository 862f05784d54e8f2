"""What the choices of pre-training are worth: each alone beside the default, on the demo's sources, ranked zero-shot on its targets.

    python studies/pretrain_choices.py                  # writes results/pretrain_choices.json, .md

Every choice is pre-trained with the demo's model, the same number of optimizer steps and the same seeds; the epoch is chosen
on held-out users of the sources, and the targets' test split is ranked once, by the chosen weights, without fine-tuning.
Local candidates are measured as four workers would have them: a quarter of the batch each. What has run is kept under
--work, and not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

if __package__ in (None, ""):  # run as a file: the repository's root, not studies/, belongs on the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from tqdm import tqdm

from mmm4rec.config import from_dict, merge, to_dict
from mmm4rec.data.batches import DomainData
from mmm4rec.data.domain import write_atomically
from mmm4rec.run import RunConfig, assemble
from mmm4rec.training.evaluate import evaluate
from mmm4rec.training.loop import EpochReport, Run, fit
from mmm4rec.training.metrics import metrics
from studies.benchmark import machine
from studies.cells import Source
from studies.domains import make_domains
from studies.pretrain import pretrain_config
from studies.spec import Spec, load_spec

WORKERS = 4  # that share a batch where candidates are local
CHOICES: dict[str, dict[str, Any]] = {  # what each changes in the training of the default
    "default: global candidates, a domain a batch, proportional": {},
    "mixed batches": {"mixed_batches": True},
    "logQ": {"logq": True},
    "mixed batches, logQ": {"mixed_batches": True, "logq": True},
    f"local candidates of {WORKERS} workers": {"accumulation": WORKERS},  # and batch_size / WORKERS
    "sampling power 0.5": {"sampling_power": 0.5},
    "sampling power 0 (uniform)": {"sampling_power": 0.0},
    "all items of the domain": {"loss": "full"},
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("results/pretrain_choices"), metavar="STEM", help="default: results/pretrain_choices"
    )
    parser.add_argument("--work", type=Path, default=Path("build/pretrain_choices"), help="default: build/pretrain_choices")
    parser.add_argument("--seeds", type=int, default=3, help="default: 3")
    parser.add_argument("--epochs", type=int, help="default: the demo's")
    told = parser.parse_args(arguments)
    torch.set_num_threads(1)
    spec = load_spec("demo")
    sources = make_domains(spec.domains, told.work / "domains", data=None, seed=spec.seed)
    wanted = [(choice, seed) for seed in range(told.seeds) for choice in CHOICES]
    found: dict[str, list[dict[str, Any]]] = {}
    for choice, seed in tqdm(wanted, unit="run"):
        file = told.work / f"{list(CHOICES).index(choice)}_{seed}.json"
        if not file.is_file():
            result = measure(config_of(spec, sources, choice, seed, told.epochs), [sources[name] for name in targets(spec)])
            write_atomically(file, (json.dumps(result) + "\n").encode())
        found.setdefault(choice, []).append(json.loads(file.read_text(encoding="utf-8")))
    write(told.out, found, spec)
    return 0


def targets(spec: Spec) -> list[str]:
    return list(dict.fromkeys(name for group in spec.cells for name in group.domains))


def config_of(spec: Spec, sources: dict[str, Source], choice: str, seed: int, epochs: int | None) -> RunConfig:
    plain = to_dict(pretrain_config(spec, sources))
    training = merge(CHOICES[choice], {} if epochs is None else {"epochs": epochs})
    if "accumulation" in training:
        training["batch_size"] = plain["training"]["batch_size"] // training["accumulation"]
    changes = {"training": training | {"steps_between_reports": 0}, "seed": seed, "data": {"zero_shot": []}}
    return from_dict(RunConfig, merge(plain, changes), source=choice)


def measure(config: RunConfig, unseen: Sequence[Source]) -> dict[str, Any]:
    """Pre-train, and rank the targets' test examples with the chosen weights."""
    run = assemble(config).run
    reports = [report for report in fit(run) if isinstance(report, EpochReport)]
    run.model.load_state_dict(run.state.best_weights)
    best = next(report for report in reports if report.epoch == run.state.best_epoch)
    shot = assemble(
        from_dict(RunConfig, merge(to_dict(config), {"data": {"zero_shot": [source.path for source in unseen]}}), source="")
    ).run
    return {
        "valid": best.valid["ndcg@10"],
        "test": {data.domain.name: rank_test(run, data) for data in shot.zero_shot},
        "best_epoch": best.epoch,
        "optimizer_steps": best.optimizer_steps,
        "seconds": sum(report.train_seconds for report in reports),
    }


def rank_test(run: Run, data: DomainData) -> float:
    users, ends = data.domain.examples("test")
    return metrics(evaluate(run.model, data, users, ends, run.device))["ndcg@10"]


def write(stem: Path, found: dict[str, list[dict[str, Any]]], spec: Spec) -> None:
    """The figures, and the table of them."""
    where, names = machine("cpu"), targets(spec)
    first = next(iter(found.values()))
    rows = ["| choice | " + " | ".join(f"zero-shot {name}" for name in names) + " | mean | held-out users | seconds |"]
    rows += ["| --- " * (len(names) + 4) + "|"]
    for choice, results in found.items():
        shots = [_spread([result["test"][name] for result in results]) for name in names]
        whole = _spread([mean(result["test"].values()) for result in results])
        seconds = mean(result["seconds"] for result in results)
        rows.append(f"| {choice} | {' | '.join(shots)} | {whole} | {_spread([result['valid'] for result in results])} | {seconds:.0f} |")
    text = "\n".join(
        [
            "# What the choices of pre-training are worth",
            "",
            f"Written by `studies/pretrain_choices.py`: test NDCG@10 on the demo's targets untuned, mean ± sd over {len(first)} seeds;",
            "validation NDCG@10 on held-out users of the sources; seconds of training on one thread.",
            f"Machine: {where['name']}, torch {where['torch']}, code {where['code_version']}.",
            "",
            *rows,
            "",
        ]
    )
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(
        stem.with_suffix(".json"), (json.dumps({"schema_version": 1, "machine": where, "runs": found}, indent=1) + "\n").encode()
    )
    write_atomically(stem.with_suffix(".md"), text.encode())
    print(text)


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.4f} ± {stdev(values):.4f}" if len(values) > 1 else f"{mean(values):.4f}"


if __name__ == "__main__":
    raise SystemExit(main())
