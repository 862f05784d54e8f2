"""Encoding a domain's items part by part with a pre-trained encoder, in one process or in many.

A part is so many items, and a file of its own beside the features until all are there. What is done stays done: a killed
encoding goes on with the first missing part, and gives the vectors of an uninterrupted one, since what is encoded together
depends on the part alone. Vectors are float16.

    features/.MODALITY-KEY/00000.safetensors    `vectors` [n, F] float16, `present` [n] bool; KEY: hash of encoder, domain and inputs
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as from_bytes
from safetensors.numpy import save as to_bytes
from tqdm import tqdm

from mmm4rec.data.domain import Domain, open_domain, write_atomically
from mmm4rec.data.encode import open_picture, picture_files, read_texts
from mmm4rec.data.features import Modality, publish_table
from mmm4rec.data.pretrained import PretrainedConfig, PretrainedEncoder
from mmm4rec.errors import BadInput

log = logging.getLogger(__name__)
PART_ITEMS = 2048


@dataclass(frozen=True)
class Work:
    """One modality of one domain, to encode with one encoder."""

    domain: Domain
    modality: Modality
    encoder: str  # its name for this modality

    @cached_property
    def folder(self) -> Path:
        """The parts' own, by all that they depend on."""
        digest = hashlib.sha256(f"{self.encoder}\0{self.domain.fingerprint}".encode())
        for each in self.inputs:
            known = each.stat() if isinstance(each, Path) and each.is_file() else None
            told = str(each) if known is None or not isinstance(each, Path) else f"{each.name} {known.st_size} {known.st_mtime_ns}"
            digest.update(told.encode("utf-8", "replace") + b"\0")
        return self.domain.path / "features" / f".{self.modality}-{digest.hexdigest()[:12]}"

    def file(self, part: int) -> Path:
        return self.folder / f"{part:05d}.safetensors"

    @property
    def parts(self) -> range:
        return range(-(-self.domain.n_items // PART_ITEMS))

    @property
    def missing(self) -> list[int]:
        """Parts that are not encoded yet."""
        return [part for part in self.parts if not self.file(part).is_file()]

    @cached_property
    def inputs(self) -> list[str] | list[Path | None]:
        """The items' texts, or their pictures."""
        return read_texts(self.domain) if self.modality == "text" else picture_files(self.domain)


def plan(
    domains: Sequence[str | Path], encoder: PretrainedEncoder, modalities: Sequence[Modality] = (), *, force: bool = False
) -> list[Work]:
    """What is to be encoded: every modality that encoder and domain have, or these.

    Raises BadInput when the encoder lacks a modality, when a domain has features already and `force` is off, or nothing to encode.
    """
    lacking = [modality for modality in modalities if modality not in encoder.modalities]
    if lacking:
        raise BadInput(f"encodes {' and '.join(encoder.modalities)}, not {lacking[0]}.", file=encoder.config.source, remedy="Leave it out.")
    works = []
    for domain in map(open_domain, domains):
        able = [modality for modality in encoder.modalities if _has(domain, modality)]
        if not able or any(modality not in able for modality in modalities):
            what = " or ".join(modalities or encoder.modalities)
            remedy = "Prepare it with texts; fetch pictures with: mmm4rec images DOMAIN"
            raise BadInput(f"domain '{domain.name}' has no {what} to encode.", file=domain.path / "items.parquet", remedy=remedy)
        works += [Work(domain, modality, encoder.name(modality)) for modality in modalities or able]
    for work in works:
        place = work.domain.path / "features" / f"{work.modality}.json"
        if place.exists() and not force:
            rule = f"domain '{work.domain.name}' has {work.modality} features already."
            raise BadInput(rule, file=place, remedy="Replace them with --force.")
    return works


def _has(domain: Domain, modality: Modality) -> bool:
    column = domain.item_table()["text" if modality == "text" else "image"]
    return any(isinstance(value, str) and value for value in column)


def encode_part(encoder: PretrainedEncoder, work: Work, part: int, inputs: Sequence[str] | Sequence[Path | None]) -> None:
    """Encode the items of one part, of all the items' `inputs`, and write its file."""
    rows = slice(part * PART_ITEMS, min((part + 1) * PART_ITEMS, len(inputs)))
    work.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(work.file(part), part_bytes(encoder, work.modality, inputs[rows]))


def part_bytes(encoder: PretrainedEncoder, modality: Modality, inputs: Sequence[str] | Sequence[str | Path | None]) -> bytes:
    """The content of a part's file."""
    vectors, present = encode_inputs(encoder, modality, inputs)
    return to_bytes({"vectors": vectors, "present": present})


def encode_inputs(
    encoder: PretrainedEncoder, modality: Modality, inputs: Sequence[str] | Sequence[str | Path | None]
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors [n, F] float16, rows of zeros where absent, and present [n]; absent are empty texts and pictures that cannot be read."""
    if modality == "text":
        present = np.array([bool(text) for text in inputs])
        blocks = [encoder.encode_texts([str(text) for text in inputs if text])] if present.any() else []
    else:
        step, present, blocks = encoder.config.batch_size, np.zeros(len(inputs), dtype=bool), []
        for first in range(0, len(inputs), step):  # opened a batch at a time
            opened = [None if picture is None else open_picture(Path(picture)) for picture in inputs[first : first + step]]
            present[first : first + step] = [picture is not None for picture in opened]
            if readable := [picture for picture in opened if picture is not None]:
                blocks.append(encoder.encode_pictures(readable))
    if not blocks:
        return np.zeros((len(inputs), 0), dtype=np.float16), present
    found = np.concatenate(blocks)
    if not np.isfinite(found).all():
        raise BadInput("gives vectors that are not finite.", file=encoder.config.source, remedy="Use another encoder or device.")
    vectors = np.zeros((len(inputs), found.shape[1]), dtype=np.float16)
    vectors[present] = found
    return vectors, present


def finish(work: Work) -> int:
    """Join the parts, all of which are there, into the domain's features; how many items have one."""
    parts = [_read(work.file(part)) for part in work.parts]
    width = max(vectors.shape[1] for vectors, _ in parts)
    present = np.concatenate([mask for _, mask in parts])
    if not present.any():
        shutil.rmtree(work.folder)
        raise BadInput(f"has no {work.modality} that can be read.", file=work.domain.path, remedy="Leave this modality out.")
    place = work.domain.path / "features" / f".{work.modality}.npy"
    table = np.lib.format.open_memmap(place, mode="w+", dtype=np.float16, shape=(work.domain.n_items, width))
    for part, (vectors, _) in zip(work.parts, parts, strict=True):
        table[part * PART_ITEMS : part * PART_ITEMS + len(vectors)] = vectors if vectors.shape[1] else 0
    table.flush()
    del table
    publish_table(work.domain.path, work.modality, present, encoder=work.encoder, domain_fingerprint=work.domain.fingerprint)
    shutil.rmtree(work.folder)
    return int(present.sum())


def _read(file: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        arrays = from_bytes(file.read_bytes())
        return arrays["vectors"], arrays["present"]
    except (OSError, KeyError, SafetensorError) as error:
        raise BadInput(f"cannot be read ({error}).", file=file, remedy="Delete it and encode again: the rest stays done.") from error


def encode_pretrained(
    domains: Sequence[str | Path],
    config: PretrainedConfig,
    modalities: Sequence[Modality] = (),
    *,
    force: bool = False,
    in_parts: Callable[[PretrainedConfig, Work, list[int]], Iterable[int]] | None = None,
) -> list[Work]:
    """Give domains the features of a pre-trained encoder; goes on where an earlier call was ended.

    `in_parts` encodes the missing parts of a work elsewhere, and yields each that is done (studies/encode_cluster.py).
    Raises BadInput as `plan` does, and for an encoder that cannot be loaded.
    """
    encoder = PretrainedEncoder(config if in_parts is None else replace(config, device="cpu"))  # this process may have no GPU
    works = plan(domains, encoder, modalities, force=force)
    pinned = config if Path(config.source).is_dir() else replace(config, revision=encoder.version)
    for work in works:
        missing, total = work.missing, work.domain.n_items
        done = total - sum(min(PART_ITEMS, total - part * PART_ITEMS) for part in missing)
        title = f"{work.domain.name} {work.modality}"
        with tqdm(total=total, initial=done, desc=title, unit=" items", unit_scale=True, disable=None, smoothing=0.1) as bar:
            encoded = _here(encoder, work, missing) if in_parts is None else in_parts(pinned, work, missing)
            for part in encoded:
                bar.update(min(PART_ITEMS, total - part * PART_ITEMS))
        present = finish(work)
        log.info("%s: %s features for %d of %d items by %s.", work.domain.name, work.modality, present, total, work.encoder)
    return works


def _here(encoder: PretrainedEncoder, work: Work, missing: list[int]) -> Iterable[int]:
    inputs = work.inputs
    for part in missing:
        encode_part(encoder, work, part, inputs)
        yield part
