"""Raw files to tables: the only module that knows a raw format.

Two sources are known. A row that breaks their rules ends as BadInput with file, line, rule and remedy.

UniSRec / MISSRec downstream folder (github.com/RUCAIBox/UniSRec, dataset/preprocessing/process_amazon.py)
    X.{train,valid,test}.inter      user index, history of item indices, target index; header; tab-separated
    X.user2index, X.item2index      id, index from 0; no header; tab-separated
    X.text                          item id, text; header; tab-separated
    X.feat1CLS, X.feat3CLS          text and image features, optional: raw little-endian float32 [I, F], row = item index

Amazon Reviews 2018 category
    X.csv                           item, user, rating, unix seconds; no header
    X.json.gz, X_5.json.gz          JSON lines with reviewerID, asin, unixReviewTime (_5: its publisher's 5-core)
    meta_X.json.gz                  JSON lines with asin, title, brand, category, description
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from mmm4rec.data.features import Modality
from mmm4rec.data.strict import FIX_ROW, read_columns, read_lines, read_records, reject_first
from mmm4rec.errors import BadInput

INTER_SUFFIXES = (".train.inter", ".valid.inter", ".test.inter")
INTER_HEADER = ["user_id:token", "item_id_list:token_seq", "item_id:token"]
FEATURE_FILES: dict[Modality, str] = {"text": "feat1CLS", "image": "feat3CLS"}
TEXT_HEADER = "item_id:token\ttext:token_seq"
REVIEW_SUFFIXES = (".csv", ".json.gz", ".json")  # most trusted first
TEXT_FIELDS = ("title", "brand", "category", "description")
IMAGE_FIELDS = ("imageURL", "imageURLHighRes")
LAST_TIME_SECONDS = 32_503_680_000  # the year 3000: what lies beyond it counts milliseconds
SOURCES = "Give a UniSRec / MISSRec folder, an Amazon 2018 category folder, or a category's .csv, .json.gz or .json file."


@dataclass(frozen=True)
class AmazonSource:
    """The files of one Amazon category; `unread` were passed over for `interactions`."""

    name: str
    interactions: Path
    metadata: Path
    unread: tuple[Path, ...]


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


def find_source(path: Path) -> AmazonSource | DownstreamSource:
    """Recognise the format of a folder or file by its names. Raises BadInput when it is none of the two, or several."""
    if not path.exists():
        raise BadInput("does not exist.", file=path, remedy=SOURCES)
    files = [path] if path.is_file() else sorted(each for each in path.iterdir() if each.is_file())
    names = {file.name.removesuffix(suffix) for file in files for suffix in INTER_SUFFIXES if file.name.endswith(suffix)}
    if names and path.is_dir():
        return DownstreamSource(_the_only(names, path), path)
    reviews = [file for file in files if file.name.endswith(REVIEW_SUFFIXES) and not file.name.startswith("meta_")]
    name = _the_only({_category(file) for file in reviews}, path)
    first, *unread = sorted(reviews, key=lambda file: (_stem(file).endswith("_5"), REVIEW_SUFFIXES.index(_suffix(file))))
    metadata = [first.parent / f"meta_{name}{suffix}" for suffix in (".json.gz", ".json")]
    found = [file for file in metadata if file.is_file()]
    if not found:
        raise BadInput("is missing: it holds the items' texts.", file=metadata[0], remedy=f"Put it beside {first.name}.")
    return AmazonSource(name, first, found[0], tuple(unread))


def _the_only(names: set[str], place: Path) -> str:
    if not names:
        raise BadInput("is of an unknown format.", file=place, remedy=SOURCES)
    if len(names) > 1:
        raise BadInput(f"holds several domains: {', '.join(sorted(names))}.", file=place, remedy="Give each a folder of its own.")
    return next(iter(names))


def _suffix(file: Path) -> str:
    return next(suffix for suffix in REVIEW_SUFFIXES if file.name.endswith(suffix))


def _stem(file: Path) -> str:
    return file.name.removesuffix(_suffix(file))


def _category(file: Path) -> str:
    return _stem(file).removesuffix("_5")


# Amazon 2018


def read_interactions(file: Path) -> pd.DataFrame:
    """The rows of a ratings CSV or a reviews file, in the file's order: `user` (str), `item` (str), `time` (int64 unix seconds)."""
    return _read_ratings(file) if file.name.endswith(".csv") else _read_reviews(file)


