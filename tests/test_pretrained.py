"""Facts about pre-trained encoders, with small models of random weights that the tests save: the loading code is the real one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from mmm4rec.__main__ import main
from mmm4rec.data import parts
from mmm4rec.data.domain import Domain, set_images, write_domain
from mmm4rec.data.features import open_features
from mmm4rec.data.parts import Work, encode_pretrained
from mmm4rec.data.pretrained import PretrainedConfig, PretrainedEncoder
from mmm4rec.errors import BadInput

transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")

WORDS = ["red", "blue", "green", "kite", "ball", "tent", "a", "the", "of", "with"]
ROOT = Path(__file__).parents[1]


def tokenizer(folder: Path, longest: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    known = {word: place for place, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=longest, **names).save_pretrained(folder)


SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def pixels(folder: Path) -> None:
    transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)


def clip(folder: Path) -> None:
    text = {**SMALL, "vocab_size": 20, "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    config = transformers.CLIPConfig(text_config=text, vision_config={**SMALL, "image_size": 16, "patch_size": 8}, projection_dim=6)
    transformers.CLIPModel(config).save_pretrained(folder)
    tokenizer(folder, 12)
    pixels(folder)


def siglip(folder: Path) -> None:
    text = {**SMALL, "vocab_size": 20, "max_position_embeddings": 12, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    config = transformers.SiglipConfig(text_config=text, vision_config={**SMALL, "image_size": 16, "patch_size": 8})
    transformers.SiglipModel(config).save_pretrained(folder)
    tokenizer(folder, 12)
    transformers.SiglipImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)


def bert(folder: Path) -> None:
    transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=20, max_position_embeddings=12, pad_token_id=1)).save_pretrained(
        folder
    )
    tokenizer(folder, 12)


def vit(folder: Path) -> None:
    transformers.ViTModel(transformers.ViTConfig(**SMALL, image_size=16, patch_size=8)).save_pretrained(folder)
    transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)


MODELS: dict[str, tuple[Callable[[Path], None], tuple[str, ...], int]] = {
    "clip": (clip, ("text", "image"), 6),
    "siglip": (siglip, ("text", "image"), 16),
    "bert": (bert, ("text",), 16),
    "vit": (vit, ("image",), 16),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name, (write, _, _) in MODELS.items():
        write(folder / name)
    return {name: folder / name for name in MODELS}


def texts(count: int) -> list[str]:
    draw = np.random.default_rng(0)
    return ["" if number % 7 == 3 else " ".join(draw.choice(WORDS, 1 + number % 9)) for number in range(count)]


def shop(folder: Path, count: int = 40, pictures: Sequence[int] = ()) -> Domain:
    """A domain of so many items; those in `pictures` have one, of a colour of their own; one of them is broken."""
    table = pd.DataFrame({"item": [f"i{number}" for number in range(count)], "text": texts(count), "image": None})
    shoppers: dict[str, Any] = {"offsets": np.array([0, 5]), "items": np.arange(1, 6), "timestamps": None, "user_ids": ["u"]}
    domain = write_domain(folder, name=folder.name, item_table=table, tie_break="none", provenance={}, **shoppers)
    (folder / "images").mkdir()
    for number in pictures:
        colours = np.random.default_rng(number).integers(0, 255, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(colours).save(folder / "images" / f"{number}.png")
    if pictures:
        (folder / "images" / f"{pictures[0]}.png").write_bytes(b"no picture")
        set_images(domain, [f"images/{number}.png" if number in pictures else None for number in range(count)])
    return domain


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_gives_vectors_of_length_one_and_marks_what_is_absent(
    name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    """Absent are items without a text or picture, and broken pictures: no vector of a white picture, a row of zeros."""
    _, modalities, width = MODELS[name]
    domain = shop(tmp_path / "shop", pictures=range(0, 40, 3))
    encode_pretrained([domain.path], PretrainedConfig(str(models[name]), device="cpu"))
    for modality in ("text", "image"):
        table = open_features(domain, modality)  # type: ignore[arg-type]
        if modality not in modalities:
            assert table is None
            continue
        assert table is not None
        expected = [bool(text) for text in texts(40)] if modality == "text" else [number % 3 == 0 and number > 0 for number in range(40)]
        assert table.present.tolist() == expected
        assert table.vectors.dtype == np.float16
        assert table.vectors.shape == (40, width)
        lengths = np.linalg.norm(table.vectors.astype(np.float32), axis=1)
        np.testing.assert_allclose(lengths, np.array(expected, dtype=float), atol=2e-3)
        assert table.encoder.startswith(f"{name}@")


@pytest.mark.parametrize("name", ["clip", "siglip", "bert"])
def test_a_text_is_encoded_as_the_library_does_it_alone(name: str, models: dict[str, Path]) -> None:
    """Whatever stands beside it in a batch. SigLIP pads to its longest, as it was trained."""
    encoder = PretrainedEncoder(PretrainedConfig(str(models[name]), device="cpu", batch_size=8))
    some = [text for text in texts(30) if text]
    model, reader = transformers.AutoModel.from_pretrained(models[name]).eval(), transformers.AutoTokenizer.from_pretrained(models[name])
    for text, vector in zip(some, encoder.encode_texts(some), strict=True):
        inputs = reader(text, return_tensors="pt", truncation=True, max_length=12, padding="max_length" if name == "siglip" else False)
        inputs.pop("token_type_ids", None) if name != "bert" else None
        if name == "siglip":
            inputs.pop("attention_mask", None)
        with torch.no_grad():
            told = model(**inputs).last_hidden_state.mean(1) if name == "bert" else model.get_text_features(**inputs).pooler_output
        np.testing.assert_allclose(vector, torch.nn.functional.normalize(told, dim=-1)[0].numpy(), atol=1e-5)


def test_a_picture_is_encoded_as_the_library_does_it_alone(models: dict[str, Path]) -> None:
    encoder = PretrainedEncoder(PretrainedConfig(str(models["clip"]), device="cpu", batch_size=3))
    pictures = [Image.fromarray(np.random.default_rng(n).integers(0, 255, (30, 20 + n, 3), dtype=np.uint8)) for n in range(5)]
    model, reader = (
        transformers.AutoModel.from_pretrained(models["clip"]).eval(),
        transformers.CLIPImageProcessorPil.from_pretrained(models["clip"]),
    )
    for picture, vector in zip(pictures, encoder.encode_pictures(pictures), strict=True):
        with torch.no_grad():
            told = model.get_image_features(**reader(images=picture, return_tensors="pt")).pooler_output
        np.testing.assert_allclose(vector, torch.nn.functional.normalize(told, dim=-1)[0].numpy(), atol=1e-5)


def test_pooling_is_what_a_sentence_encoders_own_files_say(models: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "sentences"
    shutil.copytree(models["bert"], folder)
    found = {None: PretrainedEncoder(PretrainedConfig(str(folder), device="cpu")).pooling}
    (folder / "1_Pooling").mkdir()
    for key in ("pooling_mode_cls_token", "pooling_mode_mean_tokens"):
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({key: True}))
        found[key] = PretrainedEncoder(PretrainedConfig(str(folder), device="cpu")).pooling
    assert found == {None: "mean", "pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
    one, other = (PretrainedEncoder(PretrainedConfig(str(folder), pooling=how, device="cpu")) for how in ("cls", "mean"))
    assert one.name("text") != other.name("text")
    assert np.abs(one.encode_texts(["red kite"]) - other.encode_texts(["red kite"])).max() > 1e-3


def test_other_weights_have_another_name(models: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    shutil.copytree(models["bert"], folder)
    before = PretrainedEncoder(PretrainedConfig(str(folder), device="cpu")).name("text")
    assert before == PretrainedEncoder(PretrainedConfig(str(models["bert"]), device="cpu")).name("text")
    torch.manual_seed(1)
    bert(folder)
    assert PretrainedEncoder(PretrainedConfig(str(folder), device="cpu")).name("text") != before


def test_weights_that_a_checkpoint_lacks_are_never_random_ones(models: dict[str, Path], tmp_path: Path) -> None:
    """A classifier's checkpoint has no pooler: pictures are read by their class token, texts by their tokens, alike at every load."""
    transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, image_size=16, patch_size=8)).save_pretrained(tmp_path / "vit")
    shutil.copy(models["vit"] / "preprocessor_config.json", tmp_path / "vit")
    config = transformers.BertConfig(**SMALL, vocab_size=20, max_position_embeddings=12, pad_token_id=1)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    tokenizer(tmp_path / "bert", 12)
    picture = [Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 30, 3), dtype=np.uint8))]
    one, other = (PretrainedEncoder(PretrainedConfig(str(tmp_path / "vit"), device="cpu")) for _ in range(2))
    np.testing.assert_array_equal(one.encode_pictures(picture), other.encode_pictures(picture))
    assert one.name("image").endswith(":cls")
    for pooling in ("auto", "cls"):
        told = PretrainedConfig(str(tmp_path / "bert"), pooling=pooling, device="cpu")  # type: ignore[arg-type]
        one, other = PretrainedEncoder(told), PretrainedEncoder(told)
        np.testing.assert_array_equal(one.encode_texts(["red kite"]), other.encode_texts(["red kite"]))
    with pytest.raises(BadInput, match="no weights of a pooler"):
        PretrainedEncoder(PretrainedConfig(str(tmp_path / "bert"), pooling="pooler", device="cpu"))


