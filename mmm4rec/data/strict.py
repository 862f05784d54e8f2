"""Strict readers of text files from outside: blocks, lines, delimited columns.

They know no format. A file that cannot be read ends as BadInput with file, line, rule and remedy. A malformed line is left
out, counted and reported, and ends the work too when there are more than a share of all lines (`Faults`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv, parquet
from tqdm import tqdm

from mmm4rec.errors import BadInput

BLOCK_BYTES = 1 << 24  # read and parsed at a time
LINE_BYTES = 1 << 26  # no line may be longer
FIX_ROW = "Correct the row, or download the file again."
AGAIN = "Download the file again."
CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
TOLD = 3  # faults that a report names


@dataclass
class Faults:
    """The malformed rows of some files: left out, counted, and too many when they are more than `share` of the rows."""

    share: float = 0.0  # with 0 the first fault ends the work
    most_rows: float = math.inf  # no more rows than these are to come, good and bad: what ends a hopeless reading early
    rows: int = 0  # good and bad, read so far
    count: int = 0
    first: list[BadInput] = field(default_factory=list)

    def add(self, file: Path, line: int, rule: str, remedy: str = FIX_ROW) -> None:
        """Count a fault. Raises BadInput when none is allowed, or when they are too many already, whatever is to come."""
        fault = BadInput(rule, file=file, line=line, remedy=remedy)
        if self.share == 0:
            raise fault
        self.count += 1
        if len(self.first) < TOLD:
            self.first.append(fault)
        if self.count > self.share * self.most_rows:
            raise self._too_many()

    def check(self) -> None:
        """Raise BadInput when the files had too many faults."""
        if self.count > self.share * self.rows:
            raise self._too_many()

    def report(self) -> dict[str, Any]:
        """For a domain's provenance."""
        told = [{"line": fault.line, "rule": fault.rule} for fault in self.first]
        return {"rows": self.rows, "malformed": self.count, "limit": self.share, "first_malformed": told}

    def _too_many(self) -> BadInput:
        first = self.first[0]
        told = f"{first.rule} ({self.count:,} of {self.rows:,} rows that were read are malformed; the limit is {self.share:.2%}.)"
        return BadInput(told, file=first.file, line=first.line, remedy=f"{first.remedy} Or raise the limit, with --malformed.")


def rows_at_most(files: Sequence[Path]) -> float:
    """A bound of the rows in these files: a byte each, unknown where they are compressed."""
    packed = any(file.suffix in (*CODECS, ".parquet") for file in files)
    return math.inf if packed else sum(file.stat().st_size + 1 for file in files)


def plain_name(file: Path) -> str:
    """A file's name without what says that it is compressed."""
    return file.stem if file.suffix in CODECS else file.name


def read_blocks(file: Path) -> Iterator[tuple[int, bytes]]:
    """Whole lines of a file, compressed or not, about BLOCK_BYTES at a time, with the number of the first; a bar where it takes long.

    The last line may lack its end; a byte order mark is taken off.
    """
    line, rest = 1, b""
    try:
        with (
            file.open("rb") as raw,
            pa.CompressedInputStream(pa.PythonFile(raw), CODECS[file.suffix]) if file.suffix in CODECS else nullcontext(raw) as stream,
            tqdm(total=file.stat().st_size, desc=file.name, unit="B", unit_scale=True, delay=2, disable=None) as bar,
        ):
            while part := stream.read(BLOCK_BYTES):
                bar.update(raw.tell() - bar.n)
                whole, end, begun = (rest + part).rpartition(b"\n")
                rest = begun
                if len(rest) > LINE_BYTES:
                    raise BadInput(f"has a line of more than {LINE_BYTES:,} bytes.", file=file, line=line, remedy=AGAIN)
                if end:
                    block = (whole + end).removeprefix(b"\xef\xbb\xbf") if line == 1 else whole + end
                    yield line, block
                    line += block.count(b"\n")
    except FileNotFoundError as error:
        raise BadInput("is missing.", file=file, remedy="Put it beside the other files of its domain.") from error
    except (OSError, pa.ArrowException) as error:
        raise BadInput(f"cannot be read ({error}).", file=file, line=line, remedy=AGAIN) from error
    if rest:
        yield line, rest.removeprefix(b"\xef\xbb\xbf") if line == 1 else rest


def read_lines(file: Path, faults: Faults) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file, numbered from 1, without their ends; a line that is not UTF-8 is a fault."""
    for first, block in read_blocks(file):
        faults.rows += block.count(b"\n") + (not block.endswith(b"\n"))
        for line, text in enumerate(block.removesuffix(b"\n").split(b"\n"), start=first):
            try:
                yield line, text.decode("utf-8").rstrip("\r")
            except UnicodeDecodeError:
                faults.add(file, line, "is not UTF-8.", "Convert the file to UTF-8.")


def parse_json(text: str) -> dict[str, Any]:
    """A line of a JSON-lines file. Raises ValueError, with the rule that it breaks."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is no JSON ({error}); a line is strict JSON, one object.") from error
    if not isinstance(record, dict):
        raise ValueError(f"is a JSON {type(record).__name__}; a line is an object.")
    return record


