"""The released model: its numbers to the last digit, its checkpoints in and out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_MODEL
from torch import Tensor

from mmm4rec.__main__ import main
from mmm4rec.data.domain import Domain
from mmm4rec.errors import BadInput
from mmm4rec.models.mmm4rec import MMM4Rec, ModelConfig
from mmm4rec.models.published import from_published, published_scores, to_published
from mmm4rec.models.quirks import NONE
from mmm4rec.training.checkpoint import load_model
from mmm4rec.training.losses import cross_entropy, in_batch_weights

GOLDEN = Path(__file__).parent / "golden"
VARIANTS = sorted(path.stem for path in GOLDEN.glob("fused_*.npz"))
INPUTS = np.load(GOLDEN / "inputs.npz")
ITEMS, LENGTHS, LABELS = (torch.from_numpy(INPUTS[name]) for name in ("item_seq", "lengths", "labels"))


def checkpoint(variant: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The released state dict of a golden variant: a subset of the shared parameters, the shared block under both names."""
    match = re.fullmatch(r"fused_L(\d)_(time|notime)_(bias|nobias)_(static|dynamic_\w+?)(_cleants)?", variant)
    assert match is not None
    layers, time, ids, fusion, _ = match.groups()
    foreign = [r"fusion_factor"] + [r"_layers\.1\."] * (layers == "1") + ["item_embedding_bias"] * (ids == "nobias")
    foreign += ["time", "complex_weight"] * (time == "notime")
    weights = {
        name: torch.from_numpy(np.array(value)).to(dtype)
        for name, value in np.load(GOLDEN / "params.npz").items()
        if not any(re.search(pattern, name) for pattern in foreign)
    }
    factor = np.load(GOLDEN / "params.npz").get(f"fusion_factor__{fusion}", np.ones(()))
    shared = {
        name.replace("encoder", "decoder"): value for name, value in weights.items() if re.match(r"encoder_ssd_layers\.\d\.ssd", name)
    }
    return weights | shared | {"fusion_factor": torch.from_numpy(np.array(factor)).to(dtype)}