def vectors_of(domain: Domain, modality: str = "text") -> np.ndarray:
    table = open_features(domain, modality)  # type: ignore[arg-type]
    assert table is not None
    return np.array(table.vectors)


def test_an_encoding_that_was_ended_goes_on_and_comes_to_the_same(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PART_ITEMS", 8)
    config = PretrainedConfig(str(models["clip"]), device="cpu", batch_size=3)
    whole, ended = shop(tmp_path / "whole", pictures=range(0, 40, 2)), shop(tmp_path / "ended", pictures=range(0, 40, 2))
    encode_pretrained([whole.path], config)
    written: list[int] = []
    original = parts.encode_part

    def dies(encoder: PretrainedEncoder, work: Work, part: int, inputs: Any) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        original(encoder, work, part, inputs)
        written.append(part)

    monkeypatch.setattr(parts, "encode_part", dies)
    with pytest.raises(KeyboardInterrupt):
        encode_pretrained([ended.path], config)
    assert open_features(ended, "text") is None
    monkeypatch.setattr(
        parts, "encode_part", lambda encoder, work, part, inputs: (written.append(part), original(encoder, work, part, inputs))
    )
    encode_pretrained([ended.path], config)
    assert written == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]  # texts, then pictures, each part once
    for modality in ("text", "image"):
        np.testing.assert_array_equal(vectors_of(whole, modality), vectors_of(ended, modality))
    assert sorted(file.name for file in (ended.path / "features").iterdir()) == sorted(f.name for f in (whole.path / "features").iterdir())


