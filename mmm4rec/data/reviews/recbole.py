"""RecBole atomic files (recbole.io/docs/user_guide/data/atomic_files.html), tab-separated, with a header of name:type fields.

X.inter     user_id:token, item_id:token and, where there are times, timestamp:float; other fields are passed over
X.item      item_id:token and texts: fields of type token or token_seq; optional
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa

from mmm4rec.data.reviews.downstream import INTER_SUFFIXES
from mmm4rec.data.reviews.items import Item
from mmm4rec.data.reviews.rows import Batches, delimited_rows
from mmm4rec.data.reviews.source import RawSource
from mmm4rec.data.strict import FIX_ROW, Faults, plain_name, read_columns, read_header
from mmm4rec.errors import BadInput

TAB = "\t"
USER, ITEM, TIME = "user_id:token", "item_id:token", "timestamp:float"
FIELDS = {"title": ("title", "name", "movie_title"), "brand": ("brand", "store"), "category": ("category", "categories", "class", "genre")}
IMAGES = ("image_url", "imUrl", "imageURL")


def find(files: Sequence[Path], beside: Sequence[Path]) -> list[RawSource]:
    """The domains whose X.inter stands among these files."""
    return [
        _source(file, beside)
        for file in files
        if not file.is_dir() and plain_name(file).endswith(".inter") and not plain_name(file).endswith(INTER_SUFFIXES)
    ]


def _source(file: Path, beside: Sequence[Path]) -> RawSource:
    name = plain_name(file).removesuffix(".inter")
    header = read_header(file, TAB)
    if USER not in header or ITEM not in header:
        rule = f"starts with {TAB.join(header)!r}; a RecBole header holds {USER} and {ITEM}."
        raise BadInput(rule, file=file, line=1, remedy=FIX_ROW)
    columns = [{USER: "user", ITEM: "item", TIME: "time"}.get(field, field) for field in header]
    metadata = tuple(each for each in beside if plain_name(each) == f"{name}.item")[:1]

    def items(faults: Faults) -> Iterator[Item]:
        for each in metadata:
            yield from _items(each, faults)

    return RawSource("recbole", name, (file,), metadata, partial(_rows, file, columns), items, timed="time" in columns)


def _rows(file: Path, columns: list[str], faults: Faults) -> Batches:
    return delimited_rows(file, TAB, columns, faults, header=True)


def _items(file: Path, faults: Faults) -> Iterator[Item]:
    header = read_header(file, TAB)
    if ITEM not in header:
        raise BadInput(f"starts with {TAB.join(header)!r}; a RecBole header holds {ITEM}.", file=file, line=1, remedy=FIX_ROW)
    names = [field.split(":")[0] for field in header]
    texts = [name for name, field in zip(names, header, strict=True) if field.endswith((":token", ":token_seq"))]
    placed = {name: part for part, known in FIELDS.items() for name in texts if name in known}
    rest = [name for name in texts if name not in placed and name not in ("item_id", *IMAGES)]
    for _, _, table in read_columns(file, dict.fromkeys(names, pa.string()), TAB, faults, header=True):
        for row in table.to_pylist():
            parts = {part: [row[name] for name, its in placed.items() if its == part and row[name]] for part in FIELDS}
            image = next((row[name] for name in IMAGES if row.get(name)), None)
            if row["item_id"]:
                yield Item(row["item_id"], **parts, description=[row[name] for name in rest if row[name]], image_url=image)
