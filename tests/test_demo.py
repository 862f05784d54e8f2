"""The demo's data: the same bytes for a seed, and a rule that text, picture, pause and memory each help to follow."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmm4rec.data.demo import DAY_SECONDS, SHAPES, Catalogue, DemoConfig, appeal, simulate, stock_shop, write_demo
from mmm4rec.data.encode import load_encoder
from mmm4rec.data.features import open_features
from mmm4rec.errors import BadInput

pytest.importorskip("PIL")
pytest.importorskip("sklearn")

TINY = DemoConfig(
    sources=("bazaar", "market"), targets=("attic",), source_users=60, source_items=80, target_users=40, target_items=50, dimensions=16
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "demo"
    write_demo(out, config=TINY)
    return out


def bytes_of(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_seed_fixes_every_byte_and_another_seed_gives_other_domains(demo: Path, tmp_path: Path) -> None:
    again = write_demo(tmp_path / "again", config=TINY)
    assert bytes_of(tmp_path / "again") == bytes_of(demo)
    other = write_demo(tmp_path / "other", seed=1, config=TINY)
    assert len({domain.fingerprint for domain in (*again, *other)}) == 6


def test_changing_the_targets_leaves_encoders_and_sources_as_they_are(demo: Path, tmp_path: Path) -> None:
    write_demo(tmp_path / "out", config=replace(TINY, target_items=60))
    for part in ("bazaar/features", "market/features", "encoders"):
        assert bytes_of(tmp_path / "out" / part) == bytes_of(demo / part)


def test_a_shop_of_another_size_leaves_the_others_as_they_are(demo: Path, tmp_path: Path) -> None:
    config = replace(TINY, targets=("attic", "emporium"), sizes={"emporium": (90, 120)})
    *_, emporium = write_demo(tmp_path / "out", config=config)
    assert (emporium.name, emporium.n_users, emporium.n_items) == ("emporium", 90, 120)
    for part in ("bazaar/features", "attic/features", "encoders"):
        assert bytes_of(tmp_path / "out" / part) == bytes_of(demo / part)


@pytest.mark.parametrize("sizes", [{"nowhere": (90, 120)}, {"attic": (90,)}, {"attic": (0, 120)}])
def test_a_size_names_a_shop_its_users_and_its_items(sizes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="it gives \\[users, items\\] of one of the shops: bazaar, market, attic"):
        replace(TINY, sizes=sizes)


def test_the_plan_names_domains_that_have_both_modalities_by_the_saved_encoders(demo: Path, tmp_path: Path) -> None:
    plan = json.loads((demo / "demo.json").read_text())
    assert (plan["sources"], plan["targets"]) == (["bazaar", "market"], ["attic"])
    for domain in write_demo(tmp_path / "demo", config=TINY):
        for modality in ("text", "image"):
            table = open_features(domain, modality)
            assert table is not None
            assert table.encoder == load_encoder(demo / "encoders" / modality).name
            assert table.present.mean() > 0.9


def test_every_shopper_has_five_items_or_more_at_rising_times(tmp_path: Path) -> None:
    for domain in write_demo(tmp_path / "demo", config=TINY):
        assert np.diff(domain.offsets).min() >= 5
        assert domain.timestamps is not None
        gaps = np.delete(np.diff(domain.timestamps), domain.offsets[1:-1] - 1)
        assert gaps.min() > 0
        assert 0.2 < (gaps > DAY_SECONDS).mean() < 0.4


def test_an_existing_folder_needs_force_and_is_left_alone(demo: Path) -> None:
    before = bytes_of(demo)
    with pytest.raises(BadInput, match=r"exists already.*--force"):
        write_demo(demo, seed=1, config=TINY)
    assert bytes_of(demo) == before


def last_choices(config: DemoConfig) -> tuple[Catalogue, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A shop's items, and for each shopper: last item, was it after a long pause, commonest shape so far, next item."""
    random = np.random.default_rng(0)
    catalogue = stock_shop(random, config.target_items, config)
    offsets, items, stamps = simulate(random, catalogue, config.target_users, config)
    rows, ends = items - 1, offsets[1:]
    paused = stamps[ends - 2] - stamps[ends - 3] > DAY_SECONDS
    shapes = [np.bincount(catalogue.shape[rows[a : b - 1]], minlength=len(SHAPES)).argmax() for a, b in zip(offsets, ends, strict=False)]
    return catalogue, rows[ends - 2], paused, np.array(shapes), rows[ends - 1]


def hit_at_10(scores: np.ndarray, chosen: np.ndarray) -> float:
    return float(np.mean((scores > scores[np.arange(len(chosen)), chosen][:, None]).sum(axis=1) < 10))


def test_the_rule_beats_popularity_and_each_of_its_parts_adds_to_it() -> None:
    config = DemoConfig()
    catalogue, last, paused, shape, chosen = last_choices(config)

    def hit(paused: np.ndarray = paused, **weights: float) -> float:
        return hit_at_10(appeal(catalogue, last, paused, shape, replace(config, **weights)), chosen)  # type: ignore[arg-type]

    rule = hit()
    assert rule > 0.5
    assert hit_at_10(np.tile(catalogue.popularity, (len(last), 1)), chosen) < 0.1
    assert hit(topic_weight=0) < rule - 0.2  # without the text
    assert hit(hue_weight=0, shape_weight=0) < rule - 0.08  # without the picture
    assert hit(paused=np.zeros_like(paused)) < rule - 0.1  # without the pauses
    assert hit(shape_weight=0) < rule  # without the memory of earlier items


def test_likeness_to_the_last_item_is_not_the_rule() -> None:
    config = DemoConfig()
    catalogue, last, paused, shape, chosen = last_choices(config)
    alike = 4.0 * (catalogue.topic == catalogue.topic[last][:, None]) + np.cos(catalogue.hue - catalogue.hue[last][:, None])
    assert hit_at_10(alike, chosen) < 0.5 * hit_at_10(appeal(catalogue, last, paused, shape, config), chosen)