def test_parts_of_other_pictures_are_not_gone_on_with(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_ITEMS", 8)
    domain, config = shop(tmp_path / "shop", pictures=range(0, 40, 3)), PretrainedConfig(str(models["vit"]), device="cpu", batch_size=3)
    (work,) = parts.plan([domain.path], encoder := PretrainedEncoder(config))
    for part in work.parts[:3]:
        parts.encode_part(encoder, work, part, work.inputs)
    Image.new("RGB", (30, 20)).save(domain.path / "images" / "0.png")  # it was broken
    encode_pretrained([domain.path], config)
    table = open_features(domain, "image")
    assert table is not None
    assert table.present[0]


@pytest.mark.slow
def test_an_encoding_that_was_killed_goes_on(models: dict[str, Path], tmp_path: Path) -> None:
    domain = shop(tmp_path / "shop", count=40_000)
    command = [sys.executable, "-m", "mmm4rec", "encode", str(domain.path), "--encoder", str(models["bert"]), "--device", "cpu"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list((domain.path / "features").glob(".text-*/*.safetensors"))) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (folder,) = (domain.path / "features").glob(".text-*")
    kept = {file: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")}
    assert 0 < len(kept) < 20
    times: dict[Path, int] = {}
    original = parts.finish

    def look(work: Work) -> int:
        times.update({file: file.stat().st_mtime_ns for file in kept})
        return original(work)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "finish", look)
        assert main(command[3:]) == 0
    assert times == kept
    assert len(vectors_of(domain)) == 40_000


@pytest.mark.slow
def test_workers_of_ray_give_the_vectors_of_one_process(models: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="several workers need Ray")
    one, many = (shop(tmp_path / name, count=5000, pictures=range(0, 100, 2)) for name in ("one", "many"))
    encode_pretrained([one.path], PretrainedConfig(str(models["clip"]), device="cpu"))
    script = [
        sys.executable,
        str(ROOT / "studies" / "encode_cluster.py"),
        str(many.path),
        "--encoder",
        str(models["clip"]),
        "--workers",
        "2",
    ]
    environment = {**os.environ, "RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(script, check=False, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    for modality in ("text", "image"):
        np.testing.assert_array_equal(vectors_of(one, modality), vectors_of(many, modality))
        mine, theirs = (open_features(domain, modality) for domain in (one, many))  # type: ignore[arg-type]
        assert mine is not None
        assert theirs is not None
        assert (mine.encoder, mine.digest) == (theirs.encoder, theirs.digest)


def pickled(models: dict[str, Path], folder: Path) -> None:
    shutil.copytree(models["bert"], folder)
    weights = transformers.AutoModel.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")


def own_code(models: dict[str, Path], folder: Path) -> None:
    shutil.copytree(models["bert"], folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")


def empty(models: dict[str, Path], folder: Path) -> None:
    folder.mkdir()


def cut_short(models: dict[str, Path], folder: Path) -> None:
    shutil.copytree(models["bert"], folder)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:2000])


def layers_lost(models: dict[str, Path], folder: Path) -> None:
    shutil.copytree(models["bert"], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))


