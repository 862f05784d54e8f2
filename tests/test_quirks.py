"""Each fault of the release, alone: what it shows the model, and what it does to a step."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_MODEL
from torch import Tensor, nn

from mmm4rec.config import from_dict
from mmm4rec.data.batches import TimeView, make_batch, pack
from mmm4rec.data.domain import Domain
from mmm4rec.data.sampler import Plan
from mmm4rec.execute import execute
from mmm4rec.inference import recommend
from mmm4rec.models.blocks import Scan
from mmm4rec.models.mmm4rec import ModelConfig, TimeInput, masked_norm
from mmm4rec.models.quirks import Quirks
from mmm4rec.run import RunConfig, assemble
from mmm4rec.training.evaluate import evaluate
from mmm4rec.training.loop import _optimizer_step
from mmm4rec.training.step import add_gradient, prepare

HOUR = 3600


def tiny(domain: Domain, *, quirks: dict | None = None, **settings: dict) -> RunConfig:
    model = {**TINY_MODEL, "quirks": quirks or {}, **settings.get("model", {})}
    training = {"batch_size": 32, "accumulation": 2, "epochs": 1, **settings.get("training", {})}
    data = {"domains": [str(domain.path)], **settings.get("data", {})}
    return from_dict(RunConfig, {"data": data, "model": model, "training": training}, source="test")


def test_published_sets_every_quirk_and_the_default_none() -> None:
    names = [field.name for field in fields(Quirks)]
    assert all(getattr(ModelConfig.published().quirks, name) for name in names)
    assert not any(getattr(ModelConfig().quirks, name) for name in names)


@pytest.mark.parametrize(
    ("view", "gaps", "timed"),
    [
        (TimeView(), [0, 2, 0, 0, 0], [1, 1, 0, 0, 0]),
        (TimeView(label_time=True), [0, 2, 7, 0, 0], [1, 1, 1, 0, 0]),
        (TimeView(zero_stamps=True), [0, 2, -102, 0, 0], [1, 1, 1, 1, 1]),
        (TimeView(label_time=True, zero_stamps=True), [0, 2, 7, -109, 0], [1, 1, 1, 1, 1]),
    ],
)
def test_what_the_model_sees_of_time(view: TimeView, gaps: list[int], timed: list[int]) -> None:
    """Two items at 100 and 102, the target at 109, five positions; and a history that fills them all."""
    seen = view.gaps(np.array([[100, 102, 109, 0, 0], [1, 2, 4, 8, 16]]), np.array([2, 5]))
    assert seen[0].tolist() == [gaps, [0, 1, 2, 4, 8]]
    assert seen[1].astype(int).tolist() == [timed, [1, 1, 1, 1, 1]]


@pytest.mark.parametrize("view", [TimeView(), TimeView(True), TimeView(False, True), TimeView(True, True)], ids=str)
def test_a_batch_shows_the_stamps_of_its_view(make_domain: Callable[..., Domain], view: TimeView) -> None:
    domain = make_domain()
    assert domain.timestamps is not None
    batch = make_batch(domain, *domain.examples("train"), max_len=5, time=True, view=view)
    assert batch.gap_seconds is not None
    assert len(batch.gap_seconds) == len(batch)
    for user, end, length, gaps in zip(batch.users, batch.ends, batch.packing.lengths.tolist(), batch.gap_seconds, strict=True):
        first = domain.offsets[user] + end - length
        laid_out = np.zeros(5, dtype=np.int64)
        laid_out[: length + 1] = domain.timestamps[first : first + length + 1][:5]
        expected, _ = view.gaps(laid_out[None], np.array([length]))
        np.testing.assert_array_equal(gaps, expected[0].astype(np.float32))
    history = make_batch(domain, np.array([3]), np.array([4]), max_len=8, time=True, view=view, with_targets=False)
    assert history.gap_seconds is not None
    assert history.gap_seconds[0, 4] == (-float(domain.timestamps[domain.offsets[3] + 3]) if view.zero_stamps else 0)


def test_real_gaps_survive_the_log_and_drown_in_the_release() -> None:
    """An hour against three months: far apart as logarithms; beside the padding's outlier nearly the same number."""
    gaps = torch.tensor([[0.0, HOUR, 90 * 24 * HOUR, 0, 0, 0]])
    timed = torch.tensor([[True, True, True, False, False, False]])
    ours = TimeInput(ModelConfig(max_len=6))(gaps, timed)[0, 0]
    assert ours[2] - ours[1] > 0.7
    assert not ours[3:].any()
    outlier = gaps.clone()
    outlier[0, 4] = -1.4e9
    theirs = TimeInput(ModelConfig.published(max_len=6, dropout=0.0))(outlier, torch.ones_like(timed))[0, 0]
    assert (theirs[2] - theirs[1]).abs() < 0.02
    centred = masked_norm(gaps, timed, 1e-5)
    torch.testing.assert_close(centred[0, :3].mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(centred[0, :3].square().mean(), torch.tensor(1.0), atol=1e-4, rtol=0)
    assert not centred[0, 3:].any()


def test_dropout_on_raw_gaps_only_as_a_quirk() -> None:
    gaps, timed = torch.full((50, 8), 60.0), torch.ones(50, 8, dtype=torch.bool)
    signals = [TimeInput(ModelConfig(max_len=8, quirks=Quirks(raw_gap_dropout=quirk)))(gaps, timed) for quirk in (False, True)]
    assert signals[0].unique().numel() == 1
    assert (signals[1] == 0).float().mean().item() == pytest.approx(0.4, abs=0.1)


def test_epsilon_of_every_norm(make_domain: Callable[..., Domain]) -> None:
    domain = make_domain()
    for tiny_epsilon, eps in ((False, 1e-5), (True, 1e-12)):
        model = assemble(tiny(domain, quirks={"tiny_epsilon": tiny_epsilon}, model={"time_step": "scale"})).run.model
        assert {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)} == {eps}
        assert {module.config.norm_eps for module in model.modules() if isinstance(module, Scan)} == {eps}


