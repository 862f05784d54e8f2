"""Facts about the MLflow mirror when things go wrong: a store that is away, answers that are lost, kills, a burst, a real server."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from mlflow import MlflowClient
from sqlalchemy.exc import DatabaseError, OperationalError

from mmm4rec.config import from_dict
from studies import outbox
from studies.cells import Cell, Source, build_cells
from studies.mlflow_store import is_away, open_store, search, shown, store_uri
from studies.mlflow_tracker import MlflowTracker
from studies.outbox import NotWritten, Outbox
from studies.runs import MlflowRuns
from studies.spec import Spec
from studies.state import Journal
from studies.tracked import METRICS, ranks_reader, read_study

SPEC = from_dict(
    Spec,
    {
        "study": "small",
        "domains": {"demo": True},
        "arms": {"scratch": {}, "text_only": {"model": {"modalities": "text"}}},
        "cells": [{"domains": ["toys"], "arms": ["scratch", "text_only"]}],
        "space": {"training.learning_rate": {"low": 0.001, "high": 0.1}},
        "budget": {"search_trials": 1, "epochs": 4, "confirm_seeds": 1},
    },
    source="test",
)
CELLS, _ = build_cells(SPEC, {"toys": Source("/toys", "print", True)})
SCRATCH, TEXT_ONLY = CELLS
WRITES = ("create_experiment", "create_run", "log_batch", "log_artifact", "log_artifacts", "set_terminated", "delete_run")


def add_epochs(journal: Journal, trial_key: str, first: int, last: int) -> None:
    for epoch in range(first, last + 1):
        valid = dict.fromkeys(METRICS, epoch / 10)
        row = {
            "epoch": epoch,
            "optimizer_steps": 7 * epoch,
            "train_loss": 1 / epoch,
            "train_seconds": 2.0,
            "valid_seconds": 1.0,
            "valid": valid,
        }
        journal.add_report(trial_key, row, epoch / 10)


def end(journal: Journal, folder: Path, trial_key: str, epoch: int) -> None:
    """Finished, best at its last epoch."""
    journal_trial = journal.trial(trial_key)
    result: dict[str, Any] = {"best_epoch": epoch, "valid": dict.fromkeys(METRICS, epoch / 10), "code_version": "1"}
    result |= {"config": {"model": {"width": 8}, "seed": journal_trial.seed}, "fingerprint": "print"}
    if journal_trial.phase == "confirm":
        result["test"] = dict.fromkeys(METRICS, 0.25)
        files = folder / "trials" / trial_key
        files.mkdir(parents=True)
        (files / "best.safetensors").write_bytes(b"weights")
    journal.end(trial_key, "finished", result=result)


def new_journal(folder: Path) -> Journal:
    folder.mkdir(exist_ok=True)
    journal = Journal(folder / "study.sqlite3")
    journal.add_cells([cell.name for cell in CELLS])
    journal.remember("begun_ms", "1000")
    return journal


def fill(folder: Path) -> list[str]:
    """A journal with a search and a confirm trial of one cell and a failed trial of the other; the trials' keys."""
    journal = new_journal(folder)
    search_trial = journal.start(SCRATCH, "search", 0, 0, {"training.learning_rate": 0.01}, origin="warm start: here")
    confirm = journal.start(SCRATCH, "confirm", 0, 10_000, {"training.learning_rate": 0.01})
    failed = journal.start(TEXT_ONLY, "search", 0, 0, {"training.learning_rate": 0.02})
    for trial in (search_trial, confirm):
        add_epochs(journal, trial.trial_key, 1, 3)
        end(journal, folder, trial.trial_key, 3)
    journal.end(failed.trial_key, "failed", reason="broken on purpose")
    journal.close()
    return [search_trial.trial_key, confirm.trial_key, failed.trial_key]


@contextmanager
def tracking(folder: Path, uri: str | None = None, cells: tuple[Cell, ...] = CELLS) -> Iterator[MlflowTracker]:
    tracker = MlflowTracker(folder, SPEC, cells, folder / "study.sqlite3", uri)
    tracker.start()
    try:
        yield tracker
    finally:
        tracker.close()


