"""Facts about pre-training through Ray Train: any number of workers gives one curve, and kills change nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from mlflow import MlflowClient

from mmm4rec.config import from_dict, to_dict
from mmm4rec.data.demo import write_demo
from mmm4rec.errors import BadInput
from studies.cells import Source
from studies.checkpoints import newest_steps
from studies.mlflow_store import search, store_uri
from studies.pretrain import pretrain_config
from studies.soak import ROOT, processes_below, small_cluster
from studies.soak_checks import Violated
from studies.soak_pretrain import BETWEEN_REPORTS, EVERY_STEPS, SHOPS, WORKER, check, make_spec, run
from studies.soak_pretrain import start as start_on
from studies.spec import Pretrain, Spec
from studies.storage import Storage

EPOCHS = 4


def start(out: Path, spec: Spec) -> subprocess.Popen[str]:
    if not (out / spec.study / "domains").exists():
        (out / spec.study).mkdir(parents=True, exist_ok=True)
        write_demo(out / spec.study / "domains", config=SHOPS)
    (out / f"{spec.study}.yaml").write_text(yaml.safe_dump(to_dict(spec)))
    command = [sys.executable, str(ROOT / "studies" / "pretrain.py"), "--spec", str(out / f"{spec.study}.yaml"), "--out", str(out)]
    environment = {**os.environ, "RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(driver: subprocess.Popen[str]) -> None:
    try:
        said, _ = driver.communicate(timeout=270)
    finally:
        driver.kill()
        driver.wait()
    assert driver.returncode == 0, said


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a pre-training on two workers was left alone; `alone` is its study."""
    out = tmp_path_factory.mktemp("pretrain")
    finish(start(out, make_spec("alone", EPOCHS, workers=2)))
    return out


@pytest.mark.slow
def test_one_worker_gives_the_curve_of_two(alone: Path) -> None:
    """Losses at every report to float tolerance: a step's examples are summed in another order."""
    finish(start(alone, make_spec("one", EPOCHS, workers=1)))
    two, one = (lines(alone / name / "pretrain" / "steps.jsonl") for name in ("alone", "one"))
    assert {row["workers"] for row in two} == {2}
    assert {row["workers"] for row in one} == {1}
    assert [row["optimizer_steps"] for row in one] == [row["optimizer_steps"] for row in two]
    for key in ("train_loss", "gradient_norm"):
        np.testing.assert_allclose([row[key] for row in one], [row[key] for row in two], rtol=2e-4)
    check(alone, "one", kills=0)


@pytest.mark.slow
def test_workers_killed_twice_on_the_way_give_the_same_end(alone: Path) -> None:
    """At a moment of a third and of two thirds of the way. Ray starts both workers again, from the newest checkpoint."""
    spec = make_spec("killed", EPOCHS, workers=2)
    spec = replace(spec, pretrain=replace(spec.pretrain, min_workers=None))  # type: ignore[type-var]
    driver, place = start(alone, spec), Storage(str(alone / "killed" / "pretrain" / "checkpoints"))
    total = lines(alone / "alone" / "pretrain" / "steps.jsonl")[-1]["optimizer_steps"]
    try:
        for share in (1 / 3, 2 / 3):
            deadline = time.monotonic() + 120
            while newest_steps(place) < share * total:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            os.kill(processes_below(driver.pid, WORKER)[0], signal.SIGKILL)
        finish(driver)
    finally:
        driver.kill()
    assert all(0 <= steps <= 2 * EVERY_STEPS for steps in check(alone, "killed", kills=2))
    assert (alone / "killed" / "pretrain" / "log.txt").read_text().count("begins or goes on") == 3


@pytest.mark.slow
def test_mlflow_has_the_curves_of_what_it_came_to(alone: Path) -> None:
    client = MlflowClient(tracking_uri=store_uri(alone / "alone"))
    (run,) = search(client, [e.experiment_id for e in client.search_experiments()], "tags.`mmm4rec.phase` = 'pretrain'")
    steps, curve = (lines(alone / "alone" / "pretrain" / name) for name in ("steps.jsonl", "curve.jsonl"))

    def history(name: str) -> list[tuple[int, float]]:
        return sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, name))

    assert [row["optimizer_steps"] % BETWEEN_REPORTS for row in steps] == [0] * len(steps)
    assert history("step/loss") == [(row["optimizer_steps"], row["train_loss"]) for row in steps]
    assert history("step/loss/market") == [(row["optimizer_steps"], row["domain_losses"]["market"]) for row in steps]
    assert history("step/examples_per_second_per_worker") == [(row["optimizer_steps"], row["examples_per_second"] / 2) for row in steps]
    assert history("zero_shot/attic") == [(row["optimizer_steps"], row["zero_shot"]["attic"]) for row in curve]
    assert history("train/loss/bazaar") == [(row["optimizer_steps"], row["domain_losses"]["bazaar"]) for row in curve]