def no_padding(models: dict[str, Path], folder: Path) -> None:
    shutil.copytree(models["bert"], folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != "pad_token"}))


def pools_otherwise(models: dict[str, Path], folder: Path) -> None:
    shutil.copytree(models["bert"], folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_lasttoken": true, "pooling_mode_mean_tokens": false}')


def pools_by_nothing(models: dict[str, Path], folder: Path) -> None:
    pools_otherwise(models, folder)
    (folder / "1_Pooling" / "config.json").write_text("{")


@pytest.mark.parametrize("spoil", [pickled, own_code, empty, cut_short, layers_lost, no_padding, pools_otherwise, pools_by_nothing])
def test_what_is_no_whole_known_encoder_is_refused(
    spoil: Callable[[dict[str, Path], Path], None], models: dict[str, Path], tmp_path: Path
) -> None:
    spoil(models, tmp_path / "model")
    with pytest.raises(BadInput, match=r"cannot be loaded|lacks weights|pools by lasttoken"):
        PretrainedEncoder(PretrainedConfig(str(tmp_path / "model"), device="cpu"))
    assert not (tmp_path / "model" / "ran").exists()


def test_what_cannot_be_encoded_is_told(models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    domain = shop(tmp_path / "shop")

    def told(*arguments: str) -> str:
        assert main(["encode", str(domain.path), *arguments]) == 2
        return capsys.readouterr().err

    assert "has no image to encode" in told("--encoder", str(models["vit"]))
    assert "mmm4rec images" in told("--encoder", str(models["clip"]), "--modality", "image")
    assert "encodes text, not image" in told("--encoder", str(models["bert"]), "--modality", "image")
    assert "not fitted or saved" in told("--encoder", str(models["bert"]), "--save", str(tmp_path / "x"))
    assert "device is 'gpu'" in told("--encoder", str(models["bert"]), "--device", "gpu")
    assert "pooling is 'best'" in told("--encoder", str(models["bert"]), "--pooling", "best")
    encode_pretrained([domain.path], PretrainedConfig(str(models["bert"]), device="cpu"))
    assert "--force" in told("--encoder", str(models["bert"]))
    assert main(["encode", str(domain.path), "--encoder", str(models["bert"]), "--force"]) == 0
