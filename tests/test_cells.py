"""What a study begins with: its domains, the depth that was pre-trained, the protocol of its metrics, its pinned spec."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_MODEL, TINY_SHOPS, TINY_STUDY

from mmm4rec.config import from_dict, to_dict
from mmm4rec.data.demo import write_demo
from mmm4rec.data.domain import Domain, open_domain
from mmm4rec.data.features import MODALITIES, add_features, load_features
from mmm4rec.errors import BadInput
from mmm4rec.execute import execute
from mmm4rec.run import RunConfig, assemble
from mmm4rec.training.checkpoint import save_model
from studies.cells import Cell, Source, build_cells
from studies.domains import make_domains
from studies.engine import run_config
from studies.pretrain import pretrain_config
from studies.spec import Domains, Spec, TextEncoder, load_spec, on_domains
from studies.state import Trial
from studies.study import open_study
from studies.transfer_sweep import main


def spec(**changes: object) -> Spec:
    return from_dict(Spec, {**TINY_STUDY, **changes}, source="test")


def sources(*names: str) -> dict[str, Source]:
    return {name: Source(f"/{name}", f"print-{name}", True) for name in ("bazaar", "attic", *names)}


def trial_of(cell: Cell) -> Trial:
    return Trial("", cell.name, "confirm", 0, 1, {}, "running", None, None, 0, None, False)


def test_seen_items_are_left_out_in_every_run_or_in_none(make_domain: Callable[..., Domain], tmp_path: Path) -> None:
    domain = make_domain()
    opened = {**sources(), "attic": Source(str(domain.path), domain.fingerprint, True)}
    plain, masked = (build_cells(spec(mask_seen=on, model=TINY_MODEL), opened)[0] for on in (False, True))
    assert all(run_config(cell, trial_of(cell), Path("x")).data.mask_seen for cell in masked)
    assert not any(run_config(cell, trial_of(cell), Path("x")).data.mask_seen for cell in plain)
    assert [pretrain_config(spec(mask_seen=on), opened).data.mask_seen for on in (False, True)] == [False, True]
    for cell in (plain[-1], masked[-1]):
        list(execute(run_config(cell, trial_of(cell), None), tmp_path / cell.fingerprint))
        result = json.loads((tmp_path / cell.fingerprint / "result.json").read_text())
        assert result["fingerprint"] == cell.fingerprint
    assert (plain[-1].fingerprint, masked[-1].fingerprint) == (domain.fingerprint, f"{domain.fingerprint}+mask_seen")


def test_on_runs_every_arm_on_the_readers_domains() -> None:
    one = {**TINY_STUDY["arms"]["no_time"], "init": "scratch"}  # type: ignore[index]
    groups = [{"domains": ["attic"], "arms": ["scratch", "plain"]}, {"domains": ["corner"], "arms": ["popularity", "scratch"]}]
    arms = {**TINY_STUDY["arms"], "plain": one}  # type: ignore[dict-item]
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
    digests = {modality: load_features(domain, [modality]).digests[modality] for modality in MODALITIES}
    assert found == {"mine": Source(str(domain.path.resolve()), domain.fingerprint, True, digests)}
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
    write_demo(tmp_path / "tiny" / "domains", config=TINY_SHOPS)
    for baseline in ("scratch", "pretrained"):
        with open_study(spec(baseline=baseline), tmp_path, data=None) as study:
            assert len(study.plan.cells) == 4
    with pytest.raises(BadInput, match="mask_seen: False then, True now"), open_study(spec(mask_seen=True), tmp_path, data=None):
        pass


def test_other_features_are_another_study_and_a_domain_without_any_is_named(make_domain: Callable[..., Domain], tmp_path: Path) -> None:
    def begin() -> list[str]:
        said: list[str] = []
        with open_study(wanted, tmp_path / "out", data=tmp_path, say=said.append):
            return said

    wanted = on_domains(spec(pretrain=None, arms={"scratch": {}}, cells=[{"domains": ["x"], "arms": ["scratch"]}]), ["shop"])
    domain = make_domain("shop", modalities=())
    assert any("domain 'shop' has no features: its cells learn from item ids alone" in line for line in begin())
    add_features(domain, "text", np.ones((domain.n_items, 3), dtype=np.float32), np.ones(domain.n_items, dtype=bool), encoder="ones")
    with pytest.raises(BadInput, match=r"features"):
        begin()


def test_generated_shops_may_be_others_than_the_demos_and_stand_beside_prepared_domains(
    make_domain: Callable[..., Domain], tmp_path: Path
) -> None:
    make_domain("own")
    domains = {"demo": to_dict(TINY_SHOPS) | {"sizes": {"attic": [70, 45]}}, "prepare": {"own": "own"}}
    wanted = from_dict(Domains, domains, source="test")
    assert from_dict(Domains, to_dict(wanted), source="test") == wanted
    made = make_domains(wanted, tmp_path / "domains", data=tmp_path, seed=0)
    assert list(made) == [*TINY_SHOPS.sources, *TINY_SHOPS.targets, "own"]
    attic = open_domain(made["attic"].path)
    assert (attic.n_users, attic.n_items) == (70, 45)
    wider = from_dict(Domains, domains | {"demo": to_dict(TINY_SHOPS) | {"sizes": {"attic": [71, 45]}}}, source="test")
    with pytest.raises(BadInput, match=r"another shop 'attic' than the spec: \(70, 45\) there, \(71, 45\) in the spec"):
        make_domains(wider, tmp_path / "domains", data=tmp_path, seed=0)
    (tmp_path / "prepared").mkdir()
    with pytest.raises(BadInput, match="holds no generated shops"):
        make_domains(wanted, tmp_path / "prepared", data=tmp_path, seed=0)
    with pytest.raises(BadInput, match=r"sizes has nowhere"):
        from_dict(Domains, {"demo": {"sizes": {"nowhere": [1, 1]}}}, source="test")


@pytest.mark.parametrize("name", ["..", "a/b"])
def test_on_takes_names_of_folders(name: str) -> None:
    with pytest.raises(BadInput, match="no folder right under --data"):
        on_domains(spec(pretrain=None, arms={"scratch": {}}, cells=[{"domains": ["x"], "arms": ["scratch"]}]), [name])


def test_a_zero_shot_arm_is_the_pre_trained_model_untrained() -> None:
    """One trial, nothing searched, no epochs, no ids; it needs something to begin from."""
    arms = {"zero_shot": {"init": "pretrained", "zero_shot": True}, "pretrained": {"init": "pretrained"}}
    cells, _ = build_cells(
        spec(pretrain={"sources": ["bazaar"]}, baseline=None, arms=arms, cells=[{"domains": ["x"], "arms": list(arms)}]),
        {"x": Source("/x", "f", True), "bazaar": Source("/b", "b", True)},
    )
    zero_shot, pretrained = cells
    assert (zero_shot.search_trials, zero_shot.confirm_seeds, zero_shot.space) == (0, 1, {})
    assert (zero_shot.run["training"]["epochs"], zero_shot.run["model"]["ids"]) == (0, False)
    assert pretrained.run["training"]["epochs"] > 0
    with pytest.raises(BadInput, match="zero_shot needs init: pretrained"):
        spec(baseline=None, arms={"zero_shot": {"zero_shot": True}}, cells=[{"domains": ["x"], "arms": ["zero_shot"]}])


def test_a_recommender_takes_of_the_study_what_its_config_knows() -> None:
    """Of the study's sizes and space; an arm's own words must fit. What needs no training is searched only in its own config."""
    arms = {
        "gru": {"recommender": "gru4rec", "space": {"model.recurrent_width": {"choices": [8, 16]}}},
        "knn": {"recommender": "item_knn", "space": {"model.window": {"low": 1, "high": 5, "integer": True}}},
        "popularity": {"recommender": "popularity"},
        "tim": {"recommender": "tim4rec"},
        "own": {"init": "scratch"},
    }
    groups = [{"domains": ["attic"], "arms": list(arms)}]
    told = {"arms": arms, "cells": groups, "baseline": None, "pretrain": None}
    untimed = {"attic": Source("/attic", "f", False)}
    cells = {cell.arm: cell for cell in build_cells(spec(**told), untimed)[0]}
    assert cells["gru"].run["model"] == {"width": 16}
    assert list(cells["gru"].space) == ["training.learning_rate", "model.dropout", "model.recurrent_width"]
    assert list(cells["knn"].space) == ["model.window"]
    assert (cells["knn"].search_trials, cells["knn"].confirm_seeds, cells["popularity"].search_trials) == (3, 1, 0)
    assert cells["popularity"].run["model"] == {}
    assert not cells["tim"].run["model"]["time"]
    arms["gru"] = {"recommender": "gru4rec", "space": {"model.filter_size": {"choices": [1, 2]}}}
    with pytest.raises(BadInput, match=r"searches model.filter_size, which gru4rec does not read"):
        build_cells(spec(**told), untimed)
    arms["gru"] = {"recommender": "gru4rec", "model": {"filter_size": 2}}
    with pytest.raises(BadInput, match="unknown key filter_size"):
        build_cells(spec(**told), untimed)
    without = {"arms": {"tim": arms["tim"]}, "cells": [{"domains": ["attic"], "arms": ["tim"]}]}
    with pytest.raises(BadInput, match=r"model\.\w+, which none of its recommenders knows: tim4rec"):
        spec(**told | without)  # the study's space is MMM4Rec's too
    arms["gru"] = {"recommender": "popularity", "space": {"training.learning_rate": {"low": 1e-3, "high": 1e-2}}}
    with pytest.raises(BadInput, match=r"searches training.learning_rate, which popularity does not read"):
        build_cells(spec(**told), untimed)


def test_a_key_that_no_recommender_knows_is_no_key() -> None:
    for broken in ({"model": {"widht": 8}}, {"space": {"model.dropuot": {"low": 0.1, "high": 0.5}}}):
        with pytest.raises(BadInput, match=r"sets or searches model\.(widht|dropuot), which none of its recommenders knows"):
            spec(**broken)
    with pytest.raises(BadInput, match="has recommender item_knn, which is not trained"):
        spec(pretrain={"sources": ["bazaar"], "recommender": "item_knn"})
    zero_shot = {"tim": {"recommender": "tim4rec", "init": "pretrained", "zero_shot": True}}
    with pytest.raises(BadInput, match="tim4rec cannot"):
        spec(arms=zero_shot, cells=[{"domains": ["attic"], "arms": ["tim"]}], baseline=None)


def test_what_is_pre_trained_is_what_its_arms_are() -> None:
    arms = {"moved": {"recommender": "unisrec", "init": "pretrained"}, "other": {"init": "pretrained"}}
    pretrain = {"sources": ["bazaar"], "recommender": "unisrec", "model": {"layers": 3}}
    told = {"arms": arms, "cells": [{"domains": ["attic"], "arms": ["moved"]}], "baseline": None, "pretrain": pretrain}
    (cell,), _ = build_cells(spec(**told), sources())
    assert cell.run["model"] == {"width": 16, "ffn_width": 16, "layers": 3}
    config = pretrain_config(spec(**told), sources())
    assert (config.recommender, config.model.ids, config.model.layers) == ("unisrec", False, 3)
    with pytest.raises(BadInput, match="arm 'other' is mmm4rec, and unisrec is pre-trained"):
        spec(**{**told, "cells": [{"domains": ["attic"], "arms": ["moved", "other"]}]})
    with pytest.raises(BadInput, match="gru4rec cannot"):
        pretrain_config(spec(**{**told, "pretrain": {"sources": ["bazaar"], "recommender": "gru4rec"}, "arms": {"moved": {}}}), sources())


def test_weights_of_another_recommender_are_refused(make_domain: Callable[..., Domain], tmp_path: Path) -> None:
    domain = make_domain()
    base = {"data": {"domains": [str(domain.path)]}, "training": {"epochs": 1}, "device": "cpu"}
    sasrec = from_dict(RunConfig, {**base, "recommender": "sasrec", "model": {"width": 8, "max_len": 8}}, source="test")
    list(execute(sasrec, tmp_path / "run"))
    moved = {**base, "model": TINY_MODEL, "init": str(tmp_path / "run" / "best.safetensors")}
    with pytest.raises(BadInput, match=r"holds a model of sasrec; the run's recommender is mmm4rec"):
        assemble(from_dict(RunConfig, moved, source="test"))