def stamps(variant: str) -> Tensor:
    return torch.from_numpy(INPUTS["time_stamps_clean" if variant.endswith("cleants") else "time_stamps"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_golden_number(variant: str) -> None:
    """User vectors, scores, both losses and every parameter's gradient norm under both, as the authors' code computes them."""
    golden, model = np.load(GOLDEN / f"{variant}.npz"), from_published(checkpoint(variant))
    users, scores = (part.detach() for part in published_scores(model, ITEMS, LENGTHS, stamps(variant)))
    np.testing.assert_allclose(users, golden["f64.seq_output"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(scores, golden["f64.scores"], rtol=0, atol=1e-9)
    for loss_name, norm_name in (("ce_loss", "grad_norm"), ("in_batch_loss", "in_batch_grad_norm")):
        model.zero_grad()
        loss = published_loss(model, variant, in_batch=loss_name == "in_batch_loss")
        np.testing.assert_allclose(loss, golden[f"f64.{loss_name}"], rtol=0, atol=1e-9)
        norms = published_gradient_norms(model)
        named = zip(golden["grad_names"], golden[f"f64.{norm_name}"], strict=True)
        expected = {str(name).split("__")[0]: norm for name, norm in named}
        assert {name for name, norm in expected.items() if norm > 0} <= set(norms)
        for name, norm in expected.items():
            np.testing.assert_allclose(norms.get(name, 0.0), norm, rtol=1e-7, atol=1e-15, err_msg=f"{loss_name} {name}")


def scores_of(model: MMM4Rec, variant: str = "") -> Tensor:
    return published_scores(model, ITEMS, LENGTHS, stamps(variant))[1].detach()


def published_loss(model: MMM4Rec, variant: str, *, in_batch: bool) -> float:
    """The release's mean losses, by the function that trains: over all rows with padding, or over the batch's targets.

    Its gradient is added to the parameters' gradients.
    """
    assert model.features is not None
    quirks, (users, _) = model.config.quirks, published_scores(model, ITEMS, LENGTHS, stamps(variant))
    told: dict[str, Any] = {"temperature": model.temperature, "scale": 1 / len(LABELS)}
    if in_batch:
        ids, targets, counts = LABELS.unique(return_inverse=True, return_counts=True)
        assert counts.max() > 1
        candidates = model.items(model.features, ids).candidates
        told |= {"log_weights": torch.from_numpy(in_batch_weights(counts.numpy())), "target_weighs_one": not quirks.duplicate_negatives}
    else:
        first = 0 if quirks.padding_class else 1
        candidates, targets = model.items(model.features).candidates[first:], LABELS - first
    gradient = torch.zeros_like(candidates)
    with torch.no_grad():
        loss, d_users = cross_entropy(users, candidates, targets, gradient=gradient, **told)
    torch.autograd.backward([users, candidates], [d_users, gradient])
    return float(loss) / len(LABELS)


def published_gradient_norms(model: MMM4Rec) -> dict[str, float]:
    """The norms under the release's names: a model whose weights are its gradients, written out."""
    gradients = from_published(to_published(model))
    with torch.no_grad():
        for own, parameter in zip(gradients.parameters(), model.parameters(), strict=True):
            own.copy_(torch.zeros_like(own) if parameter.grad is None else parameter.grad)
    return {name: float(value.norm()) for name, value in to_published(gradients).items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_scores(variant: str) -> None:
    scores = scores_of(from_published(checkpoint(variant, torch.float32)), variant)
    expected = np.load(GOLDEN / f"{variant}.npz")["f64.scores"]
    assert scores.dtype == torch.float32
    assert np.abs(scores.numpy() - expected).max() / np.abs(expected).max() < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(variant: str) -> None:
    given = checkpoint(variant)
    returned = to_published(from_published({"model": given, "optimizer": {}, "epoch": 40}))
    assert set(returned) == set(given)
    for name, value in given.items():
        assert returned[name].dtype == value.dtype
        assert torch.equal(returned[name], value), name


def test_sizes_are_read_off_the_tensors() -> None:
    config = from_published(checkpoint("fused_L2_time_bias_static_cleants")).config
    assert config == ModelConfig.published(width=64, ffn_width=64, layers=2, head_width=16, state=16, groups=8)
    one_group = from_published(checkpoint("fused_L1_notime_nobias_static"), n_groups=1, max_len=50).config
    assert (one_group.groups, one_group.state, one_group.ids, one_group.time, one_group.max_len) == (1, 128, False, False, 50)


def test_a_gate_for_each_position() -> None:
    """p2p_residual: the gate is a square matrix; with the rows all alike it is the gate for each head."""
    variant = "fused_L1_time_bias_static"
    weights = checkpoint(variant)
    for side in ("encoder", "decoder"):
        gate = f"{side}_ssd_layers.0.ssd.time_gate_residual.1"
        weights |= {f"{gate}.weight": weights[f"{gate}.weight"].repeat(20, 1), f"{gate}.bias": weights[f"{gate}.bias"].repeat(20)}
    model = from_published(weights)
    assert model.config.time_gate == "position"
    scores = scores_of(model, variant)
    np.testing.assert_allclose(scores, np.load(GOLDEN / f"{variant}.npz")["f64.scores"], rtol=0, atol=1e-9)


def test_activation_of_the_fallback_changes_the_scores() -> None:
    weights = checkpoint("fused_L1_time_bias_static")
    fused, fallback = (scores_of(from_published(weights, activation=activation)) for activation in ("silu", "hardswish"))  # type: ignore[arg-type]
    assert (fused - fallback).abs().max() > 1e-3


def test_features_may_come_apart() -> None:
    """A released file has no features; the tables, with or without the row of padding, give the same scores."""
    weights = checkpoint("fused_L1_time_bias_static")
    tables = {"text": weights.pop("text_embedding"), "image": weights.pop("vision_embedding")}
    model = from_published(weights)
    with pytest.raises(BadInput, match="carries no features"):
        published_scores(model, ITEMS, LENGTHS, stamps(""))
    assert set(to_published(model)) == set(weights)
    expected = np.load(GOLDEN / "fused_L1_time_bias_static.npz")["f64.scores"]
    for given in (tables, {name: table[1:] for name, table in tables.items()}):
        scores = scores_of(from_published(weights, features=given))
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-9)
    with pytest.raises(BadInput, match=r"text features are of 49 items, the checkpoint or the other features of 50"):
        from_published(weights, features={**tables, "text": tables["text"][2:]})
    with pytest.raises(BadInput, match="there are no image features"):
        from_published(weights, features={"text": tables["text"]})
    first_is_zero = tables["text"][1:].clone()
    first_is_zero[0] = 0
    model = from_published(weights, features={"text": first_is_zero, "image": tables["image"]})
    assert model.features is not None
    assert torch.equal(model.features.vectors["text"][1:], first_is_zero)
    with pytest.raises(BadInput, match=r"image features are \[51, 24\]; the checkpoint reads 20"):
        from_published(weights, features={**tables, "image": tables["text"]})


def test_what_is_missing_or_left_over_is_said(caplog: pytest.LogCaptureFixture) -> None:
    weights = checkpoint("fused_L1_time_bias_static")
    weights["head.weight"] = weights.pop("encoder_ssd_layers.0.ffn.fc2.bias")
    with pytest.raises(BadInput, match=r"missing: encoder_ssd_layers.0.ffn.fc2.bias; left over: head.weight"):
        from_published(weights)
    from_published(weights, strict=False)
    assert "missing: encoder_ssd_layers.0.ffn.fc2.bias; left over: head.weight" in caplog.text
    twice = checkpoint("fused_L1_time_bias_static")
    twice["decoder_ssd_layers.0.ssd.D"] = twice["decoder_ssd_layers.0.ssd.D"] + 1
    with pytest.raises(BadInput, match="are one tensor of the release and differ"):
        from_published(twice)
    for groups in (0, 3, 16):
        with pytest.raises(BadInput, match="do not fit together"):
            from_published(checkpoint("fused_L1_time_bias_static"), n_groups=groups)
    with pytest.raises(BadInput, match="temperature is 0"):
        from_published(checkpoint("fused_L1_time_bias_static"), temperature=0)
    with pytest.raises(BadInput, match="none of the published model"):
        from_published({"weight": torch.zeros(3)})


@pytest.mark.parametrize(("quirk", "room"), [("label_time", 20), ("zero_stamps", 19)])
def test_each_time_quirk_alone(quirk: str, room: int) -> None:
    """Where a history leaves room for its stamps, a quirk changes the scores; without both, no stamp behind the history is read."""
    model = from_published(checkpoint("fused_L1_time_bias_static"))
    both = model.config
    scores = {}
    for name, off in (("both", {}), ("one", {quirk: False}), ("none", {"label_time": False, "zero_stamps": False})):
        model.config = replace(both, quirks=replace(both.quirks, **off))
        scores[name] = [scores_of(model, variant) for variant in ("", "cleants")]
    changed = (scores["both"][0] - scores["one"][0]).abs().amax(1) > 1e-6
    assert torch.equal(changed, room > LENGTHS)
    torch.testing.assert_close(scores["none"][0], scores["none"][1], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"time": False, "quirks": NONE}, "unscaled skip.*another epsilon"),
        ({"time_encoding": "log"}, "another time input"),
        ({"time_step": "shift"}, "another time input"),
        ({"filter": False}, "no Fourier filter"),
        ({"filter_size": 2}, "no Fourier filter or a smaller one"),
        ({"modalities": "text"}, "one modality"),
        ({"cross": "add"}, "no Cross-SSD"),
        ({"groups": 2}, "groups other than 1"),
    ],
    ids=str,
)
def test_what_the_release_cannot_compute_is_not_exported(changes: dict[str, Any], named: str) -> None:
    config = replace(ModelConfig.published(**TINY_MODEL), **changes)
    model = MMM4Rec(config, feature_dimensions={"text": 4, "image": 4}, n_items=3)
    with pytest.raises(BadInput, match=named):
        to_published(model)


def test_import_from_the_command_line(tmp_path: Path, make_domain: Callable[..., Domain], capsys: pytest.CaptureFixture[str]) -> None:
    weights = checkpoint("fused_L1_time_bias_static", torch.float32)
    tables = [weights.pop("text_embedding")[1:], weights.pop("vision_embedding")[1:]]
    files = [tmp_path / name for name in ("text_feat.pth", "image_feat.pth")]
    for file, table in zip(files, tables, strict=True):
        torch.save(table, file)
    torch.save({"model": weights, "optimizer": {"state": {}, "param_groups": []}, "epoch": 40}, tmp_path / "released.pth")
    out = tmp_path / "ours" / "best.safetensors"
    command = ["import-published", str(tmp_path / "released.pth"), str(out), "--features", *map(str, files)]
    assert main(command) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["width"], told["layers"], told["n_items"]) == (64, 1, 50)
    own, metadata = load_model(out)
    assert metadata["feature_dimensions"] == {"text": 24, "image": 20}
    assert torch.equal(own["layers.0.ssd.scan.log_a"], weights["encoder_ssd_layers.0.ssd.A_log"])
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*command, "--force", "--n-groups", "3"]) == 2
    assert "do not fit together" in capsys.readouterr().err
    assert load_model(out)[1] == metadata


