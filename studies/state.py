"""The study's journal: what was tried, what came out, and what comes next. Sqlite, free of Ray.

The journal is the study's truth. Every fact is one transaction, and writing a fact again changes nothing, so a
driver may die anywhere: the next one reads the journal, goes on with the trials that are `running` in it, and
asks `Plan` for more. Optuna's and MLflow's stores are written from it.
"""

from __future__ import annotations

import fcntl
import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmm4rec.config import to_dict
from mmm4rec.errors import BadInput
from studies.cells import Cell, differences

SCHEMA_VERSION = 1

Phase = Literal["search", "confirm"]
Outcome = Literal["running", "finished", "pruned", "failed"]

TABLES = """
CREATE TABLE IF NOT EXISTS study (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS cells (
    cell TEXT PRIMARY KEY, position INTEGER NOT NULL, chosen_trial TEXT, chosen_config TEXT);
CREATE TABLE IF NOT EXISTS trials (
    trial_key TEXT PRIMARY KEY, cell TEXT NOT NULL, phase TEXT NOT NULL, number INTEGER NOT NULL, seed INTEGER NOT NULL,
    config TEXT NOT NULL, outcome TEXT NOT NULL, reason TEXT, result TEXT,
    started_ms INTEGER NOT NULL, ended_ms INTEGER, tracked INTEGER NOT NULL DEFAULT 0, UNIQUE (cell, phase, number));
CREATE TABLE IF NOT EXISTS reports (
    trial_key TEXT NOT NULL, epoch INTEGER NOT NULL, value REAL, row TEXT NOT NULL, keep INTEGER NOT NULL,
    reported_ms INTEGER NOT NULL, PRIMARY KEY (trial_key, epoch)) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Trial:
    """Cell × config × seed in a phase. `number` counts from 0 within cell and phase."""

    trial_key: str
    cell: str
    phase: Phase
    number: int
    seed: int
    config: dict[str, Any]
    outcome: Outcome
    reason: str | None  # of a failure
    result: dict[str, Any] | None  # result.json of a finished trial
    started_ms: int  # Unix time, milliseconds
    ended_ms: int | None
    tracked: bool  # its end stands in MLflow


@dataclass(frozen=True)
class Report:
    """One epoch of a trial: `row` is the line of curve.jsonl, `value` its validation metric, `keep` ASHA's word."""

    epoch: int
    value: float | None  # None: not a number
    row: dict[str, Any]
    keep: bool
    reported_ms: int


