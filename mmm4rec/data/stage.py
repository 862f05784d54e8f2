"""Raw interactions in order, out of core: numbered users and items, sorted, equal rows once.

DuckDB numbers and sorts, within a memory limit and beyond it on disk; what it gives back lies in memory-mapped files, over
which the k-core and the counts go a block of rows at a time. Memory grows with users and items, and by one byte a row.

Legend: R rows, equal ones once; U and T users and items of all rows.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mmm4rec.errors import BadInput

log = logging.getLogger(__name__)
ROWS_AT_ONCE = 2**21
SMALLEST_BYTES = 250_000_000  # with less DuckDB cannot work
DTYPES = {"user": np.int32, "item": np.int32, "time_ms": np.int64}


@dataclass(frozen=True)
class Staged:
    """All rows, ordered by user, time and item; users and items are numbered from 0 by their ids, ascending."""

    user: np.ndarray  # [R] int32, memory-mapped, as the others
    item: np.ndarray  # [R] int32
    time_ms: np.ndarray  # [R] int64; without times, the row's number in the source
    user_ids: pa.ChunkedArray  # [U] strings
    item_ids: pa.ChunkedArray  # [T]
    duplicates: int  # rows dropped: user, item and time as in another

    def __len__(self) -> int:
        return len(self.user)


def stage(batches: Iterable[pa.RecordBatch], folder: Path, *, memory_bytes: int) -> Staged:
    """Number and order the rows of `batches` (reviews/rows.py), with files in `folder`.

    Raises BadInput when DuckDB is missing or lacks memory.
    """
    with _database(folder, memory_bytes) as connection:
        connection.execute('CREATE TABLE raw ("user" VARCHAR, item VARCHAR, time_ms BIGINT)')
        connection.execute("BEGIN")
        for batch in batches:
            connection.register("batch", pa.Table.from_batches([batch]))
            connection.execute("INSERT INTO raw SELECT * FROM batch")
        connection.execute("COMMIT")
        ids = {}
        for kind in ("user", "item"):
            connection.execute(
                f"CREATE TABLE {kind}s AS SELECT id, (row_number() OVER (ORDER BY id) - 1)::INTEGER AS number"
                f' FROM (SELECT DISTINCT "{kind}" AS id FROM raw)'
            )
            ids[kind] = connection.sql(f"SELECT id FROM {kind}s ORDER BY number").to_arrow_table()["id"]
        ordered = connection.sql(
            'SELECT users.number AS "user", items.number AS item, time_ms FROM raw JOIN users ON users.id = raw."user"'
            " JOIN items ON items.id = raw.item ORDER BY 1, 3, 2"
        ).to_arrow_reader(ROWS_AT_ONCE)
        kept, read = _write(ordered, folder)
    user, item, time_ms = (np.memmap(folder / name, dtype, mode="r") if kept else np.empty(0, dtype) for name, dtype in DTYPES.items())
    return Staged(user, item, time_ms, ids["user"], ids["item"], read - kept)


@contextmanager
def _database(folder: Path, memory_bytes: int) -> Iterator[Any]:
    try:
        import duckdb
    except ModuleNotFoundError as error:
        raise BadInput(
            "Preparing raw reviews needs duckdb, which is not installed.", remedy="Run: pip install 'mmm4rec[prepare]'"
        ) from error
    if memory_bytes < SMALLEST_BYTES:
        raise BadInput(
            f"the memory limit is {memory_bytes / 1e9:.2f} GB; it is {SMALLEST_BYTES / 1e9} or more.", remedy="Raise --memory-gb."
        )
    settings: dict[str, Any] = {
        "memory_limit": f"{memory_bytes}B",
        "temp_directory": str(folder / "spilled"),
        "preserve_insertion_order": "false",
    }
    connection = duckdb.connect(str(folder / "rows.duckdb"), config=settings)
    try:
        yield connection
    except duckdb.OutOfMemoryException as error:
        raise BadInput(
            f"{memory_bytes / 1e9:.1f} GB are not enough ({str(error).splitlines()[0]}).", remedy="Raise --memory-gb."
        ) from error
    except duckdb.IOException as error:
        raise OSError(str(error)) from error
    finally:
        connection.close()


def _write(ordered: Iterable[pa.RecordBatch], folder: Path) -> tuple[int, int]:
    """Append ordered rows to a file a column, a row that equals the one before left out; rows written and rows read."""
    written = read = 0
    last = dict.fromkeys(DTYPES, -1)
    with (folder / "user").open("wb") as user, (folder / "item").open("wb") as item, (folder / "time_ms").open("wb") as time_ms:
        for batch in ordered:
            columns = {name: batch.column(name).to_numpy().astype(dtype, copy=False) for name, dtype in DTYPES.items()}
            new = np.zeros(len(batch), dtype=bool)
            for name, column in columns.items():
                new |= np.diff(column, prepend=np.array(last[name], dtype=column.dtype)) != 0
            for file, (name, column) in zip((user, item, time_ms), columns.items(), strict=True):
                column[new].tofile(file)
                last[name] = int(column[-1])
            written, read = written + int(new.sum()), read + len(batch)
    return written, read


def blocks(rows: int) -> Iterator[slice]:
    """All rows, a block at a time."""
    for first in range(0, rows, ROWS_AT_ONCE):
        yield slice(first, min(first + ROWS_AT_ONCE, rows))


def k_core_mask(user: np.ndarray, item: np.ndarray, k: int) -> np.ndarray:
    """The rows [R] bool of the k-core: the largest set in which every user and every item has k rows or more.

    Args: user, item: [R] integer codes from 0, in any order.
    """
    kept = np.ones(len(user), dtype=bool)
    codes = (user, item)
    counts = [counted(column, kept) for column in codes]
    while True:
        often = [count >= k for count in counts]
        changed = False
        for rows in blocks(len(user)):
            alive = np.flatnonzero(kept[rows])
            columns = [column[rows][alive] for column in codes]
            gone = ~(often[0][columns[0]] & often[1][columns[1]])
            if gone.any():
                changed = True
                kept[rows][alive[gone]] = False
                counts = [count - np.bincount(column[gone], minlength=len(count)) for count, column in zip(counts, columns, strict=True)]
        if not changed:
            return kept


def counted(codes: np.ndarray, kept: np.ndarray | None = None) -> np.ndarray:
    """How often each code stands in the kept rows, [largest code + 1] int64."""
    size = 1 + max((int(codes[rows].max()) for rows in blocks(len(codes))), default=-1)
    counts = np.zeros(size, dtype=np.int64)
    for rows in blocks(len(codes)):
        part = codes[rows] if kept is None else codes[rows][kept[rows]]
        counts += np.bincount(part, minlength=size)
    return counts


def count_ties(user: np.ndarray, time: np.ndarray) -> dict[str, int]:
    """How many users have two interactions of equal time, and how many have such a tie for their last place.

    Whole-day stamps count as they stand: two interactions of one day are a tie.
    Args: user [N] integer codes from 0, ascending; time [N], ascending within a user.
    """
    users = tied_users = tied_last = 0
    counted_user, before = -1, (-1, -1)  # the last user counted as tied; user and time of the row before the block
    before_tied = False
    for rows in blocks(len(user)):
        u, t = np.append(before[0], user[rows]), np.append(before[1], time[rows])  # [n + 1], the row before first
        same_user = u[1:] == u[:-1]  # [n], of each row and the one before it
        tied = same_user & (t[1:] == t[:-1])
        users += int((~same_user).sum())
        with_ties = np.unique(u[1:][tied])
        tied_users += len(with_ties) - int(len(with_ties) > 0 and with_ties[0] == counted_user)
        counted_user = int(with_ties[-1]) if len(with_ties) else counted_user
        # a row is its user's last where the next row is another's; the block's own last row is left to the block after it
        tied_last += int((np.append(before_tied, tied[:-1]) & ~same_user).sum())
        before, before_tied = (int(u[-1]), int(t[-1])), bool(tied[-1])
    return {"users": users, "users_with_tied_times": tied_users, "users_with_tied_last": tied_last + int(before_tied)}


def ranks(kept: np.ndarray) -> np.ndarray:
    """New numbers from 0 of the codes that are kept, [n] int32; of the others they mean nothing."""
    return (np.cumsum(kept) - 1).astype(np.int32)


def earliest_from(time: np.ndarray, share: float) -> int:
    """The earliest time from which on no more than `share` of all [N] lie."""
    most = int(share * len(time))
    low, high = 0, 1 + max((int(time[rows].max()) for rows in blocks(len(time))), default=0)
    while low < high:
        middle = (low + high) // 2
        later = sum(int((time[rows] >= middle).sum()) for rows in blocks(len(time)))
        low, high = (low, middle) if later <= most else (middle + 1, high)
    return low
