"""Facts about a model as a folder: it is the model, a run may begin from it, and it goes to the hub whole."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_training import drain, tiny

from mmm4rec.data.domain import Domain
from mmm4rec.errors import BadInput
from mmm4rec.inference import open_model
from mmm4rec.models.mmm4rec import MMM4Rec
from mmm4rec.run import assemble
from mmm4rec.training.checkpoint import hash_file, load_model

hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub: pip install 'mmm4rec[hub]'")
pytest.importorskip("ray", reason="the folder is made by studies/pretrain.py, which needs Ray")
FILES = ["README.md", "config.json", "model.safetensors"]


@pytest.fixture
def folder(make_domain: Callable[..., Domain], tmp_path: Path) -> Path:
    """What pre-training on two small domains leaves."""
    from studies.pretrain import export

    domains = [make_domain("a"), make_domain("b", seed=1, items=20)]
    told = {"examples": "all", "heldout_users": 0.2, "zero_shot": [str(make_domain("target", seed=2, items=25).path)]}
    drain(tiny(domains, data=told, model={"ids": False}, training={"loss": "in_batch", "epochs": 2}), tmp_path / "run")
    export(tmp_path / "run")
    return tmp_path / "run" / "model"


def test_the_folder_is_the_model_and_comes_back(folder: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == FILES
    model = MMM4Rec.from_pretrained(folder)
    assert isinstance(model, MMM4Rec)
    assert not model.training
    weights, _ = load_model(folder.parent / "best.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    model.save_pretrained(tmp_path / "again")
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_a_run_begins_from_it_and_it_ranks_as_best_safetensors(folder: Path, make_domain: Callable[..., Domain]) -> None:
    target = make_domain("target", seed=2, items=25)
    file = folder / "model.safetensors"
    begun = assemble(tiny(target, init=str(file), model={"ids": False})).run.model.state_dict()
    weights, _ = load_model(folder.parent / "best.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in begun.items())
    models = [open_model(path, target.path, device="cpu")[0].state_dict() for path in (file, folder.parent / "best.safetensors")]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


def test_the_card_says_what_it_was_trained_on_and_what_came_out(folder: Path) -> None:
    text, result = (folder / "README.md").read_text(), json.loads((folder.parent / "result.json").read_text())
    description = json.loads((folder / "config.json").read_text())
    for name, fingerprint in result["fingerprints"].items():
        assert f"| {name} | {fingerprint} |" in text
    assert f"| validation ndcg@10 | {result['valid']['ndcg@10']:.4f} |" in text
    assert f"| zero-shot ndcg@10, target | {result['zero_shot']['target']:.4f} |" in text
    assert f"- code version: {result['code_version']}" in text
    assert text.startswith("---\nlibrary_name: mmm4rec\n")
    assert description["result"]["checkpoint"] == hash_file(folder.parent / "best.safetensors")


def test_it_is_pushed_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: dict[str, bytes] = {}

    class Repo:
        repo_id = "me/shop"

    monkeypatch.setattr(hub.HfApi, "create_repo", lambda self, **told: Repo)
    monkeypatch.setattr(
        hub.HfApi,
        "upload_folder",
        lambda self, folder_path, **told: pushed.update({file.name: file.read_bytes() for file in Path(folder_path).iterdir()}),
    )
    MMM4Rec.from_pretrained(folder).push_to_hub("me/shop")
    assert pushed == {name: (folder / name).read_bytes() for name in FILES}


def test_it_comes_from_the_hub_file_by_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repo: str, name: str, **told: object) -> str:
        asked.append((repo, name, told["revision"]))
        return str(folder / name)

    monkeypatch.setattr("mmm4rec.models.hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", lambda **told: str(folder / told["filename"]))
    MMM4Rec.from_pretrained("me/shop", revision="v2")
    assert set(asked) == {("me/shop", "config.json", "v2"), ("me/shop", "model.safetensors", "v2")}


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match=r"no folder of a model: it has no config\.json"):
        MMM4Rec.from_pretrained(tmp_path)
    for name in [name for name in sys.modules if name.startswith(("mmm4rec.models", "huggingface_hub"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as where it is not installed
    from mmm4rec.models.mmm4rec import MMM4Rec as Plain

    with pytest.raises(BadInput, match=r"pip install 'mmm4rec\[hub\]'"):
        Plain.from_pretrained(tmp_path)