def _read_ratings(file: Path) -> pd.DataFrame:
    kinds = {"item": pa.string(), "user": pa.string(), "rating": pa.float64(), "time": pa.float64()}
    table = read_columns(file, kinds, ",").drop(columns="rating")
    reject_first((table["item"] == "") | (table["user"] == ""), file, 1, lambda row: "the item or the user is empty.")
    time = table["time"].to_numpy()
    bad_time = ~((time >= 0) & (time <= LAST_TIME_SECONDS) & (np.floor(time) == time))
    reject_first(bad_time, file, 1, lambda row: _time_rule("time", time[row]))
    return table.assign(time=time.astype(np.int64))


def _read_reviews(file: Path) -> pd.DataFrame:
    columns: dict[str, list[Any]] = {"reviewerID": [], "asin": [], "unixReviewTime": []}
    for line, record in read_records(file, ids=("reviewerID", "asin"), required=("unixReviewTime",)):
        time = record["unixReviewTime"]
        if type(time) not in (int, float) or not 0 <= time <= LAST_TIME_SECONDS or time != int(time):
            raise BadInput(_time_rule("unixReviewTime", time), file=file, line=line, remedy=FIX_ROW)
        for key, values in columns.items():
            values.append(record[key])
    if not columns["asin"]:
        raise BadInput("holds no rows.", file=file, remedy=FIX_ROW)
    time_seconds = np.array(columns["unixReviewTime"], dtype=np.int64)
    return pd.DataFrame({"user": columns["reviewerID"], "item": columns["asin"], "time": time_seconds})


def _time_rule(name: str, value: object) -> str:
    return f"{name} is {value!s}; a time is whole unix seconds, from 0 to {LAST_TIME_SECONDS}."


def read_metadata(file: Path, wanted: Collection[str]) -> pd.DataFrame:
    """Metadata of the wanted items, a row an item in no set order: `item`, `text` (plain), `has_image` (an image URL is given).

    Every row of the file is checked. Of several rows for one item, the one with the longest text counts (then the
    greatest text), whatever their order.
    """
    best: dict[str, tuple[int, str, bool]] = {}
    for line, record in read_records(file, ids=("asin",)):
        fields = {key: _strings(record, key, file, line) for key in (*TEXT_FIELDS, *IMAGE_FIELDS)}
        if record["asin"] in wanted:
            # The dump has rows whose title is page source; its own page says to filter them by this word.
            fields["title"] = [each for each in fields["title"] if "getTime" not in each]
            text = item_text(*(fields[key] for key in TEXT_FIELDS))
            found = (len(text), text, any(fields[key] for key in IMAGE_FIELDS))
            best[record["asin"]] = max(found, best.get(record["asin"], found))
    rows = [(item, text, has_image) for item, (_, text, has_image) in best.items()]
    return pd.DataFrame(rows, columns=["item", "text", "has_image"])


def _strings(record: dict[str, Any], key: str, file: Path, line: int) -> list[str]:
    """A field that may be absent, a text or a list of texts."""
    value = record.get(key) or []
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(each, str) for each in values):
        raise BadInput(f"{key} is {type(value).__name__}; it is a text or a list of texts.", file=file, line=line, remedy=FIX_ROW)
    return [each for each in values if each]


def item_text(title: list[str], brand: list[str], category: list[str], description: list[str]) -> str:
    """One plain line: title, brand, category, description, each ended as a sentence; a category named twice counts once."""
    parts = [[plain_text(each) for each in part] for part in (title, brand, list(dict.fromkeys(category)), description)]
    sentences = [glue.join(filter(None, part)) for glue, part in zip((" ", " ", ", ", " "), parts, strict=True)]
    return " ".join(each if each.endswith((".", "!", "?")) else f"{each}." for each in sentences if each)


