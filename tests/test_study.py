"""Facts about whole studies on tiny generated domains: through Ray with a kill in the middle, and blindness to the test split."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import numpy_model
import pandas as pd
import pytest
import yaml
from conftest import TINY_SHOPS, TINY_STUDY
from mlflow import MlflowClient
from safetensors.numpy import load_file

from mmm4rec.config import from_dict, to_dict
from mmm4rec.data.demo import write_demo
from mmm4rec.data.domain import fingerprint, open_domain
from mmm4rec.execute import execute
from mmm4rec.training.checkpoint import load_description
from studies.cells import Source, build_cells
from studies.engine import run_config
from studies.mlflow_tracker import store_uri
from studies.plan import Plan
from studies.runs import MlflowRuns
from studies.soak import TRIAL, processes_below
from studies.spec import Spec
from studies.state import Journal
from studies.suggestions import Suggestions, sqlite_url
from studies.tracked import read_study
from studies.transfer_sweep import main

ROOT = Path(__file__).parent.parent
TRIALS = {("search", arm): 3 for arm in ("pretrained", "scratch", "no_time")}
TRIALS |= {("confirm", arm): 2 for arm in ("pretrained", "scratch", "no_time")} | {("confirm", "popularity"): 1}


def start(folder: Path, **changes: object) -> subprocess.Popen[str]:
    spec = folder / "tiny.yaml"
    spec.write_text(yaml.safe_dump({**TINY_STUDY, **changes}))
    command = [sys.executable, str(ROOT / "studies" / "transfer_sweep.py"), "--spec", str(spec), "--out", str(folder)]
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder)


def ended(folder: Path) -> dict[str, tuple]:
    """Trials that ended, by key: when and how."""
    if not (folder / "tiny" / "study.sqlite3").exists():
        return {}
    journal = Journal(folder / "tiny" / "study.sqlite3")
    found = {trial.trial_key: (trial.outcome, trial.ended_ms) for trial in journal.trials() if trial.outcome != "running"}
    journal.close()
    return found


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple], str]:
    """A study whose driver is killed after some trials and that is then run to its end: folder, what had ended, output."""
    folder = tmp_path_factory.mktemp("results")
    (folder / "tiny").mkdir()
    write_demo(folder / "tiny" / "domains", config=TINY_SHOPS)
    driver, deadline = start(folder), time.monotonic() + 200
    while len(ended(folder)) < 4 and time.monotonic() < deadline and driver.poll() is None:
        time.sleep(0.1)
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate()
    before = ended(folder)
    driver = start(folder)
    output, _ = driver.communicate(timeout=280)
    assert driver.returncode == 0, output
    return folder / "tiny", before, output


@pytest.mark.slow
@pytest.mark.timeout(560)
def test_the_main_table_is_what_the_kept_weights_rank_in_plain_numpy(killed: tuple[Path, dict[str, tuple], str]) -> None:
    """The artifacts of the runs and the domain's files, a ranking that shares no code with ours, metrics written out here."""
    folder, _, _ = killed
    source = MlflowRuns(folder)
    users = np.arange(open_domain(folder / "domains" / "attic").n_users)
    ends = np.diff(np.load(folder / "domains" / "attic" / "offsets.npy")) - 1
    table = pd.read_csv(folder / "tables" / "main.csv").set_index("arm")
    compared = [cell for cell in read_study(source).cells if cell.arm != "popularity"]
    assert len(compared) == 3
    for cell in compared:
        found = []
        for trial in cell.trials:
            weights = folder / "artifacts" / trial.run_id / "artifacts" / "best.safetensors"
            found.append(numpy_model.ranks(weights, folder / "domains" / "attic", users, ends))
        rank = np.stack(found)
        for cutoff in (10, 20, 50):
            assert table.loc[cell.arm, f"hit@{cutoff} mean"] == pytest.approx((rank <= cutoff).mean(), abs=1e-6)
            gain = np.where(rank <= cutoff, 1 / np.log2(1 + rank), 0)
            assert table.loc[cell.arm, f"ndcg@{cutoff} mean"] == pytest.approx(gain.mean(), abs=1e-6)
        assert table.loc[cell.arm, "mrr mean"] == pytest.approx((1 / rank).mean(), abs=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_another_recommender_is_pre_trained_searched_and_moved(tmp_path: Path) -> None:
    """UniSRec on the source, two workers; zero-shot and fine-tuned on the target beside models of item ids and one without training."""
    (tmp_path / "tiny").mkdir()
    write_demo(tmp_path / "tiny" / "domains", config=TINY_SHOPS)
    pretrain = {**TINY_STUDY["pretrain"], "recommender": "unisrec"}  # type: ignore[dict-item]
    arms = {
        "moved": {"recommender": "unisrec", "init": "pretrained"},
        "zero_shot": {"recommender": "unisrec", "init": "pretrained", "zero_shot": True},
        "gru4rec": {"recommender": "gru4rec"},
        "item_knn": {"recommender": "item_knn", "space": {"model.window": {"low": 1, "high": 4, "integer": True}}},
    }
    cells = [{"domains": ["attic"], "arms": list(arms)}]
    budget = {"search_trials": 2, "epochs": 2, "grace_epochs": 1, "confirm_seeds": 2}
    model = {"width": 16, "ffn_width": 16}
    space = {name: space for name, space in TINY_STUDY["space"].items() if name != "model.filter_size"}  # type: ignore[attr-defined]
    driver = start(tmp_path, baseline="gru4rec", pretrain=pretrain, model=model, space=space, arms=arms, cells=cells, budget=budget)
    output, _ = driver.communicate(timeout=360)
    assert driver.returncode == 0, output
    table = pd.read_csv(tmp_path / "tiny" / "tables" / "main.csv").set_index("arm")
    assert table["seeds"].to_dict() == {"moved": 2, "zero_shot": 1, "gru4rec": 2, "item_knn": 1}
    assert table["search trials"].to_dict() == {"moved": 2, "zero_shot": 0, "gru4rec": 2, "item_knn": 2}
    assert "Unequal budgets" not in (tmp_path / "tiny" / "tables" / "main.md").read_text(encoding="utf-8")
    assert load_description(tmp_path / "tiny" / "pretrain" / "best.safetensors")["config"]["recommender"] == "unisrec"
    assert not (tmp_path / "tiny" / "pretrain" / "model").exists()  # a folder for MMM4Rec.from_pretrained


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the workers in /proc, which Linux has")
def test_a_trial_whose_worker_is_killed_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    write_demo(tmp_path / "tiny" / "domains", config=TINY_SHOPS)
    budget = {"search_trials": 2, "epochs": 20, "grace_epochs": 20, "confirm_seeds": 1}
    cells = [{"domains": ["attic"], "arms": ["scratch"]}]
    driver = start(
        tmp_path,
        baseline=None,
        pretrain=None,
        arms={"scratch": {}},
        cells=cells,
        budget=budget,
        training={"batch_size": 64, "patience": 20},
    )
    killed: list[int] = []
    while driver.poll() is None and not killed:
        if any((tmp_path / "tiny" / "trials").glob("*/last.ckpt")):
            killed = processes_below(driver.pid, TRIAL)[:1]
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    output, _ = driver.communicate(timeout=240)
    assert killed
    assert driver.returncode == 0, output
    journal = Journal(tmp_path / "tiny" / "study.sqlite3")
    assert [trial.outcome for trial in journal.trials()] == ["finished"] * 3, output
    for trial in journal.trials():
        assert [report.epoch for report in journal.reports(trial.trial_key)] == list(range(1, 21))


@pytest.mark.slow
@pytest.mark.timeout(560)
def test_a_killed_study_ends_complete_and_keeps_what_had_ended(killed: tuple[Path, dict[str, tuple], str]) -> None:
    folder, before, output = killed
    assert 4 <= len(before) < sum(TRIALS.values())
    after = ended(folder.parent)
    assert {key: after[key] for key in before} == before
    journal = Journal(folder / "study.sqlite3")
    trials = journal.trials()
    assert Counter((trial.phase, trial.cell.split("/")[1]) for trial in trials) == TRIALS
    assert {trial.outcome for trial in trials} <= {"finished", "pruned"}, output
    for trial in trials:
        curve = [report.epoch for report in journal.reports(trial.trial_key)]
        assert curve == list(range(curve[0], curve[0] + len(curve)))
        assert trial.phase == "search" or trial.outcome == "finished"
        if trial.result is not None:
            assert ("test" in trial.result) == (trial.phase == "confirm")


@pytest.mark.slow
@pytest.mark.timeout(560)
def test_mlflow_holds_every_trial_once_as_the_journal_does(killed: tuple[Path, dict[str, tuple], str]) -> None:
    folder, _, _ = killed
    client, journal = MlflowClient(tracking_uri=store_uri(folder)), Journal(folder / "study.sqlite3")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()], max_results=1000)
    assert "RUNNING" not in {run.info.status for run in runs}
    assert Counter(run.data.tags["mmm4rec.phase"] for run in runs if "mmm4rec.trial_key" not in run.data.tags) == {
        "study": 1,
        "pretrain": 1,
        "cell": 4,
    }
    by_key = {run.data.tags["mmm4rec.trial_key"]: run for run in runs if "mmm4rec.trial_key" in run.data.tags}
    assert len(by_key) == sum("mmm4rec.trial_key" in run.data.tags for run in runs)
    assert set(by_key) == {trial.trial_key for trial in journal.trials()}
    for trial in journal.trials():
        run = by_key[trial.trial_key]
        assert run.data.tags["mmm4rec.outcome"] == trial.outcome
        tracked = sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, "valid/ndcg_at_10"))
        assert tracked == [(report.row["optimizer_steps"], report.value) for report in journal.reports(trial.trial_key)]


