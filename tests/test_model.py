"""The model: what must not change a score, and what must."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY_MODEL
from torch.nn import functional as F

from mmm4rec.data.batches import Batch, Packing, make_batch
from mmm4rec.data.domain import Domain
from mmm4rec.data.features import ItemFeatures, add_features, load_features
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
    {"missing": "zero"},
    {"missing": "other"},
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


def filled(batch: Batch, item: int = 5) -> Batch:
    """The batch in windows two positions longer in front and three behind, with an item wherever no history stands."""
    packing, Q = batch.packing, batch.items.shape[1]
    positions = F.pad(packing.positions, (2, 3), value=-1)  # [W, Q + 5]
    items = F.pad(batch.items, (2, 3)).where(positions >= 0, item)
    last = packing.last // Q * (Q + 5) + packing.last % Q + 2
    return replace(batch, items=items, packing=Packing(positions, F.pad(packing.examples, (2, 3)), last, packing.lengths))


@pytest.mark.parametrize("switches", [*SWITCHES, *({"scan": name, "layers": 2} for name in ("recurrence", "chunked"))], ids=str)
def test_packing_and_padding_change_no_score(make_domain: Callable[..., Domain], monkeypatch: pytest.MonkeyPatch, switches: dict) -> None:
    """A batch scores as its examples do alone, in another order, and with other items and wider windows around the histories."""
    monkeypatch.setattr("mmm4rec.models.ssd.CHUNK", 3)  # several chunks a window
    domain = make_domain()
    model, features = build(domain, **switches)
    users, ends = domain.examples("test")
    batch = make_batch(domain, users, ends, max_len=8, time=True)
    assert len(batch.items) < len(batch)
    assert (batch.packing.positions < 0).any()
    together = score(model, features, batch)
    torch.testing.assert_close(score(model, features, filled(batch)), together, rtol=1e-10, atol=1e-10)
    order = np.random.default_rng(1).permutation(len(users))
    shuffled = make_batch(domain, users[order], ends[order], max_len=8, time=True)
    assert not torch.equal(shuffled.packing.last, batch.packing.last[torch.from_numpy(order)])
    torch.testing.assert_close(score(model, features, shuffled), together[torch.from_numpy(order)], rtol=1e-10, atol=1e-10)
    for row in range(0, len(batch), 7):
        alone = make_batch(domain, users[row : row + 1], ends[row : row + 1], max_len=8, time=True)
        for changed in (alone, filled(alone)):
            torch.testing.assert_close(score(model, features, changed)[0], together[row], rtol=1e-10, atol=1e-10)


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
    assert batch.gap_seconds is not None
    longer = score(model, features, replace(batch, gap_seconds=batch.gap_seconds * 100))
    assert batch.packing.lengths.min() > 1  # a history of one item has no gap
    assert ((longer - score(model, features, batch)).abs().amax(1) > 1e-6).all()


def test_missing_modality_is_the_learned_vector(make_domain: Callable[..., Domain]) -> None:
    """An item without a picture, and a domain without pictures, stand where the learned vector stands."""
    domain = make_domain()
    vectors, present = np.load(domain.path / "features" / "image.npy"), np.arange(1, 31) != 5
    add_features(domain, "image", vectors, present, encoder="random-image", force=True)
    model, features = build(domain, ids=False)
    absent_item = model.items(features).inputs["image"]
    torch.testing.assert_close(absent_item[5], model.missing["image"])
    assert not torch.equal(absent_item[6], model.missing["image"])
    only_text = replace(features, vectors={"text": features.vectors["text"]}, present={"text": features.present["text"]})
    torch.testing.assert_close(model.items(only_text).inputs["image"], model.missing["image"].expand(31, -1))


@pytest.mark.parametrize("missing", ["zero", "other"])
def test_what_else_may_stand_for_a_missing_modality(missing: str, make_domain: Callable[..., Domain]) -> None:
    """Nothing at all, or the projection of the item's other modality; where that is missing too, the learned vector."""
    domain = make_domain()
    for modality, absent in (("text", [6]), ("image", [5, 6])):
        vectors = np.load(domain.path / "features" / f"{modality}.npy")
        present = ~np.isin(np.arange(1, 31), absent)
        add_features(domain, modality, vectors, present, encoder=f"random-{modality}", force=True)  # type: ignore[arg-type]
    model, features = build(domain, ids=False, missing=missing)
    inputs = model.items(features).inputs
    learned, zero = build(domain, ids=False)[0].items(features).inputs, torch.zeros_like(inputs["image"][5])
    text = inputs["text"]
    expected = {"zero": (zero, zero, zero), "other": (text[5], model.missing["image"], model.missing["text"])}[missing]
    for found, due in zip((inputs["image"][5], inputs["image"][6], inputs["text"][6]), expected, strict=True):
        torch.testing.assert_close(found, due)
    there = [row for row in range(31) if row not in (0, 5, 6)]
    for modality in ("text", "image"):
        torch.testing.assert_close(inputs[modality][there], learned[modality][there])
    only_text = replace(features, vectors={"text": features.vectors["text"]}, present={"text": features.present["text"]})
    pictureless = model.items(only_text).inputs["image"]
    torch.testing.assert_close(pictureless[there], zero.expand(28, -1) if missing == "zero" else text[there])
    assert score(model, features, make_batch(domain, *domain.examples("test"), max_len=8, time=True)).isfinite().all()


def test_an_item_of_nothing_has_no_endless_gradient(make_domain: Callable[..., Domain]) -> None:
    """With `zero`, an item without features whose id is 0 yet: its length is 0, by which no gradient may be divided."""
    domain = make_domain()
    for modality in ("text", "image"):
        vectors = np.load(domain.path / "features" / f"{modality}.npy")
        add_features(domain, modality, vectors, np.arange(1, 31) != 5, encoder=f"random-{modality}", force=True)  # type: ignore[arg-type]
    model, features = build(domain, missing="zero")
    with torch.no_grad():
        for table in model.ids.values():
            table.zero_()
    catalogue = model.items(features)
    assert not catalogue.candidates[5].any()
    catalogue.candidates.sum().backward()
    for table in model.ids.values():
        assert table.grad is not None
        assert 0 < table.grad.abs().max() < 1e6


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
    """The histories' items become rows of the list; the targets stay items."""
    domain = make_domain()
    batch = make_batch(domain, *domain.examples("valid"), max_len=8, time=False)
    ids, compact = batch.compact()
    assert torch.equal(ids, batch.items.unique())
    assert torch.equal(ids[compact.items], batch.items)
    assert torch.equal(compact.targets, batch.targets)
