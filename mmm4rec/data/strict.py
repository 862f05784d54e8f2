"""Strict readers of text files from outside: lines, JSON records, delimited columns.

They know no format. What cannot be read, decoded or parsed ends as BadInput with file, line, rule and remedy.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import csv
from tqdm import tqdm

from mmm4rec.errors import BadInput

BLOCK_BYTES = 1 << 24  # parsed at a time; no row may be longer
FIX_ROW = "Correct the row, or download the file again."


def read_lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file, plain or .gz, numbered from 1, without their ends; a bar shows where it takes long."""
    number = 0
    try:
        with (
            file.open("rb") as raw,
            gzip.open(raw) if file.suffix == ".gz" else nullcontext(raw) as stream,
            tqdm(total=file.stat().st_size, desc=file.name, unit="B", unit_scale=True, delay=2, disable=None) as bar,
        ):
            for number, line in enumerate(stream, start=1):
                if number % 50_000 == 0:
                    bar.update(raw.tell() - bar.n)
                yield number, line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise BadInput("is not UTF-8.", file=file, line=number, remedy="Convert the file to UTF-8.") from error
    except FileNotFoundError as error:
        raise BadInput("is missing.", file=file, remedy="Put it beside the other files of its domain.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"cannot be read ({error}).", file=file, line=number + 1, remedy="Download the file again.") from error


def read_records(file: Path, ids: tuple[str, ...], required: tuple[str, ...] = ()) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON-lines file with their line numbers; `ids` are there and printable text, `required` are there."""
    for line, text in read_lines(file):
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"is no JSON ({error}).", file=file, line=line, remedy="Give strict JSON, one object a line.") from error
        if not isinstance(record, dict):
            raise BadInput(f"is a JSON {type(record).__name__}; a line is an object.", file=file, line=line, remedy=FIX_ROW)
        missing = [key for key in (*ids, *required) if key not in record]
        if missing:
            raise BadInput(f"has no {', '.join(missing)}.", file=file, line=line, remedy=FIX_ROW)
        for key in ids:
            if not (isinstance(record[key], str) and record[key] and record[key].isprintable()):
                raise BadInput(f"{key} is {record[key]!r}; an id is printable text.", file=file, line=line, remedy=FIX_ROW)
        yield line, record


def read_columns(file: Path, kinds: dict[str, pa.DataType], delimiter: str, header: list[str] | None = None) -> pd.DataFrame:
    """A delimited file without quoting: every row has every column. Row r stands on line r + 1, or r + 2 after a header."""
    try:
        with csv.open_csv(
            file,
            csv.ReadOptions(column_names=list(kinds), skip_rows=int(header is not None), block_size=BLOCK_BYTES),
            csv.ParseOptions(delimiter=delimiter, quote_char=False, ignore_empty_lines=False),
            csv.ConvertOptions(column_types=kinds, null_values=[], strings_can_be_null=False),
        ) as reader:
            table = pa.Table.from_batches(tqdm(reader, desc=file.name, unit=" blocks", delay=2, disable=None), reader.schema)
    except (pa.ArrowInvalid, OSError) as error:
        raise _first_fault(file, kinds, delimiter, header, error) from error
    if header is not None and next(read_lines(file))[1].split(delimiter) != header:
        raise _first_fault(file, kinds, delimiter, header, None)
    if not len(table):
        raise BadInput("holds no rows.", file=file, remedy="Download the file again.")
    return table.to_pandas()


def _first_fault(file: Path, kinds: dict[str, pa.DataType], delimiter: str, header: list[str] | None, error: Exception | None) -> BadInput:
    """Read a faulty file again, slowly, and name its first bad line."""
    for line, row in read_lines(file):
        fields = row.split(delimiter)
        if header is not None and line == 1:
            if fields != header:
                return BadInput(f"starts with {row!r}; its header is {delimiter.join(header)!r}.", file=file, line=line, remedy=FIX_ROW)
            continue
        if len(fields) != len(kinds):
            rule = f"has {len(fields)} field{'s'[: len(fields) != 1]}; a row has {len(kinds)}: {', '.join(kinds)}."
            return BadInput(rule, file=file, line=line, remedy=FIX_ROW)
        for (name, kind), field in zip(kinds.items(), fields, strict=True):
            try:
                _ = field if kind == pa.string() else int(field) if kind == pa.int64() else float(field)
            except ValueError:
                return BadInput(f"{name} is {field!r}, which is no number.", file=file, line=line, remedy=FIX_ROW)
    return BadInput(f"cannot be read ({error}).", file=file, remedy="Download the file again.")


def reject_first(bad: pd.Series | np.ndarray, file: Path, first_line: int, rule: Callable[[int], str]) -> None:
    """Raise BadInput for the first row that is bad; `rule(row)` words what is wrong with it."""
    flags = np.asarray(bad)
    if flags.any():
        row = int(np.argmax(flags))
        raise BadInput(rule(row), file=file, line=row + first_line, remedy=FIX_ROW)