def facts(uri: str) -> list[tuple]:
    """Everything that MLflow knows, but for the ids and the times that it gives itself."""
    client = MlflowClient(tracking_uri=uri)
    runs = search(client, [found.experiment_id for found in client.search_experiments()], "")
    names = {run.info.run_id: run.info.run_name for run in runs}
    told = []
    for run in runs:
        tags = {key: value for key, value in run.data.tags.items() if key.startswith("mmm4rec.")}
        histories = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
        curves = {name: sorted((m.step, m.timestamp, m.value) for m in history) for name, history in histories.items()}
        artifacts = sorted(artifact.path for artifact in client.list_artifacts(run.info.run_id))
        parent = names.get(run.data.tags.get("mlflow.parentRunId", ""))
        told.append((run.info.run_name, run.info.status, parent, sorted(tags.items()), sorted(run.data.params.items()), curves, artifacts))
    return sorted(told, key=lambda run: run[0])


@pytest.fixture
def folder(tmp_path: Path, empty_store: Path) -> Path:
    (tmp_path / "small").mkdir()
    shutil.copy(empty_store, tmp_path / "small" / "mlflow.db")
    return tmp_path / "small"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(outbox, "LONGEST_PAUSE_SECONDS", 0.5)


def box() -> Outbox:
    opened = Outbox("it", is_away=lambda error: isinstance(error, ConnectionError), in_words=str, at_end=lambda: None)
    opened.start()
    return opened


def test_writes_asked_for_while_the_store_is_away_are_done_once_each_and_nobody_waits() -> None:
    away, done = threading.Event(), Counter[str]()
    away.set()

    def write(key: str) -> None:
        if away.is_set():
            raise ConnectionError("refused")
        done[key] += 1

    opened, began = box(), time.monotonic()
    for _ in range(1000):
        for key in "abc":
            opened.put(key, lambda key=key: write(key))
    assert time.monotonic() - began < 2
    assert len(opened._pending) == 3, "one write a key: memory stays flat"
    with pytest.raises(NotWritten, match=r"none of 3 outstanding writes.*refused.*--resume"):
        opened.flush(0.3)
    away.clear()
    opened.flush(20)
    assert done == {"a": 1, "b": 1, "c": 1}
    assert opened.close() == 0


def test_a_write_that_never_succeeds_holds_no_other_one_up() -> None:
    done: list[int] = []

    def never() -> None:
        raise ConnectionError("busy")

    opened = box()
    opened.put("never", never)
    for number in range(5):
        opened.put(number, lambda number=number: done.append(number))
    with pytest.raises(NotWritten, match="none of 1 outstanding"):
        opened.flush(0.5)
    assert done == list(range(5))
    assert opened.close() == 1


def test_a_write_that_is_asked_for_while_it_is_done_is_done_again() -> None:
    began, go_on, seen = threading.Event(), threading.Event(), []

    def slow() -> None:
        began.set()
        go_on.wait(5)
        seen.append("before")

    opened = box()
    opened.put("key", slow)
    began.wait(5)
    opened.put("key", lambda: seen.append("after"))
    go_on.set()
    opened.flush(5)
    assert seen == ["before", "after"]
    opened.close()


def test_what_waiting_does_not_change_is_told_from_what_it_does() -> None:
    def database(kind: type[DatabaseError], text: str) -> Exception:
        return kind("SELECT 1", {}, Exception(text))

    assert is_away(database(OperationalError, "database is locked"))
    assert is_away(database(OperationalError, "connection refused"))
    assert is_away(OSError(28, "No space left on device"))
    assert not is_away(database(DatabaseError, "file is not a database"))
    assert not is_away(database(OperationalError, 'FATAL: password authentication failed for user "me"'))
    assert not is_away(FileNotFoundError(2, "no such file"))


