"""Plain tables: parquet, CSV or TSV files with named columns.

    interactions.{parquet,csv,tsv}  user, item and, where there are times, time; or a single file of any name
    items.{parquet,csv,tsv}         item, and of title, text, brand, category, description, image_url those that there are; optional

`Columns` says what the columns are called, and what a time counts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import pyarrow as pa

from mmm4rec.data.reviews.items import Item
from mmm4rec.data.reviews.rows import Batches, cast, delimited_rows, parquet_rows
from mmm4rec.data.reviews.source import RawSource
from mmm4rec.data.strict import Faults, plain_name, read_columns, read_header, read_parquet
from mmm4rec.errors import BadInput

log = logging.getLogger(__name__)
TimeUnit = Literal["s", "ms", "us", "ns"]
SUFFIXES = {"csv": ",", "tsv": "\t", "parquet": ""}  # with the delimiter
PARTS = ("title", "text", "brand", "category", "description", "image_url")


@dataclass(frozen=True)
class Columns:
    """What a plain table's columns are called."""

    user: str = "user"
    item: str = "item"
    time: str = "time"  # a table without it has no times
    time_unit: TimeUnit = "s"  # of numbers; a parquet column of timestamps needs none
    title: str = "title"
    text: str = "text"
    brand: str = "brand"
    category: str = "category"
    description: str = "description"
    image_url: str = "image_url"

    def __post_init__(self) -> None:
        if self.time_unit not in get_args(TimeUnit):
            raise ValueError(f"time_unit is {self.time_unit!r}; it must be one of {', '.join(get_args(TimeUnit))}.")

    @classmethod
    def parse(cls, pairs: Sequence[str]) -> Columns:
        """From NAME=COLUMN pairs. Raises BadInput for an unknown name."""
        known = {field.name for field in fields(cls)}
        told = dict(pair.partition("=")[::2] for pair in pairs)
        roles = [told.get(name, name) for name in ("user", "item", "time")]
        if len(set(roles)) < len(roles):
            raise BadInput(f"--columns gives one column two meanings: {', '.join(roles)}.", remedy="Name user, item and time apart.")
        wrong = sorted(name for name, column in told.items() if name not in known or not column)
        if wrong:
            raise BadInput(f"--columns does not know {', '.join(wrong)}.", remedy=f"Give NAME=COLUMN with {', '.join(sorted(known))}.")
        try:
            return cls(**told)  # type: ignore[arg-type]
        except ValueError as error:
            raise BadInput(str(error), remedy="Correct --columns.") from error

    @property
    def named(self) -> dict[str, str]:
        """Those that are not called what they are called by default."""
        return {field.name: getattr(self, field.name) for field in fields(self) if getattr(self, field.name) != field.default}


def find(files: Sequence[Path], beside: Sequence[Path], columns: Columns, name: str) -> list[RawSource]:
    """The domain whose tables stand among these files: interactions.*, or the only table; named `name` or after its file.

    Raises BadInput where `columns` names what the table does not have.
    """
    tables = [file for file in files if not file.is_dir() and _kind(file) in SUFFIXES]
    chosen = [file for file in tables if _stem(file) == "interactions"] or (tables if len(files) == 1 else [])
    sources = []
    for file in chosen[:1]:
        names = _names(file)
        absent = [columns.named[part] for part in ("user", "item", "time") if part in columns.named and columns.named[part] not in names]
        if absent:
            rule = f"has no column {', '.join(absent)}; its columns are {', '.join(names)}."
            raise BadInput(rule, file=file, line=1, remedy="Correct --columns.")
        if columns.user in names and columns.item in names:
            items = tuple(each for each in beside if not each.is_dir() and _stem(each) == "items" and _kind(each) in SUFFIXES)[:1]
            rows, timed = partial(_rows, file, names, columns), columns.time in names
            if not timed:
                log.warning("%s has no column %s: the domain has no times", file.name, columns.time)
            called = name if _stem(file) == "interactions" else _stem(file)
            sources.append(RawSource("table", called, (file,), items, rows, partial(_items, items, columns), timed=timed))
    return sources


def _kind(file: Path) -> str:
    return plain_name(file).rpartition(".")[2]


def _stem(file: Path) -> str:
    return plain_name(file).rpartition(".")[0]


def _names(file: Path) -> list[str]:
    if _kind(file) != "parquet":
        return [name.strip('"') for name in read_header(file, SUFFIXES[_kind(file)])]
    from pyarrow import parquet

    try:
        return list(parquet.read_schema(file).names)
    except (OSError, pa.ArrowException) as error:
        raise BadInput(f"cannot be read ({error}).", file=file, remedy="Write it again.") from error


def _rows(file: Path, names: list[str], columns: Columns, faults: Faults) -> Batches:
    if _kind(file) == "parquet":
        return parquet_rows(
            file, columns.user, columns.item, columns.time if columns.time in names else None, faults, unit=columns.time_unit
        )
    called = {columns.user: "user", columns.item: "item", columns.time: "time"}
    placed = [called.get(name, f"column {name}") for name in names]
    if len(set(placed)) != len(names):
        raise BadInput("names a column twice.", file=file, line=1, remedy="Give every column a name of its own.")
    return delimited_rows(file, SUFFIXES[_kind(file)], placed, faults, header=True, quoted=True, unit=columns.time_unit)


def _items(files: tuple[Path, ...], columns: Columns, faults: Faults) -> Iterator[Item]:
    for file in files:
        names = _names(file)
        if columns.item not in names:
            raise BadInput(f"has no column {columns.item}.", file=file, remedy="Name it with --columns item=COLUMN.")
        absent = [columns.named[part] for part in PARTS if part in columns.named and columns.named[part] not in names]
        if absent:
            raise BadInput(
                f"has no column {', '.join(absent)}; its columns are {', '.join(names)}.", file=file, remedy="Correct --columns."
            )
        here = {part: getattr(columns, part) for part in PARTS if getattr(columns, part) in names}
        for row in _records(file, names, {"item": columns.item, **here}, faults):
            if row["item"]:
                parts = {part: [row[part]] if row.get(part) else [] for part in ("title", "brand", "category", "description")}
                parts["title"] += [row["text"]] if row.get("text") else []
                yield Item(row["item"], **parts, image_url=row.get("image_url") or None)


def _records(file: Path, names: list[str], wanted: dict[str, str], faults: Faults) -> Iterator[dict[str, str]]:
    tables: Iterator[pa.Table | pa.RecordBatch]
    if _kind(file) == "parquet":
        tables = (batch for _, batch in read_parquet(file, list(wanted.values())))
    else:
        kinds = dict.fromkeys(names, pa.string())
        tables = (table for _, _, table in read_columns(file, kinds, SUFFIXES[_kind(file)], faults, header=True, quoted=True))
    for table in tables:
        if _kind(file) == "parquet":
            faults.rows += len(table)
        columns = {part: _texts(file, name, table.column(name)) for part, name in wanted.items()}
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))


def _texts(file: Path, name: str, column: pa.Array | pa.ChunkedArray) -> list[str]:
    return cast(file, name, column, pa.string()).to_pylist()
