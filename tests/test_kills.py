"""A kill at every durable write: a study that is killed there and goes on equals the one that was never interrupted.

The writes are those of the journal, of a trial's files, of MLflow and of Optuna. They are counted and killed by injection
from here; the study knows nothing of it. The suite kills at a sample of them. At every one (some minutes, printed one by one):

    MMM4REC_KILLS=all python -m pytest tests/test_kills.py -s
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, redirect_stdout
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pandas as pd
import pytest
import torch
import torch._dynamo  # what torch imports late, before we fork
from conftest import TINY_SHOPS, TINY_STUDY
from mlflow import MlflowClient
from optuna.storages import RDBStorage

import mmm4rec.execute
from mmm4rec.config import from_dict, to_dict
from mmm4rec.data.demo import write_demo
from studies import study
from studies.cells import build_cells
from studies.conductor import Conductor, run_here
from studies.domains import make_domains
from studies.engine import run_config
from studies.mlflow_store import fold_wal, open_store, search, store_uri
from studies.mlflow_tracker import MlflowTracker
from studies.places import Places
from studies.spec import Spec
from studies.state import Journal, Trial
from studies.suggestions import Suggestions, sqlite_url

SAMPLE, SEED = 4, 0  # kills of the suite
SPEC = {
    **TINY_STUDY,
    "domains": {"prepare": {"attic": "attic"}},
    "pretrain": None,
    "training": {"batch_size": 512, "accumulation": 1},
    "arms": {"scratch": {}, "popularity": {"recommender": "popularity"}},
    "cells": [{"domains": ["attic"], "arms": ["scratch", "popularity"]}],
    "budget": {"search_trials": 3, "epochs": 3, "grace_epochs": 1, "reduction": 2, "confirm_seeds": 1},
    "resources": {"concurrent": 1},
}
MLFLOW_WRITES = ("create_experiment", "create_run", "log_batch", "log_artifact", "log_artifacts", "set_terminated", "delete_run")
OPTUNA_WRITES = (
    "create_new_study",
    "delete_study",
    "set_study_user_attr",
    "_create_new_trial",  # of one study: Optuna's cache calls it
    "set_trial_param",
    "set_trial_state_values",
    "set_trial_intermediate_value",
)


@contextmanager
def every_write(seen: Callable[[str], None]) -> Iterator[None]:
    """Inside, `seen` hears of each durable write before it happens and after."""
    with pytest.MonkeyPatch.context() as patch:

        def watch(owner: Any, name: str, store: str) -> None:
            write = getattr(owner, name)

            @wraps(write)
            def watched(*args: Any, **kwargs: Any) -> Any:
                seen(f"before {store} {name}")
                result = write(*args, **kwargs)
                seen(f"after {store} {name}")
                return result

            patch.setattr(owner, name, watched)

        class Watched(sqlite3.Connection):
            def execute(self, statement: str, *args: Any) -> sqlite3.Cursor:  # type: ignore[override]
                writes = statement.split(maxsplit=1)[0] in ("INSERT", "UPDATE", "DELETE", "COMMIT")
                if writes:
                    seen(f"before journal {statement[:40]}")
                result = super().execute(statement, *args)
                if writes:
                    seen(f"after journal {statement[:40]}")
                return result

        connect = sqlite3.connect

        def connected(file: Any, **settings: Any) -> sqlite3.Connection:
            return connect(file, **settings, **({"factory": Watched} if Path(file).name == "study.sqlite3" else {}))

        patch.setattr("studies.state.sqlite3.connect", connected)
        watch(Path, "replace", "file")
        watch(pd.DataFrame, "to_parquet", "file")
        for name in MLFLOW_WRITES:
            watch(MlflowClient, name, "mlflow")
        for name in OPTUNA_WRITES:
            watch(RDBStorage, name, "optuna")
        yield


@contextmanager
def without_ray(epochs: Path) -> Iterator[None]:
    """Inside, a study runs its trials in this process, one after another, waits for MLflow, and draws no figures.

    So each write has its place in the order. `epochs` gets a line for each epoch that is trained.
    """

    def run_cells(conductor: Conductor, *, places: Places, pretrained: Path | None) -> None:
        def launch(trial: Trial) -> dict[str, Any]:
            run = to_dict(run_config(conductor.plan.cells[trial.cell], trial, None))
            return {"out": str(places.trial(trial.trial_key).path), "run": run, "halvings": conductor.halvings(trial)}

        run_here(conductor, launch)

    def write_tables(folder: Path, *, uri: str | None) -> SimpleNamespace:
        (folder / "tables").mkdir(exist_ok=True)
        (folder / "tables" / "ledger.md").write_text("")
        return SimpleNamespace(to_markdown=str)

    tell, fit = MlflowTracker.trial, mmm4rec.execute.fit

    def tell_and_wait(tracker: MlflowTracker, trial_key: str) -> None:
        tell(tracker, trial_key)
        tracker.flush()

    def counted_fit(run: Any) -> Iterator[Any]:
        for report in fit(run):
            with epochs.open("a") as file:
                file.write(f"{report.epoch}\n")
            yield report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "start_ray", lambda resources, workers: None)
        patch.setattr(study, "_check_reach", lambda places: None)
        patch.setattr(study, "run_cells", run_cells)
        patch.setattr(study, "write_tables", write_tables)
        patch.setattr(MlflowTracker, "trial", tell_and_wait)
        patch.setattr(mmm4rec.execute, "fit", counted_fit)
        yield


def run_killed(folder: Path, kill_at: int | None) -> None:
    """Run the study. Kill this process at the n-th word of a write: odd ones before it, even ones after it. None: count them."""
    heard: list[str] = []

    def seen(write: str) -> None:
        heard.append(write)
        if len(heard) == kill_at:
            (folder / "killed").write_text(write)
            os.kill(os.getpid(), signal.SIGKILL)

    spec = from_dict(Spec, SPEC, source="test")
    with (folder / "log.txt").open("a") as log, redirect_stdout(log), without_ray(folder / "epochs"), every_write(seen):
        assert study.run_study(spec, folder, data=folder.parent / "domains") == 0
    (folder / "writes.json").write_text(json.dumps(heard))


def without_seconds(tree: Any) -> Any:
    """What a run tells, without what differs from one run to the next."""
    left_out = ("seconds", "train_seconds", "valid_seconds", "peak_memory_bytes")
    return {key: without_seconds(value) for key, value in tree.items() if key not in left_out} if isinstance(tree, dict) else tree


def facts(folder: Path) -> dict[str, Any]:
    """What the journal, MLflow and Optuna say of the study."""
    place = folder / "tiny"
    spec = from_dict(Spec, SPEC, source="test")
    with closing(Journal(place / "study.sqlite3")) as journal:
        for trial in journal.trials("attic/scratch", "search")[:1]:  # the first word about a cell makes its study anew from the journal
            cell, _ = build_cells(spec, make_domains(spec.domains, place / "domains", data=folder.parent / "domains", seed=0))[0]
            Suggestions(journal, sqlite_url(place / "optuna.sqlite3"), study="tiny", seed=0).tell(cell, trial)
        trials, chosen = journal.trials(), journal.chosen("attic/scratch")
        curves = {trial.trial_key: journal.reports(trial.trial_key) for trial in trials}
    client = open_store(store_uri(place))
    runs = search(client, [experiment.experiment_id for experiment in client.search_experiments()], "")
    mlflow = []
    for run in runs:
        curve = sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, "valid/ndcg_at_10"))
        tags = {key: run.data.tags.get(f"mmm4rec.{key}") for key in ("phase", "key", "outcome")}
        mlflow.append({**tags, "status": run.info.status, "curve": curve})
    told = optuna.load_study(study_name="tiny/attic/scratch", storage=sqlite_url(place / "optuna.sqlite3")).get_trials()
    return {
        "trials": [[t.trial_key, t.name, t.config, t.outcome, t.reason, without_seconds(t.result)] for t in trials],
        "curves": {key: [[r.epoch, r.value, r.keep, without_seconds(r.row)] for r in reports] for key, reports in curves.items()},
        "chosen": chosen,
        "mlflow": sorted(mlflow, key=lambda run: (run["phase"], run["key"])),
        "optuna": [[trial.number, trial.params, trial.state.name, trial.value] for trial in told],
        "epochs trained": len((folder / "epochs").read_text().splitlines()),
    }


def in_a_child(work: Callable[[], None]) -> int:
    """Do some work in a fork of this process, which has imported everything. Its exit status; negative: the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def begun(folder: Path) -> Path:
    """A folder for a study, with empty stores of MLflow and Optuna, which take seconds to make."""
    (folder / "tiny").mkdir(parents=True)
    for name in ("mlflow.db", "optuna.sqlite3"):
        shutil.copy(folder.parent / name, folder / "tiny" / name)
    return folder