def copy_of(out: Path, name: str) -> None:
    subprocess.run(["cp", "-r", str(out / "alone"), str(out / name)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["a step twice", "a loss", "many steps again"])
def test_the_soaks_check_sees_damage(alone: Path, damage: str) -> None:
    name = damage.replace(" ", "_")
    copy_of(alone, name)
    folder = alone / name / "pretrain"
    check(alone, name, kills=0)
    rows = lines(folder / "steps.jsonl")
    if damage == "a step twice":
        rows.insert(3, rows[3])
    elif damage == "a loss":
        rows[3]["train_loss"] *= 1.01
    else:
        with (folder / "log.txt").open("a") as log:
            log.write("x begins or goes on\nx had come to step 90\nx goes on from 0000000060.ckpt\n")
    (folder / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(Violated):
        check(alone, name, kills=1)


def spec_of(**pretrain: Any) -> Spec:
    plain = to_dict(make_spec("x", 1, workers=1))
    plain["pretrain"] = {"sources": ["bazaar"], **pretrain}
    return from_dict(Spec, plain, source="test")


def test_what_cannot_be_is_refused() -> None:
    sources = {"bazaar": Source("/bazaar", "b", True), "attic": Source("/attic", "a", True, {"text": "t"})}
    with pytest.raises(BadInput, match=r"checkpoint_every_steps is 25; it must be a multiple of training\.steps_between_reports, 10"):
        pretrain_config(spec_of(checkpoint_every_steps=25), sources)
    with pytest.raises(ValueError, match="min_workers no more"):
        Pretrain(sources=("a",), workers=1, min_workers=2)
    with pytest.raises(BadInput, match="unknown domain moon"):
        pretrain_config(spec_of(sources=["moon"]), sources)


def test_target_domains_are_watched_where_the_model_can_rank_them() -> None:
    """With features, with times where the sources have them, and without item ids."""
    bazaar, attic = Source("/bazaar", "b", True, {"text": "t"}), Source("/attic", "a", True, {"text": "t"})
    watched = {"bazaar": bazaar, "attic": attic}
    assert pretrain_config(spec_of(), watched).data.zero_shot == ("/attic",)
    assert pretrain_config(spec_of(zero_shot=False), watched).data.zero_shot == ()
    assert pretrain_config(spec_of(model={"ids": True}), watched).data.zero_shot == ()
    assert pretrain_config(spec_of(), watched | {"attic": replace(attic, features={})}).data.zero_shot == ()
    lexical = {"bazaar": replace(bazaar, encoders={"text": "lexical"})}
    for encoders, seen in (({"text": "lexical"}, ("/attic",)), ({"text": "other"}, ()), ({"image": "other"}, ("/attic",))):
        assert pretrain_config(spec_of(), lexical | {"attic": replace(attic, encoders=encoders)}).data.zero_shot == seen
    assert pretrain_config(spec_of(), watched | {"attic": replace(attic, has_timestamps=False)}).data.zero_shot == ()
    untimed = {"bazaar": replace(bazaar, has_timestamps=False), "attic": replace(attic, has_timestamps=False)}
    assert pretrain_config(spec_of(), untimed).data.zero_shot == ("/attic",)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_training_goes_on_with_fewer_workers(tmp_path: Path) -> None:
    """A node is taken and none joins: one worker goes on, from the newest checkpoint, to the same end.

    Ray looks for room to grow back once a minute: longer than this training takes.
    """
    with small_cluster() as cluster:
        run(cluster, make_spec("alone", EPOCHS, workers=2), tmp_path, None)
        spec, file = make_spec("elastic", EPOCHS, workers=2), tmp_path / "elastic" / "pretrain" / "steps.jsonl"
        (tmp_path / spec.study).mkdir()
        write_demo(tmp_path / spec.study / "domains", config=SHOPS)
        (tmp_path / f"{spec.study}.yaml").write_text(yaml.safe_dump(to_dict(spec)))
        driver = start_on(cluster, spec, tmp_path)

        def until_workers_are(count: int) -> None:
            deadline = time.monotonic() + 240
            while not file.exists() or not (rows := lines(file)) or rows[-1]["workers"] != count:
                assert time.monotonic() < deadline
                assert driver.poll() is None
                time.sleep(0.1)

        try:
            until_workers_are(2)
            cluster.remove_node(sorted(cluster.worker_nodes, key=lambda node: str(node.unique_id))[0], allow_graceful=False)
            until_workers_are(1)
            assert driver.wait(timeout=480) == 0
        finally:
            driver.kill()
        check(tmp_path, "elastic", kills=2)
