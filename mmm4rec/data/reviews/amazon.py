"""Amazon reviews, one category, as its publishers give them; every file may be compressed.

2014 (jmcauley.ucsd.edu/data/amazon)
    ratings_X.csv                   user, item, rating, unix seconds; no header
    reviews_X.json, reviews_X_5.json    JSON lines with reviewerID, asin, unixReviewTime (_5: the publisher's 5-core)
    meta_X.json                     Python dictionaries: asin, title, brand, categories, description, imUrl
2018 (nijianmo.github.io/amazon)
    X.csv                           item, user, rating, unix seconds; no header
    X.json, X_5.json                JSON lines with reviewerID, asin, unixReviewTime
    meta_X.json                     JSON lines with asin, title, brand, category, description, imageURL, imageURLHighRes
2023 (amazon-reviews-2023.github.io): times in milliseconds, items by parent_asin
    X.csv                           header user_id,parent_asin,rating,timestamp
    X.jsonl, X.parquet, raw_review_X/*.parquet      user_id, parent_asin, timestamp
    meta_X.jsonl, meta_X.parquet, raw_meta_X/*.parquet  parent_asin, title, store, categories, features, description, images
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from mmm4rec.data.reviews.items import Item, Numbered, Record, json_records, read_items, texts_of
from mmm4rec.data.reviews.rows import Batches, check_record, delimited_rows, json_rows, parquet_rows
from mmm4rec.data.reviews.source import RawSource
from mmm4rec.data.strict import Faults, plain_name, read_blocks, read_header, read_parquet

HEADER_2023 = ["user_id", "parent_asin", "rating", "timestamp"]
ITEM_COLUMNS_2023 = ("parent_asin", "title", "store", "categories", "features", "description", "images")
FIRST_2014, FIRST_2018 = ("user", "item", "rating", "time"), ("item", "user", "rating", "time")


def find_2014(files: Sequence[Path], beside: Sequence[Path]) -> list[RawSource]:
    """The categories whose ratings_X or reviews_X stand among these files: full before 5-core, ratings before reviews."""
    found: dict[str, list[Path]] = {}
    for file in files:
        stem, _, suffix = plain_name(file).rpartition(".")
        if (stem.startswith("ratings_") and suffix == "csv") or (stem.startswith("reviews_") and suffix == "json"):
            found.setdefault(stem.split("_", 1)[1].removesuffix("_5"), []).append(file)

    def rows(file: Path, faults: Faults) -> Batches:
        if plain_name(file).endswith(".csv"):
            return delimited_rows(file, ",", FIRST_2014, faults, whole=True)
        return json_rows(file, "reviewerID", "asin", "unixReviewTime", faults, whole=True)

    return [_source("amazon2014", name, mine, rows, _item_2014, "asin", beside, ("json",)) for name, mine in found.items()]


def find_2018(files: Sequence[Path], beside: Sequence[Path]) -> list[RawSource]:
    """The categories whose X.csv or X.json stand among these files: full before 5-core, ratings before reviews."""
    found: dict[str, list[Path]] = {}
    for file in files:
        stem, _, suffix = plain_name(file).rpartition(".")
        other = stem.startswith(("meta_", "ratings_", "reviews_"))
        if stem and not other and (suffix == "json" or (suffix == "csv" and _is_2018(file))):
            found.setdefault(stem.removesuffix("_5"), []).append(file)

    def rows(file: Path, faults: Faults) -> Batches:
        if plain_name(file).endswith(".csv"):
            return delimited_rows(file, ",", FIRST_2018, faults, whole=True)
        return json_rows(file, "reviewerID", "asin", "unixReviewTime", faults, whole=True)

    return [_source("amazon2018", name, mine, rows, _item_2018, "asin", beside, ("json",)) for name, mine in found.items()]


def find_2023(files: Sequence[Path], beside: Sequence[Path]) -> list[RawSource]:
    """The categories whose X.csv, X.jsonl or parquet files stand among these: ratings before reviews."""
    found: dict[str, list[Path]] = {}
    for file in files:
        stem, _, suffix = plain_name(file).rpartition(".")
        if file.is_dir():
            if file.name.startswith("raw_review_"):
                found.setdefault(file.name.removeprefix("raw_review_"), []).append(file)
        elif not stem.startswith("meta_") and (
            suffix == "jsonl" or (suffix == "csv" and read_header(file, ",") == HEADER_2023) or (suffix == "parquet" and _is_2023(file))
        ):
            found.setdefault(stem, []).append(file)

    def rows(file: Path, faults: Faults) -> Batches:
        if plain_name(file).endswith(".csv"):
            return delimited_rows(file, ",", FIRST_2014, faults, header=True, unit="ms")
        if plain_name(file).endswith(".jsonl"):
            return json_rows(file, "user_id", "parent_asin", "timestamp", faults, unit="ms")
        shards = (parquet_rows(shard, "user_id", "parent_asin", "timestamp", faults, unit="ms") for shard in _shards(file))
        return chain.from_iterable(shards)

    return [
        _source("amazon2023", name, mine, rows, _item_2023, "parent_asin", beside, ("jsonl", "parquet")) for name, mine in found.items()
    ]


FINDERS = (find_2014, find_2023, find_2018)


def _is_2018(file: Path) -> bool:
    """Whether a .csv begins as 2018's do: without a header, and soon with a line of four fields, the last two of them numbers."""
    _, block = next(read_blocks(file), (1, b""))
    lines = [line.decode("utf-8", "replace").strip().split(",") for line in block.split(b"\n", 5)[:5]]
    return any(map(_is_number, lines[0])) and any(len(line) == 4 and _is_number(line[2]) and _is_number(line[3]) for line in lines)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _is_2023(file: Path) -> bool:
    from pyarrow import ArrowException, parquet

    try:
        return {"user_id", "parent_asin", "timestamp"} <= set(parquet.read_schema(file).names)
    except (OSError, ArrowException):
        return False


