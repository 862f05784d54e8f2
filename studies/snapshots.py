"""A study's small stores on the shared storage: copies while it runs, back on a new head, one driver at a time.

The head keeps its sqlite files on its own disk. What is lost with that disk is what was written since the last
snapshot, ten seconds by default; trials keep their own files on the storage, so that a trial which the journal had
begun goes on from there. One that began after the snapshot is asked for again: the same trial where the suggestion
is the same (one trial at a time), and then it is found as far as it came.

The order of a snapshot. MLflow's and Optuna's stores are functions of the journal, so a copy that is *behind* the
journal is filled up from it. A copy that is *ahead* is not harmless: MLflow would keep runs of trials that nobody
remembers, RUNNING for ever, and epochs twice, with two times. So

1. MLflow and Optuna are copied first, then the journal: each copy knows no more than the journal's copy.
2. Pushed are spec.yaml, tables/, figures/, index.html and pretrain/ (the journal pins the hash of that checkpoint: without the
   file the study could not go on), then the journal, then Optuna, artifacts/ (MLflow's runs name them), and MLflow last.

Between any two of these puts the storage therefore holds a journal that is level with MLflow and Optuna or ahead of
them, and every file that they name. The journal also notes what stands in MLflow; `restore` takes that back, for it
may be more than the copy of MLflow holds, and the tracker writes again what is there already without a change.
(An MLflow server or PostgreSQL has no part in this and is ahead of a restored journal by up to one snapshot: the tracker
sets runs of trials that the journal does not know aside, and leaves epochs that stand there as they are.)

A database is never opened here but by sqlite: closing any other handle on it would drop the locks of this process.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from mmm4rec.errors import BadInput
from studies.state import Journal, locked, now_ms
from studies.storage import Storage

JOURNAL, OPTUNA, MLFLOW = "study.sqlite3", "optuna.sqlite3", "mlflow.db"
PRETRAIN = ("best.safetensors", "curve.jsonl", "steps.jsonl", "result.json")  # in this order
REPORT = ("tables", "figures", "index.html")  # what tables.py writes
SNAPSHOT = "snapshot"  # the place on the storage
LEASE = "driver.json"
RENEW_SECONDS, EXPIRE_SECONDS, SETTLE_SECONDS = 20.0, 90.0, 2.0
TICK_SECONDS = 1.0  # no file system's clock is coarser

log = logging.getLogger(__name__)


class Snapshots:
    """Keeps the storage's copy of a study's stores up to date, in a thread."""

    def __init__(self, folder: Path, storage: Storage, *, every_seconds: float = 10.0, may_push: Callable[[], bool] = lambda: True) -> None:
        """Args: folder: the study's; may_push: whether this driver still holds the study (a lease's `held`)."""
        self._folder, self._place, self._every_seconds, self._may_push = folder, storage.sub(SNAPSHOT), every_seconds, may_push
        self._pushed: dict[str, Any] = {}  # name -> the version that the storage has
        self._turn = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="snapshots", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def now(self) -> None:
        """Bring the storage's copy up to date. Raises what the storage or sqlite raised, and BadInput where the lease is lost."""
        with self._turn:
            if not self._may_push():
                raise BadInput("another driver has taken this study over.", file=self._place.uri, remedy="End this one.")
            copies = self._folder / ".snapshot"
            shutil.rmtree(copies, ignore_errors=True)
            copies.mkdir()
            try:
                changed = {name: version for name in (MLFLOW, OPTUNA, JOURNAL) if (version := self._copy(name, copies)) is not None}
                report = [name for part in REPORT for name in _below(self._folder, part)]
                self._push_files(["spec.yaml", *report, *(f"pretrain/{name}" for name in PRETRAIN)])
                for name in (JOURNAL, OPTUNA, MLFLOW):
                    if name == MLFLOW:
                        self._push_files(_below(self._folder, "artifacts"))
                    if name in changed:
                        self._place.push(copies, [name])
                        self._pushed[name] = changed[name]
            finally:
                shutil.rmtree(copies, ignore_errors=True)

    def close(self) -> None:
        """The last snapshot; where it fails, a warning says what that means."""
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._try("The storage lacks the study's last seconds; they are on this machine's disk")

    def _work(self) -> None:
        while not self._over.wait(self._every_seconds):
            self._try("The next snapshot tries again")

    def _try(self, consequence: str) -> None:
        try:
            self.now()
        except (OSError, sqlite3.Error, BadInput) as error:
            log.warning("The study's stores were not copied to %s: %s. %s.", self._place.uri, error, consequence)

    def _copy(self, name: str, copies: Path) -> Any:
        """Copy a database, consistent while others write; its version before, or None where it is absent or unchanged.

        No connection is kept to ask for PRAGMA data_version: an open one keeps others from folding a database's WAL.
        """
        if not (self._folder / name).is_file():
            return None
        version, settled = self._version_of(name)
        if settled and self._pushed.get(name) == version:
            return None
        uri = f"{(self._folder / name).resolve().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=60)) as source, closing(sqlite3.connect(copies / name)) as copy:
            source.backup(copy)  # in one step: under one read transaction
        return version if settled else ()

    def _version_of(self, name: str) -> tuple[Any, bool]:
        """What the file system says of a database and its WAL; and whether it would tell of a commit from now on.

        A commit changes a file's time, but two within a tick of the clock leave the same one.
        """
        states = []
        for file in (self._folder / name, self._folder / f"{name}-wal"):
            with suppress(FileNotFoundError):
                if (state := file.stat()).st_size:  # an empty WAL may come and go with a reader
                    states.append(state)
        newest = max((state.st_mtime for state in states), default=0.0)
        return [(state.st_ino, state.st_mtime_ns, state.st_size) for state in states], time.time() - newest > TICK_SECONDS

    def _push_files(self, names: list[str]) -> None:
        """Push those that exist and changed."""
        for name in names:
            with suppress(FileNotFoundError):
                state = (self._folder / name).stat()
                version = (state.st_ino, state.st_mtime_ns, state.st_size)
                if self._pushed.get(name) != version:
                    self._place.push(self._folder, [name])
                    self._pushed[name] = version


