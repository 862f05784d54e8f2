"""Feature tables: one vector an item and modality, and a mask that says which rows exist.

On disk, inside the domain's folder:

    features/text.npy            [I, F] float16 or float32, row i - 1 is item i
    features/text.present.npy    [I] bool
    features/text.json           encoder, dimension, fingerprint of the domain, digest of the vectors
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from mmm4rec.data.at_once import at_once
from mmm4rec.data.domain import Domain
from mmm4rec.errors import BadInput

Modality = Literal["text", "image"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)
ITEMS_AT_ONCE = 32_768  # a catalogue of fewer items is computed whole
BLOCK_ITEMS = {"cpu": 8_192, "cuda": 131_072}  # of a larger one


@dataclass(frozen=True)
class Damage:
    """What a stress test does to a domain's features. Every item has its lot, so that a larger share spoils the smaller one's items too."""

    drop_text: float = 0.0  # the share of the items that have no such feature any more
    drop_image: float = 0.0
    corrupt_text: float = 0.0  # the share of the items that get the feature of another one of them
    corrupt_image: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("drop_text", "drop_image", "corrupt_text", "corrupt_image"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be from 0 to 1.")

    def of(self, modality: Modality) -> tuple[float, float]:
        """The shares dropped and corrupted."""
        return (self.drop_text, self.corrupt_text) if modality == "text" else (self.drop_image, self.corrupt_image)


@dataclass(frozen=True)
class FeatureTable:
    """The features of one modality of one domain."""

    modality: Modality
    vectors: np.ndarray  # [I, F], row i - 1 is item i; rows that are not present are zero
    present: np.ndarray  # [I] bool
    encoder: str  # what made them: a name that fixes their meaning
    digest: str  # hash of vectors and mask

    @property
    def dimension(self) -> int:
        return int(self.vectors.shape[1])

    def shuffled(self, seed: int) -> FeatureTable:
        """The same rows dealt out anew among the items: the control that takes content's meaning away."""
        order = np.random.default_rng(seed).permutation(len(self.vectors))
        return replace(self, vectors=self.vectors[order], present=self.present[order], digest=f"{self.digest}-shuffled{seed}")

    def damaged(self, damage: Damage) -> FeatureTable:
        """The table after a stress test's damage; the same one where there is none."""
        drop, corrupt = damage.of(self.modality)
        if not drop and not corrupt:
            return self
        random = np.random.default_rng([damage.seed, MODALITIES.index(self.modality)])
        lots = random.permutation(len(self.vectors)) / len(self.vectors)  # [I], an item is spoilt where its lot is below the share
        spoilt = np.flatnonzero((lots < corrupt) & self.present)
        giver = np.arange(len(self.vectors))
        circle = random.permutation(spoilt)  # each gets the feature of the next one
        giver[circle] = np.roll(circle, 1)
        present = self.present & ~(lots < drop)
        vectors = np.where(present[:, None], self.vectors[giver], np.zeros((), dtype=self.vectors.dtype))
        return replace(self, vectors=vectors, present=present, digest=f"{self.digest}-drop{drop}-corrupt{corrupt}-{damage.seed}")


def save_table(
    folder: Path, modality: Modality, vectors: np.ndarray, present: np.ndarray, *, encoder: str, domain_fingerprint: str, source: str | Path
) -> None:
    """Write a table into a domain's folder; the description goes last, so a table without one is no table.

    Args: vectors [I, F]; present [I]; encoder: a name that fixes the vectors' meaning (two tables with
    the same name and dimension may share a model); source: named in the error of a bad vector.
    Raises BadInput when a present vector is not finite.
    """
    finite = np.isfinite(vectors).all(axis=1) | ~present
    if not finite.all():
        raise BadInput(f"row {int(np.argmin(finite))} (counted from 0) is not finite.", file=source, remedy="Encode the items again.")
    target = folder / "features"
    target.mkdir(exist_ok=True)
    np.save(target / f".{modality}.npy", np.where(present[:, None], vectors, np.zeros((), dtype=vectors.dtype)))
    publish_table(folder, modality, present, encoder=encoder, domain_fingerprint=domain_fingerprint)


def publish_table(folder: Path, modality: Modality, present: np.ndarray, *, encoder: str, domain_fingerprint: str) -> None:
    """Make `features/.MODALITY.npy`, already written, with rows of zeros where absent, the domain's table of a modality."""
    target = folder / "features"
    vectors = np.load(target / f".{modality}.npy", mmap_mode="r", allow_pickle=False)
    digest = hashlib.sha256(vectors.data)
    digest.update(present.tobytes())
    info = {
        "schema_version": 1,
        "encoder": encoder,
        "dimension": int(vectors.shape[1]),
        "items": len(vectors),
        "present": int(present.sum()),
        "domain_fingerprint": domain_fingerprint,
        "digest": digest.hexdigest()[:16],
    }
    np.save(target / f".{modality}.present.npy", present.astype(bool))
    (target / f"{modality}.json").unlink(missing_ok=True)
    for name in (f"{modality}.npy", f"{modality}.present.npy"):
        (target / f".{name}").replace(target / name)
    part = target / f".{modality}.json"
    part.write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    part.replace(target / f"{modality}.json")


