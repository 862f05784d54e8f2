"""Facts about a trial and its mirror that need no Ray cluster."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY_MODEL

from mmm4rec.config import from_dict, to_dict
from mmm4rec.data.domain import Domain
from mmm4rec.execute import execute
from mmm4rec.run import RunConfig
from studies import engine
from studies.mlflow_tracker import MlflowTracker
from studies.spec import Spec
from studies.state import Journal

SPEC = {"study": "s", "domains": {"demo": True}, "arms": {"scratch": {}}, "cells": [{"domains": ["a"], "arms": ["scratch"]}]}


@pytest.mark.parametrize("lines_in_the_curve", [0, 1, 2])
def test_a_resumed_trial_tells_every_epoch(
    lines_in_the_curve: int, make_domain: Callable[..., Domain], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the kill came after an epoch's last.ckpt and before its line in the curve."""
    told: list[int] = []
    monkeypatch.setattr(engine.tune, "report", lambda metrics: told.append(json.loads(metrics["message"])["row"]["epoch"]))
    training = {"epochs": 4, "batch_size": 64, "accumulation": 1}
    domain = make_domain()
    plain = {"data": {"domains": [str(domain.path)]}, "model": TINY_MODEL, "training": training, "device": "cpu"}
    config = from_dict(RunConfig, plain, source="test")
    out = tmp_path / "trial"
    reports = execute(config, out)
    next(reports), next(reports)
    reports.close()
    lines = (out / "curve.jsonl").read_text().splitlines(keepends=True)
    (out / "curve.jsonl").write_text("".join(lines[:lines_in_the_curve]))
    trial = {"cpus": 1, "gpus": 0, "out": str(out), "run": to_dict(config), "halvings": 0}
    trial["domains"] = [(str(domain.path), domain.fingerprint)]
    engine.run_trial(trial)
    assert told == [1, 2, 3, 4]
    engine.run_trial(trial)
    assert told == [1, 2, 3, 4] * 2


@pytest.mark.timeout(60)
def test_a_store_that_cannot_be_opened_is_an_error_and_no_endless_wait(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("this is no database")
    Journal(tmp_path / "study.sqlite3").close()
    tracker = MlflowTracker(tmp_path, from_dict(Spec, SPEC, source="test"), [], tmp_path / "study.sqlite3")
    tracker.start()
    tracker.pretraining([], [], None)
    with pytest.raises(Exception, match="database"):
        tracker.flush()
    tracker.close()