def test_the_skip_reads_its_input_or_its_input_times_the_step() -> None:
    """With nothing to read in C the scan gives 0 and the skip alone is left, under the RMS norm."""
    config = ModelConfig(**TINY_MODEL)  # type: ignore[arg-type]
    E, H = config.ssd.inner, config.heads
    x, step, gate, nothing = torch.randn(2, 3, E), torch.randn(2, 3, H), torch.randn(2, 3, E), torch.zeros(2, 3, H, config.state)
    written, (_, packing) = x.unflatten(-1, (H, -1)), pack(np.ones(6, dtype=np.int64), np.array([3, 3]))
    for scaled in (False, True):
        torch.manual_seed(0)
        scan = Scan(replace(config, quirks=Quirks(scaled_skip=scaled)).ssd)
        delta = nn.functional.softplus(step + scan.step_bias).repeat_interleave(config.head_width, dim=-1)
        skipped = (x * delta if scaled else x) * nn.functional.silu(gate)
        expected = scan.out(nn.functional.rms_norm(skipped, (E,), eps=1e-5))
        torch.testing.assert_close(scan(written, nothing, step, nothing, gate, packing, at_last=False), expected)
        last = scan(written, nothing, step, nothing[:, -1], gate[:, -1], packing, at_last=True)
        torch.testing.assert_close(last, expected[:, -1])


def first_gradients(config: RunConfig) -> dict[str, Tensor]:
    run = assemble(config).run
    add_gradient(run, prepare(run, [Plan.of_one(0, *run.data[0].train)], 0))
    return {name: parameter.grad for name, parameter in run.model.named_parameters() if parameter.grad is not None}


