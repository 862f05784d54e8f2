"""Facts about whole studies on tiny generated domains: through Ray with a kill in the middle, and blindness to the test split.

And about what a study begins with: the domains it is told to run on, the depth that was pre-trained, its pinned spec.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import TINY_MODEL
from mlflow import MlflowClient
from safetensors.numpy import load_file

from mmm4rec.config import from_dict, to_dict
from mmm4rec.data.demo import DemoConfig, write_demo
from mmm4rec.data.domain import Domain, fingerprint, open_domain
from mmm4rec.errors import BadInput
from mmm4rec.run import execute
from mmm4rec.training.checkpoint import save_model
from studies.cells import Cell, Source, build_cells
from studies.domains import make_domains
from studies.engine import run_config
from studies.mlflow_tracker import store_uri
from studies.plan import Plan
from studies.pretrain import pretrain_config
from studies.spec import Domains, Spec, TextEncoder, load_spec, on_domains
from studies.state import Journal, Trial
from studies.study import open_study
from studies.suggestions import Suggestions
from studies.transfer_sweep import main

ROOT = Path(__file__).parent.parent
TINY = DemoConfig(sources=("bazaar",), targets=("attic",), source_users=80, source_items=40, target_users=60, target_items=40, dimensions=8)
SPEC = {
    "study": "tiny",
    "domains": {"demo": True},
    "model": {"width": 16, "ffn_width": 16, "head_width": 8, "state": 8},
    "training": {"batch_size": 64, "accumulation": 1},
    "pretrain": {"sources": ["bazaar"], "training": {"epochs": 2, "batch_size": 64, "accumulation": 1}, "workers": 2},
    "space": {
        "training.learning_rate": {"low": 1e-3, "high": 1e-1, "log": True},
        "model.filter_size": {"choices": [2, 4]},
        "model.dropout": {"low": 0.0, "high": 0.5},
    },
    "arms": {
        "pretrained": {"init": "pretrained"},
        "scratch": {},
        "no_time": {"init": "pretrained", "model": {"time": False}},
        "popularity": {"recommender": "popularity"},
    },
    "cells": [{"domains": ["attic"], "arms": ["pretrained", "scratch", "no_time", "popularity"]}],
    "baseline": "scratch",
    "budget": {"search_trials": 3, "epochs": 4, "grace_epochs": 1, "reduction": 2, "confirm_seeds": 2},
}
TRIALS = {("search", arm): 3 for arm in ("pretrained", "scratch", "no_time")}
TRIALS |= {("confirm", arm): 2 for arm in ("pretrained", "scratch", "no_time")} | {("confirm", "popularity"): 1}


def start(folder: Path, **changes: object) -> subprocess.Popen[str]:
    spec = folder / "tiny.yaml"
    spec.write_text(yaml.safe_dump({**SPEC, **changes}))
    command = [sys.executable, str(ROOT / "studies" / "transfer_sweep.py"), "--spec", str(spec), "--out", str(folder)]
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder)


def trial_workers(driver: int) -> list[int]:
    """The processes below this one that run trials."""
    parents, names = {}, {}
    for process in (path for path in Path("/proc").iterdir() if path.name.isdigit()):
        with suppress(OSError):
            parents[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(process.name)] = (process / "cmdline").read_bytes()

    def is_below(pid: int) -> bool:
        return pid == driver or (pid in parents and is_below(parents[pid]))

    return [pid for pid, name in names.items() if b"ImplicitFunc.train" in name and is_below(pid)]


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
    write_demo(folder / "tiny" / "domains", config=TINY)
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
@pytest.mark.timeout(280)
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the workers in /proc, which Linux has")
def test_a_trial_whose_worker_is_killed_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    write_demo(tmp_path / "tiny" / "domains", config=TINY)
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
            killed = trial_workers(driver.pid)[:1]
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
    assert told == [[arm, "scratch", seeds] for arm, seeds in (("pretrained", "2"), ("no_time", "2"), ("popularity", "1"))]


def run_without_ray(folder: Path, domain: Path) -> dict[str, tuple]:
    """The study's scratch arms on one domain, one trial at a time: by cell the chosen config and what each trial came to."""
    wanted = {**SPEC, "arms": {"scratch": {}, "text_only": {"model": {"modalities": "text"}}, "popularity": {"recommender": "popularity"}}}
    spec = from_dict(Spec, {**wanted, "cells": [{"domains": ["attic"], "arms": list(wanted["arms"])}]}, source="test")  # type: ignore[call-overload]
    opened = open_domain(domain)
    cells, _ = build_cells(spec, {"attic": Source(str(domain), opened.fingerprint, True)})
    folder.mkdir()
    journal = Journal(folder / "study.sqlite3")
    journal.add_cells(cells)
    plan, suggestions = Plan(journal, cells, spec.budget, spec.seed), Suggestions(journal, folder / "optuna.sqlite3", seed_name="tiny 0")
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
    write_demo(target.parent, config=TINY)
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
    write_demo(tmp_path / "one", config=TINY)
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