def read_columns(
    file: Path, kinds: dict[str, pa.DataType], delimiter: str, faults: Faults, *, header: bool = False, quoted: bool = False
) -> Iterator[tuple[int, np.ndarray, pa.Table]]:
    """Delimited rows, every one with every column: blocks of them, each with the file's line of its first row.

    Yields the first line, the good rows' places [n] counted from it, and the rows themselves. A block that cannot be parsed is
    halved until the lines that cannot be parsed stand alone: these are faults, worded by what is wrong with them.
    """
    for first, block in read_blocks(file):
        if header and first == 1:
            cut = block.find(b"\n") + 1 or len(block)
            first, block = 2, block[cut:]  # noqa: PLW2901
        rows = block.count(b"\n") + (not block.endswith(b"\n")) if block else 0
        if rows:
            faults.rows += rows
            places, tables = [], []
            for start, table in _parsed(file, first, 0, block, kinds, delimiter, faults, quoted):
                places.append(np.arange(start, start + len(table)))
                tables.append(table)
            if tables:
                yield first, np.concatenate(places), pa.concat_tables(tables)


def _parsed(
    file: Path, first: int, start: int, block: bytes, kinds: dict[str, pa.DataType], delimiter: str, faults: Faults, quoted: bool
) -> Iterator[tuple[int, pa.Table]]:
    lines = block.count(b"\n") + (not block.endswith(b"\n"))
    try:
        table = csv.read_csv(
            pa.BufferReader(block),
            csv.ReadOptions(column_names=list(kinds), use_threads=False, block_size=max(len(block) + 1, 2)),
            csv.ParseOptions(delimiter=delimiter, quote_char='"' if quoted else False, ignore_empty_lines=False),
            csv.ConvertOptions(column_types=kinds, null_values=[], strings_can_be_null=False),
        )
        if len(table) == lines:
            yield start, table
            return
    except (pa.ArrowException, UnicodeDecodeError):  # not every message of Arrow's is UTF-8
        pass
    if lines == 1:
        faults.add(file, first + start, *_fault(block, kinds, delimiter))
        return
    parts = block.removesuffix(b"\n").split(b"\n")
    for half, shift in ((parts[: lines // 2], 0), (parts[lines // 2 :], lines // 2)):
        yield from _parsed(file, first, start + shift, b"\n".join(half) + b"\n", kinds, delimiter, faults, quoted)


def _fault(line: bytes, kinds: dict[str, pa.DataType], delimiter: str) -> tuple[str, str]:
    """What is wrong with a line that cannot be parsed, and the remedy."""
    try:
        fields = line.decode("utf-8").rstrip("\r\n").split(delimiter)
    except UnicodeDecodeError:
        return "is not UTF-8.", "Convert the file to UTF-8."
    if len(fields) != len(kinds):
        return f"has {len(fields)} field{'s'[: len(fields) != 1]}; a row has {len(kinds)}: {', '.join(kinds)}.", FIX_ROW
    for (name, kind), text in zip(kinds.items(), fields, strict=True):
        if kind != pa.string():
            try:
                pa.array([text.strip()]).cast(kind)
            except pa.ArrowInvalid:
                return f"{name} is {text!r}, which is no number.", FIX_ROW
    return "cannot be parsed: it holds a quotation mark or a line end where none may stand.", FIX_ROW


def read_header(file: Path, delimiter: str) -> list[str]:
    """The fields of a file's first line; [''] where there is none."""
    _, block = next(read_blocks(file), (1, b""))
    return block.split(b"\n", 1)[0].decode("utf-8", "replace").rstrip("\r").split(delimiter)


def read_parquet(file: Path, columns: Sequence[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Rows of a parquet file, batch by batch, with the number of the first, from 1; a bar where it takes long."""
    row = 1
    try:
        with parquet.ParquetFile(file) as opened:
            absent = [name for name in columns if name not in opened.schema_arrow.names]
            if absent:
                rule = f"has no column {', '.join(absent)}; its columns are {', '.join(opened.schema_arrow.names)}."
                raise BadInput(rule, file=file, remedy="Name its columns with --columns, or download it again.")
            with tqdm(total=opened.metadata.num_rows, desc=file.name, unit=" rows", unit_scale=True, delay=2, disable=None) as bar:
                for batch in opened.iter_batches(batch_size=2**18, columns=list(columns)):
                    batch.validate(full=True)
                    yield row, batch
                    row += len(batch)
                    bar.update(len(batch))
    except FileNotFoundError as error:
        raise BadInput("is missing.", file=file, remedy="Put it beside the other files of its domain.") from error
    except (OSError, pa.ArrowException, UnicodeDecodeError, OverflowError) as error:
        raise BadInput(f"cannot be read ({error}).", file=file, line=row, remedy=AGAIN) from error


def printable(ids: pa.Array) -> np.ndarray:
    """Which of these texts can be an id: present, not empty, printable."""
    good = pc.and_(pc.utf8_is_printable(ids), pc.greater(pc.utf8_length(ids), 0))
    return np.asarray(pc.fill_null(good, False).to_numpy(zero_copy_only=False), dtype=bool)