@pytest.mark.slow
@pytest.mark.timeout(560)
def test_a_finished_study_prints_its_table_again(killed: tuple[Path, dict[str, tuple], str], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _, output = killed
    table = (folder / "tables" / "main.md").read_text()
    assert table in output
    assert main(["--spec", str(folder.parent / "tiny.yaml"), "--out", str(folder.parent)]) == 0
    assert table in capsys.readouterr().out
    assert all((folder / "figures" / f"{name}.{suffix}").exists() for name in ("convergence", "effects") for suffix in ("png", "svg"))
    effects = [line.split("|")[2:5] for line in (folder / "tables" / "effects.md").read_text().splitlines()[2:]]
    told = [[text.strip() for text in line] for line in effects]
    assert told == [[arm, "scratch", seeds] for arm, seeds in (("pretrained", "2"), ("no_time", "2"), ("popularity", "2"))], (
        "popularity stands beside each seed"
    )


def run_without_ray(folder: Path, domain: Path) -> dict[str, tuple]:
    """The study's scratch arms on one domain, one trial at a time: by cell the chosen config and what each trial came to."""
    wanted = {
        **TINY_STUDY,
        "arms": {"scratch": {}, "text_only": {"model": {"modalities": "text"}}, "popularity": {"recommender": "popularity"}},
    }
    spec = from_dict(Spec, {**wanted, "cells": [{"domains": ["attic"], "arms": list(wanted["arms"])}]}, source="test")  # type: ignore[call-overload]
    opened = open_domain(domain)
    cells, _ = build_cells(spec, {"attic": Source(str(domain), opened.fingerprint, True)})
    folder.mkdir()
    journal = Journal(folder / "study.sqlite3")
    journal.add_cells([cell.name for cell in cells])
    plan = Plan(journal, cells, spec.budget, spec.seed)
    suggestions = Suggestions(journal, sqlite_url(folder / "optuna.sqlite3"), study="tiny", seed=0)
    found: dict[str, tuple] = {}
    while trial := plan.next_trial(suggestions.suggest):
        cell, out = plan.cells[trial.cell], folder / trial.trial_key
        reports = execute(run_config(cell, trial, None), out, resume=True)
        if all(plan.report(trial.trial_key, to_dict(report)) for report in reports):
            journal.end(trial.trial_key, "finished", result=json.loads((out / "result.json").read_text()))
        if trial.phase == "search":
            suggestions.tell(cell, journal.trial(trial.trial_key))
        ended_trial, weights = journal.trial(trial.trial_key), load_file(out / "best.safetensors")
        best = None if ended_trial.result is None else ended_trial.result["best_epoch"]
        test = (ended_trial.result or {}).get("test")
        found[f"{trial.cell} {trial.phase} {trial.number}"] = (trial.config, ended_trial.outcome, best, weights, test)
    return found


def other_test_targets(source: Path, target: Path) -> None:
    """The demo domain with each user's last item and its time replaced."""
    write_demo(target.parent, config=TINY_SHOPS)
    domain, random = open_domain(source), np.random.default_rng(1)
    items, timestamps = np.array(domain.items), np.array(domain.timestamps)
    last = domain.offsets[1:] - 1
    items[last] = 1 + (items[last] - 1 + random.integers(1, domain.n_items, len(last))) % domain.n_items
    timestamps[last] += random.integers(1, 10**7, len(last))
    np.save(target / "items.npy", items)
    np.save(target / "timestamps.npy", timestamps)
    info = json.loads((target / "domain.json").read_text())
    users = [str(user) for user in pd.read_parquet(target / "users.parquet")["user"]]
    changed = fingerprint(domain.offsets, items, timestamps, domain.item_table()["item"].tolist(), users, info["tie_break"])
    assert changed != info["fingerprint"]
    for file in (target / "domain.json", *(target / "features").glob("*.json")):
        file.write_text(file.read_text().replace(info["fingerprint"], changed))


@pytest.mark.slow
def test_with_other_test_targets_configs_best_epochs_and_weights_are_the_same(tmp_path: Path) -> None:
    write_demo(tmp_path / "one", config=TINY_SHOPS)
    other_test_targets(tmp_path / "one" / "attic", tmp_path / "two" / "attic")
    one = run_without_ray(tmp_path / "study_one", tmp_path / "one" / "attic")
    two = run_without_ray(tmp_path / "study_two", tmp_path / "two" / "attic")
    assert list(one) == list(two)
    assert len(one) == 2 * (3 + 2) + 1
    for name, (config, outcome, best_epoch, weights, test) in one.items():
        assert (config, outcome, best_epoch) == two[name][:3], name
        assert set(weights) == set(two[name][3])
        assert all(np.array_equal(weights[tensor], two[name][3][tensor]) for tensor in weights), name
        assert test is None or test != two[name][4], "the replaced targets changed no test metric: the test shows nothing"