def spec(**changes: object) -> Spec:
    return from_dict(Spec, {**SPEC, **changes}, source="test")


def sources(*names: str) -> dict[str, Source]:
    return {name: Source(f"/{name}", f"print-{name}", True) for name in ("bazaar", "attic", *names)}


def trial_of(cell: Cell) -> Trial:
    return Trial("", cell.name, "confirm", 0, 1, {}, "running", None, None, 0, None, False)


def test_seen_items_are_left_out_in_every_run_or_in_none(make_domain: Callable[..., Domain], tmp_path: Path) -> None:
    domain = make_domain()
    opened = {**sources(), "attic": Source(str(domain.path), domain.fingerprint, True)}
    plain, masked = (build_cells(spec(mask_seen=on, model=TINY_MODEL), opened)[0] for on in (False, True))
    assert all("data" not in cell.run for cell in plain), "trial keys of other studies must stay"
    assert all(run_config(cell, trial_of(cell), Path("x")).data.mask_seen for cell in masked)
    assert not any(run_config(cell, trial_of(cell), Path("x")).data.mask_seen for cell in plain)
    assert [pretrain_config(spec(mask_seen=on), opened).data.mask_seen for on in (False, True)] == [False, True]
    for cell in (plain[-1], masked[-1]):
        list(execute(run_config(cell, trial_of(cell), None), tmp_path / cell.fingerprint))
        result = json.loads((tmp_path / cell.fingerprint / "result.json").read_text())
        assert result["fingerprint"] == cell.fingerprint
    assert (plain[-1].fingerprint, masked[-1].fingerprint) == (domain.fingerprint, f"{domain.fingerprint}+mask_seen")


def test_on_runs_every_arm_on_the_readers_domains() -> None:
    one = {**SPEC["arms"]["no_time"], "init": "scratch"}  # type: ignore[index]
    groups = [{"domains": ["attic"], "arms": ["scratch", "plain"]}, {"domains": ["corner"], "arms": ["popularity", "scratch"]}]
    arms = {**SPEC["arms"], "plain": one}  # type: ignore[dict-item]
    changed = on_domains(spec(pretrain={"checkpoint": "x.safetensors"}, arms=arms, cells=groups), ["shop", "stall"])
    assert changed.study == "tiny_shop_stall"
    assert changed.domains == Domains(prepare={"shop": "shop", "stall": "stall"})
    cells = build_cells(changed, sources("shop", "stall"))[0]
    assert [cell.name for cell in cells] == [f"{shop}/{arm}" for shop in ("shop", "stall") for arm in ("scratch", "plain", "popularity")]
    with pytest.raises(BadInput, match=r"pre-trains on bazaar, which --on takes away"):
        on_domains(spec(), ["shop"])
    with pytest.raises(BadInput, match="none twice"):
        on_domains(spec(pretrain={"checkpoint": "x.safetensors"}), ["shop", "shop"])


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--spec", "demo", "--on", "shop", "--dry-run"]) == 2
    assert "--on takes away" in capsys.readouterr().err
    assert main(["--spec", "scientific_62_steps", "--on", "shop", "stall", "--dry-run"]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[:-1]] == [
        f"{shop}/{arm}" for shop in ("shop", "stall") for arm in load_spec("scientific_62_steps").arms
    ]


