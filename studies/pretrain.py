"""Pre-training on all sources: Ray Train around `execute`, on one worker or more.

    python studies/pretrain.py --spec demo      # transfer_sweep.py goes on from what this leaves

What Ray keeps is not needed: a restarted worker, and a second call after a kill, go on from `last.ckpt`.
"""

from __future__ import annotations

import argparse
import json
import shutil
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
from studies.conductor import read_curve, whole_lines
from studies.mlflow_tracker import MlflowTracker
from studies.places import Places, domain_here, scratch
from studies.spec import Spec, add_arguments, told_spec
from studies.storage import Storage

WATCH_SECONDS = 2.0
FILES = ("last.ckpt", "best.safetensors", "curve.jsonl", "result.json")  # in the order in which they are put back


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


def pretrain(spec: Spec, sources: dict[str, Source], places: Places, tracker: MlflowTracker) -> Path | None:
    """The checkpoint that the pretrained arms start from, made now unless the study holds it; None without pre-training.

    Needs Ray started. Raises BadInput where the spec's checkpoint is missing.
    """
    if spec.pretrain is None:
        return None
    if spec.pretrain.checkpoint is not None:
        checkpoint = Path(spec.pretrain.checkpoint)
        if not checkpoint.is_file():
            raise BadInput("is no file.", file=checkpoint, remedy="Give the path of a best.safetensors in pretrain.checkpoint.")
        return checkpoint.resolve()
    out = (places.folder / "pretrain").resolve()
    if not (out / "result.json").exists():
        over, place = threading.Event(), places.root.sub("pretrain")
        watcher = threading.Thread(target=_watch, args=(place, tracker, over), daemon=True)
        watcher.start()
        try:
            _train(spec, sources, places, place)
        finally:
            over.set()
            watcher.join()
        if places.storage is not None:
            place.pull(out, FILES)
    tracker.pretraining(read_curve(out), json.loads((out / "result.json").read_text(encoding="utf-8")))
    return out / "best.safetensors"


def _train(spec: Spec, sources: dict[str, Source], places: Places, place: Storage) -> None:
    assert spec.pretrain is not None
    config = pretrain_config(spec, sources)
    used = {name: sources[name] for name in spec.pretrain.sources}
    published = places.publish(used)
    domains = [(published[source.path], source.fingerprint) for source in used.values()]
    resources, on_gpu = spec.resources, spec.resources.gpus > 0
    TorchTrainer(
        train_worker,
        train_loop_config={"run": to_dict(config), "out": place.uri, "domains": domains, "cpus": resources.cpus},
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=spec.pretrain.workers,
            use_gpu=on_gpu,
            resources_per_worker={"CPU": resources.cpus} | ({"GPU": 1} if on_gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            name="pretrain",
            storage_path=places.root.sub("ray").uri,
            failure_config=ray.train.FailureConfig(max_failures=spec.pretrain.max_failures),
        ),
    ).fit()


def train_worker(config: dict[str, Any]) -> None:
    """One worker: every rank goes through the same epochs, rank 0 writes the files.

    Where they lie in an object store, each rank begins from a copy, and rank 0 puts its own back after each epoch.
    """
    torch.set_num_threads(config["cpus"])
    place, rank = Storage(config["out"]), ray.train.get_context().get_world_rank()
    out = place.path or scratch(place.uri) / f"rank_{rank}"
    here = {"data": {"domains": [domain_here(domain, fingerprint) for domain, fingerprint in config["domains"]]}}
    run = from_dict(RunConfig, merge(config["run"], here), source="pre-training")

    def keep() -> None:
        if place.path is None and rank == 0:
            place.push(out, [name for name in FILES if (out / name).is_file()])

    if place.path is None:
        shutil.rmtree(out, ignore_errors=True)
        place.pull(out, FILES)
    with closing(execute(run, out, resume=True)) as reports:
        for report in reports:
            keep()
            ray.train.report({"epoch": report.epoch})
    keep()


def _watch(place: Storage, tracker: MlflowTracker, over: threading.Event) -> None:
    """Print pre-training's epochs, and pass them on, as they appear in its curve."""
    told = 0
    while not over.wait(WATCH_SECONDS):
        curve = whole_lines(place.read("curve.jsonl"))
        for row in curve[told:]:
            valid = ", ".join(f"valid {name} {row['valid'][name]:.4f}" for name in ("ndcg@10",) if name in row["valid"])
            loss = "" if row["train_loss"] is None else f"loss {row['train_loss']:.4f}, "
            print(f"[pre-training] epoch {row['epoch']}, {row['optimizer_steps']} steps: {loss}{valid}", flush=True)
        if len(curve) > told:
            tracker.pretraining(curve, None)
            told = len(curve)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 MLflow does not have all of it, 2 bad input."""
    from studies.outbox import NotWritten
    from studies.study import open_study, start_ray

    parser = argparse.ArgumentParser(
        description="Pre-train for a transfer study.", epilog="Example: python studies/pretrain.py --spec demo"
    )
    add_arguments(parser)
    told = parser.parse_args(arguments)
    try:
        spec = told_spec(told)
        with open_study(spec, told.out, data=told.data) as study:
            start_ray(spec.resources, workers=spec.pretrain.workers if spec.pretrain else 1)
            print(f"Checkpoint: {study.pretrain()}")
            study.tracker.flush()
    except NotWritten as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