def add_features(
    domain: Domain, modality: Modality, vectors: np.ndarray, present: np.ndarray, *, encoder: str, force: bool = False
) -> None:
    """Give a domain a feature table. Raises BadInput when it has one already and `force` is off."""
    place = domain.path / "features" / f"{modality}.json"
    if place.exists() and not force:
        raise BadInput(f"domain '{domain.name}' has {modality} features already.", file=place, remedy="Replace them with --force.")
    if vectors.ndim != 2 or len(vectors) != domain.n_items:
        raise BadInput(
            f"has {len(vectors):,} rows; domain '{domain.name}' has {domain.n_items:,} items.", file=place, remedy="Encode the items again."
        )
    save_table(domain.path, modality, vectors, present, encoder=encoder, domain_fingerprint=domain.fingerprint, source=place)


def open_features(domain: Domain, modality: Modality) -> FeatureTable | None:
    """The domain's table of a modality, by memory map; None when it has none.

    Raises BadInput when the table does not fit the domain (another fingerprint, another number of rows).
    """
    folder = domain.path / "features"
    file = folder / f"{modality}.json"
    if not file.is_file():
        return None
    remedy = f"Re-run: mmm4rec encode {domain.path}"
    try:
        info: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        vectors = np.load(
            folder / f"{modality}.npy", mmap_mode="c", allow_pickle=False
        )  # torch wants it writable; no write reaches the file
        present = np.load(folder / f"{modality}.present.npy", allow_pickle=False)
        encoder, digest, bound_to = str(info["encoder"]), str(info["digest"]), info["domain_fingerprint"]
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"cannot be read ({error}).", file=file, remedy=remedy) from error
    if bound_to != domain.fingerprint:
        raise BadInput(f"belongs to domain {bound_to}; this domain is {domain.fingerprint}.", file=file, remedy=remedy)
    if len(vectors) != domain.n_items or len(present) != domain.n_items:
        raise BadInput(
            f"has {len(vectors):,} rows; domain '{domain.name}' has {domain.n_items:,} items.",
            file=folder / f"{modality}.npy",
            remedy=remedy,
        )
    return FeatureTable(modality, vectors, present, encoder, digest)


@dataclass(frozen=True)
class ItemFeatures:
    """A domain's features as a model reads them; padding (item 0) has none.

    Small catalogues are in memory, as float32 [I + 1, F]: row i is item i, row 0 zero. Larger ones, of ITEMS_AT_ONCE items
    and more, stay where they are on disk, as they are: [I, F], row i - 1 is item i, and are read block by block.
    """

    n_items: int
    vectors: dict[Modality, Tensor]  # [I + 1, F], or a memory map [I, F], 0 where absent; a modality that the domain lacks has no entry
    present: dict[Modality, Tensor]  # [I + 1] bool
    encoders: dict[Modality, str]
    digests: dict[Modality, str] = field(default_factory=dict)  # which vectors these are

    @property
    def dimensions(self) -> dict[Modality, int]:
        return {modality: vectors.shape[1] for modality, vectors in self.vectors.items()}

    @property
    def one_block(self) -> bool:
        """Whether all items may be computed at once."""
        return self.n_items < ITEMS_AT_ONCE

    def blocks(self) -> list[slice]:
        """The real items 1..I, whole or block by block."""
        device = next((part.device.type for part in self.present.values()), "cpu")
        step = self.n_items if self.one_block else at_once(BLOCK_ITEMS, device)
        return [slice(first, min(first + step, self.n_items + 1)) for first in range(1, self.n_items + 1, step)]

    def numbers(self, ids: Tensor | slice | None, device: torch.device | None = None) -> Tensor:
        """The items that `ids` means, [n]: these, a range, or all with padding."""
        if isinstance(ids, Tensor):
            return ids
        return torch.arange(*(ids or slice(None)).indices(self.n_items + 1), device=device)

    def rows(self, modality: Modality, ids: Tensor | slice | None) -> tuple[Tensor, Tensor]:
        """Vectors [n, F], 0 where absent, and presence [n] of these items; half precision comes as float32."""
        table, present = self.vectors[modality], self.present[modality]
        chosen = slice(None) if ids is None else ids
        if len(table) == self.n_items + 1:
            return table[chosen], present[chosen]
        numbers = self.numbers(ids, table.device)
        rows = table[(numbers - 1).clamp(min=0)]
        rows[numbers == 0] = 0  # the row before the first stands for padding
        return rows.float() if rows.dtype == torch.float16 else rows, present[chosen]

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> ItemFeatures:
        vectors = {modality: part.to(device, dtype) for modality, part in self.vectors.items()}
        return replace(self, vectors=vectors, present={modality: part.to(device) for modality, part in self.present.items()})


def load_features(
    domain: Domain, modalities: Sequence[Modality], *, shuffle_seed: int | None = None, damage: Damage | None = None
) -> ItemFeatures:
    """The domain's tables of these modalities as tensors; `shuffle_seed` deals their rows out anew among the items."""
    tables = [table for table in (open_features(domain, modality) for modality in modalities) if table is not None]
    if damage is not None:
        tables = [table.damaged(damage) for table in tables]
    if shuffle_seed is not None:
        tables = [table.shuffled(shuffle_seed) for table in tables]
    in_memory = domain.n_items < ITEMS_AT_ONCE
    return ItemFeatures(
        n_items=domain.n_items,
        vectors={
            table.modality: _padded(np.asarray(table.vectors, dtype=np.float32)) if in_memory else torch.from_numpy(table.vectors)
            for table in tables
        },
        present={table.modality: _padded(table.present) for table in tables},
        encoders={table.modality: table.encoder for table in tables},
        digests={table.modality: table.digest for table in tables},
    )


def _padded(rows: np.ndarray) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros_like(rows[:1]), rows]))
