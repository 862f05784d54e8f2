"""Items' metadata as every reader gives it: an id, a plain text, the address of a picture."""

from __future__ import annotations

import ast
import html
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mmm4rec.data.reviews.rows import check_record
from mmm4rec.data.strict import FIX_ROW, Faults, parse_json, read_lines

LITERAL_BYTES = 1 << 20  # of a line that is a Python literal

Record = dict[str, Any]
Numbered = Iterator[tuple[Path, int, Record]]  # with file and line


@dataclass(frozen=True)
class Item:
    """What a source says of an item; the parts of its text are not cleaned yet."""

    id: str
    title: list[str]
    brand: list[str]
    category: list[str]
    description: list[str]
    image_url: str | None = None

    @property
    def text(self) -> str:
        return item_text(self.title, self.brand, self.category, self.description)


def json_records(files: Iterable[Path], faults: Faults, *, id_key: str, literal: bool = False) -> Numbered:
    """The objects of JSON-lines files that have an id; `literal`: a line may be a Python dictionary, read as a literal."""
    parse = parse_literal if literal else parse_json
    for file in files:
        for line, text in read_lines(file, faults):
            try:
                record = parse(text)
                check_record(record, (id_key,))
            except ValueError as rule:
                faults.add(file, line, str(rule))
                continue
            yield file, line, record


def parse_literal(text: str) -> Record:
    """A line of the 2014 metadata, which is a Python dictionary, or JSON; nothing is evaluated. Raises ValueError with the rule."""
    if len(text) > LITERAL_BYTES:
        raise ValueError(f"has {len(text):,} characters; a Python literal may have {LITERAL_BYTES:,}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes
            record = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return parse_json(text)
    if not isinstance(record, dict):
        raise ValueError(f"is a Python {type(record).__name__}; a line is a dictionary.")
    return record


def texts_of(record: Record, key: str) -> list[str]:
    """A field that may be absent, a text, or texts in lists. Raises ValueError, with the rule, for anything else."""
    value = record.get(key) or []
    texts = [value] if isinstance(value, str) else list(_flat(value))
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{key} is {type(text).__name__}; it is a text or a list of texts.")
    return [text for text in texts if text]


def _flat(value: object, depth: int = 0) -> Iterator[Any]:
    if not isinstance(value, list | tuple) or depth > 3:
        yield value
        return
    for each in value:
        if isinstance(each, list | tuple):
            yield from _flat(each, depth + 1)
        else:
            yield each


def read_items(records: Numbered, build: Callable[[Record], Item], faults: Faults) -> Iterator[Item]:
    """The items that records describe; one that cannot be built is a fault."""
    for file, line, record in records:
        try:
            yield build(record)
        except ValueError as rule:
            faults.add(file, line, str(rule), FIX_ROW)


def best_items(items: Iterable[Item], wanted: Collection[str]) -> pd.DataFrame:
    """A row a wanted item that has metadata, in no set order: `item`, `text`, `image_url` (str or None).

    Of several for one item, the one with the longest text counts (then the greatest text, then the greatest address),
    whatever their order.
    """
    best: dict[str, tuple[int, str, str]] = {}
    for item in items:
        if item.id in wanted:
            text = item.text
            address = item.image_url or ""
            found = (len(text), text, address if address.isprintable() else "")
            best[item.id] = max(found, best.get(item.id, found))
    rows = [(item, text, image_url or None) for item, (_, text, image_url) in best.items()]
    return pd.DataFrame(rows, columns=["item", "text", "image_url"])


def item_text(title: list[str], brand: list[str], category: list[str], description: list[str]) -> str:
    """One plain line: title, brand, category, description, each ended as a sentence; a category named twice counts once."""
    parts = [[plain_text(each) for each in part] for part in (title, brand, list(dict.fromkeys(category)), description)]
    sentences = [glue.join(filter(None, part)) for glue, part in zip((" ", " ", ", ", " "), parts, strict=True)]
    return " ".join(each if each.endswith((".", "!", "?")) else f"{each}." for each in sentences if each)


HIDDEN = re.compile(r"<(script|style)\b.*?(?:</\1\s*>|$)|<!--.*?(?:-->|$)|<!\[[^<>]*>", re.DOTALL | re.IGNORECASE)
TAG = re.compile(r"</?([a-zA-Z][a-zA-Z0-9]*)\b[^<>]*>")
INLINE = frozenset({"a", "b", "em", "font", "i", "span", "strong", "sub", "sup", "u"})  # these do not part words


def plain_text(markup: str) -> str:
    """HTML as one line of text: tags, comments, scripts and styles out, entities resolved, white space folded."""
    if "<" in markup:
        markup = TAG.sub(lambda tag: "" if tag[1].lower() in INLINE else " ", HIDDEN.sub("", markup))
    if "&" in markup:
        markup = html.unescape(markup)
    return " ".join(markup.encode("utf-8", "replace").decode().split())  # a lone surrogate has no place in a file
