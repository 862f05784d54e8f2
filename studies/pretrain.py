"""Pre-training on all sources: Ray Train around `execute`, on one worker or more.

    python studies/pretrain.py --spec demo      # transfer_sweep.py goes on from what this leaves

What Ray keeps is not needed: a restarted worker, and a second call after a kill, go on from `last.ckpt`.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the repository's root, not studies/, belongs on the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer

from mmm4rec.config import from_dict, merge, to_dict
from mmm4rec.errors import BadInput
from mmm4rec.execute import execute
from mmm4rec.run import RunConfig
from studies.cells import Source
from studies.conductor import read_curve
from studies.mlflow_tracker import MlflowTracker
from studies.spec import Spec, add_arguments, load_spec

WATCH_SECONDS = 2.0


def pretrain_config(spec: Spec, sources: dict[str, Source]) -> RunConfig:
    """What pre-training runs: the study's model, in-batch cross-entropy unless the spec says otherwise."""
    assert spec.pretrain is not None
    unknown = sorted(set(spec.pretrain.sources) - set(sources))
    if unknown:
        raise BadInput(f"pre-training names the unknown domain {', '.join(unknown)}.", remedy=f"Known: {', '.join(sources)}.")
    told = {
        "data": {"domains": [sources[name].path for name in spec.pretrain.sources], "examples": "all", "mask_seen": spec.mask_seen},
        "model": merge(spec.model, spec.pretrain.model),
        "training": merge({"loss": "in_batch"}, spec.pretrain.training),
        "seed": spec.seed,
        "device": "cuda" if spec.resources.gpus else "cpu",
        "test": False,
    }
    return from_dict(RunConfig, told, source=f"study {spec.study}, pretrain")


def pretrain(spec: Spec, sources: dict[str, Source], folder: Path, tracker: MlflowTracker) -> Path | None:
    """The checkpoint that the pretrained arms start from, made now unless `folder` holds it; None without pre-training.

    Needs Ray started. Raises BadInput where the spec's checkpoint is missing.
    """
    if spec.pretrain is None:
        return None
    if spec.pretrain.checkpoint is not None:
        checkpoint = Path(spec.pretrain.checkpoint)
        if not checkpoint.is_file():
            raise BadInput("is no file.", file=checkpoint, remedy="Give the path of a best.safetensors in pretrain.checkpoint.")
        return checkpoint.resolve()
    out = (folder / "pretrain").resolve()
    if not (out / "result.json").exists():
        config, over = pretrain_config(spec, sources), threading.Event()
        watcher = threading.Thread(target=_watch, args=(out, tracker, over), daemon=True)
        watcher.start()
        try:
            _train(spec, config, out, folder)
        finally:
            over.set()
            watcher.join()
    tracker.pretraining(read_curve(out), json.loads((out / "result.json").read_text(encoding="utf-8")))
    return out / "best.safetensors"


def _train(spec: Spec, config: RunConfig, out: Path, folder: Path) -> None:
    assert spec.pretrain is not None
    resources, on_gpu = spec.resources, spec.resources.gpus > 0
    TorchTrainer(
        train_worker,
        train_loop_config={"run": to_dict(config), "out": str(out), "cpus": resources.cpus},
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=spec.pretrain.workers,
            use_gpu=on_gpu,
            resources_per_worker={"CPU": resources.cpus} | ({"GPU": 1} if on_gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            name="pretrain",
            storage_path=str((folder / "ray").resolve()),
            failure_config=ray.train.FailureConfig(max_failures=spec.pretrain.max_failures),
        ),
    ).fit()


def train_worker(config: dict[str, Any]) -> None:
    """One worker: every rank goes through the same epochs, rank 0 writes the files."""
    torch.set_num_threads(config["cpus"])
    run = from_dict(RunConfig, config["run"], source="pre-training")
    with closing(execute(run, Path(config["out"]), resume=True)) as reports:
        for report in reports:
            ray.train.report({"epoch": report.epoch, **report.valid})


def _watch(out: Path, tracker: MlflowTracker, over: threading.Event) -> None:
    """Print pre-training's epochs, and pass them on, as they appear in its curve."""
    told = 0
    while not over.wait(WATCH_SECONDS):
        curve = read_curve(out)
        for row in curve[told:]:
            valid = ", ".join(f"valid {name} {row['valid'][name]:.4f}" for name in ("ndcg@10",) if name in row["valid"])
            loss = "" if row["train_loss"] is None else f"loss {row['train_loss']:.4f}, "
            print(f"[pre-training] epoch {row['epoch']}, {row['optimizer_steps']} steps: {loss}{valid}", flush=True)
        if len(curve) > told:
            tracker.pretraining(curve, None)
            told = len(curve)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input."""
    from studies.study import open_study, start_ray

    parser = argparse.ArgumentParser(
        description="Pre-train for a transfer study.", epilog="Example: python studies/pretrain.py --spec demo"
    )
    add_arguments(parser)
    told = parser.parse_args(arguments)
    try:
        spec = load_spec(told.spec)
        with open_study(spec, told.out, data=told.data) as study:
            start_ray(spec.resources, workers=spec.pretrain.workers if spec.pretrain else 1)
            print(f"Checkpoint: {study.pretrain()}")
            study.tracker.flush()
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
