"""A study's stores on the storage: whole, in an order that a restored study can go on from, and one driver at a time."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from test_storage import moto, place, run_and_kill, s3  # noqa: F401 (fixtures)

from mmm4rec.errors import BadInput
from studies import snapshots
from studies.snapshots import JOURNAL, LEASE, MLFLOW, OPTUNA, Lease, Snapshots, restore
from studies.state import Journal, now_ms
from studies.storage import Storage

STORES = (JOURNAL, OPTUNA, MLFLOW)


def journal_row(folder: Path) -> None:
    """One more finished trial, which MLflow has."""
    with closing(sqlite3.connect(folder / JOURNAL, isolation_level=None)) as db:
        db.execute(
            "INSERT INTO trials (trial_key, cell, phase, number, seed, config, outcome, started_ms, tracked)"
            " SELECT 't' || n, 'a/x', 'search', n, 0, '{}', 'finished', 0, 1 FROM (SELECT count(*) AS n FROM trials)"
        )


def mirror_row(folder: Path) -> None:
    """Write the journal's trials into MLflow and Optuna, and a file for each beside them."""
    for number in range(rows(folder / MLFLOW), rows(folder / JOURNAL)):
        (folder / "artifacts").mkdir(exist_ok=True)
        (folder / "artifacts" / f"{number}.txt").write_text(f"ranks {number}")
        for name in (OPTUNA, MLFLOW):
            with closing(sqlite3.connect(folder / name, isolation_level=None)) as db:
                db.execute("INSERT INTO trials VALUES (?)", (number,))


