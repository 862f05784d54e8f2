"""Interactions as every reader gives them: batches of user, item and time, whatever the format.

Schema of a batch: `user` and `item` string, `time_ms` int64, Unix time in milliseconds; without times, the row's number.
Rows that break the rules below are faults: left out and counted (strict.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmm4rec.data.strict import AGAIN, Faults, parse_json, printable, read_columns, read_lines, read_parquet
from mmm4rec.errors import BadInput

SCHEMA = pa.schema([("user", pa.string()), ("item", pa.string()), ("time_ms", pa.int64())])
LAST_TIME_SECONDS = 32_503_680_000  # the year 3000: what lies beyond it is of another unit
AT_ONCE = 2**17  # rows of JSON in a batch
WHOLE_MS = {"s": (1000, 1), "ms": (1, 1), "us": (1, 1000), "ns": (1, 1_000_000)}  # times, and parts
MS = {"s": 1000.0, "ms": 1.0, "us": 1e-3, "ns": 1e-6}  # milliseconds in a unit of time

Batches = Iterator[pa.RecordBatch]


def time_rule(name: str, value: object, unit: str, whole: bool) -> str:
    """What a time must be."""
    if whole:
        return f"{name} is {value!s}; a time is whole unix seconds, from 0 to {LAST_TIME_SECONDS}."
    return f"{name} is {value!s}; a time is unix time in {unit}, from 0 to the year 3000."


def checked(
    file: Path,
    lines: np.ndarray,
    user: pa.Array,
    item: pa.Array,
    time: np.ndarray | None,
    faults: Faults,
    *,
    unit: str = "s",
    whole: bool = False,
    name: str = "time",
) -> pa.RecordBatch:
    """The good rows of a batch, in the schema; the others are faults.

    Args: lines [n]: where the rows stand in the file; user, item [n] strings; time [n]: float64 or int64 in `unit`, without
    fractions where it is `whole`; None: the rows have no times.
    """
    named = {"user": printable(user), "item": printable(item)}
    good = named["user"] & named["item"]
    stamps = lines if time is None else to_ms(time, unit)
    if time is not None:
        good &= (time >= 0) & (time * (MS[unit] / 1000) <= LAST_TIME_SECONDS)
        if whole:
            good &= np.floor(time) == time
    for row in np.flatnonzero(~good):
        blank = [key for key, ids in (("user", user), ("item", item)) if not named[key][row]]
        values = {"user": user[row].as_py(), "item": item[row].as_py()}
        if not blank:
            assert time is not None
            rule = time_rule(name, time[row], unit, whole)
        elif any(values[key] for key in blank):
            rule = f"{blank[0]} is {values[blank[0]]!r}; an id is printable text."
        else:
            rule = "the item or the user is empty."
        faults.add(file, int(lines[row]), rule)
    columns = [user, item, pa.array(np.where(good, stamps, 0).astype(np.int64))]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA).filter(pa.array(good))


def to_ms(time: np.ndarray, unit: str) -> np.ndarray:
    """Times [n] in milliseconds, int64, rounded down; what is no number or out of bounds is any."""
    if np.issubdtype(time.dtype, np.integer):
        times, parts = WHOLE_MS[unit]
        return time.astype(np.int64) * times // parts
    scaled = np.nan_to_num(np.asarray(time, dtype=np.float64) * MS[unit], nan=0.0, posinf=0.0, neginf=0.0)
    return np.floor(np.clip(scaled, 0, LAST_TIME_SECONDS * 1000.0)).astype(np.int64)


def delimited_rows(
    file: Path,
    delimiter: str,
    columns: Sequence[str],
    faults: Faults,
    *,
    header: bool = False,
    quoted: bool = False,
    unit: str = "s",
    whole: bool = False,
) -> Batches:
    """Rows of a delimited file. `columns`: what each of its fields is, in order; `user`, `item` and `time` (if any) are read."""
    kinds = {name: pa.float64() if name == "time" else pa.string() for name in columns}
    for first, places, table in read_columns(file, kinds, delimiter, faults, header=header, quoted=quoted):
        user, item = (table[name].combine_chunks() for name in ("user", "item"))
        time = table["time"].to_numpy() if "time" in columns else None
        yield checked(file, first + places, user, item, time, faults, unit=unit, whole=whole)


def json_rows(file: Path, user: str, item: str, time: str, faults: Faults, *, unit: str = "s", whole: bool = False) -> Batches:
    """Rows of a JSON-lines file whose objects hold user, item and time under these keys."""
    lines: list[int] = []
    values: dict[str, list[Any]] = {user: [], item: [], time: []}

    def batch() -> pa.RecordBatch:
        who, what = (pa.array(values[key], type=pa.string()) for key in (user, item))
        stamps = np.array(values[time], dtype=np.float64)
        return checked(file, np.array(lines), who, what, stamps, faults, unit=unit, whole=whole, name=time)

    for line, text in read_lines(file, faults):
        try:
            record = parse_json(text)
            check_record(record, (user, item), (time,))
        except ValueError as rule:
            faults.add(file, line, str(rule))
            continue
        lines.append(line)
        for key, column in values.items():
            column.append(record[key])
        if len(lines) == AT_ONCE:
            yield batch()
            for column in (lines, *values.values()):
                column.clear()
    if lines:
        yield batch()


def check_record(record: dict[str, Any], ids: tuple[str, ...], numbers: tuple[str, ...] = ()) -> None:
    """Raise ValueError, with the rule, unless `ids` are there and printable text and `numbers` are there and numbers."""
    missing = [key for key in (*ids, *numbers) if record.get(key) is None]
    if missing:
        raise ValueError(f"has no {', '.join(missing)}.")
    for key in ids:
        if not (isinstance(record[key], str) and record[key] and record[key].isprintable()):
            raise ValueError(f"{key} is {record[key]!r}; an id is printable text.")
    for key in numbers:
        value = record[key]
        if type(value) not in (int, float) or abs(value) > 2**62:
            raise ValueError(f"{key} is {value!s:.40}, which is no time.")


def parquet_rows(file: Path, user: str, item: str, time: str | None, faults: Faults, *, unit: str = "s") -> Batches:
    """Rows of a parquet file; ids of any plain type are read as text, a column of timestamps needs no unit."""
    for first, batch in read_parquet(file, [name for name in (user, item, time) if name]):
        faults.rows += len(batch)
        who, what = (cast(file, name, batch.column(name), pa.string()) for name in (user, item))
        stamps = None
        if time is not None:
            kind = batch.column(time).type
            dated = pa.types.is_timestamp(kind) or pa.types.is_date(kind)
            column = cast(file, time, batch.column(time), pa.timestamp("ms")).cast(pa.int64()) if dated else batch.column(time)
            column = column if pa.types.is_integer(column.type) else cast(file, time, column, pa.float64())
            stamps, unit = pc.fill_null(column, -1).to_numpy(zero_copy_only=False), "ms" if dated else unit
        yield checked(file, first + np.arange(len(batch)), who, what, stamps, faults, unit=unit)


def cast(file: Path, name: str, column: pa.Array, kind: pa.DataType) -> pa.Array:
    """A column as another type. Raises BadInput where it holds what that type cannot."""
    try:
        return pc.cast(column, kind, safe=kind != pa.timestamp("ms"))
    except pa.ArrowException as error:
        raise BadInput(f"column {name} holds {column.type}, which cannot be read as {kind} ({error}).", file=file, remedy=AGAIN) from error