def restore(folder: Path, storage: Storage) -> bool:
    """On a new head: bring the last snapshot back, where `folder` holds no journal and the storage has one; whether it did.

    The journal comes last, so that a kill in the middle starts over. Call it with the study's lock and lease held.
    `folder` should have the path that it had: MLflow notes where artifacts lie. Raises BadInput where the copy is damaged.
    """
    place = storage.sub(SNAPSHOT)
    if (folder / JOURNAL).exists() or not place.exists(JOURNAL):
        return False
    for name in (f"{store}{end}" for store in (JOURNAL, OPTUNA, MLFLOW) for end in ("-wal", "-shm", "-journal")):
        (folder / name).unlink(missing_ok=True)  # of a database that is gone: sqlite would mix it into the one that comes
    place.pull(folder, [name for name in place.names() if name != JOURNAL])
    part = folder / ".restore"
    shutil.rmtree(part, ignore_errors=True)
    place.pull(part, [JOURNAL])
    _check_sound(part / JOURNAL)
    with closing(Journal(part / JOURNAL)) as journal:
        journal.track_again()  # the copy of MLflow may know less than this journal says it does
    (part / JOURNAL).replace(folder / JOURNAL)
    shutil.rmtree(part)
    return True


def _check_sound(journal: Path) -> None:
    """Raise BadInput where the file is no sound database."""
    try:
        with closing(sqlite3.connect(journal, isolation_level=None)) as db:
            verdict = db.execute("PRAGMA quick_check").fetchone()[0]
    except sqlite3.DatabaseError as error:
        verdict = str(error)
    if verdict != "ok":
        raise BadInput(f"the snapshot of the journal is damaged ({verdict}).", file=journal, remedy="Start the study anew.")


