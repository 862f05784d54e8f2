"""Pre-training on all sources: Ray Train around `execute`, on one worker or more.

    python studies/pretrain.py --spec demo      # transfer_sweep.py goes on from what this leaves

What Ray keeps is not needed: restarted workers, as many as there are, and a second call after a kill go on from the newest
whole checkpoint on the storage. The result, `pretrain/model/`, is a folder that MMM4Rec.from_pretrained reads.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the repository's root, not studies/, belongs on the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer
from tqdm import tqdm

from mmm4rec.config import from_dict, merge, to_dict
from mmm4rec.errors import BadInput
from mmm4rec.execute import execute
from mmm4rec.models.hub import WEIGHTS
from mmm4rec.models.kinds import known_fields
from mmm4rec.models.mmm4rec import MMM4Rec
from mmm4rec.run import RunConfig
from mmm4rec.training import distributed
from mmm4rec.training.checkpoint import load_model
from mmm4rec.training.loop import Diverged, EpochReport
from studies.cells import Source, known_model
from studies.checkpoints import RecentCheckpoints, newest_steps
from studies.conductor import read_lines, whole_lines
from studies.files import logged
from studies.mlflow_tracker import MlflowTracker
from studies.places import Places, domain_here, scratch
from studies.spec import Spec, add_arguments, told_spec
from studies.state import locked
from studies.storage import Storage

log = logging.getLogger(__name__)

WATCH_SECONDS = 2.0
LINES = ("steps.jsonl", "log.txt")
DIVERGED = "diverged.txt"
FILES = ("best.safetensors", "curve.jsonl", "steps.jsonl", "log.txt", "result.json")  # in the order in which they are put back
CHECKPOINTS, MODEL = "checkpoints", "model"  # folders
STEPS_BETWEEN_REPORTS = 10


def pretrain_config(spec: Spec, sources: dict[str, Source]) -> RunConfig:
    """What pre-training runs: the study's model, in-batch cross-entropy unless the spec says otherwise."""
    assert spec.pretrain is not None
    unknown = sorted(set(spec.pretrain.sources) - set(sources))
    if unknown:
        raise BadInput(f"pre-training names the unknown domain {', '.join(unknown)}.", remedy=f"Known: {', '.join(sources)}.")
    kind = spec.pretrain.recommender
    if "ids" not in known_fields(kind):
        rule = f"pre-training on several domains needs a model that can be without item ids, and {kind} cannot."
        raise BadInput(rule, remedy="Name another recommender: mmm4rec, sasrec with content, unisrec or missrec.")
    model = merge(merge(known_model(kind, spec.model), {"ids": False}), spec.pretrain.model)
    told = {
        "data": {
            "domains": [sources[name].path for name in spec.pretrain.sources],
            "zero_shot": [] if model["ids"] or not spec.pretrain.zero_shot else _zero_shot(spec, sources),
            "examples": "all",
            "mask_seen": spec.mask_seen,
        },
        "recommender": kind,
        "model": model,
        "training": merge({"loss": "in_batch", "steps_between_reports": STEPS_BETWEEN_REPORTS, "divergence": 3.0}, spec.pretrain.training),
        "seed": spec.seed,
        "device": "cuda" if spec.resources.gpus else "cpu",
        "test": False,
    }
    config = from_dict(RunConfig, told, source=f"study {spec.study}, pretrain")
    every, reports = spec.pretrain.checkpoint_every_steps, config.training.steps_between_reports
    if every is not None and (reports == 0 or every % reports):
        rule = f"pretrain.checkpoint_every_steps is {every}; it must be a multiple of training.steps_between_reports, {reports}."
        raise BadInput(rule, remedy="Change one of them: a run is saved at its reports.")
    return config


