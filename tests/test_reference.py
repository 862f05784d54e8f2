"""The fast path is the plain one: numbers and gradients of tests/reference.py, which pads and keeps everything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import torch
from test_model import SWITCHES, build
from torch import Tensor

from mmm4rec.data.batches import DomainData
from mmm4rec.data.domain import Domain
from mmm4rec.data.sampler import Plan
from mmm4rec.models.mmm4rec import MMM4Rec
from mmm4rec.models.quirks import Quirks
from mmm4rec.run import DataConfig, RunConfig, domain_data
from mmm4rec.training import step
from mmm4rec.training.evaluate import evaluate
from mmm4rec.training.loop import Run, TrainingConfig

MORE_SWITCHES = [
    {"modalities": "text", "layers": 2},
    {"cross": "add", "layers": 2},
    {"cross": "add", "time_step": "scale"},
    {"layers": 3, "ids": False},
    {"quirks": Quirks(padding_class=True)},
    {"quirks": Quirks.published(), "time_encoding": "layer_norm", "time_step": "scale"},
    {"max_len": 3},
    {"max_len": 1},
]


def make_run(domain: Domain, switches: dict[str, Any], **training: Any) -> Run:
    """A float64 run, every parameter moved, whose micro-batches hold 40 of the training examples."""
    model, features = build(domain, **switches)
    config = RunConfig(DataConfig((str(domain.path),)), model.config)
    data = domain_data(config, domain, features, domain.examples("train"), domain.examples("valid"))
    return Run(model, [data], TrainingConfig(**training), 0, torch.device("cpu"), model.config.quirks)


def plans_of(data: DomainData, *, size: int = 40, count: int = 3) -> list[Plan]:
    users, ends = data.train
    order = np.random.default_rng(3).permutation(len(users))
    return [Plan.of_one(0, users[part], ends[part]) for part in np.split(order[: size * count], count)]


def padded(data: DomainData, plan: Plan) -> reference.Padded:
    return reference.pad(data.domain, plan.shares[0].users, plan.shares[0].ends, max_len=data.max_len, time=data.time, view=data.view)


def plain_scores(run: Run, batch: reference.Padded) -> Tensor:
    model, data = run.model, run.data[0]
    assert isinstance(model, MMM4Rec)
    inputs, candidates = reference.items(model, data.features)
    return reference.scores(model, reference.users(model, batch, inputs), candidates)


def gradients(run: Run) -> dict[str, Tensor]:
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in run.model.named_parameters()}
    run.model.zero_grad()
    return found


def assert_same_gradients(ours: dict[str, Tensor], plain: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    largest = max(float(gradient.abs().max()) for gradient in plain.values())
    for name, gradient in plain.items():
        scale = max(float(gradient.abs().max()), 1e-5 * largest)
        assert float((ours[name] - gradient).abs().max()) <= tolerance * scale, name


@pytest.mark.parametrize("switches", [*SWITCHES, *MORE_SWITCHES], ids=str)
def test_a_step_is_the_plain_step(make_domain: Callable[..., Domain], monkeypatch: pytest.MonkeyPatch, switches: dict) -> None:
    """Loss and every gradient of three accumulated batches, in chunks that cut across them; and the ranks."""
    monkeypatch.setattr("mmm4rec.data.batches.POSITIONS_AT_ONCE", {"cpu": 150})
    monkeypatch.setattr("mmm4rec.training.losses.SCORES_AT_ONCE", {"cpu": 200})
    run = make_run(make_domain(), switches)
    data, plans = run.data[0], plans_of(run.data[0])
    plain_loss = torch.zeros((), dtype=torch.float64)
    for plan in plans:
        batch = padded(data, plan)
        loss = reference.loss_sum(run.model, plain_scores(run, batch), batch.targets)  # type: ignore[arg-type]
        (loss / (len(plan) if run.quirks.summed_accumulation else 120)).backward()
        plain_loss += loss.detach()
    plain = gradients(run)
    assert sum(loss for _, loss in step.add_gradient(run, step.prepare(run, plans, 0))) == pytest.approx(float(plain_loss), rel=1e-12)
    assert_same_gradients(gradients(run), plain)
    run.model.eval()
    users, ends = data.valid
    ranks = reference.ranks(run.model, data.features, padded(data, Plan.of_one(0, users, ends)))  # type: ignore[arg-type]
    np.testing.assert_array_equal(evaluate(run.model, data, users, ends, run.device), ranks.numpy())