def rows(file: Path) -> int:
    with closing(sqlite3.connect(file)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return int(db.execute("SELECT count(*) FROM trials").fetchone()[0])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A study with one trial."""
    folder = tmp_path / "study"
    (folder / "pretrain").mkdir(parents=True)
    (folder / "tables").mkdir()
    for name in ("spec.yaml", "tables/main.md", "index.html", "pretrain/best.safetensors", "pretrain/result.json"):
        (folder / name).write_text(name)
    with closing(Journal(folder / JOURNAL)) as journal:
        journal.remember("begun_ms", "1")
        journal.remember("reported", "1")
    for name in (OPTUNA, MLFLOW):
        with closing(sqlite3.connect(folder / name)) as db:
            db.execute("CREATE TABLE trials (number INTEGER)")
    journal_row(folder)
    mirror_row(folder)
    return folder


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that are written to the storage from now on."""
    names: list[str] = []
    write = Storage.write

    def note(self: Storage, name: str, content: bytes) -> None:
        write(self, name, content)
        names.append(name)

    monkeypatch.setattr(Storage, "write", note)
    return names


def test_a_study_comes_back_on_a_new_head(folder: Path, place: Storage, tmp_path: Path) -> None:  # noqa: F811
    new = tmp_path / "new"
    assert not restore(new, place)
    with_snapshots = Snapshots(folder, place)
    with_snapshots.now()
    with_snapshots.close()
    assert restore(new, place)
    assert [rows(new / name) for name in STORES] == [1, 1, 1]
    for name in ("spec.yaml", "tables/main.md", "index.html", "pretrain/best.safetensors", "pretrain/result.json", "artifacts/0.txt"):
        assert (new / name).read_bytes() == (folder / name).read_bytes()
    with closing(Journal(new / JOURNAL)) as journal:
        assert [trial.tracked for trial in journal.trials()] == [False]  # MLflow is filled up from here
        assert (journal.fact("begun_ms"), journal.fact("reported")) == ("1", None)
    journal_row(new)
    assert not restore(new, place)  # a study that stands is left alone
    assert rows(new / JOURNAL) == 2
    assert not list(new.glob(".*"))


def test_only_what_changed_is_pushed(folder: Path, tmp_path: Path, pushed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "TICK_SECONDS", 0.1)
    time.sleep(0.2)
    running = Snapshots(folder, Storage(str(tmp_path / "shared")))
    running.now()
    first = [
        "spec.yaml",
        "tables/main.md",
        "index.html",
        "pretrain/best.safetensors",
        "pretrain/result.json",
        JOURNAL,
        OPTUNA,
        "artifacts/0.txt",
        MLFLOW,
    ]
    assert pushed == first
    running.now()
    assert pushed == first
    program = f"import sqlite3; db = sqlite3.connect({str(folder / OPTUNA)!r}); db.execute('INSERT INTO trials VALUES (7)'); db.commit()"
    subprocess.run([sys.executable, "-c", program], check=True)
    (folder / "artifacts" / "late.txt").write_text("x")
    running.now()
    assert pushed[len(first) :] == [OPTUNA, "artifacts/late.txt"]
    del pushed[:]
    with closing(sqlite3.connect(folder / JOURNAL, isolation_level=None)) as db:  # stays open: the commit is in the WAL alone
        db.execute("UPDATE study SET value = '2' WHERE key = 'begun_ms'")
        running.now()
        assert JOURNAL in pushed
    running.close()


def test_a_commit_within_a_tick_of_the_clock_is_not_missed(folder: Path, tmp_path: Path) -> None:
    running, place = Snapshots(folder, Storage(str(tmp_path / "shared"))), tmp_path / "shared" / "snapshot"  # noqa: F811
    times = (folder / OPTUNA).stat()
    running.now()
    with closing(sqlite3.connect(folder / OPTUNA)) as db:
        db.execute("UPDATE trials SET number = 7")
        db.commit()
    os.utime(folder / OPTUNA, ns=(times.st_atime_ns, times.st_mtime_ns))
    running.now()
    with closing(sqlite3.connect(place / OPTUNA)) as db:
        assert db.execute("SELECT number FROM trials").fetchall() == [(7,)]


def kill_and_restore(folder: Path, place: Storage, event: int, new: Path) -> bool:  # noqa: F811
    """A second snapshot, killed at its step `event`, while the study goes on between any two copies; then a restore."""
    copy = Snapshots._copy

    def copy_while_it_goes_on(self: Snapshots, name: str, copies: Path) -> Any:
        found = copy(self, name, copies)
        for _ in range(len(STORES)):  # each copy is of another moment
            journal_row(folder)
        mirror_row(folder)
        return found

    def second() -> None:
        Snapshots._copy = copy_while_it_goes_on  # type: ignore[method-assign]
        Snapshots(folder, place).now()

    was_killed = run_and_kill(second, event, ("os.rename",))  # before a file takes its place: what lies between shows nobody
    assert restore(new, place)
    return was_killed


@pytest.mark.slow
def test_whenever_a_snapshot_is_killed_mlflow_never_knows_more_than_the_journal(folder: Path, tmp_path: Path) -> None:
    Snapshots(folder, Storage(str(tmp_path / "shared"))).now()
    journal_row(folder)
    mirror_row(folder)
    event, behind, killed = 0, [], True
    while killed:
        study, shared, new = (tmp_path / f"{name}{event}" for name in ("study", "shared", "new"))
        shutil.copytree(folder, study)
        shutil.copytree(tmp_path / "shared", shared)
        killed = kill_and_restore(study, Storage(str(shared)), event, new)
        told = {name: rows(new / name) for name in STORES}
        assert told[MLFLOW] <= told[JOURNAL], (event, told)
        assert told[OPTUNA] <= told[JOURNAL], (event, told)
        assert all((new / "artifacts" / f"{number}.txt").exists() for number in range(told[MLFLOW]))
        behind.append(told[JOURNAL] - told[MLFLOW])
        event += 1
    assert (behind[0], told[JOURNAL]) == (0, 8)  # from the first snapshot to the whole of the second
    assert max(behind) == 7  # a kill between the journal and MLflow


def test_a_first_snapshot_that_is_killed_is_none_or_whole_enough(folder: Path, tmp_path: Path) -> None:
    for event in range(0, 90, 5):
        place = Storage(str(tmp_path / f"shared{event}"))  # noqa: F811
        if not run_and_kill(Snapshots(folder, place).now, event):
            return
        if restore(tmp_path / f"new{event}", place):
            assert (tmp_path / f"new{event}" / "pretrain" / "best.safetensors").exists()  # the journal pins its hash
            assert rows(tmp_path / f"new{event}" / JOURNAL) == 1
    pytest.fail("it never came to its end")


@pytest.mark.slow
def test_a_restore_that_is_killed_anywhere_starts_over(folder: Path, tmp_path: Path) -> None:
    place, event = Storage(str(tmp_path / "shared")), 0  # noqa: F811
    Snapshots(folder, place).now()
    while True:
        new = tmp_path / f"new{event}"
        if not run_and_kill(lambda new=new: restore(new, place), event):  # type: ignore[misc]
            break
        assert restore(new, place) or (new / JOURNAL).exists()
        assert [rows(new / name) for name in STORES] == [1, 1, 1]
        with closing(Journal(new / JOURNAL)) as journal:
            assert journal.untracked() == ["t0"]
        assert (new / "artifacts" / "0.txt").exists()
        event += 1
    assert event > 20


def test_a_damaged_snapshot_is_refused(folder: Path, tmp_path: Path) -> None:
    place = Storage(str(tmp_path / "shared"))  # noqa: F811
    Snapshots(folder, place).now()
    place.write(f"snapshot/{JOURNAL}", b"no database" * 1000)
    with pytest.raises(BadInput, match="damaged"):
        restore(tmp_path / "new", place)
    assert not (tmp_path / "new" / JOURNAL).exists()


WRITER = """
import sqlite3, sys, time
db = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None)
db.execute(f"PRAGMA journal_mode = {sys.argv[2]}")
db.execute("CREATE TABLE history (n INTEGER PRIMARY KEY, padding TEXT)")
print("ready", flush=True)
for n in range(100_000):
    db.execute("INSERT INTO history VALUES (?, ?)", (n, "x" * 200))
    time.sleep(0.004)
"""


@pytest.mark.parametrize("mode", ["WAL", "DELETE"])
def test_a_snapshot_of_a_database_that_is_written_is_a_prefix_of_its_history(mode: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / MLFLOW), mode]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE)
    running, lengths = Snapshots(tmp_path, Storage(str(tmp_path / "shared"))), []
    try:
        assert writer.stdout is not None
        writer.stdout.readline()
        for _ in range(5):
            time.sleep(0.2)
            running.now()
            with closing(sqlite3.connect(tmp_path / "shared" / "snapshot" / MLFLOW)) as db:
                assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
                numbers = [n for (n,) in db.execute("SELECT n FROM history ORDER BY n")]
            assert numbers == list(range(len(numbers)))
            lengths.append(len(numbers))
        assert writer.poll() is None  # it was not locked out
    finally:
        writer.kill()
        writer.wait()
    assert lengths == sorted(set(lengths))


