"""The model: what must not change a score, and what must."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY_MODEL

from mmm4rec.data.batches import Batch, make_batch
from mmm4rec.data.domain import Domain
from mmm4rec.data.features import ItemFeatures, load_features
from mmm4rec.models.blocks import FourierFilter
from mmm4rec.models.mmm4rec import MMM4Rec, ModelConfig
from mmm4rec.models.quirks import Quirks

SWITCHES: list[dict] = [
    {},
    {"modalities": "text"},
    {"modalities": "image"},
    {"ids": False},
    {"time": False},
    {"filter": False},
    {"filter_size": 2},
    {"cross": "add"},
    {"fusion": "dynamic_shared"},
    {"fusion": "dynamic_instance"},
    {"time_encoding": "layer_norm"},
    {"layers": 2},
    {"groups": 1},
    {"time_step": "scale"},
    {"time_step": "scale", "time_gate": "position", "layers": 2},
    {"time_encoding": "masked_norm"},
    {"cross_activation": "hardswish"},
    {"conv_width": 1},
    {"conv_width": 7},
    {"quirks": Quirks(scaled_skip=True, tiny_epsilon=True, raw_gap_dropout=True)},
]


def build(domain: Domain, **switches: object) -> tuple[MMM4Rec, ItemFeatures]:
    """A float64 model with no parameter left at zero."""
    config = ModelConfig(**{**TINY_MODEL, "dropout": 0.0, **switches})  # type: ignore[arg-type]
    features = load_features(domain, config.streams)
    features = replace(features, vectors={name: value.double() for name, value in features.vectors.items()})
    torch.manual_seed(0)
    model = MMM4Rec(config, feature_dimensions=features.dimensions, n_items=domain.n_items).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model, features


def score(model: MMM4Rec, features: ItemFeatures, batch: Batch) -> torch.Tensor:
    catalogue = model.items(features)
    return model.scores(model.users(batch, catalogue), catalogue)


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_grouping_and_padding_change_no_score(make_domain: Callable[..., Domain], switches: dict) -> None:
    """A batch scores as its examples do alone, at full padded length and with other items in the padding."""
    domain = make_domain()
    model, features = build(domain, **switches)
    users, ends = domain.examples("test")
    batch = make_batch(domain, users, ends, max_len=8, time=True)
    assert len(batch.groups) > 2
    together = score(model, features, batch)
    for row in range(0, len(batch), 7):
        user = batch.users[row : row + 1]
        alone = make_batch(domain, user, ends[user], max_len=8, time=True).groups[0]
        padded = torch.full((1, 8), 5)
        padded[:, : alone.items.shape[1]] = alone.items
        stretched = Batch((replace(alone, items=padded),), torch.zeros(1, dtype=torch.long), user, ends[user])
        torch.testing.assert_close(score(model, features, stretched)[0], together[row], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_target_and_its_time_change_no_score(make_domain: Callable[..., Domain], switches: dict) -> None:
    def change(offsets: np.ndarray, items: np.ndarray, times: np.ndarray) -> None:
        items[offsets[1:] - 1] = 7
        times[offsets[1:] - 1] += 10**7

    scores = []
    for alteration in (None, change):
        domain = make_domain(change=alteration)
        model, features = build(domain, **switches)
        scores.append(score(model, features, make_batch(domain, *domain.examples("test"), max_len=8, time=True)))
    torch.testing.assert_close(*scores, rtol=0, atol=0)


def test_time_gaps_change_the_score(make_domain: Callable[..., Domain]) -> None:
    """Hours against months: the same items, other gaps."""
    domain = make_domain()
    model, features = build(domain)
    batch = make_batch(domain, *domain.examples("test"), max_len=8, time=True)
    groups = tuple(replace(group, gap_seconds=group.gap_seconds * 100) for group in batch.groups if group.gap_seconds is not None)
    longer = score(model, features, replace(batch, groups=groups))
    changed = (longer - score(model, features, batch)).abs().amax(1) > 1e-6
    assert changed[batch.groups[0].lengths.numel() :].all()


def test_missing_modality_is_the_learned_vector(make_domain: Callable[..., Domain]) -> None:
    """An item without a picture, and a domain without pictures, stand where the learned vector stands."""
    domain = make_domain()
    model, features = build(domain, ids=False)
    present = {**features.present, "image": features.present["image"].clone()}
    present["image"][5] = False
    absent_item = model.items(replace(features, present=present)).inputs["image"]
    torch.testing.assert_close(absent_item[5], model.missing["image"])
    assert not torch.equal(absent_item[6], model.missing["image"])
    only_text = replace(features, vectors={"text": features.vectors["text"]}, present={"text": features.present["text"]})
    torch.testing.assert_close(model.items(only_text).inputs["image"], model.missing["image"].expand(31, -1))


def test_one_modality_ignores_the_other(make_domain: Callable[..., Domain]) -> None:
    domain = make_domain()
    model, features = build(domain, modalities="text", ids=False)
    assert not any("image" in name or "cross" in name for name, _ in model.named_parameters())
    assert list(model.items(features).inputs) == ["text"]


def test_small_filter_is_a_low_pass() -> None:
    """Frequencies at and above filter_size leave no trace, neither in nor out."""
    torch.manual_seed(0)
    filter_ = FourierFilter(20, 3).double()
    positions = torch.arange(20, dtype=torch.float64)
    low, high = torch.cos(2 * torch.pi * positions * 2 / 20), torch.cos(2 * torch.pi * positions * 5 / 20)
    zero = torch.zeros(20, dtype=torch.float64)
    torch.testing.assert_close(filter_(low + high, zero), filter_(low, zero))
    assert (filter_(low, zero) - filter_(zero, zero)).abs().max() > 1e-3
    assert torch.fft.rfft(filter_(low, zero))[3:].abs().max() < 1e-12


def test_compact_batch_names_the_same_items(make_domain: Callable[..., Domain]) -> None:
    domain = make_domain()
    batch = make_batch(domain, *domain.examples("valid"), max_len=8, time=False)
    ids, compact = batch.compact()
    assert torch.equal(ids, ids.unique())
    for group, rows in zip(batch.groups, compact.groups, strict=True):
        assert torch.equal(ids[rows.items], group.items)
    assert torch.equal(ids[compact.targets], batch.targets)