def _shards(place: Path) -> list[Path]:
    return sorted(place.glob("*.parquet")) if place.is_dir() else [place]


def _source(
    edition: str,
    name: str,
    interactions: list[Path],
    rows: Callable[[Path, Faults], Batches],
    item: Callable[[Record], Item],
    id_key: str,
    beside: Sequence[Path],
    kinds: tuple[str, ...],
) -> RawSource:
    """Of one category."""
    first, *unread = sorted(interactions, key=lambda file: (_stem(file).endswith("_5"), not plain_name(file).endswith(".csv"), file.name))
    due = f"meta_{name}"
    metadata = [file for file in beside if not file.is_dir() and plain_name(file) in {f"{due}.{kind}" for kind in kinds}]
    metadata = metadata or [shard for file in beside if file.is_dir() and file.name == f"raw_{due}" for shard in _shards(file)]

    def records(faults: Faults) -> Numbered:
        if metadata[0].suffix != ".parquet":
            return json_records(metadata[:1], faults, id_key=id_key, literal=edition == "amazon2014")
        return chain.from_iterable(_parquet_records(file, faults) for file in metadata)

    def items(faults: Faults) -> Iterator[Item]:
        return read_items(records(faults), item, faults)

    read = tuple(_shards(first))
    missing = first.with_name(f"{due}.{kinds[0]}.gz")
    return RawSource(edition, name, read, tuple(metadata), partial(rows, first), items, metadata_due=missing, unread=tuple(unread))


def _stem(file: Path) -> str:
    return plain_name(file).rpartition(".")[0]


def _parquet_records(file: Path, faults: Faults) -> Numbered:
    for first, batch in read_parquet(file, ITEM_COLUMNS_2023):
        faults.rows += len(batch)
        for row, record in enumerate(batch.to_pylist(), start=first):
            try:
                check_record(record, ("parent_asin",))
            except ValueError as rule:
                faults.add(file, row, str(rule))
                continue
            yield file, row, record


def _item_2014(record: Record) -> Item:
    return _item(record, "asin", "categories", texts_of(record, "imUrl"))


def _item_2018(record: Record) -> Item:
    return _item(record, "asin", "category", [*texts_of(record, "imageURLHighRes"), *texts_of(record, "imageURL")])


def _item(record: Record, id_key: str, category: str, images: list[str]) -> Item:
    # The 2018 dump has rows whose title is page source; its own page says to filter them by this word.
    title = [text for text in texts_of(record, "title") if "getTime" not in text]
    brand, kinds, description = (texts_of(record, key) for key in ("brand", category, "description"))
    return Item(record[id_key], title, brand, kinds, description, images[0] if images else None)


def _item_2023(record: Record) -> Item:
    title, brand, category = (texts_of(record, key) for key in ("title", "store", "categories"))
    description = [*texts_of(record, "features"), *texts_of(record, "description")]
    return Item(record["parent_asin"], title, brand, category, description, _image_2023(record.get("images")))


def _image_2023(images: Any) -> str | None:
    """The main picture's largest address, or the first's: a list of pictures in JSON, an object of lists in parquet."""
    if isinstance(images, dict):
        columns = {key: column for key, column in images.items() if isinstance(column, list)}
        length = max(map(len, columns.values()), default=0)
        images = [{key: column[place] for key, column in columns.items() if place < len(column)} for place in range(length)]
    pictures = [one for one in images if isinstance(one, dict)] if isinstance(images, list) else []
    ordered = sorted(pictures, key=lambda one: one.get("variant") != "MAIN")
    addresses = [one.get(size) for one in ordered for size in ("hi_res", "large", "thumb")]
    return next((address for address in addresses if isinstance(address, str) and address), None)