def test_a_storage_that_is_away_ends_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shared = tmp_path / "shared"
    shared.write_text("in the way")
    running = Snapshots(folder, Storage(str(shared)), every_seconds=0.05)
    with pytest.raises(OSError, match="shared"):
        running.now()
    with caplog.at_level(logging.WARNING):
        running.start()
        wait_for(lambda: "tries again" in caplog.text)
        shared.unlink()
        wait_for((shared / "snapshot" / MLFLOW).exists)
    journal_row(folder)
    running.close()
    assert rows(shared / "snapshot" / JOURNAL) == 2


def wait_for(come: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not come():
        assert time.monotonic() < end
        time.sleep(0.02)


def hold(place: Storage, **facts: Any) -> None:  # noqa: F811
    """Another driver's lease."""
    told = {"holder": "other", "host": "far", "pid": 1, "machine": "another", "renewed_ms": now_ms(), **facts}
    place.write(LEASE, json.dumps(told).encode())


def test_of_two_drivers_the_second_refuses_until_the_first_has_ended(place: Storage, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(snapshots, "SETTLE_SECONDS", 0.1)
    with Lease(place) as first:
        with pytest.raises(BadInput, match=rf"held by the driver on .* \(process {os.getpid()}\).*wait (89|90) s"), Lease(place):
            pass
        assert first.held()
        assert place.exists(LEASE)
    assert not place.exists(LEASE)
    with Lease(place) as second:
        assert second.held()


def test_a_lease_that_nobody_renewed_is_taken_over(tmp_path: Path) -> None:
    place = Storage(str(tmp_path))  # noqa: F811
    hold(place, renewed_ms=now_ms() - 80_000)
    with pytest.raises(BadInput, match=r"on far \(process 1\).*wait (9|10) s"), Lease(place):
        pass
    hold(place, renewed_ms=now_ms() - 91_000)
    with Lease(place):
        assert json.loads(place.read(LEASE) or b"")["holder"] != "other"


def test_a_driver_that_died_on_this_machine_is_not_waited_for(tmp_path: Path) -> None:
    place = Storage(str(tmp_path))  # noqa: F811
    child = os.fork()
    if child == 0:
        Lease(place).__enter__()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert json.loads(place.read(LEASE) or b"")["pid"] == child
    with Lease(place):
        pass
    hold(place, pid=child)  # the same number on another machine says nothing
    with pytest.raises(BadInput, match="held by the driver"), Lease(place):
        pass


def test_a_driver_that_was_taken_over_hears_of_it_and_pushes_no_more(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "RENEW_SECONDS", 0.05)
    place, told = Storage(str(tmp_path / "shared")), []  # noqa: F811
    with Lease(place, on_lost=lambda: told.append("lost")) as lease:
        renewed = (place.read(LEASE), time.sleep(0.2), place.read(LEASE))
        assert renewed[0] != renewed[2]
        running = Snapshots(folder, place, may_push=lease.held)
        running.now()
        hold(place)
        wait_for(lambda: told == ["lost"])
        assert not lease.held()
        journal_row(folder)
        with pytest.raises(BadInput, match="taken this study over"):
            running.now()
    assert json.loads(place.read(LEASE) or b"")["holder"] == "other"  # it is not ours to delete
    assert rows(tmp_path / "shared" / "snapshot" / JOURNAL) == 1


def test_of_two_drivers_that_write_at_once_the_earlier_write_loses(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    place = Storage(s3)  # noqa: F811
    monkeypatch.setattr(time, "sleep", lambda seconds: hold(place))  # while this one waits
    with pytest.raises(BadInput, match="takes it at this moment"), Lease(place):
        pass
    assert json.loads(place.read(LEASE) or b"")["holder"] == "other"