class Lease:
    """Holds a study on the storage against a second driver on another head. Use it as a context manager.

    The holder's driver.json is renewed every 20 s. Who finds one of another holder, younger than 90 s, raises BadInput;
    an older one, or one whose process on this very machine is gone, is taken over.

    In a folder, taking is one step under a file lock (where the mount's locks work). An object store, as it is used
    here, has no compare-and-swap, so this is no lock there: two drivers that take a lease at the same moment each write,
    wait, and read back, and the later write wins; but a driver that stands still for longer than that wait between
    reading and writing can overwrite a newer holder, and both then go on until the next renewal, 20 s at most, when one
    finds the other's name, and stops being `held`. A holder that cannot reach the storage for 90 s may be taken over, and
    hears of it when it can. Clocks of the two machines that differ count against the 90 s.
    """

    def __init__(self, storage: Storage, *, on_lost: Callable[[], None] = lambda: None) -> None:
        """Args: on_lost: called once, in another thread, when another driver has taken the study over: end this one then."""
        self._storage, self._on_lost, self._holder = storage, on_lost, uuid.uuid4().hex
        self._lost, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="lease", daemon=True)

    def held(self) -> bool:
        """Whether this process still holds the study, as far as it knows."""
        return not self._lost.is_set()

    def __enter__(self) -> Lease:
        with self._alone():
            self._refuse_other()
            self._write()
        if self._storage.path is None:
            time.sleep(SETTLE_SECONDS)
        if not self._is_mine(self._read()):
            raise BadInput("another driver takes it at this moment.", file=self._storage.uri, remedy="Leave it to that one.")
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Release it; where the storage is away, it expires by itself."""
        self._over.set()
        self._thread.join()
        try:
            with self._alone():
                if self._is_mine(self._read()):
                    self._storage.delete([LEASE])
        except (OSError, BadInput) as problem:
            log.warning("%s could not be removed from %s (%s): it expires in %.0f s.", LEASE, self._storage.uri, problem, EXPIRE_SECONDS)

    def _work(self) -> None:
        while not self._over.wait(RENEW_SECONDS):
            try:
                self._renew()
            except (OSError, BadInput) as error:
                log.warning("The study's lease on %s was not renewed: %s. It is tried again.", self._storage.uri, error)
            if self._lost.is_set():
                log.error("Another driver has taken the study on %s over: this one ends.", self._storage.uri)
                self._on_lost()
                return

    def _renew(self) -> None:
        with self._alone():
            found = self._read()
            if found is not None and not self._is_mine(found):
                self._lost.set()
            else:
                self._write()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One at a time reads and writes, where the storage is a folder."""
        if self._storage.path is not None:
            self._storage.path.mkdir(parents=True, exist_ok=True)
        with nullcontext() if self._storage.path is None else locked(self._storage.path / f".{LEASE}.lock", wait=True):
            yield

    def _read(self) -> dict[str, Any] | None:
        text = self._storage.read(LEASE)
        try:
            return None if text is None else dict(json.loads(text))
        except (ValueError, TypeError) as error:
            raise BadInput(f"{LEASE} is no lease of ours ({error}).", file=self._storage.uri, remedy="Delete it.") from error

    def _write(self) -> None:
        facts = {"holder": self._holder, "host": socket.gethostname(), "pid": os.getpid(), "machine": _machine(), "renewed_ms": now_ms()}
        self._storage.write(LEASE, json.dumps(facts).encode())

    def _is_mine(self, facts: dict[str, Any] | None) -> bool:
        return facts is not None and facts["holder"] == self._holder

    def _refuse_other(self) -> None:
        """Raises BadInput where another driver holds the study."""
        facts = self._read()
        if facts is None or self._is_mine(facts) or _is_gone(facts):
            return
        left_seconds = EXPIRE_SECONDS - (now_ms() - facts["renewed_ms"]) / 1000
        if left_seconds > 0:
            rule = f"is held by the driver on {facts['host']} (process {facts['pid']})."
            raise BadInput(rule, file=self._storage.uri, remedy=f"End that driver, or wait {left_seconds:.0f} s if it is dead.")


def _below(folder: Path, name: str) -> list[str]:
    """The file of that name, or those in the folder of that name, as paths from `folder`."""
    place = folder / name
    files = [place] if place.is_file() else place.rglob("*")
    return sorted(path.relative_to(folder).as_posix() for path in files if path.is_file())


def _machine() -> str | None:
    """What names this boot of this machine and the space in which its process numbers count; None where it is not told."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text(encoding='ascii').strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def _is_gone(facts: dict[str, Any]) -> bool:
    """Whether the holder ran on this machine, and its process is no more. A number that is in use again counts as the holder's."""
    if facts.get("machine") is None or facts["machine"] != _machine():
        return False
    try:
        os.kill(int(facts["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