def _zero_shot(spec: Spec, sources: Mapping[str, Source]) -> list[str]:
    """The folders of the domains that a model of the sources can rank: with features of its encoders, and times where it reads them."""
    assert spec.pretrain is not None
    timed = all(sources[name].has_timestamps for name in spec.pretrain.sources)
    names = dict.fromkeys(name for group in spec.cells for name in group.domains if name not in spec.pretrain.sources)
    targets = [sources[name] for name in names if name in sources]
    read = {modality: encoder for name in spec.pretrain.sources for modality, encoder in sources[name].encoders.items()}
    return [
        source.path
        for source in targets
        if source.features
        and (source.has_timestamps or not timed)
        and all(read.get(modality, encoder) == encoder for modality, encoder in source.encoders.items())
    ]


def pretrain(spec: Spec, sources: dict[str, Source], places: Places, tracker: MlflowTracker) -> Path | None:
    """The checkpoint that the pretrained arms start from, made now unless the study holds it; None without pre-training.

    Needs Ray started. Raises BadInput where the spec's checkpoint is missing.
    """
    if spec.pretrain is None:
        return None
    if spec.pretrain.checkpoint is not None:
        checkpoint = Path(spec.pretrain.checkpoint)
        checkpoint = checkpoint / WEIGHTS if checkpoint.is_dir() else checkpoint
        if not checkpoint.is_file():
            remedy = "Give the path of a best.safetensors, or the folder of a model, in pretrain.checkpoint."
            raise BadInput("is no file.", file=checkpoint, remedy=remedy)
        return checkpoint.resolve()
    out = (places.folder / "pretrain").resolve()
    if not (out / "result.json").exists():
        place = places.root.sub("pretrain")
        with _watched(place, tracker):
            _train(spec, sources, places, place)
        if places.storage is not None:
            place.pull(out, FILES)
    if spec.pretrain.recommender == "mmm4rec" and not (out / MODEL).exists():
        export(out)
    tell(tracker, out)
    return out / "best.safetensors"


def tell(tracker: MlflowTracker, out: Path) -> None:
    """Tell MLflow of a pre-training that has ended, whole."""
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    tracker.pretraining(read_lines(out / "curve.jsonl"), read_lines(out / "steps.jsonl"), result)


def export(out: Path) -> None:
    """Make the model's own folder from a run's best.safetensors and result.json: weights, config, card."""
    weights, description = load_model(out / "best.safetensors")
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    kept = ("valid", "zero_shot", "optimizer_steps", "best_epoch", "best_optimizer_steps", "seed", "device", "code_version", "checkpoint")
    model = MMM4Rec.described(description, source=str(out))
    model.load_state_dict(weights)
    model.description = description | {"result": {name: result[name] for name in kept if name in result}}
    part = out / f".{MODEL}.part"
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    part.rename(out / MODEL)


def _train(spec: Spec, sources: dict[str, Source], places: Places, place: Storage) -> None:
    assert spec.pretrain is not None
    told, config = spec.pretrain, pretrain_config(spec, sources)
    read = {name: source for name, source in sources.items() if source.path in (*config.data.domains, *config.data.zero_shot)}
    published, prints = places.publish(read), {source.path: source.fingerprint for source in read.values()}

    def where(paths: Sequence[str]) -> list[tuple[str, str]]:
        return [(published[path], prints[path]) for path in paths]

    resources, on_gpu = spec.resources, spec.resources.gpus > 0
    TorchTrainer(
        train_worker,
        train_loop_config={
            "run": to_dict(config),
            "out": place.uri,
            "domains": where(config.data.domains),
            "zero_shot": where(config.data.zero_shot),
            "checkpoints": {
                "keep": told.keep_checkpoints,
                "every_steps": told.checkpoint_every_steps,
                "every_seconds": told.checkpoint_every_seconds,
            },
            "cpus": resources.cpus,
        },
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=told.workers if told.min_workers in (None, told.workers) else (told.min_workers, told.workers),  # type: ignore[arg-type]
            use_gpu=on_gpu,
            resources_per_worker={"CPU": resources.cpus} | ({"GPU": 1} if on_gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            name="pretrain",
            **places.root.sub("ray").for_ray(),
            failure_config=ray.train.FailureConfig(max_failures=told.max_failures),
        ),
    ).fit()
    if (reason := place.read(DIVERGED)) is not None:
        place.delete([DIVERGED])
        raise BadInput(f"pre-training: {reason.decode()}.", remedy="Lower its learning rate, or look at what is named.")


