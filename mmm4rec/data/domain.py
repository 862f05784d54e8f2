"""The on-disk contract of a domain: this module is its only reader and writer.

A domain is a folder:

    domain.json       name, counts, split, tie-break, provenance, fingerprint, schema_version
    offsets.npy       int64 [U + 1]; user u's interactions are rows offsets[u] .. offsets[u + 1] - 1
    items.npy         int32 [N]; item numbers 1..I in time order (0 is padding and never stored)
    timestamps.npy    int64 [N], unix seconds; absent when the source has no times
    cuts.npy          int64 [U, 2]; with a global-time split: a user's interactions before the validation's time, before the test's
    items.parquet     a row an item, row i - 1 is item i: `item` (the source's id), `text`, `image`, `image_url`
    users.parquet     a row a user: `user` (the source's id)
    features/         one table a modality, written by `features.py`

Prefixes are never stored: an example is (user, end), its input is interactions[:end] and its target
is interactions[end]. The split says how many of a user's n interactions come before validation and before test:
n - 2 and n - 1 with leave-one-out, `cuts` with global-time. Training examples are all targets before validation, the
validation example is the last one before test, the test example the last of all, where it comes after the one before it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import pandas as pd

from mmm4rec.errors import BadInput

SCHEMA_VERSION = 1
LEAVE_ONE_OUT = "leave-one-out"

Split = Literal["train", "valid", "test", "all"]


@dataclass(frozen=True)
class Examples:
    """The (user, end) pairs of some users, not listed: memory grows with the users alone. Unpacks into all users and all ends."""

    users: np.ndarray  # [U] int64, with at least one example each
    first_ends: np.ndarray  # [U] int64; a user's further ends follow it one by one
    stops: np.ndarray  # [U] int64: how many examples the users up to this one have

    def __len__(self) -> int:
        return int(self.stops[-1]) if len(self.stops) else 0

    def __iter__(self) -> Iterator[np.ndarray]:
        yield from self.at(np.arange(len(self)))

    def at(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The users and ends of these examples, [n] int64 each; examples are numbered from 0, user by user."""
        place = np.searchsorted(self.stops, numbers, side="right")
        before = np.where(place > 0, self.stops[place - 1], 0)
        return self.users[place], self.first_ends[place] + numbers - before


