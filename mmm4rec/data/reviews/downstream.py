"""UniSRec / MISSRec downstream folders (github.com/RUCAIBox/UniSRec, dataset/preprocessing/process_amazon.py).

    X.{train,valid,test}.inter      user index, history of item indices, target index; header; tab-separated
    X.user2index, X.item2index      id, index from 0; no header; tab-separated
    X.text                          item id, text; header; tab-separated
    X.feat1CLS, X.feat3CLS          text and image features, optional: raw little-endian float32 [I, F], row = item index

The rows of one user belong together, so that no row is left out: the first malformed one ends the work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from mmm4rec.data.features import Modality
from mmm4rec.data.strict import AGAIN, FIX_ROW, Faults, read_columns, read_header, read_lines
from mmm4rec.errors import BadInput

TAB = "\t"
INTER_SUFFIXES = (".train.inter", ".valid.inter", ".test.inter")
INTER_HEADER = ["user_id:token", "item_id_list:token_seq", "item_id:token"]
FEATURE_FILES: dict[Modality, str] = {"text": "feat1CLS", "image": "feat3CLS"}
TEXT_HEADER = "item_id:token\ttext:token_seq"


@dataclass(frozen=True)
class DownstreamSource:
    """A UniSRec / MISSRec folder whose files are named after `name`."""

    name: str
    folder: Path

    def file(self, suffix: str) -> Path:
        return self.folder / f"{self.name}.{suffix}"


@dataclass(frozen=True)
class Rows:
    """One .inter file; row r stands on line r + 2."""

    file: Path
    user: np.ndarray  # [R] int64, index from 0
    target: np.ndarray  # [R] int64, item index from 0
    lengths: np.ndarray  # [R] int64, items in each history, 1 or more
    history: np.ndarray  # [sum of lengths] int64, item indices, oldest first

    @property
    def ends(self) -> np.ndarray:  # [R], row r's history is history[ends[r] - lengths[r] : ends[r]]
        return np.cumsum(self.lengths)


@dataclass(frozen=True)
class Downstream:
    """The tables of a downstream folder; place in a list = index in its files."""

    users: list[str]
    items: list[str]
    texts: list[str]  # '' for an item without a line in .text
    train: Rows
    valid: Rows
    test: Rows
    features: dict[Modality, np.ndarray]  # [I, F] float32
    files: list[str]  # names of all that was read


def read_downstream(source: DownstreamSource) -> Downstream:
    """Read a downstream folder. Raises BadInput for a missing file, a bad row, an unknown user or item, bad features."""
    users, items = _read_index(source.file("user2index")), _read_index(source.file("item2index"))
    train, valid, test = (_read_rows(source.file(f"{split}.inter"), len(users), len(items)) for split in ("train", "valid", "test"))
    texts = _read_texts(source.file("text"), items)
    paths = {modality: source.file(suffix) for modality, suffix in FEATURE_FILES.items() if source.file(suffix).exists()}
    features = {modality: _read_features(path, len(items)) for modality, path in paths.items()}
    read = [source.file(suffix) for suffix in ("user2index", "item2index", "train.inter", "valid.inter", "test.inter", "text")]
    return Downstream(users, items, texts, train, valid, test, features, [path.name for path in (*read, *paths.values())])


def _read_table(file: Path, kinds: dict[str, pa.DataType], header: list[str] | None = None) -> pd.DataFrame:
    """All rows; row r stands on line r + 1, or r + 2 after a header."""
    if header is not None and (found := read_header(file, TAB)) != header:
        rule = f"starts with {TAB.join(found)!r}; its header is {TAB.join(header)!r}."
        raise BadInput(rule, file=file, line=1, remedy=FIX_ROW)
    tables = [table for _, _, table in read_columns(file, kinds, TAB, Faults(), header=header is not None)]
    if not tables:
        raise BadInput("holds no rows.", file=file, remedy=AGAIN)
    return pa.concat_tables(tables).to_pandas()


def _reject_first(bad: pd.Series | np.ndarray, file: Path, first_line: int, rule: Callable[[int], str]) -> None:
    """Raise BadInput for the first row that is bad; `rule(row)` words what is wrong with it."""
    flags = np.asarray(bad)
    if flags.any():
        row = int(np.argmax(flags))
        raise BadInput(rule(row), file=file, line=row + first_line, remedy=FIX_ROW)


def _read_index(file: Path) -> list[str]:
    """The ids in index order."""
    table = _read_table(file, {"id": pa.string(), "index": pa.int64()})
    index, ids = table["index"], table["id"]
    bad = (index < 0) | (index >= len(index)) | index.duplicated() | ids.duplicated() | (ids == "")
    _reject_first(
        bad, file, 1, lambda row: f"gives '{ids[row]}' index {index[row]}; ids are unique and indices run from 0 to {len(ids) - 1}."
    )
    return ids.iloc[np.argsort(index.to_numpy())].tolist()


def _read_rows(file: Path, n_users: int, n_items: int) -> Rows:
    table = _read_table(file, {"user": pa.int64(), "history": pa.string(), "target": pa.int64()}, header=INTER_HEADER)
    words = pc.split_pattern(pa.array(table["history"], type=pa.string()), " ")
    lengths = pc.list_value_length(words).to_numpy().astype(np.int64)
    row_of = np.repeat(np.arange(len(lengths)), lengths)
    try:
        history = pc.list_flatten(words).cast(pa.int64()).to_numpy()
    except pa.ArrowInvalid:
        bad = [not all(word.isascii() and word.isdecimal() and len(word) < 19 for word in line.split(" ")) for line in table["history"]]
        _reject_first(
            np.array(bad), file, 2, lambda row: f"history '{table['history'][row]}' is no list of item indices parted by single spaces."
        )
        raise
    user, target = table["user"].to_numpy(), table["target"].to_numpy()
    _reject_first((user < 0) | (user >= n_users), file, 2, lambda row: f"user {user[row]} is unknown: user2index ends at {n_users - 1}.")
    for items, rows in ((target, np.arange(len(target))), (history, row_of)):
        wrong = np.flatnonzero((items < 0) | (items >= n_items))
        if len(wrong):
            rule = f"item {items[wrong[0]]} is unknown: item2index ends at {n_items - 1}."
            raise BadInput(rule, file=file, line=int(rows[wrong[0]]) + 2, remedy=FIX_ROW)
    return Rows(file, user, target, lengths, history)


def _read_texts(file: Path, items: list[str]) -> list[str]:
    """Texts in item order; a tab inside a text is white space."""
    known, texts = set(items), dict[str, str]()
    for line, row in read_lines(file, Faults()):
        if line == 1 and row == TEXT_HEADER:
            continue
        item, tab, text = row.partition("\t")
        if line == 1 or not tab:
            rule = f"is {row!r}; a .text file starts with {TEXT_HEADER!r} and goes on with item id, tab and text."
            raise BadInput(rule, file=file, line=line, remedy=FIX_ROW)
        if item not in known or item in texts:
            rule = "is there twice" if item in texts else "is unknown: item2index does not have it"
            raise BadInput(f"item '{item}' {rule}.", file=file, line=line, remedy=FIX_ROW)
        texts[item] = " ".join(text.split())
    return [texts.get(item, "") for item in items]


def _read_features(file: Path, n_items: int) -> np.ndarray:
    size = file.stat().st_size
    if size == 0 or size % (4 * n_items):
        rule = f"has {size:,} bytes, which is no float32 table of {n_items:,} rows, one for each item of item2index."
        raise BadInput(rule, file=file, remedy="Download it again, or remove it and encode the items.")
    vectors = np.fromfile(file, dtype="<f4").reshape(n_items, -1)
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        rule = f"row {int(np.argmin(finite))} (item index, counted from 0) is not finite."
        raise BadInput(rule, file=file, remedy="Download it again, or remove it and encode the items.")
    return vectors