def kill_and_resume(folder: Path, kill_at: int) -> dict[str, Any]:
    """Kill a study at a write and run it to its end: where it was killed, and the facts."""
    status = in_a_child(lambda: run_killed(folder, kill_at))
    assert status == -signal.SIGKILL, f"exit status {status} where write {kill_at} kills"

    def resume() -> None:
        run_killed(folder, None)
        (folder / "facts.json").write_text(json.dumps(facts(folder)))

    assert in_a_child(resume) == 0, f"the study did not go on from write {kill_at}, {(folder / 'killed').read_text()}"
    found = json.loads((folder / "facts.json").read_text())
    return {"killed": f"{kill_at}, {(folder / 'killed').read_text()}", **found}


def main(place: Path, wanted: str) -> None:
    """The study uninterrupted, then killed at each wanted write: a line of JSON each. No thread may run here: we fork."""
    assert in_a_child(lambda: make_template(place)) == 0

    def uninterrupted() -> None:
        folder = begun(place / "whole")
        run_killed(folder, None)
        print(json.dumps({"writes": json.loads((folder / "writes.json").read_text()), **facts(folder)}), flush=True)

    assert in_a_child(uninterrupted) == 0
    words = len(json.loads((place / "whole" / "writes.json").read_text()))
    # the n-th write is heard of as word 2 n + 1, before it, and word 2 n + 2, after it
    each = [2 * write + 1 + write % 2 for write in range(words // 2)]
    chosen = each if wanted == "all" else sorted(random.Random(SEED).sample(each, min(len(each), int(wanted))))
    for kill_at in chosen:
        folder = begun(place / f"killed_{kill_at}")
        print(json.dumps(kill_and_resume(folder, kill_at)), flush=True)
        shutil.rmtree(folder)


def make_template(place: Path) -> None:
    """The domains, and empty stores to copy."""
    write_demo(place / "domains", config=TINY_SHOPS)
    open_store(f"sqlite:///{place / 'mlflow.db'}").search_experiments()
    fold_wal(f"sqlite:///{place / 'mlflow.db'}")
    RDBStorage(sqlite_url(place / "optuna.sqlite3"))


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The uninterrupted study, and the killed ones."""
    command = [sys.executable, __file__, str(tmp_path_factory.mktemp("kills")), os.environ.get("MMM4REC_KILLS", str(SAMPLE))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = []
        for line in process.stdout:
            found.append(json.loads(line))
            print(found[-1].get("killed") or f"{len(found[-1]['writes']) // 2} writes", flush=True)
    assert process.returncode == 0
    return found


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(7200 if os.environ.get("MMM4REC_KILLS") else 900),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks of a process"),
]


def test_the_writes_of_every_store_are_met(studies: list[dict[str, Any]]) -> None:
    stores = {write.split()[1] for write in studies[0]["writes"]}
    assert stores == {"journal", "file", "mlflow", "optuna"}
    assert len(studies) > 1
    assert all(write.startswith(("before", "after")) for write in studies[0]["writes"])


def test_a_study_killed_at_a_write_equals_the_uninterrupted_one(studies: list[dict[str, Any]]) -> None:
    """Suggestion by suggestion: configs, curves, outcomes, results, the chosen config, what MLflow has and what the sampler knows."""
    whole, *killed = studies
    assert [outcome for _, _, _, outcome, *_ in whole["trials"]].count("pruned") == 1
    for study_killed in killed:
        for name in ("trials", "curves", "chosen", "mlflow", "optuna"):
            assert study_killed[name] == whole[name], f"{name} after a kill at {study_killed['killed']}"


def test_no_epoch_is_told_twice_and_at_most_one_is_trained_twice(studies: list[dict[str, Any]]) -> None:
    whole, *killed = studies
    for key, curve in whole["curves"].items():
        first = 0 if curve[0][0] == 0 else 1  # 0: of a recommender that is not trained
        assert [epoch for epoch, *_ in curve] == list(range(first, first + len(curve))), key
    for study_killed in killed:
        again = study_killed["epochs trained"] - whole["epochs trained"]
        assert 0 <= again <= 1, f"{again} epochs trained again after a kill at {study_killed['killed']}"


def test_mlflow_has_each_trial_once_with_the_journals_curve_and_optuna_each_search_trial(studies: list[dict[str, Any]]) -> None:
    for one in studies:
        runs = [run for run in one["mlflow"] if run["phase"] in ("search", "confirm")]
        assert "RUNNING" not in {run["status"] for run in one["mlflow"]}
        assert sorted((run["key"], run["outcome"]) for run in runs) == sorted((key, outcome) for key, _, _, outcome, *_ in one["trials"])
        for run in runs:
            assert run["curve"] == [[row["optimizer_steps"], value] for _, value, _, row in one["curves"][run["key"]]]
        searched = [(key, config) for key, name, config, *_ in one["trials"] if name.startswith("attic/scratch search")]
        told = [(number, params, value) for number, params, _, value in one["optuna"]]
        best = [max(value for _, value, *_ in one["curves"][key]) for key, _ in searched]
        assert told == [(number, config, best[number]) for number, (_, config) in enumerate(searched)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2])