def test_padding_as_a_class_makes_the_first_gradient_explode(make_domain: Callable[..., Domain]) -> None:
    """Its vector is 0 at the start, so normalising it divides by 1e-12."""
    domain = make_domain()
    sane, exploding = (first_gradients(tiny(domain, quirks={"padding_class": quirk})) for quirk in (False, True))
    assert sane["adapters.text.bias"].norm() < 10
    assert exploding["adapters.text.bias"].norm() > 1e6
    assert exploding["adapters.text.weight"].norm() < 10


def weights_after(config: RunConfig, steps: int = 4) -> dict[str, nn.Parameter]:
    run = assemble(config).run
    run.model.double().train()
    run.data = [replace(data, features=data.features.to(run.device, torch.float64)) for data in run.data]
    users, ends = run.data[0].train
    plans = [Plan.of_one(0, users[i : i + 16], ends[i : i + 16]) for i in range(0, 32 * steps, 16)]
    for step in range(steps):
        _optimizer_step(run, prepare(run, plans[2 * step : 2 * step + 2], step), "")
    return dict(run.model.named_parameters())


def test_summed_gradients_with_decay_d_are_averaged_ones_with_a_share_of_it(make_domain: Callable[..., Domain]) -> None:
    """Two micro-batches of one size: d / 2. With d itself the weights differ."""
    domain, common = make_domain(), {"time": False, "dropout": 0.0}
    summed = weights_after(tiny(domain, quirks={"summed_accumulation": True}, model=common, training={"weight_decay": 0.05}))
    halved, whole = (weights_after(tiny(domain, model=common, training={"weight_decay": decay})) for decay in (0.025, 0.05))
    name = "layers.0.ssd.proj.weight"
    same, other = ((summed[name] - weights[name]).abs().mean() for weights in (halved, whole))
    assert same < other / 50  # not 0: the optimizer's epsilon knows the size of a gradient


def test_seen_items_masked_against_brute_force(make_domain: Callable[..., Domain], tmp_path: Path) -> None:
    """The whole history is left out, a target that was seen before too: it ties with all that is masked."""
    domain = make_domain()
    run = assemble(tiny(domain)).run
    users, ends = domain.examples("test")
    masked = replace(run.data[0], mask_seen=True)
    found = evaluate(run.model, masked, users, ends, run.device)
    with torch.no_grad():
        catalogue = run.model.eval().items(masked.features)
        repeated = 0
        for user, end, rank in zip(users, ends, found, strict=True):
            batch = masked.batch(np.array([user]), np.array([end]))
            scores = run.model.scores(run.model.users(batch, catalogue), catalogue)[0]
            seen = set(domain.items[domain.offsets[user] : domain.offsets[user] + end].tolist())
            target = int(domain.items[domain.offsets[user] + end])
            fresh = [item for item in range(1, 31) if item not in seen]
            repeated += target in seen
            higher = len(fresh) if target in seen else sum(float(scores[item]) > float(scores[target]) for item in fresh)
            assert rank == 1 + higher + ((len(seen) - 1) / 2 if target in seen else 0)
    assert 0 < repeated < len(users)
    assert masked.fingerprint == domain.fingerprint + "+mask_seen"
    for line in recommend(run.model, masked, run.device, top=30):
        user = int(line["user"][1:])
        history = {f"i{item - 1}" for item in domain.items[domain.offsets[user] : domain.offsets[user + 1]]}
        assert set(line["items"]) == {f"i{k}" for k in range(30)} - history


def test_masking_is_part_of_a_runs_fingerprint(make_domain: Callable[..., Domain], tmp_path: Path) -> None:
    domain = make_domain()
    for mask, ending in ((False, ""), (True, "+mask_seen")):
        list(execute(tiny(domain, data={"mask_seen": mask}), tmp_path / str(mask)))
        result = json.loads((tmp_path / str(mask) / "result.json").read_text())
        assert result["fingerprint"] == domain.fingerprint + ending
