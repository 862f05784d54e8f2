"""The command line: exit status, messages, files, and nothing left behind by bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TINY_MODEL
from test_prepare import BAD_INPUTS

from mmm4rec.__main__ import main
from mmm4rec.config import from_dict, override, to_dict
from mmm4rec.data.domain import Domain
from mmm4rec.errors import BadInput
from mmm4rec.run import RunConfig
from mmm4rec.tracking import metric_name, mlflow_name
from mmm4rec.training.metrics import METRIC_NAMES

SETS = [f"model.{key}={value}" for key, value in TINY_MODEL.items()]


@pytest.mark.parametrize(("name", "build", "fragments"), BAD_INPUTS, ids=[name for name, _, _ in BAD_INPUTS])
def test_prepare_of_bad_input_exits_with_2(
    name: str, build: Callable[[Path], Path], fragments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = build(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["prepare", str(source), str(tmp_path / "out" / "domain")]) == 2
    message = capsys.readouterr().err
    assert all(fragment in message for fragment in fragments), message
    assert [path for path in sorted(tmp_path.rglob("*")) if path not in before and path != tmp_path / "out"] == []


def test_an_existing_domain_stays_without_force(make_domain: Callable[..., Domain], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    name, build, _ = BAD_INPUTS[0]
    domain = make_domain()
    before = {path: path.read_bytes() for path in domain.path.rglob("*") if path.is_file()}
    assert main(["prepare", str(build(tmp_path)), str(domain.path)]) == 2
    assert {path: path.read_bytes() for path in domain.path.rglob("*") if path.is_file()} == before, name
    assert capsys.readouterr().err


def test_train_keeps_the_files_in_their_form(make_domain: Callable[..., Domain], tmp_path: Path) -> None:
    domain = make_domain()
    out = tmp_path / "run"
    config = tmp_path / "run.yaml"
    config.write_text("training: {batch_size: 64, learning_rate: 1e-3}\nmodel: {layers: 2}\n")
    arguments = ["train", "--domain", str(domain.path), "--out", str(out), "--config", str(config), "--seed", "5", "--epochs", "2"]
    assert main([*arguments, "--set", *SETS[:2], "--set", *SETS[2:], "training.accumulation=1"]) == 0
    curve = [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in curve] == [1, 2]
    for line in curve:
        assert {"epoch", "optimizer_steps", "train_loss", "train_seconds", "valid_seconds", "valid"} <= set(line)
        assert set(line["valid"]) == set(METRIC_NAMES)
    result = json.loads((out / "result.json").read_text())
    keys = {"best_epoch", "valid", "test", "config", "fingerprint", "seed", "code_version", "seconds", "peak_memory_bytes"}
    assert keys <= set(result)
    assert result["seed"] == 5
    assert result["config"]["model"]["layers"] == 2
    assert result["config"]["training"]["learning_rate"] == 1e-3
    assert result["fingerprint"] == domain.fingerprint
    torch.load(out / "last.ckpt", weights_only=True)
    again = from_dict(RunConfig, result["config"], source="result.json")
    assert to_dict(again) == result["config"]


def test_print_config_shows_every_key_and_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "--domain", "anywhere", "--epochs", "7", "--set", "model.width=32", "--print-config"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["training"]["epochs"] == 7
    assert from_dict(RunConfig, shown, source="printed").model.width == 32
    assert main(["train", "--domain", "anywhere"]) == 2
    assert "Give --out DIR" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--set", "model.widht=3"], "unknown key widht. Known keys: width"),
        (["--set", "model.width=three"], "'model.width' is 'three'; it must be a whole number"),
        (["--set", "model.filter_size=99"], "filter_size is 99; with max_len 20 it must be in 1..11"),
        (["--set", "training.valid_metric=auc"], "valid_metric is 'auc'"),
        (["--set", "training.loss=sampled", "training.negatives=0"], "negatives is 0; it must be at least 1"),
        (["--set", "training.precision=fp8"], "'training.precision' is 'fp8'; it must be 'float32' or 'tf32' or 'bf16'"),
        (["--set", "model.width"], "'model.width' is no assignment"),
        (["--set", "model.width=["], "has a value that is not YAML"),
        (["--seed", "-1"], "seed is -1; it must be at least 0"),
        (["--init", "nowhere.safetensors"], "nowhere.safetensors: is no model of ours"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["--domain", "nowhere"], "nowhere: is not a domain"),
        (["--device", "abacus"], "device is 'abacus'"),
    ],
    ids=str,
)
def test_train_of_bad_input_exits_with_2(
    arguments: list[str], fragment: str, make_domain: Callable[..., Domain], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    assert main(["train", "--domain", str(make_domain().path), "--out", str(out), *arguments]) == 2
    assert fragment in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("damage", ["cut", "features", "version"])
def test_a_damaged_domain_is_refused(
    damage: str, make_domain: Callable[..., Domain], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = make_domain().path
    if damage == "cut":
        (path / "items.npy").write_bytes((path / "items.npy").read_bytes()[:-40])
    elif damage == "features":
        for file in ("text.npy", "text.present.npy", "text.json"):
            (path / "features" / file).write_bytes((make_domain("other", items=29).path / "features" / file).read_bytes())
    else:
        info = path / "domain.json"
        info.write_text(info.read_text().replace('"schema_version": 1', '"schema_version": 7'))
    assert main(["train", "--domain", str(path), "--out", str(tmp_path / "run")]) == 2
    fragment = {"cut": "is damaged", "features": "belongs to domain", "version": "schema_version 7; this version reads 1"}[damage]
    assert fragment in capsys.readouterr().err


def test_evaluate_and_recommend(make_domain: Callable[..., Domain], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    domain = str(make_domain().path)
    assert main(["train", "--domain", domain, "--out", str(tmp_path / "run"), "--epochs", "1", "--set", *SETS]) == 0
    model = str(tmp_path / "run" / "best.safetensors")
    capsys.readouterr()
    assert main(["evaluate", "--model", model, "--domain", domain]) == 0
    values = json.loads(capsys.readouterr().out)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert {name: values[name] for name in METRIC_NAMES} == result["test"]
    assert main(["recommend", "--model", model, "--domain", domain, "--user", "u1", "--top", "3"]) == 0
    assert len(json.loads(capsys.readouterr().out)["items"]) == 3
    other = str(make_domain("other", seed=2).path)
    assert main(["evaluate", "--model", model, "--domain", other]) == 2
    assert "has learned single items of" in capsys.readouterr().err


def test_a_run_that_diverges_fails_and_keeps_no_perfect_score(
    make_domain: Callable[..., Domain], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Scores that are not finite are beaten by none; they must not count as rank one."""
    arguments = ["train", "--domain", str(make_domain().path), "--out", str(tmp_path / "run"), "--epochs", "1"]
    assert main([*arguments, "--set", *SETS, "training.learning_rate=1e30"]) == 1
    assert "not finite" in capsys.readouterr().err
    assert not (tmp_path / "run" / "result.json").exists()
    assert not (tmp_path / "run" / "best.safetensors").exists()


def test_metric_names_survive_mlflow() -> None:
    for name in METRIC_NAMES:
        assert "@" not in mlflow_name(f"best_valid {name}")
        assert metric_name(mlflow_name(f"valid {name}")) == f"valid {name}"
    assert mlflow_name("valid ndcg@10") == "valid/ndcg_at_10"


def test_override_reads_numbers_as_people_write_them() -> None:
    data = override({"training": {"epochs": 3}}, ["training.learning_rate=1e-3", "model.filter_size=null", "data.domains=[a, b]"])
    assert data == {"training": {"epochs": 3, "learning_rate": 1e-3}, "model": {"filter_size": None}, "data": {"domains": ["a", "b"]}}
    with pytest.raises(BadInput, match="no assignment"):
        override({}, ["model.width"])