def test_an_imported_checkpoint_ranks_its_own_domain(
    tmp_path: Path, make_domain: Callable[..., Domain], capsys: pytest.CaptureFixture[str]
) -> None:
    """Bound to a domain, ids and all; on another, without its ids it is a start to transfer from."""
    config = ModelConfig.published(width=16, ffn_width=16, head_width=8, state=8, max_len=8)
    domain, other = make_domain(), make_domain("other", items=25)
    model = MMM4Rec(config, feature_dimensions={"text": 12, "image": 10}, n_items=30)
    torch.save({"model": to_published(model)}, tmp_path / "released.pth")
    out = tmp_path / "best.safetensors"
    assert main(["import-published", str(tmp_path / "released.pth"), str(out), "--domain", str(other.path)]) == 2
    assert "has 25 items; the checkpoint's 'text_item_embedding_bias' is of 30" in capsys.readouterr().err
    assert main(["import-published", str(tmp_path / "released.pth"), str(out), "--domain", str(domain.path)]) == 0
    capsys.readouterr()
    assert main(["evaluate", "--model", str(out), "--domain", str(domain.path)]) == 0
    assert json.loads(capsys.readouterr().out)["fingerprint"] == domain.fingerprint
    assert main(["evaluate", "--model", str(out), "--domain", str(other.path)]) == 2
    assert "has learned single items of 'shop'" in capsys.readouterr().err
    textual = make_domain("textual", modalities=("text",))
    assert main(["import-published", str(tmp_path / "released.pth"), str(out), "--domain", str(textual.path), "--force"]) == 2
    assert "image features of dimension None; the checkpoint reads 10" in capsys.readouterr().err
    sizes = [f"model.{name}={value}" for name, value in (("width", 16), ("ffn_width", 16), ("head_width", 8), ("state", 8), ("max_len", 8))]
    published = ["model.time_encoding=layer_norm", "model.time_step=scale"]
    run = ["train", "--domain", str(other.path), "--out", str(tmp_path / "run"), "--init", str(out), "--epochs", "1", "--set"]
    assert main([*run, *sizes, *published]) == 0
    assert "2 reset, 0 skipped, 0 new" in capsys.readouterr().out


def test_a_checkpoint_that_executes_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return (Path.touch, (Path(tmp_path / "exploded"),))  # type: ignore[return-value]

    torch.save({"model": Bomb()}, tmp_path / "bomb.pth")
    (tmp_path / "table.csv").write_text("user,item\n1,2\n")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "bomb.pth").read_bytes()[:100])
    for name in ("bomb.pth", "table.csv", "cut.pth", "absent.pth"):
        assert main(["import-published", str(tmp_path / name), str(tmp_path / "out.safetensors")]) == 2
        assert "cannot be read as plain tensors" in capsys.readouterr().err
    assert not (tmp_path / "exploded").exists()
    assert not (tmp_path / "out.safetensors").exists()
