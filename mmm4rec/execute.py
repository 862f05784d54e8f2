"""execute(): a run with the files that it leaves behind."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Generator
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from mmm4rec import __version__
from mmm4rec.config import to_dict
from mmm4rec.data.batches import DomainData
from mmm4rec.data.domain import Split, write_atomically
from mmm4rec.errors import BadInput
from mmm4rec.run import Assembled, RunConfig, assemble
from mmm4rec.tracking import JsonLinesTracker, StepLines, Tracker
from mmm4rec.training import distributed
from mmm4rec.training.checkpoint import LastCheckpoint, RunCheckpoints, check_identity, save_model
from mmm4rec.training.evaluate import evaluate
from mmm4rec.training.loop import EpochReport, Run, StepReport, fit
from mmm4rec.training.metrics import DEFINITION, mean_metrics


def execute(
    config: RunConfig,
    out: str | Path,
    *,
    resume: bool = False,
    checkpoints: RunCheckpoints | None = None,
    on_start: Callable[[Assembled], None] = lambda assembled: None,
) -> Generator[EpochReport | StepReport, None, dict[str, Any]]:
    """Run fit() and keep its files in `out`; they are complete before each report is yielded.

    Writes best.safetensors and curve.jsonl after every epoch, steps.jsonl with every StepReport, result.json and
    ranks.parquet at the end, and returns the result. With `resume` it continues from the newest of its `checkpoints`
    (None: last.ckpt in `out`, after every epoch), and does nothing where the run has ended. Closing the generator leaves
    the files for a later resume. In a distributed run worker 0 writes. Raises BadInput when `out` holds a run and `resume`
    is off, or holds another run.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise BadInput("is a file; a run needs a folder.", file=out, remedy="Choose another name.")
    result_file, checkpoints = out / "result.json", checkpoints or LastCheckpoint(out / "last.ckpt")
    if not resume and (result_file.exists() or checkpoints.exists()):
        raise BadInput("holds a run already.", file=out, remedy="Choose another folder, or continue it with --resume.")
    assembled = assemble(config)
    run, description = assembled.run, assembled.description
    if result_file.exists():
        result = json.loads(result_file.read_text(encoding="utf-8"))
        check_identity(result, description, file=result_file)
        return result
    out.mkdir(parents=True, exist_ok=True)
    tracker: Tracker = JsonLinesTracker(out / "curve.jsonl")
    writes = distributed.rank() == 0
    if resume and checkpoints.load(run, description) and writes:
        tracker.log(run.state.history)
    steps = StepLines(out / "steps.jsonl", run.state.optimizer_steps) if writes else None
    with checkpoints:
        on_start(assembled)
        for report in fit(run):
            if steps is not None:
                if isinstance(report, StepReport):
                    steps.log(report)
                elif report.best_epoch == report.epoch:
                    save_model(out / "best.safetensors", run.state.best_weights, description)
                checkpoints.save(run, description, epoch_over=isinstance(report, EpochReport))
                tracker.log(run.state.history)
            yield report
    return _finish(assembled, out)


def _finish(assembled: Assembled, out: Path) -> dict[str, Any]:
    """Rank with the best weights, write ranks.parquet and result.json, return the result.

    `seconds` counts every epoch of the run, before a resume too, and this last ranking. `peak_memory_bytes`
    is of the GPU, or of the whole process where there is none.
    """
    run, config, state, started = assembled.run, assembled.config, assembled.run.state, time.perf_counter()
    run.model.load_state_dict(state.best_weights)
    splits: tuple[Split, ...] = ("valid", "test") if config.test and config.data.examples == "train" else ("valid",)
    tables = [_ranks(run, data, split) for split in splits for data in run.data]
    best = state.history[state.best_epoch - state.history[0].epoch]
    result: dict[str, Any] = {
        "schema_version": 1,
        "best_epoch": state.best_epoch,
        "epochs": state.history[-1].epoch,
        "optimizer_steps": state.optimizer_steps,
        "best_optimizer_steps": best.optimizer_steps,
        "valid": best.valid,
    } | ({"zero_shot": best.zero_shot} if best.zero_shot else {})
    if "test" in splits:
        result["test"] = mean_metrics(table["rank"].to_numpy() for table in tables if table["split"].iloc[0] == "test")
    if distributed.rank() == 0:
        fingerprints = {data.domain.name: data.fingerprint for data in run.data}
        train_seconds, valid_seconds = (sum(getattr(r, name) for r in state.history) for name in ("train_seconds", "valid_seconds"))
        result |= {
            **assembled.description,
            "fingerprint": next(iter(fingerprints.values())) if len(fingerprints) == 1 else fingerprints,
            **_protocol(run),
            "seed": config.seed,
            "code_version": code_version(),
            "checkpoint": save_model(out / "best.safetensors", state.best_weights, assembled.description),
            "transfer": None if assembled.transfer is None else to_dict(assembled.transfer),
            "device": _device_name(run.device),
            "seconds": train_seconds + valid_seconds + time.perf_counter() - started,
            "train_seconds": train_seconds,
            "valid_seconds": valid_seconds,
            "peak_memory_bytes": _peak_memory_bytes(run.device),
        }
        pd.concat(tables).to_parquet(out / "ranks.parquet", index=False)
        write_atomically(out / "result.json", (json.dumps(result, indent=2) + "\n").encode())
    distributed.wait_for_all()  # no worker may end, and take the group down, before the files stand
    return result


def _protocol(run: Run) -> dict[str, Any]:
    """What a number means beside the fingerprint, and how much it was taken from; of one domain only."""
    if len(run.data) > 1:
        return {"metrics": DEFINITION}
    domain = run.data[0].domain
    return {"metrics": DEFINITION, "split": domain.info["split"], "users": domain.n_users, "items": domain.n_items}


def _ranks(run: Run, data: DomainData, split: Split) -> pd.DataFrame:
    users, ends = data.valid if split == "valid" else data.domain.examples(split)
    rank = evaluate(run.model, data, users, ends, run.device)
    return pd.DataFrame({"domain": data.domain.name, "split": split, "user": users, "rank": rank})


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def _peak_memory_bytes(device: torch.device) -> int:
    """The most memory so far: of the GPU where there is one, of this process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if os.name != "posix":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@cache
def code_version() -> str:
    """The package's version and a hash of its source, so that an uncommitted change shows too."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:10]}"