def test_a_prepared_domain_is_read_where_it_is_and_never_written_to(make_domain: Callable[..., Domain], tmp_path: Path) -> None:
    domain = make_domain("shop")
    before = {file: file.stat().st_mtime_ns for file in domain.path.rglob("*")}
    domains, folder = Domains(prepare={"mine": "shop"}), tmp_path / "study"
    found = make_domains(domains, folder, data=tmp_path, seed=0)
    assert found == {"mine": Source(str(domain.path.resolve()), domain.fingerprint, True)}
    assert not folder.exists()
    encoded = Domains(prepare={"mine": "shop"}, text_encoder=TextEncoder(fit_on=("mine",), domains=("mine",)))
    with pytest.raises(BadInput, match="domain 'mine' was prepared elsewhere"):
        make_domains(encoded, folder, data=tmp_path, seed=0)
    assert before == {file: file.stat().st_mtime_ns for file in domain.path.rglob("*")}
    with pytest.raises(BadInput, match="Give it with --data DIR"):
        make_domains(domains, folder, data=None, seed=0)


def layers_of(wanted: Spec) -> tuple[list[int], tuple[str, ...]]:
    """By cell the layers that its runs have; and the warnings."""
    cells, warnings = build_cells(wanted, sources())
    return [run_config(cell, trial_of(cell), Path("x")).model.layers for cell in cells], warnings


DEPTH_ARMS = {"pretrained": {"init": "pretrained"}, "scratch": {}, "one": {"init": "pretrained", "model": {"layers": 1}}}
DEPTH_CELLS = [{"domains": ["attic"], "arms": list(DEPTH_ARMS)}]
LOST = "cell 'attic/one' has 1 of the 3 pre-trained layers: layer 2, 3 is dropped."


def test_cells_are_as_deep_as_was_pre_trained_and_dropped_layers_are_named() -> None:
    deep = {"sources": ["bazaar"], "model": {"layers": 3}}
    plain = {"arms": DEPTH_ARMS, "cells": DEPTH_CELLS}
    assert layers_of(spec(pretrain=deep, **plain)) == ([3, 3, 1], (LOST,))
    assert layers_of(spec(pretrain=deep, model={"layers": 2}, **plain))[0] == [3, 3, 1]
    assert layers_of(spec(pretrain={"sources": ["bazaar"]}, model={"layers": 2}, **plain)) == (
        [2, 2, 1],
        ("cell 'attic/one' has 1 of the 2 pre-trained layers: layer 2 is dropped.",),
    )
    assert layers_of(spec(pretrain={"sources": ["bazaar"]}, **plain)) == ([1, 1, 1], ())
    deeper = {"three": {"init": "pretrained", "model": {"layers": 3}}}
    assert layers_of(spec(arms=deeper, cells=[{"domains": ["attic"], "arms": ["three"]}], baseline=None)) == ([3], ())


def test_a_depth_that_the_model_has_anyway_changes_no_trial_key() -> None:
    with_pretraining = build_cells(spec(arms=DEPTH_ARMS, cells=DEPTH_CELLS), sources())[0]
    assert "layers" not in with_pretraining[0].run["model"]


def test_the_depth_of_a_checkpoint_is_read_from_its_header(tmp_path: Path) -> None:
    file = tmp_path / "best.safetensors"
    save_model(file, {"x": torch.zeros(1)}, {"config": {"model": {"layers": 3}}})
    given = spec(pretrain={"checkpoint": str(file)}, arms=DEPTH_ARMS, cells=DEPTH_CELLS)
    assert layers_of(given) == ([3, 3, 1], (LOST,))
    file.write_bytes(b"no weights")
    with pytest.raises(BadInput, match="is no model of ours"):
        layers_of(given)
    file.unlink()
    assert layers_of(given) == ([1, 1, 1], ())


def test_a_begun_study_takes_another_baseline_and_no_other_protocol(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    write_demo(tmp_path / "tiny" / "domains", config=TINY)
    for baseline in ("scratch", "pretrained"):
        with open_study(spec(baseline=baseline), tmp_path, data=None) as study:
            assert len(study.plan.cells) == 4
    with pytest.raises(BadInput, match="mask_seen: False then, True now"), open_study(spec(mask_seen=True), tmp_path, data=None):
        pass
