"""Encode item texts and pictures with a pre-trained encoder on several GPUs or machines, through Ray Data.

Each worker holds the model; a part of 2,048 items travels to it and its vectors travel back to this process, which alone
writes: a folder that only this machine sees is enough for texts, pictures must lie where every worker sees them. What is
written stays done when anything is killed; the same command goes on with the parts that are missing. The vectors are those
of `mmm4rec encode`.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmm4rec.data.domain import write_atomically
from mmm4rec.data.parts import PART_ITEMS, Work, encode_pretrained, part_bytes
from mmm4rec.data.pretrained import PretrainedConfig, PretrainedEncoder
from mmm4rec.errors import BadInput


class EncodePart:
    """A worker: one loaded encoder."""

    def __init__(self, config: PretrainedConfig, modality: Any) -> None:
        self.encoder, self.modality = PretrainedEncoder(config), modality

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """`part` and the `inputs` of its items -> `part` and its file's `content`."""
        inputs = [None if each is None else str(each) for each in row["inputs"]]
        return {"part": int(row["part"]), "content": part_bytes(self.encoder, self.modality, inputs)}


def through_ray(workers: int, gpus: float) -> Callable[[PretrainedConfig, Work, list[int]], Iterable[int]]:
    """What encodes the missing parts of a work with so many workers of so many GPUs each."""

    def encode(config: PretrainedConfig, work: Work, missing: list[int]) -> Iterable[int]:
        import ray

        if not missing:
            return
        ray.data.DataContext.get_current().enable_progress_bars = False
        inputs = [str(each.resolve()) if isinstance(each, Path) else each for each in work.inputs]
        here = config.source if not Path(config.source).is_dir() else str(Path(config.source).resolve())
        rows = [{"part": part, "inputs": inputs[part * PART_ITEMS : (part + 1) * PART_ITEMS]} for part in missing]
        coming = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            EncodePart,  # type: ignore[arg-type]
            fn_constructor_args=(replace(config, source=here), work.modality),
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=1,
            num_gpus=gpus,
        )
        work.folder.mkdir(parents=True, exist_ok=True)
        for row in coming.iter_rows():
            write_atomically(work.file(row["part"]), row["content"])
            yield row["part"]

    return encode


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input."""
    from studies.engine import start_ray
    from studies.spec import Resources

    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: ray submit cluster/gpu.yaml studies/encode_cluster.py -- /mnt/domains/Toys --encoder"
        " google/siglip-base-patch16-224 --revision COMMIT --workers 8 --gpus 1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("domain", type=Path, nargs="+", help="folders of domains")
    add("--encoder", required=True, help="a transformers model: a folder that every worker sees, or a model of the hub")
    add("--revision", help="commit, branch or tag of a hub's model")
    add("--modality", nargs="+", choices=("text", "image"), default=[], help="default: all that the encoder and the domain have")
    add("--pooling", default="auto", help="of a text encoder: mean, cls, pooler or auto")
    add("--batch-size", type=int, default=64)
    add("--workers", type=int, default=2, help="models at work at once (default 2)")
    add("--gpus", type=float, default=0.0, help="of each worker; 0: on CPUs (default 0)")
    add("--force", action="store_true", help="replace the domains' features")
    told = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    try:
        device = "cuda" if told.gpus else "cpu"
        config = PretrainedConfig(told.encoder, told.revision, told.pooling, device, told.batch_size)
        start_ray(Resources(concurrent=told.workers, cpus=1, gpus=told.gpus), workers=told.workers)
        works = encode_pretrained(told.domain, config, told.modality, force=told.force, in_parts=through_ray(told.workers, told.gpus))
    except (BadInput, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for work in works:
        print(f"{work.domain.path}: {work.modality} features by {work.encoder}")
    return 0


if __name__ == "__main__":
    from studies.encode_cluster import main as importable_main  # workers must find EncodePart in an importable module

    raise SystemExit(importable_main())
