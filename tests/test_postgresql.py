"""MLflow and Optuna on a real PostgreSQL server, started here from the distribution's package (Debian: postgresql)."""

from __future__ import annotations

import logging
import os
import pwd
import shutil
import signal
import socket
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import optuna
import pytest
from test_mlflow import CELLS, SCRATCH, SPEC, add_epochs, end, facts, fill, mirror, new_journal, tracking

from studies import outbox
from studies.mlflow_store import store_uri
from studies.mlflow_tracker import MlflowTracker
from studies.outbox import NotWritten
from studies.runs import MlflowRuns
from studies.tracked import read_study

psycopg = pytest.importorskip("psycopg", reason="needs psycopg: pip install 'mmm4rec[postgresql]'")
PASSWORD = "s3cret/p@ss"
IN_URL = "s3cret%2Fp%40ss"


class Server:
    """A PostgreSQL of its own in a temporary folder, on 127.0.0.1, with a password. It refuses root, and gets another user there."""

    def __init__(self, programs: Path) -> None:
        self._programs, self._home = programs, Path(tempfile.mkdtemp(prefix="postgresql"))
        self._user = None
        if os.getuid() == 0:
            self._user = next((user.pw_name for user in pwd.getpwall() if user.pw_name == "postgres"), "nobody")
            os.chown(self._home, pwd.getpwnam(self._user).pw_uid, -1)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        secret = self._home / "password"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        made = [
            "initdb",
            "-D",
            str(self._home / "data"),
            "-U",
            "me",
            "--auth=scram-sha-256",
            f"--pwfile={secret}",
            "--no-sync",
            "-E",
            "UTF8",
        ]
        self._start(made).communicate(timeout=120)
        secret.unlink()
        self._process: subprocess.Popen[bytes] | None = None

    def _start(self, command: list[str]) -> subprocess.Popen[bytes]:
        program = str(self._programs / command[0])
        with (self._home / "log").open("ab") as output:
            return subprocess.Popen([program, *command[1:]], user=self._user, cwd=self._home, stdout=output, stderr=output)

    def start(self) -> None:
        place = ["-D", str(self._home / "data"), "-k", str(self._home), "-h", "127.0.0.1", "-p", str(self.port)]
        self._process = self._start(["postgres", *place, "-c", "fsync=off"])
        deadline = time.monotonic() + 60
        while True:
            try:
                psycopg.connect(self.uri("postgres")).close()
                return
            except psycopg.OperationalError:
                assert time.monotonic() < deadline, (self._home / "log").read_text()
                time.sleep(0.1)

    def stop(self) -> None:
        """At once: whoever is connected is cut off."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(timeout=60)
            self._process = None

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self._home)

    def uri(self, database: str, driver: str = "postgresql") -> str:
        return f"{driver}://me:{IN_URL}@127.0.0.1:{self.port}/{database}"

    def new_database(self, name: str) -> None:
        with psycopg.connect(self.uri("postgres"), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    places = [Path(found).parent for found in (shutil.which("initdb"),) if found] + sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    programs = next((place for place in reversed(places) if (place / "initdb").is_file() and (place / "postgres").is_file()), None)
    if programs is None:
        pytest.skip("needs PostgreSQL's server programs (Debian's package postgresql)")
    started = Server(programs)
    try:
        started.start()
        started.new_database("mlflow")
        started.new_database("optuna")
        yield started
    finally:
        started.remove()


@pytest.mark.slow
def test_postgresql_holds_what_sqlite_does_and_the_password_is_nowhere(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    here, there = tmp_path / "sqlite" / "small", tmp_path / "postgresql" / "small"
    here.parent.mkdir()
    keys = fill(here)
    shutil.copytree(here, there)
    mirror(here, keys)
    for _ in range(2):  # the second time as if the first driver had died before it noted what MLflow has
        with closing(sqlite3.connect(there / "study.sqlite3", isolation_level=None)) as journal:
            journal.execute("UPDATE trials SET tracked = 0")
        with tracking(there, server.uri("mlflow")) as tracker:
            for key in keys:
                tracker.trial(key)
            tracker.finish([])
    assert facts(server.uri("mlflow")) == facts(store_uri(here))
    assert read_study(MlflowRuns(there, server.uri("mlflow"))).cells[0].trials[0].curve == ((7, 0.1), (14, 0.2), (21, 0.3))
    assert not (there / "mlflow.db").exists()
    written = b"".join(file.read_bytes() for file in there.rglob("*") if file.is_file())
    output = capfd.readouterr()
    for secret in (PASSWORD, IN_URL):
        assert secret not in caplog.text + output.out + output.err
        assert secret.encode() not in written


@pytest.mark.slow
def test_another_study_of_the_same_name_has_an_experiment_of_its_own(server: Server, tmp_path: Path) -> None:
    for name in ("one", "two"):
        journal = new_journal(tmp_path / name)
        trial = journal.start(SCRATCH, "confirm", 0, 0, {})
        add_epochs(journal, trial.trial_key, 1, 1 if name == "one" else 2)
        end(journal, tmp_path / name, trial.trial_key, 1)
        journal.close()
        with tracking(tmp_path / name, server.uri("mlflow")) as tracker:
            tracker.trial(trial.trial_key)
            tracker.finish([])
    epochs = {
        name: [len(trial.curve) for trial in read_study(MlflowRuns(tmp_path / name, server.uri("mlflow"))).cells[0].trials]
        for name in ("one", "two")
    }
    assert epochs == {"one": [1], "two": [2]}


@pytest.mark.slow
def test_a_postgresql_that_is_stopped_for_a_while_has_everything_once(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "LONGEST_PAUSE_SECONDS", 0.5)
    journal = new_journal(tmp_path / "away")
    trials = [journal.start(SCRATCH, "confirm", number, number, {}) for number in range(10)]
    with tracking(tmp_path / "away", server.uri("mlflow")) as tracker:
        for trial in trials:
            add_epochs(journal, trial.trial_key, 1, 2)
            tracker.trial(trial.trial_key)
        time.sleep(1.5)  # in the middle
        server.stop()
        for trial in trials:
            add_epochs(journal, trial.trial_key, 3, 3)
            end(journal, tmp_path / "away", trial.trial_key, 3)
            tracker.trial(trial.trial_key)
        time.sleep(2)
        server.start()
        tracker.finish([], patience_seconds=60)
    journal.close()
    (scratch, _) = read_study(MlflowRuns(tmp_path / "away", server.uri("mlflow"))).cells
    assert [trial.curve for trial in scratch.trials] == [((7, 0.1), (14, 0.2), (21, 0.3))] * 10
    assert "MLflow answers again" in caplog.text
    assert PASSWORD not in caplog.text
    assert IN_URL not in caplog.text


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_wrong_password_is_an_error_and_no_wait(server: Server, tmp_path: Path) -> None:
    new_journal(tmp_path / "wrong").close()
    uri = server.uri("mlflow").replace(IN_URL, "0ther")
    tracker = MlflowTracker(tmp_path / "wrong", SPEC, CELLS, tmp_path / "wrong" / "study.sqlite3", uri)
    tracker.start()
    tracker.baseline()
    began = time.monotonic()
    with pytest.raises(NotWritten, match="password authentication failed") as raised:
        tracker.flush()
    assert time.monotonic() - began < 20
    assert "0ther" not in str(raised.value)
    tracker.close()


@pytest.mark.slow
@pytest.mark.parametrize("driver", ["postgresql", "postgresql+psycopg"])
def test_optuna_keeps_its_studies_there(driver: str, server: Server) -> None:
    def storage() -> optuna.storages.RDBStorage:
        return optuna.storages.RDBStorage(server.uri("optuna", driver))

    study = optuna.create_study(study_name=driver, storage=storage(), direction="maximize")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
    again = optuna.load_study(study_name=driver, storage=storage())
    assert [trial.params for trial in again.trials] == [trial.params for trial in study.trials]
    assert again.best_value == max(trial.params["x"] for trial in study.trials)