def test_a_server_that_is_away_is_told_within_seconds_and_without_its_password(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as taken:  # bound and not listening: refuses
        taken.bind(("127.0.0.1", 0))
        uri = f"http://me:hush%21hush@127.0.0.1:{taken.getsockname()[1]}"
        keys = fill(tmp_path / "small")
        began = time.monotonic()
        with tracking(tmp_path / "small", uri) as tracker:
            for key in keys:
                tracker.trial(key)
            with pytest.raises(NotWritten, match="none of 3 outstanding writes") as raised:
                tracker.flush(1)
        assert time.monotonic() - began < 20
    assert "hush" not in str(raised.value) + caplog.text
    assert "MLflow is away" in caplog.text
    assert shown(uri, uri).startswith("http://me:***@127.0.0.1")


class Faulty:
    """A client whose `fault`-th write fails after it was done, as if its answer were lost; `forever`: all the later calls fail too."""

    def __init__(self, client: MlflowClient, fault: int, *, forever: bool) -> None:
        self._client, self._fault, self._forever = client, fault, forever
        self.writes = 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._forever and self.writes > self._fault:
                raise ConnectionError("the process is dead")
            answer = getattr(self._client, name)(*args, **kwargs)
            if name in WRITES:
                self.writes += 1
                if self.writes == self._fault + 1:
                    raise ConnectionError("the answer is lost")
            return answer

        return call


def mirror(folder: Path, keys: list[str], *, fault: int = 10**9, forever: bool = False) -> int:
    """Mirror the small study with one fault; how many writes that took."""
    with tracking(folder) as tracker:
        client = Faulty(open_store(store_uri(folder)), fault, forever=forever)
        vars(tracker)["_client"] = client
        for key in keys:
            tracker.trial(key)
        with suppress(*([NotWritten] if forever else [])):
            tracker.finish([], patience_seconds=0.1 if forever else 30)
    return client.writes


@pytest.mark.slow
@pytest.mark.parametrize("forever", [False, True], ids=["lost answer", "kill"])
def test_after_a_lost_answer_or_a_kill_at_any_write_mlflow_holds_everything_once(forever: bool, folder: Path, tmp_path: Path) -> None:
    """Against the mirror that nothing happened to."""
    keys = fill(folder)
    shutil.copytree(folder, template := tmp_path / "template")
    writes = mirror(folder, keys)
    expected = facts(store_uri(folder))
    assert [(run[0], run[1]) for run in expected] == [
        ("small", "FINISHED"),
        ("toys/scratch", "FINISHED"),
        ("toys/scratch confirm 0", "FINISHED"),
        ("toys/scratch search 0", "FINISHED"),
        ("toys/text_only", "FINISHED"),
        ("toys/text_only search 0", "FAILED"),
    ]
    assert 15 <= writes <= 40
    for fault in range(writes):
        hurt = Path(shutil.copytree(template, tmp_path / f"fault {fault}" / "small"))
        mirror(hurt, keys, fault=fault, forever=forever)
        if forever:
            mirror(hurt, keys)
        assert facts(store_uri(hurt)) == expected, f"write {fault}"


def test_a_create_that_comes_late_leaves_no_second_run(folder: Path) -> None:
    """A server may do what a client has given up: then there are two runs, and one of them never ends."""
    (key, *others) = fill(folder)
    mirror(folder, [key, *others])
    client = open_store(store_uri(folder))
    experiment = client.get_experiment_by_name("small").experiment_id
    tags = {"mmm4rec.phase": "search", "mmm4rec.key": key, "mmm4rec.trial_key": key, "mmm4rec.outcome": "running"}
    client.create_run(experiment, tags=tags)
    client.create_run(experiment, tags=tags | {"mmm4rec.key": "of no journal"})
    mirror(folder, [])
    runs = search(client, [experiment], "tags.`mmm4rec.phase` = 'search'")
    assert Counter(run.data.tags["mmm4rec.key"] for run in runs) == {key: 1, others[1]: 1, "of no journal": 1}
    assert {run.info.status for run in runs} == {"FINISHED", "FAILED", "KILLED"}


@pytest.mark.slow
def test_a_server_that_is_ahead_of_a_restored_journal_keeps_no_stranger_and_no_epoch_twice(folder: Path) -> None:
    """A snapshot of the journal comes back: one trial's run has more epochs than it, another one's trial it does not know."""
    journal = new_journal(folder)
    trial = journal.start(SCRATCH, "search", 0, 0, {"training.learning_rate": 0.01})
    add_epochs(journal, trial.trial_key, 1, 1)
    journal.close()
    snapshot = (folder / "study.sqlite3").read_bytes()
    with closing(Journal(folder / "study.sqlite3")) as journal:
        add_epochs(journal, trial.trial_key, 2, 3)
        stranger = journal.start(SCRATCH, "confirm", 0, 10_000, {"training.learning_rate": 0.02})
        add_epochs(journal, stranger.trial_key, 1, 3)
        end(journal, folder, stranger.trial_key, 3)
    with tracking(folder) as tracker:
        for key in (trial.trial_key, stranger.trial_key):
            tracker.trial(key)
        tracker.flush()
    before = {run[0]: run for run in facts(store_uri(folder))}
    (folder / "study.sqlite3").write_bytes(snapshot)
    time.sleep(0.01)  # the epochs that are told again have other times
    with closing(Journal(folder / "study.sqlite3")) as journal:
        add_epochs(journal, trial.trial_key, 2, 4)
        end(journal, folder, trial.trial_key, 4)
    with tracking(folder) as tracker:
        tracker.catch_up()
        tracker.trial(trial.trial_key)
        tracker.finish([])
    after = {run[0]: run for run in facts(store_uri(folder))}
    name = "toys/scratch search 0"
    assert [step for step, _, _ in after[name][5]["epoch"]] == [7, 14, 21, 28]
    assert after[name][5]["epoch"][:3] == before[name][5]["epoch"]
    assert [value for _, _, value in after[name][5]["seconds"]] == [3.0, 6.0, 9.0, 12.0]
    assert ("mmm4rec.outcome", "superseded") in after["toys/scratch confirm 0"][3]
    assert not any(cell.trials for cell in read_study(MlflowRuns(folder)).cells)


@pytest.mark.slow
def test_a_cell_that_is_taken_out_leaves_the_tables_and_comes_back_with_its_row(folder: Path) -> None:
    mirror(folder, fill(folder))
    for cells in ((SCRATCH,), CELLS):
        with tracking(folder, cells=cells) as tracker:
            tracker.catch_up()
            tracker.baseline()
            tracker.flush()
        assert [cell.name for cell in read_study(MlflowRuns(folder)).cells] == [cell.name for cell in cells]


def test_the_artifacts_tags_and_ledger_of_a_study_are_read_back(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = fill(folder)
    (folder / "tables").mkdir()
    (folder / "tables" / "main.md").write_text("table")
    with tracking(folder) as tracker:
        for key in keys:
            tracker.trial(key)
        for hours in (1.0, 2.5, 2.5):
            tracker.ledger("toys/scratch", {"gpu hours": hours, "trials": 2})
            tracker.flush()
        tracker.finish([folder / "tables"])
    runs = {run[0]: run for run in facts(store_uri(folder))}
    assert runs["small"][6] == ["tables"]
    assert runs["toys/scratch confirm 0"][6] == ["best.safetensors"]
    assert ("mmm4rec.origin", "warm start: here") in runs["toys/scratch search 0"][3]
    ledger = {name: [value for _, _, value in curve] for name, curve in runs["toys/scratch"][5].items()}
    assert ledger == {"ledger/gpu hours": [1.0, 2.5], "ledger/trials": [2.0]}
    scratch, text_only = read_study(MlflowRuns(folder)).cells
    assert scratch.ledger == {"gpu hours": 2.5, "trials": 2}
    assert (text_only.ledger, text_only.trials) == ({}, ())
    assert [trial.curve for trial in scratch.trials] == [((7, 0.1), (14, 0.2), (21, 0.3))]
    assert "refuses" not in caplog.text


def test_superseded_trials_leave_the_tables_and_their_runs_stay(folder: Path) -> None:
    keys = fill(folder)
    mirror(folder, keys)
    journal = Journal(folder / "study.sqlite3")
    journal.supersede("toys/scratch")
    mirror(folder, keys)
    assert read_study(MlflowRuns(folder)).cells[0].trials == ()
    again = journal.start(SCRATCH, "confirm", 0, 10_000, {"training.learning_rate": 0.01})
    add_epochs(journal, again.trial_key, 1, 2)
    end(journal, folder, again.trial_key, 2)
    journal.close()
    mirror(folder, [*keys, again.trial_key])
    (trial,) = read_study(MlflowRuns(folder)).cells[0].trials
    assert trial.best_epoch == 2
    told = Counter((run[1], dict(run[3])["mmm4rec.outcome"]) for run in facts(store_uri(folder)) if "scratch " in run[0])
    assert told == {("KILLED", "superseded"): 2, ("FINISHED", "finished"): 1}


def test_cells_that_join_or_change_are_known_to_mlflow_before_their_first_trial(folder: Path) -> None:
    new_journal(folder).close()
    with tracking(folder, cells=(SCRATCH,)) as tracker:
        tracker.add_cells([TEXT_ONLY])
        tracker.flush()
        assert [(cell.name, cell.search_trials) for cell in read_study(MlflowRuns(folder)).cells] == [
            ("toys/scratch", 1),
            ("toys/text_only", 1),
        ]
        tracker.add_cells([TEXT_ONLY, replace(SCRATCH, search_trials=9)])  # all: in their order
        tracker.flush()
    assert [(cell.name, cell.search_trials) for cell in read_study(MlflowRuns(folder)).cells] == [
        ("toys/text_only", 1),
        ("toys/scratch", 9),
    ]


READER = """
import sys, time
from pathlib import Path
from mmm4rec.errors import BadInput
from studies.runs import MlflowRuns
from studies.tracked import read_study
folder, reads, most = Path(sys.argv[1]), 0, 0
while not (folder / "over").exists():
    try:
        most = max(most, sum(len(cell.trials) for cell in read_study(MlflowRuns(folder)).cells))
    except BadInput as error:
        assert "no cell of a study" in str(error), error
    reads += 1
print(reads, most)
"""


def test_a_cells_facts_are_told_though_the_store_went_away_after_its_run_was_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, failures = MlflowTracker._write, [1, 1]

    def write(self: MlflowTracker, run: str, **told: Any) -> None:
        if failures and "mmm4rec.position" in (told.get("tags") or {}):
            failures.pop()
            raise ConnectionError("gone")
        original(self, run, **told)

    monkeypatch.setattr(MlflowTracker, "_write", write)
    journal = new_journal(folder)
    trial = journal.start(SCRATCH, "confirm", 0, 0, {})
    add_epochs(journal, trial.trial_key, 1, 2)
    with tracking(folder) as tracker:
        tracker.trial(trial.trial_key)
        tracker.finish([])
    assert not failures
    assert len(read_study(MlflowRuns(folder)).cells) == 2
    journal.close()


@pytest.mark.slow
def test_a_burst_of_100_trials_meets_no_locked_database_while_another_process_reads(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    journal = new_journal(folder)
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, str(folder)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent
    )
    try:
        keys = [journal.start(SCRATCH, "confirm", number, number, {}).trial_key for number in range(100)]
        with tracking(folder) as tracker:
            slowest = 0.0
            for epoch in range(1, 6):
                for key in keys:
                    add_epochs(journal, key, epoch, epoch)
                    began = time.monotonic()
                    tracker.trial(key)
                    slowest = max(slowest, time.monotonic() - began)
            tracker.flush()
            for key in keys:
                end(journal, folder, key, 5)
                tracker.trial(key)
            tracker.flush()
            (folder / "over").touch()
            tracker.finish([])
    finally:
        (folder / "over").touch()
        output, _ = reader.communicate(timeout=60)
    assert reader.returncode == 0
    reads, most = map(int, output.split())
    assert reads >= 3
    assert most > 0, "it saw trials while the tracker wrote"
    assert caplog.text == "", "MLflow refused nothing and was never away"
    assert slowest < 5  # seconds; an idle machine shows milliseconds
    (scratch, _) = read_study(MlflowRuns(folder)).cells
    assert len(scratch.trials) == 100
    assert {len(trial.curve) for trial in scratch.trials} == {5}
    journal.close()


@contextmanager
def server(port: int, store: Path) -> Iterator[None]:
    """A real `mlflow server` on loopback; killed with all its processes at the end."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", store_uri(store), "--artifacts-destination", str(store / "artifacts")]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (store / "server.log").open("a") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not answers(port):
            assert process.poll() is None, (store / "server.log").read_text()
            assert time.monotonic() < deadline, "the server did not answer"
            time.sleep(0.3)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(port: int) -> bool:
    with suppress(OSError), closing(urlopen(f"http://127.0.0.1:{port}/health", timeout=2)) as answer:
        return bool(answer.status == 200)
    return False


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_real_server_that_is_killed_and_started_again_has_everything_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, plain = folder, folder.parent / "plain"
    shutil.copytree(folder, plain)  # the empty store
    study = folder.parent / "study"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    journal = new_journal(study)
    trials = [journal.start(SCRATCH, "confirm", number, number, {}) for number in range(6)]
    with tracking(study, f"http://127.0.0.1:{port}") as tracker:
        with server(port, store):
            for trial in trials:
                add_epochs(journal, trial.trial_key, 1, 2)
                tracker.trial(trial.trial_key)
            time.sleep(0.3)  # in the middle
        for trial in trials:
            add_epochs(journal, trial.trial_key, 3, 3)
            end(journal, study, trial.trial_key, 3)
            tracker.trial(trial.trial_key)
        time.sleep(2)
        with server(port, store):
            tracker.finish([], patience_seconds=60)
            (scratch, _) = read_study(MlflowRuns(study, f"http://127.0.0.1:{port}")).cells
            assert [trial.curve for trial in scratch.trials] == [((7, 0.1), (14, 0.2), (21, 0.3))] * 6
            assert ranks_reader(MlflowRuns(study, f"http://127.0.0.1:{port}"))(scratch.trials[0]) is None
            there = facts(f"http://127.0.0.1:{port}")
    journal._db.execute("UPDATE trials SET tracked = 0")
    journal.close()
    study.rename(folder.parent / "moved")
    shutil.copy(plain / "mlflow.db", folder.parent / "moved" / "mlflow.db")
    mirror(folder.parent / "moved", [trial.trial_key for trial in trials])
    assert there == facts(store_uri(folder.parent / "moved"))
    assert "MLflow answers again" in caplog.text
