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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmm4rec.errors import BadInput
from studies.cells import Cell, differences

SCHEMA_VERSION = 2  # 1: before attempts, requests and generations

Phase = Literal["search", "confirm"]
Outcome = Literal["running", "finished", "pruned", "failed", "superseded"]
FailureKind = Literal["error", "out_of_memory", "lost", "disk_full"]

TABLES = """
CREATE TABLE IF NOT EXISTS study (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS cells (
    cell TEXT PRIMARY KEY, position INTEGER NOT NULL, generation INTEGER NOT NULL DEFAULT 0, chosen_trial TEXT, chosen_config TEXT);
CREATE TABLE IF NOT EXISTS trials (
    trial_key TEXT PRIMARY KEY, cell TEXT NOT NULL, phase TEXT NOT NULL, number INTEGER NOT NULL, seed INTEGER NOT NULL,
    config TEXT NOT NULL, origin TEXT, outcome TEXT NOT NULL, reason TEXT, result TEXT,
    started_ms INTEGER NOT NULL, ended_ms INTEGER, tracked INTEGER NOT NULL DEFAULT 0, UNIQUE (cell, phase, number));
CREATE INDEX IF NOT EXISTS trials_by_outcome ON trials (outcome);
CREATE TABLE IF NOT EXISTS reports (
    trial_key TEXT NOT NULL, epoch INTEGER NOT NULL, value REAL, row TEXT NOT NULL, keep INTEGER NOT NULL,
    reported_ms INTEGER NOT NULL, PRIMARY KEY (trial_key, epoch)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS attempts (
    trial_key TEXT NOT NULL, number INTEGER NOT NULL, kind TEXT NOT NULL, reason TEXT NOT NULL, epochs INTEGER NOT NULL,
    failed_ms INTEGER NOT NULL, PRIMARY KEY (trial_key, number)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS requests (number INTEGER PRIMARY KEY, kind TEXT NOT NULL, asked_ms INTEGER NOT NULL, heard_ms INTEGER);
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
    origin: str | None = None  # where its config came from, if a sampler did not draw it

    @property
    def name(self) -> str:
        return f"{self.cell} {self.phase} {self.number}"


@dataclass(frozen=True)
class Report:
    """One epoch of a trial: `row` is the line of curve.jsonl, `value` its validation metric, `keep` ASHA's word."""

    epoch: int
    value: float | None  # None: not a number
    row: dict[str, Any]
    keep: bool
    reported_ms: int


@dataclass(frozen=True)
class Attempt:
    """A try at a trial that failed, when the journal knew so many of its epochs."""

    kind: FailureKind
    reason: str
    epochs: int


