"""A short soak, and that its checks see what they are there for. The long one: python studies/soak.py --kills 300"""

from __future__ import annotations

import json
import os
import random
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from mlflow import MlflowClient

from studies.mlflow_store import search, store_uri
from studies.soak import make_spec
from studies.soak_checks import Violated, check_study
from studies.state import Journal

ROOT = Path(__file__).parent.parent
KILLS, SEED, TRIALS = 4, 3, 2

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the trials' processes in /proc, which Linux has"),
]


@pytest.fixture(scope="module")
def soaked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a short soak, and what it printed."""
    out = tmp_path_factory.mktemp("soak")
    command = [sys.executable, str(ROOT / "studies" / "soak.py"), "--kills", str(KILLS), "--seed", str(SEED), "--out", str(out)]
    command += ["--trials", str(TRIALS), "--pause", "4", "--reruns", "2"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def test_a_short_soak_holds_every_invariant(soaked: tuple[Path, str]) -> None:
    out, said = soaked
    told = re.search(r"(\d+) kills \((.*)\), (\d+) studies, (\d+) trials", said)
    assert told is not None, said
    assert int(told[1]) == KILLS == sum(map(int, re.findall(r"\w (\d+)", told[2])))
    assert int(told[4]) == int(told[3]) * 2 * (2 * (TRIALS + 2) + 1)
    assert all((out / f"soak_{SEED + number}" / "tables" / "main.md").exists() for number in range(int(told[3])))


def lose_a_report(study: Path) -> None:
    with closing(sqlite3.connect(study / "study.sqlite3", isolation_level=None)) as database:
        database.execute(
            "DELETE FROM reports WHERE epoch = 2 AND trial_key ="
            " (SELECT trial_key FROM trials WHERE phase = 'confirm' AND cell NOT LIKE '%popularity' LIMIT 1)"
        )


def spare_a_pruned_trial(study: Path) -> None:
    with closing(sqlite3.connect(study / "study.sqlite3", isolation_level=None)) as database:
        assert database.execute("UPDATE reports SET keep = 1 WHERE keep = 0").rowcount


def forget_a_trial(study: Path) -> None:
    with closing(sqlite3.connect(study / "study.sqlite3", isolation_level=None)) as database:
        database.execute("DELETE FROM trials WHERE rowid = (SELECT max(rowid) FROM trials)")


def leave_a_run_running(study: Path) -> None:
    client = MlflowClient(tracking_uri=store_uri(study))
    (run, *_) = search(client, [e.experiment_id for e in client.search_experiments()], "tags.`mmm4rec.phase` = 'search'")
    client.update_run(run.info.run_id, status="RUNNING")


def make_a_run_twice(study: Path) -> None:
    client = MlflowClient(tracking_uri=store_uri(study))
    (run, *_) = search(client, [e.experiment_id for e in client.search_experiments()], "tags.`mmm4rec.phase` = 'search'")
    twin = client.create_run(run.info.experiment_id, tags=run.data.tags)
    client.set_terminated(twin.info.run_id)


def change_a_metric(study: Path) -> None:
    """In the journal, the trial's files: only its rerun alone can tell."""
    with closing(Journal(study / "study.sqlite3")) as journal:
        keys = [trial.trial_key for trial in journal.trials() if "popularity" not in trial.cell]
    with closing(sqlite3.connect(study / "study.sqlite3", isolation_level=None)) as database:
        for key in keys:
            (text,) = database.execute("SELECT row FROM reports WHERE epoch = 1 AND trial_key = ?", (key,)).fetchone()
            changed = {**json.loads(text), "train_loss": 1.0}
            database.execute("UPDATE reports SET row = ? WHERE epoch = 1 AND trial_key = ?", (json.dumps(changed), key))
            curve = study / "trials" / key / "curve.jsonl"
            curve.write_text("\n".join([json.dumps(changed), *curve.read_text().splitlines()[1:]]) + "\n")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (forget_a_trial, "were asked for"),
        (lose_a_report, "has the epochs"),
        (spare_a_pruned_trial, "its rung says otherwise"),
        (leave_a_run_running, "RUNNING"),
        (make_a_run_twice, "twice"),
        (change_a_metric, "alone"),
    ],
)
def test_the_soaks_checks_see_damage(damage: Callable[[Path], None], said: str, soaked: tuple[Path, str], tmp_path: Path) -> None:
    out, _ = soaked
    spec = make_spec(SEED, TRIALS)
    subprocess.run(["cp", "-r", str(out / spec.study), str(tmp_path)], check=True)
    (tmp_path / "domains").symlink_to(out / "domains")
    check_study(spec, tmp_path, random.Random(0), reruns=0, kills=KILLS)
    damage(tmp_path / spec.study)
    with pytest.raises(Violated, match=said):
        check_study(spec, tmp_path, random.Random(0), reruns=4, kills=KILLS)