class Journal:
    """The facts. One object a thread; processes and threads may share the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._db = sqlite3.connect(path, timeout=60, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.executescript(TABLES)
        version = self.remember("schema_version", str(SCHEMA_VERSION))
        if version != str(SCHEMA_VERSION):
            raise BadInput(f"has schema_version {version}; this version reads {SCHEMA_VERSION}.", file=path, remedy="Start a new study.")

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All that happens inside is written together, or not at all."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def fact(self, key: str) -> str | None:
        row = self._db.execute("SELECT value FROM study WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def remember(self, key: str, value: str) -> str:
        """Note a fact, unless it was noted before; the one that stands."""
        self._db.execute("INSERT OR IGNORE INTO study VALUES (?, ?)", (key, value))
        return self.fact(key) or value

    def pin(self, key: str, facts: dict[str, Any]) -> None:
        """Note facts that must not change while the study lives. Raises BadInput, with the differences, when they were others."""
        now = json.dumps(facts, sort_keys=True)
        before = self.remember(key, now)
        if before != now:
            rule = f"was begun with another {key}:\n{differences(before, now)}"
            raise BadInput(rule, file=self.path, remedy="Give the changed study another name, or remove its folder.")

    def add_cells(self, cells: Sequence[Cell]) -> None:
        """Note the cells. Raises BadInput when a cell was another one (its domain or its run changed)."""
        for position, cell in enumerate(cells):
            facts = to_dict(cell)
            facts["source"].pop("path")
            self.pin(f"cell {cell.name}", facts)
            self._db.execute("INSERT OR IGNORE INTO cells (cell, position) VALUES (?, ?)", (cell.name, position))

    def start(self, cell: Cell, phase: Phase, number: int, seed: int, config: dict[str, Any]) -> Trial:
        """Note a new trial as running."""
        key = cell.trial_key(config, seed, phase)
        self._db.execute(
            "INSERT INTO trials (trial_key, cell, phase, number, seed, config, outcome, started_ms)"
            " VALUES (?, ?, ?, ?, ?, ?, 'running', ?)",
            (key, cell.name, phase, number, seed, json.dumps(config), now_ms()),
        )
        return self.trial(key)

    def add_report(self, trial_key: str, row: dict[str, Any], value: float | None) -> None:
        told = (trial_key, row["epoch"], value, json.dumps(row), now_ms())
        self._db.execute("INSERT OR IGNORE INTO reports VALUES (?, ?, ?, ?, 1, ?)", told)

    def end(self, trial_key: str, outcome: Outcome, *, reason: str | None = None, result: dict[str, Any] | None = None) -> None:
        """Note how a running trial ended; a trial that ended before stays as it is."""
        told = None if result is None else json.dumps(result)
        self._db.execute(
            "UPDATE trials SET outcome = ?, reason = ?, result = ?, ended_ms = ? WHERE trial_key = ? AND outcome = 'running'",
            (outcome, reason, told, now_ms(), trial_key),
        )

    def prune(self, trial_key: str, epoch: int) -> None:
        """Note that a running trial ends with this epoch, because its rung was better."""
        self._db.execute("UPDATE reports SET keep = 0 WHERE trial_key = ? AND epoch = ?", (trial_key, epoch))
        self.end(trial_key, "pruned", reason=f"below its rung at epoch {epoch}")

    def set_tracked(self, trial_key: str) -> None:
        self._db.execute("UPDATE trials SET tracked = 1 WHERE trial_key = ?", (trial_key,))

    def trial(self, trial_key: str) -> Trial:
        (trial,) = self._trials("WHERE trial_key = ?", (trial_key,))
        return trial

    def trials(self, cell: str | None = None, phase: Phase | None = None) -> list[Trial]:
        """Trials in the order of their start."""
        return self._trials("WHERE cell = coalesce(?, cell) AND phase = coalesce(?, phase) ORDER BY rowid", (cell, phase))

    def _trials(self, where: str, values: tuple[Any, ...]) -> list[Trial]:
        columns = "trial_key, cell, phase, number, seed, config, outcome, reason, result, started_ms, ended_ms, tracked"
        cursor = self._db.execute(f"SELECT {columns} FROM trials {where}", values)
        cursor.row_factory = sqlite3.Row
        return [
            Trial(
                **{
                    **row,
                    "config": json.loads(row["config"]),
                    "result": json.loads(row["result"] or "null"),
                    "tracked": bool(row["tracked"]),
                }
            )
            for row in map(dict, cursor.fetchall())
        ]

    def reports(self, trial_key: str) -> list[Report]:
        """A trial's curve, by epoch."""
        found = "SELECT epoch, value, row, keep, reported_ms FROM reports WHERE trial_key = ? ORDER BY epoch"
        return [Report(row[0], row[1], json.loads(row[2]), bool(row[3]), row[4]) for row in self._db.execute(found, (trial_key,))]

    def report(self, trial_key: str, epoch: int) -> Report | None:
        return next((report for report in self.reports(trial_key) if report.epoch == epoch), None)

    def best_values(self, cell: str, until_epoch: int | None = None) -> dict[str, float | None]:
        """The best validation value of each of the cell's search trials, by trial_key.

        With `until_epoch`: the best up to that epoch, of the trials that came so far or finished (early) before.
        """
        found = self._db.execute(
            "SELECT trial_key, max(value) FROM trials JOIN reports USING (trial_key)"
            " WHERE cell = ?1 AND phase = 'search' AND epoch <= coalesce(?2, epoch)"
            " GROUP BY trial_key HAVING ?2 IS NULL OR max(epoch) = ?2 OR outcome = 'finished'",
            (cell, until_epoch),
        )
        return dict(found.fetchall())

    def counts(self) -> dict[tuple[str, str, str], int]:
        """How many trials there are, by (cell, phase, outcome)."""
        found = self._db.execute("SELECT cell, phase, outcome, count(*) FROM trials GROUP BY cell, phase, outcome")
        return {(cell, phase, outcome): count for cell, phase, outcome, count in found}

    def set_chosen(self, cell: str, trial: Trial) -> None:
        told = (trial.trial_key, json.dumps(trial.config), cell)
        self._db.execute("UPDATE cells SET chosen_trial = ?, chosen_config = ? WHERE cell = ?", told)

    def chosen(self, cell: str) -> dict[str, Any] | None:
        """The cell's chosen config; None while its search runs, or when all its search trials failed."""
        (config,) = self._db.execute("SELECT chosen_config FROM cells WHERE cell = ?", (cell,)).fetchone()
        return None if config is None else json.loads(config)


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold a lock that ends with this process. Raises BadInput when another one holds it and `wait` is off."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise BadInput("is held by another process that works on this study.", file=path, remedy="Wait until it ends.") from error
        yield


def now_ms() -> int:
    """Unix time in milliseconds."""
    return time.time_ns() // 1_000_000