@dataclass(frozen=True)
class Domain:
    """A domain opened from disk; the arrays are memory maps."""

    path: Path
    info: dict[str, Any]  # domain.json as it stands on disk
    offsets: np.ndarray  # [U + 1] int64
    items: np.ndarray  # [N] int32, 1..I
    timestamps: np.ndarray | None  # [N] int64 unix seconds
    cuts: np.ndarray | None = None  # [U, 2] int64, with a global-time split

    @property
    def name(self) -> str:
        return str(self.info["name"])

    @property
    def fingerprint(self) -> str:
        return str(self.info["fingerprint"])

    @property
    def n_users(self) -> int:
        return len(self.offsets) - 1

    @property
    def n_items(self) -> int:
        return int(self.info["items"])

    def item_table(self) -> pd.DataFrame:
        """The items, row i - 1 for item i: `item`, `text`, `image` (a path inside the domain or null), `image_url` (or null)."""
        table = pd.read_parquet(self.path / "items.parquet")
        return table if "image_url" in table else table.assign(image_url=None)

    def before(self, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many of these users' interactions come before validation, and before test: [n] int64 each."""
        if self.cuts is not None:
            return self.cuts[users, 0], self.cuts[users, 1]
        lengths = self.offsets[users + 1] - self.offsets[users]
        return lengths - 2, lengths - 1

    def examples(self, split: Split, users: np.ndarray | None = None) -> Examples:
        """The examples of a split: `all` holds every one, the targets of validation and test included (pre-training).

        `users` restricts them to these users.
        """
        chosen = np.arange(self.n_users) if users is None else np.asarray(users, dtype=np.int64)
        before_valid, before_test = self.before(chosen)
        lengths = self.offsets[chosen + 1] - self.offsets[chosen]
        if split in ("valid", "test"):
            starts, stops = (before_valid, before_test) if split == "valid" else (before_test, lengths)
            first_ends = stops - 1
            counts = ((first_ends >= 1) & (stops > starts)).astype(np.int64)
        else:
            first_ends = np.ones_like(chosen)
            counts = np.maximum((lengths if split == "all" else before_valid) - 1, 0)
        kept = counts > 0
        return Examples(chosen[kept], first_ends[kept], np.cumsum(counts[kept]))


def open_domain(path: str | Path) -> Domain:
    """Open a domain by memory map.

    Raises BadInput when the folder is no domain, of another schema version, or damaged.
    """
    path = Path(path)
    info_file = path / "domain.json"
    if not info_file.is_file():
        raise BadInput("is not a domain: it has no domain.json.", file=path, remedy="Make one with: mmm4rec prepare SRC OUT")
    try:
        info = json.loads(info_file.read_text(encoding="utf-8"))
        version = info["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"cannot be read ({error}).", file=info_file, remedy="Run mmm4rec prepare again.") from error
    if version != SCHEMA_VERSION:
        raise BadInput(
            f"has schema_version {version}; this version reads {SCHEMA_VERSION}.", file=info_file, remedy="Run mmm4rec prepare again."
        )
    try:
        offsets = np.load(path / "offsets.npy", mmap_mode="r", allow_pickle=False)
        items = np.load(path / "items.npy", mmap_mode="r", allow_pickle=False)
        times = path / "timestamps.npy"
        timestamps = np.load(times, mmap_mode="r", allow_pickle=False) if info["has_timestamps"] else None
        cuts = None if info["split"] == LEAVE_ONE_OUT else np.load(path / "cuts.npy", mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"is damaged ({error}).", file=path, remedy="Run mmm4rec prepare again.") from error
    lengths = {len(items), int(offsets[-1]), info["interactions"]} | (set() if timestamps is None else {len(timestamps)})
    if len(lengths) != 1:
        raise BadInput(f"is damaged: its arrays hold {sorted(lengths)} interactions.", file=path, remedy="Run mmm4rec prepare again.")
    if cuts is not None and len(cuts) != len(offsets) - 1:
        raise BadInput(f"is damaged: it has cuts for {len(cuts)} users.", file=path, remedy="Run mmm4rec prepare again.")
    return Domain(path, info, offsets, items, timestamps, cuts)


def write_domain(
    out: str | Path,
    *,
    name: str,
    offsets: np.ndarray,
    items: np.ndarray,
    timestamps: np.ndarray | None,
    item_table: pd.DataFrame,
    user_ids: list[str],
    tie_break: str,
    provenance: dict[str, Any],
    split: str = LEAVE_ONE_OUT,
    cuts: np.ndarray | None = None,
    extra: Callable[[Path, str], None] | None = None,
    force: bool = False,
) -> Domain:
    """Write a domain whole or not at all, and open it.

    Args:
        offsets, items, timestamps: as in the module's text.
        item_table: `item` (str, unique), `text` (str), `image` and, where there are, `image_url` (str or None); I rows in item order.
        user_ids: the source's user ids, U of them.
        tie_break: the rule that orders interactions of equal time.
        provenance: counts and settings of the preparation (rows read, dropped, tied, k-core, ...).
        split, cuts: the split's rule, in words and, with a global-time split, as numbers.
        extra: called with the unfinished folder and the fingerprint, to write features or pictures too.
        force: replace an existing domain.
    Raises BadInput when `out` exists and `force` is off.
    """
    info = {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "users": len(offsets) - 1,
        "items": len(item_table),
        "interactions": len(items),
        "has_timestamps": timestamps is not None,
        "split": split,
        "tie_break": tie_break,
        "fingerprint": fingerprint(offsets, items, timestamps, item_table["item"].tolist(), user_ids, tie_break, split),
        "provenance": provenance,
    }
    with new_folder(out, force=force) as folder:
        np.save(folder / "offsets.npy", np.asarray(offsets, dtype=np.int64))
        np.save(folder / "items.npy", np.asarray(items, dtype=np.int32))
        if timestamps is not None:
            np.save(folder / "timestamps.npy", np.asarray(timestamps, dtype=np.int64))
        if cuts is not None:
            np.save(folder / "cuts.npy", np.asarray(cuts, dtype=np.int64))
        columns = [name for name in ("item", "text", "image", "image_url") if name in item_table]
        item_table[columns].to_parquet(folder / "items.parquet", index=False)
        pd.DataFrame({"user": user_ids}).to_parquet(folder / "users.parquet", index=False)
        if extra is not None:
            extra(folder, str(info["fingerprint"]))
        (folder / "domain.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    return open_domain(out)


def set_images(domain: Domain, images: list[str | None]) -> None:
    """Say which picture each item has: a path inside the domain's folder, or None; I of them, in item order."""
    table, content = domain.item_table().assign(image=pd.array(images, dtype=object)), BytesIO()
    table.to_parquet(content, index=False)
    write_atomically(domain.path / "items.parquet", content.getvalue())


def fingerprint(
    offsets: np.ndarray,
    items: np.ndarray,
    timestamps: np.ndarray | None,
    item_ids: list[str],
    user_ids: list[str],
    tie_break: str,
    split: str = LEAVE_ONE_OUT,
) -> str:
    """Hash of all that decides what a number on this domain means: rows, order, ids, split, tie-break."""
    digest = hashlib.sha256()
    for text in (split, tie_break, *item_ids, "users", *user_ids):
        digest.update(text.encode() + b"\0")
    arrays = ((offsets, "<i8"), (items, "<i4"), (timestamps, "<i8"))
    for array, dtype in arrays:
        if array is not None:
            digest.update(np.ascontiguousarray(array, dtype=dtype).data)
    return digest.hexdigest()[:16]


@contextmanager
def new_folder(out: str | Path, *, force: bool, marker: str = "domain.json") -> Iterator[Path]:
    """Give a temporary folder beside `out` that takes its name when the block ends well.

    Raises BadInput when `out` exists and `force` is off, or when it is not what `force` may replace: a
    folder that holds the file `marker`. When the block raises, nothing is left behind.
    """
    out = Path(out)
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()
    if out.exists() and force and not (out / marker).is_file():
        raise BadInput(f"is not replaced: it holds no {marker}.", file=out, remedy="Choose another folder.")
    if out.exists() and not force:
        raise BadInput("exists already.", file=out, remedy="Choose another folder, or replace it with --force.")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        folder.chmod(0o755)
        yield folder
        replaced = None
        if out.exists():
            replaced = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent)) / out.name
            out.replace(replaced)
        try:
            folder.replace(out)
        except OSError:
            if replaced is not None:
                replaced.replace(out)
            raise
        finally:
            if replaced is not None:
                shutil.rmtree(replaced.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file's content in one move: a reader, or a kill, meets the old or the new file whole."""
    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` in one move when the block ends, and not at all when it fails."""
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