class Journal:
    """The facts. One object a thread; processes and threads may share the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._db = sqlite3.connect(path, timeout=60, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._check_version()
        self._db.executescript(TABLES)

    def _check_version(self) -> None:
        self._db.execute("CREATE TABLE IF NOT EXISTS study (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
        version = self.remember("schema_version", str(SCHEMA_VERSION))
        if version != str(SCHEMA_VERSION):
            self.close()
            raise BadInput(
                f"has schema_version {version}; this version reads {SCHEMA_VERSION}.", file=self.path, remedy="Start a new study."
            )

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

    # Facts about the study

    def fact(self, key: str) -> str | None:
        row = self._db.execute("SELECT value FROM study WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def remember(self, key: str, value: str) -> str:
        """Note a fact, unless it was noted before; the one that stands."""
        self._db.execute("INSERT OR IGNORE INTO study VALUES (?, ?)", (key, value))
        return self.fact(key) or value

    def replace(self, key: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO study VALUES (?, ?)", (key, value))

    def change(self, key: str, facts: Mapping[str, Any]) -> str:
        """What differs between the facts noted under `key` and these, a line each; empty where nothing does or none were noted."""
        now, before = json.dumps(facts, sort_keys=True), self.fact(key)
        return "" if before in (None, now) else differences(before or "", now)

    def pin(self, key: str, facts: Mapping[str, Any]) -> None:
        """Note facts in the place of those that were."""
        self.replace(key, json.dumps(facts, sort_keys=True))

    def add_cells(self, names: Sequence[str]) -> None:
        """Note the study's cells, in this order."""
        for position, name in enumerate(names):
            self._db.execute("INSERT OR IGNORE INTO cells (cell, position) VALUES (?, ?)", (name, position))
            self._db.execute("UPDATE cells SET position = ? WHERE cell = ?", (position, name))

    def cell_names(self) -> list[str]:
        return [name for (name,) in self._db.execute("SELECT cell FROM cells ORDER BY position")]

    def generation(self, cell: str) -> int:
        row = self._db.execute("SELECT generation FROM cells WHERE cell = ?", (cell,)).fetchone()
        return 0 if row is None else int(row[0])

    def supersede(self, cell: str, phase: Phase | None = None) -> None:
        """Set the cell's trials aside, of one phase or all: it begins anew, with other trial keys. Nothing is deleted."""
        self._db.execute(
            "UPDATE trials SET cell = ?, outcome = 'superseded', ended_ms = coalesce(ended_ms, ?), tracked = 0"
            " WHERE cell = ? AND phase = coalesce(?, phase)",
            (f"{cell} (superseded {self.generation(cell)})", now_ms(), cell, phase),
        )
        self._db.execute("UPDATE cells SET generation = generation + 1, chosen_trial = NULL, chosen_config = NULL WHERE cell = ?", (cell,))

    # What others ask of a running driver

    def ask(self, kind: str) -> None:
        self._db.execute("INSERT INTO requests (kind, asked_ms) VALUES (?, ?)", (kind, now_ms()))

    def asked(self, kind: str) -> bool:
        """Whether there is a request that no driver has heard."""
        return self._db.execute("SELECT 1 FROM requests WHERE kind = ? AND heard_ms IS NULL", (kind,)).fetchone() is not None

    def heard(self, kind: str) -> None:
        self._db.execute("UPDATE requests SET heard_ms = ? WHERE kind = ? AND heard_ms IS NULL", (now_ms(), kind))

    def additions(self) -> list[dict[str, Any]]:
        """What joined the study after it had begun."""
        return list(json.loads(self.fact("additions") or "[]"))

    def add_addition(self, addition: dict[str, Any]) -> None:
        """Note what joins the study, and tell a running driver."""
        with self.transaction():
            self.replace("additions", json.dumps([*self.additions(), addition]))
            self.ask("add")

    # Trials

    def start(self, cell: Cell, phase: Phase, number: int, seed: int, config: dict[str, Any], origin: str | None = None) -> Trial:
        """Note a new trial as running."""
        key = cell.trial_key(config, seed, phase, self.generation(cell.name))
        self._db.execute(
            "INSERT INTO trials (trial_key, cell, phase, number, seed, config, origin, outcome, started_ms)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, 'running', ?)",
            (key, cell.name, phase, number, seed, json.dumps(config), origin, now_ms()),
        )
        return self.trial(key)

    def add_report(self, trial_key: str, row: dict[str, Any], value: float | None) -> None:
        told = (trial_key, row["epoch"], value, json.dumps(row), now_ms())
        self._db.execute("INSERT OR IGNORE INTO reports VALUES (?, ?, ?, ?, 1, ?)", told)

    def add_attempt(self, trial_key: str, kind: FailureKind, reason: str) -> None:
        self._db.execute(
            "INSERT INTO attempts SELECT ?1, (SELECT count(*) FROM attempts WHERE trial_key = ?1), ?2, ?3,"
            " (SELECT count(*) FROM reports WHERE trial_key = ?1), ?4",
            (trial_key, kind, reason, now_ms()),
        )

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

    def track_again(self) -> None:
        """Forget what stands in MLflow: the tracker then writes everything again, which changes nothing that is there."""
        with self.transaction():
            self._db.execute("UPDATE trials SET tracked = 0")
            self._db.execute("DELETE FROM study WHERE key = 'reported'")

    def trial(self, trial_key: str) -> Trial:
        (trial,) = self._trials("WHERE trial_key = ?", (trial_key,))
        return trial

    def trials(self, cell: str | None = None, phase: Phase | None = None, outcome: Outcome | None = None) -> list[Trial]:
        """Trials in the order of their start."""
        wanted = {"cell": cell, "phase": phase, "outcome": outcome}
        given = {key: value for key, value in wanted.items() if value is not None}
        where = "".join(f" AND {key} = ?" for key in given)
        return self._trials(f"WHERE TRUE{where} ORDER BY rowid", tuple(given.values()))

    def untracked(self) -> list[str]:
        """Keys of the trials whose end does not stand in MLflow yet, in the order of their start."""
        return [key for (key,) in self._db.execute("SELECT trial_key FROM trials WHERE NOT tracked ORDER BY rowid")]

    def _trials(self, where: str, values: tuple[Any, ...]) -> list[Trial]:
        columns = "trial_key, cell, phase, number, seed, config, origin, outcome, reason, result, started_ms, ended_ms, tracked"
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
        return self._reports("WHERE trial_key = ? ORDER BY epoch", (trial_key,))

    def report(self, trial_key: str, epoch: int) -> Report | None:
        return next(iter(self._reports("WHERE trial_key = ? AND epoch = ?", (trial_key, epoch))), None)

    def _reports(self, where: str, values: tuple[Any, ...]) -> list[Report]:
        found = self._db.execute(f"SELECT epoch, value, row, keep, reported_ms FROM reports {where}", values)
        return [Report(epoch, value, json.loads(row), bool(keep), at_ms) for epoch, value, row, keep, at_ms in found]

    def attempts(self, trial_key: str) -> list[Attempt]:
        """The tries at a trial that failed, in order."""
        found = self._db.execute("SELECT kind, reason, epochs FROM attempts WHERE trial_key = ? ORDER BY number", (trial_key,))
        return [Attempt(*row) for row in found]

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

    def best_value(self, trial_key: str) -> float | None:
        (value,) = self._db.execute("SELECT max(value) FROM reports WHERE trial_key = ?", (trial_key,)).fetchone()
        return None if value is None else float(value)

    def counts(self) -> dict[tuple[str, str, str], int]:
        """How many trials there are, by (cell, phase, outcome)."""
        found = self._db.execute("SELECT cell, phase, outcome, count(*) FROM trials GROUP BY cell, phase, outcome")
        return {(cell, phase, outcome): count for cell, phase, outcome, count in found}

    def spent(self, cell: str) -> dict[str, tuple[int, float]]:
        """A cell's epochs, and their seconds, by phase."""
        found = self._db.execute(
            "SELECT phase, sum(epoch > 0), sum(json_extract(row, '$.train_seconds') + json_extract(row, '$.valid_seconds'))"
            " FROM trials JOIN reports USING (trial_key) WHERE cell = ? GROUP BY phase",
            (cell,),
        )
        return {phase: (epochs, seconds) for phase, epochs, seconds in found}

    def set_chosen(self, cell: str, trial: Trial) -> None:
        told = (trial.trial_key, json.dumps(trial.config), cell)
        self._db.execute("UPDATE cells SET chosen_trial = ?, chosen_config = ? WHERE cell = ?", told)

    def chosen(self, cell: str) -> dict[str, Any] | None:
        """The cell's chosen config; None while its search runs, or when all its search trials failed."""
        row = self._db.execute("SELECT chosen_config FROM cells WHERE cell = ?", (cell,)).fetchone()
        return None if row is None or row[0] is None else json.loads(row[0])


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
