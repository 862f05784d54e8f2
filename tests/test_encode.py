"""Encoders: what is fitted, what is absent, what a saved one keeps, and what is refused."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mmm4rec.data.domain import Domain, write_domain
from mmm4rec.data.encode import encode_domains, fit_lexical_text, fit_pixel_image, load_encoder
from mmm4rec.data.features import open_features
from mmm4rec.errors import BadInput

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("sklearn")

TEXTS = [f"{colour} {noun}" for colour in ("red", "green", "blue", "yellow") for noun in ("tent", "lantern", "kettle")]


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path | None]:
    """Twelve pictures of one colour each, a file that is no picture, a file that does not exist, and none."""
    random, files = np.random.default_rng(0), []
    for i in range(12):
        files.append(tmp_path / f"{i}.png")
        Image.new("RGB", (20, 30), tuple(random.integers(256, size=3).tolist())).save(files[-1])
    (tmp_path / "broken.png").write_bytes(files[0].read_bytes()[:40])
    return [*files, tmp_path / "broken.png", tmp_path / "missing.png", None]


def make_domain(folder: Path, texts: Sequence[str | None], images: Sequence[str | None] | None = None) -> Domain:
    table = pd.DataFrame({"item": [f"i{k}" for k in range(len(texts))], "text": texts, "image": images or [None] * len(texts)})
    shoppers = {"offsets": np.array([0, 5]), "items": np.arange(1, 6), "timestamps": None, "user_ids": ["u"]}
    return write_domain(folder, name=folder.name, item_table=table, tie_break="none", provenance={}, **shoppers)  # type: ignore[arg-type]


def text_vectors(domain: Domain) -> np.ndarray:
    table = open_features(domain, "text")
    assert table is not None
    return np.array(table.vectors)


def test_texts_that_share_words_are_closer_and_every_vector_has_length_one() -> None:
    vectors, present = fit_lexical_text(TEXTS, 8).encode(["red tent", "red tents", "blue kettle"])
    assert present.all()
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1)
    assert vectors[0] @ vectors[1] > 0.8 > vectors[0] @ vectors[2]


def test_a_text_without_a_known_term_is_absent() -> None:
    vectors, present = fit_lexical_text(TEXTS, 8).encode(["red tent", "", "   ", "日本"])
    assert present.tolist() == [True, False, False, False]
    assert not vectors[1:].any()


def test_a_picture_that_is_missing_or_damaged_is_absent(pictures: list[Path | None]) -> None:
    vectors, present = fit_pixel_image(pictures, 3).encode(pictures)
    assert present.tolist() == [True] * 12 + [False] * 3
    assert not vectors[12:].any()


def test_pictures_of_one_colour_are_told_apart_by_three_components(pictures: list[Path | None]) -> None:
    encoder = fit_pixel_image(pictures[:12], 3)
    red = pictures[0].with_name("red.png")  # type: ignore[union-attr]
    Image.new("RGB", (200, 100), (250, 10, 10)).save(red)
    Image.new("RGB", (48, 48), (240, 20, 20)).save(red.with_name("redder.png"))
    Image.new("RGB", (48, 48), (10, 250, 250)).save(red.with_name("cyan.png"))
    vectors, _ = encoder.encode([red, red.with_name("redder.png"), red.with_name("cyan.png")])
    assert vectors[0] @ vectors[1] > 0.95
    assert vectors[0] @ vectors[2] < -0.5


def test_a_saved_encoder_gives_the_same_vectors_and_name(tmp_path: Path, pictures: list[Path | None]) -> None:
    text, image = fit_lexical_text(TEXTS, 8), fit_pixel_image(pictures, 3)
    text.save(tmp_path / "text")
    image.save(tmp_path / "image")
    for encoder, folder, inputs in ((text, "text", ["red tent", "a green kettle", ""]), (image, "image", pictures)):
        loaded = load_encoder(tmp_path / folder)
        assert loaded.name == encoder.name
        for before, after in zip(encoder.encode(inputs), loaded.encode(inputs), strict=True):  # type: ignore[arg-type]
            assert before.tobytes() == after.tobytes()


def test_the_name_changes_with_what_was_fitted() -> None:
    names = [fit_lexical_text(texts, d).name for texts, d in ((TEXTS, 8), (TEXTS, 8), (TEXTS, 7), (TEXTS[::-1][:-1], 8))]
    assert names[0] == names[1]
    assert len(set(names)) == 3


def test_a_changed_encoder_is_refused(tmp_path: Path) -> None:
    fit_lexical_text(TEXTS, 8).save(tmp_path / "text")
    file = tmp_path / "text" / "encoder.json"
    info = json.loads(file.read_text())
    info["words"][0], info["words"][1] = info["words"][1], info["words"][0]
    file.write_text(json.dumps(info))
    with pytest.raises(BadInput, match="is damaged"):
        load_encoder(tmp_path / "text")
    file.write_text("{")
    with pytest.raises(BadInput, match="cannot be read"):
        load_encoder(tmp_path / "text")


def test_too_few_texts_for_the_dimensions_name_the_most_that_fits() -> None:
    with pytest.raises(BadInput, match=r"12 texts cannot give 13 dimensions.*from 1 to 12"):
        fit_lexical_text([*TEXTS, ""], 13)


def test_target_texts_change_neither_the_encoder_nor_the_source(tmp_path: Path) -> None:
    kept = []
    for run, extra in enumerate(("red kettle", "an unheard-of gadget")):
        source = make_domain(tmp_path / f"{run}" / "source", TEXTS)
        target = make_domain(tmp_path / f"{run}" / "target", [*TEXTS[:6], extra])
        encode_domains([source.path, target.path], fit_on=[source.path], save=tmp_path / f"{run}" / "encoder", dimensions=8)
        kept.append(
            (load_encoder(tmp_path / f"{run}" / "encoder").name, text_vectors(source).tobytes(), text_vectors(target)[:6].tobytes())
        )
    assert kept[0] == kept[1]


def test_a_saved_encoder_encodes_a_new_domain_as_the_fitting_did(tmp_path: Path) -> None:
    first, second = make_domain(tmp_path / "first", TEXTS), make_domain(tmp_path / "second", [*TEXTS, None])
    encode_domains([first.path], save=tmp_path / "encoder", dimensions=8)
    encode_domains([second.path], encoder=str(tmp_path / "encoder"))
    table = open_features(second, "text")
    assert table is not None
    assert table.present.tolist() == [True] * 12 + [False]
    assert np.array_equal(text_vectors(first), table.vectors[:12])
    assert table.encoder == load_encoder(tmp_path / "encoder").name


def test_fitting_on_the_encoded_domains_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    domain = make_domain(tmp_path / "shop", TEXTS)
    with caplog.at_level(logging.WARNING):
        encode_domains([domain.path], dimensions=8)
    assert "fitted on the domains it encodes: shop" in caplog.text


def test_existing_features_need_force_and_nothing_is_written_before(tmp_path: Path) -> None:
    fresh, done = make_domain(tmp_path / "fresh", TEXTS), make_domain(tmp_path / "done", TEXTS)
    encode_domains([done.path], dimensions=8)
    with pytest.raises(BadInput, match=r"'done' has text features already.*--force"):
        encode_domains([fresh.path, done.path], dimensions=8)
    assert open_features(fresh, "text") is None
    encode_domains([fresh.path, done.path], dimensions=4, force=True)
    assert text_vectors(done).shape == (12, 4)


def test_bad_input_is_refused_with_its_rule(tmp_path: Path) -> None:
    good, mute = make_domain(tmp_path / "good", TEXTS), make_domain(tmp_path / "mute", [""] * 6)
    outside = make_domain(tmp_path / "outside", TEXTS[:6], ["../secret.png"] * 6)
    with pytest.raises(BadInput, match=r"has no text that lexical-8-.* can encode"):
        encode_domains([good.path, mute.path], fit_on=[good.path], dimensions=8)
    assert open_features(good, "text") is None
    with pytest.raises(BadInput, match="No text holds a word"):
        encode_domains([mute.path])
    with pytest.raises(BadInput, match=r"is no encoder.*'lexical', 'pixel'"):
        encode_domains([good.path], encoder="clip")
    with pytest.raises(BadInput, match="outside the domain"):
        encode_domains([outside.path], encoder="pixel")
    with pytest.raises(BadInput, match="0 pictures cannot give"):
        encode_domains([good.path], encoder="pixel")
    encode_domains([good.path], save=tmp_path / "encoder", dimensions=8)
    with pytest.raises(BadInput, match="saved encoder"):
        encode_domains([good.path], encoder=str(tmp_path / "encoder"), fit_on=[good.path])


@pytest.mark.parametrize(("package", "encoder"), [("sklearn", "lexical"), ("PIL", "pixel")])
def test_without_the_extra_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, encoder: str
) -> None:
    domain = make_domain(tmp_path / "shop", TEXTS, ["a.png"] * len(TEXTS))
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BadInput, match=rf"needs {package}.*not installed.*pip install 'mmm4rec\[encode\]'"):
        encode_domains([domain.path], encoder=encoder)