def train_worker(config: dict[str, Any]) -> None:
    """One worker: every rank goes through the same steps, rank 0 writes the files.

    Where they lie in an object store, rank 0 puts its own back after each epoch; the checkpoints go there by themselves.
    Workers that outlive a killed driver keep the next ones waiting, as in `trial_folder`.
    """
    torch.set_num_threads(config["cpus"])
    place, rank = Storage(config["out"]), ray.train.get_context().get_world_rank()
    out = place.path or scratch(place.uri) / f"rank_{rank}"
    here = {key: [domain_here(domain, fingerprint) for domain, fingerprint in config[key]] for key in ("domains", "zero_shot")}
    run = from_dict(RunConfig, merge(config["run"], {"data": here}), source="pre-training")

    def keep(names: Sequence[str] = FILES) -> None:
        if place.path is None and rank == 0:
            place.push(out, [name for name in names if (out / name).is_file()])

    lock = out.with_name(f".{out.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with locked(lock, wait=True) if rank == 0 else nullcontext():
        if place.path is None:
            shutil.rmtree(out, ignore_errors=True)
            place.pull(out, FILES)
        out.mkdir(parents=True, exist_ok=True)
        distributed.wait_for_all()  # what stands here is read when worker 0 has the folder for itself
        checkpoints = RecentCheckpoints(
            place.sub(CHECKPOINTS), scratch(place.uri) / f"checkpoints_{rank}", before=partial(keep, LINES), **config["checkpoints"]
        )
        reports = execute(run, out, resume=True, checkpoints=checkpoints)
        with logged(out / "log.txt") if rank == 0 else nullcontext(), closing(reports):
            if done := read_lines(out / "steps.jsonl"):
                log.warning("it had come to step %d", done[-1]["optimizer_steps"])
            try:
                for report in reports:
                    if isinstance(report, EpochReport):
                        keep()
                        ray.train.report({"epoch": report.epoch})
            except Diverged as error:  # on every worker alike; Ray would try it again, and it would come again
                if rank == 0:
                    place.write(DIVERGED, str(error).encode())
        keep()


@contextmanager
def _watched(place: Storage, tracker: MlflowTracker) -> Iterator[None]:
    """Inside, what pre-training comes to is printed, and passed on to MLflow as far as a checkpoint holds it."""
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(place, tracker, over), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _watch(place: Storage, tracker: MlflowTracker, over: threading.Event) -> None:
    """What a kill would take away is printed too, and not passed on: it comes again, at another time."""
    shown, told = -1, -1
    with tqdm(unit=" steps", desc="pre-training", disable=None) as bar:
        while not over.wait(WATCH_SECONDS):
            try:
                kept = newest_steps(place.sub(CHECKPOINTS))
                curve, steps = whole_lines(place.read("curve.jsonl")), whole_lines(place.read("steps.jsonl"))
            except (OSError, ValueError) as error:
                log.warning("Pre-training's progress could not be read: %s. It is tried again.", error)
                continue
            if steps:
                bar.n = steps[-1]["optimizer_steps"]
                bar.set_postfix_str(f"loss {steps[-1]['train_loss']:.3f}, {steps[-1]['examples_per_second']:,.0f} interactions/s")
            for row in curve:
                if row["epoch"] > shown:
                    bar.write(_epoch_line(row))
                    shown = row["epoch"]
            if kept > told:
                told = kept
                ended = [row for row in curve if row["optimizer_steps"] < kept]  # one at this step may not be kept yet
                tracker.pretraining(ended, [row for row in steps if row["optimizer_steps"] <= kept], None)


def _epoch_line(row: Mapping[str, Any]) -> str:
    loss = "" if row["train_loss"] is None else f"loss {row['train_loss']:.4f}, "
    zero_shot = "".join(f", zero-shot {name} {value:.4f}" for name, value in row["zero_shot"].items())
    valid = f"valid ndcg@10 {row['valid']['ndcg@10']:.4f}"
    return f"[pre-training] epoch {row['epoch']}, {row['optimizer_steps']} steps: {loss}{valid}{zero_shot}"


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