def plain_text(markup: str) -> str:
    """HTML as one line of text: tags, scripts and styles out, entities resolved, white space folded."""
    if "<" in markup or "&" in markup:
        parser = _PlainText()
        parser.feed(markup.replace("<![", "<!"))  # HTMLParser stops at marked sections that it does not know
        parser.close()
        markup = "".join(parser.parts)
    return " ".join(markup.encode("utf-8", "replace").decode().split())  # a lone surrogate has no place in a file


class _PlainText(HTMLParser):
    INLINE = frozenset({"a", "b", "em", "font", "i", "span", "strong", "sub", "sup", "u"})  # these do not part words

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.hidden = False

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.hidden = tag in ("script", "style")
        self.parts.append("" if tag in self.INLINE else " ")

    def handle_endtag(self, tag: str) -> None:
        self.hidden = False
        self.parts.append("" if tag in self.INLINE else " ")

    def handle_data(self, data: str) -> None:
        self.parts.append("" if self.hidden else data)


# UniSRec / MISSRec


def read_downstream(source: DownstreamSource) -> Downstream:
    """Read a downstream folder. Raises BadInput for a missing file, a bad row, an unknown user or item, bad features."""
    users, items = _read_index(source.file("user2index")), _read_index(source.file("item2index"))
    train, valid, test = (_read_rows(source.file(f"{split}.inter"), len(users), len(items)) for split in ("train", "valid", "test"))
    texts = _read_texts(source.file("text"), items)
    paths = {modality: source.file(suffix) for modality, suffix in FEATURE_FILES.items() if source.file(suffix).exists()}
    features = {modality: _read_features(path, len(items)) for modality, path in paths.items()}
    read = [source.file(suffix) for suffix in ("user2index", "item2index", "train.inter", "valid.inter", "test.inter", "text")]
    return Downstream(users, items, texts, train, valid, test, features, [path.name for path in (*read, *paths.values())])


def _read_index(file: Path) -> list[str]:
    """The ids in index order."""
    table = read_columns(file, {"id": pa.string(), "index": pa.int64()}, "\t")
    index, ids = table["index"], table["id"]
    bad = (index < 0) | (index >= len(index)) | index.duplicated() | ids.duplicated() | (ids == "")
    reject_first(
        bad, file, 1, lambda row: f"gives '{ids[row]}' index {index[row]}; ids are unique and indices run from 0 to {len(ids) - 1}."
    )
    return ids.iloc[np.argsort(index.to_numpy())].tolist()


def _read_rows(file: Path, n_users: int, n_items: int) -> Rows:
    table = read_columns(file, {"user": pa.int64(), "history": pa.string(), "target": pa.int64()}, "\t", header=INTER_HEADER)
    words = pc.split_pattern(pa.array(table["history"], type=pa.string()), " ")
    lengths = pc.list_value_length(words).to_numpy().astype(np.int64)
    row_of = np.repeat(np.arange(len(lengths)), lengths)
    try:
        history = pc.list_flatten(words).cast(pa.int64()).to_numpy()
    except pa.ArrowInvalid:
        bad = [not all(word.isdecimal() for word in line.split(" ")) for line in table["history"]]
        reject_first(
            np.array(bad), file, 2, lambda row: f"history '{table['history'][row]}' is no list of item indices parted by single spaces."
        )
        raise
    user, target = table["user"].to_numpy(), table["target"].to_numpy()
    reject_first((user < 0) | (user >= n_users), file, 2, lambda row: f"user {user[row]} is unknown: user2index ends at {n_users - 1}.")
    for items, rows in ((target, np.arange(len(target))), (history, row_of)):
        wrong = np.flatnonzero((items < 0) | (items >= n_items))
        if len(wrong):
            rule = f"item {items[wrong[0]]} is unknown: item2index ends at {n_items - 1}."
            raise BadInput(rule, file=file, line=int(rows[wrong[0]]) + 2, remedy=FIX_ROW)
    return Rows(file, user, target, lengths, history)


def _read_texts(file: Path, items: list[str]) -> list[str]:
    """Texts in item order; a tab inside a text is white space."""
    known, texts = set(items), dict[str, str]()
    for line, row in read_lines(file):
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
