"""Pre-trained text, image and joint encoders of `transformers`: item texts and pictures to vectors of length 1.

Joint models (CLIP, SigLIP) give text and pictures vectors of one space; text models (BERT and the sentence encoders made of
it) are pooled as their own files say, or by the mean of their tokens; image models give what they pool themselves.
Weights are read as safetensors only, and no code that comes with a model is run.

Dimensions: n texts or pictures, F dimensions of a vector.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmm4rec.data.encode import encode_extra
from mmm4rec.data.features import Modality
from mmm4rec.device import choose_device
from mmm4rec.errors import BadInput

log = logging.getLogger(__name__)
Pooling = Literal["auto", "mean", "cls", "pooler"]
FILLED = ("siglip", "siglip2")  # trained on texts that were padded to the longest, and without a mask
LONGEST = 512  # tokens, where the model does not say
COMMIT_LETTERS = 12


@dataclass(frozen=True)
class PretrainedConfig:
    """Which encoder, and how it is run."""

    source: str  # a folder that save_pretrained wrote, or a model of the hub
    revision: str | None = None  # of the hub: a commit, branch or tag; what it means today becomes part of the features' name
    pooling: Pooling = "auto"
    device: str = "auto"
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1.")
        if self.pooling not in get_args(Pooling):
            raise ValueError(f"pooling is {self.pooling!r}; it must be one of {', '.join(get_args(Pooling))}.")


class PretrainedEncoder:
    """A loaded model with its tokenizer and picture processor."""

    def __init__(self, config: PretrainedConfig) -> None:
        """Load it, and encode something. Raises BadInput when that fails: nothing there, its own code, pickled or absent weights."""
        with encode_extra():
            import transformers
        self.config, self.device, self.version = config, choose_device(config.device), _version(config)
        told: dict[str, Any] = {"trust_remote_code": False} | ({} if Path(config.source).is_dir() else {"revision": self.version})
        with _loading(config.source), _quiet(transformers):
            how: dict[str, Any] = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
            model, loaded = transformers.AutoModel.from_pretrained(config.source, **how, **told)
            self.joint = hasattr(model, "get_text_features") and hasattr(model, "get_image_features")
            reads_pixels = getattr(model, "main_input_name", "input_ids") == "pixel_values"
            self.tokenizer = self.pictures = None
            if self.joint or not reads_pixels:
                self.tokenizer = transformers.AutoTokenizer.from_pretrained(config.source, **told)
            if self.joint or reads_pixels:
                self.pictures = transformers.AutoImageProcessor.from_pretrained(config.source, backend="pil", **told)
        self.model = model.eval().to(self.device)
        self.pooling = self._pooling(sorted(loaded["missing_keys"]))
        with _loading(config.source):
            self._try_out()

    def _pooling(self, absent: list[str]) -> str:
        """How tokens become a vector; never by weights that the checkpoint lacks, which would be random ones."""
        if lost := [name for name in absent if "pooler" not in name]:
            rule = f"lacks weights of the model: {', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''}."
            raise BadInput(rule, file=self.config.source, remedy="Give a checkpoint of the whole encoder.")
        if self.joint or self.tokenizer is None:
            return "cls" if absent else "pooler"
        asked = _asked_pooling(self.config, self.version)
        if asked == "pooler" and absent:
            raise BadInput("has no weights of a pooler.", file=self.config.source, remedy="Give --pooling mean or cls.")
        return asked

    def _try_out(self) -> None:
        if self.tokenizer is not None:
            self.encode_texts(["a"])
        if self.pictures is not None:
            from PIL import Image

            self.encode_pictures([Image.new("RGB", (32, 32))])

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """What it can encode."""
        known: tuple[tuple[Modality, object], ...] = (("text", self.tokenizer), ("image", self.pictures))
        return tuple(modality for modality, reader in known if reader is not None)

    def name(self, modality: Modality) -> str:
        """A name that fixes what the vectors mean."""
        called = Path(self.config.source).resolve().name if Path(self.config.source).is_dir() else self.config.source
        return f"{called}@{self.version[:COMMIT_LETTERS]}:{modality}:{self.pooling}"

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors [n, F] float32 of length 1. Texts of like length are encoded together; the order comes out as it went in."""
        assert self.tokenizer is not None
        tokens = self.tokenizer(list(texts), truncation=True, max_length=self._longest())
        order = sorted(range(len(texts)), key=lambda row: (len(tokens["input_ids"][row]), row))
        filled = self.model.config.model_type in FILLED
        unread = ({"token_type_ids"} if self.joint else set()) | ({"attention_mask"} if filled else set())
        vectors: list[Tensor] = []
        for rows in self._batches(order):
            batch = {key: [tokens[key][row] for row in rows] for key in tokens}
            how = {"padding": "max_length", "max_length": self._longest()} if filled else {"padding": "longest"}
            padded = self.tokenizer.pad(batch, return_tensors="pt", **how)
            vectors.append(self._forward(self._text_vectors, {key: value for key, value in padded.items() if key not in unread}))
        return _in_order(vectors, order)

    def encode_pictures(self, pictures: Sequence[Any]) -> np.ndarray:
        """Vectors [n, F] float32 of length 1 of PIL pictures in RGB."""
        assert self.pictures is not None
        batches = self._batches(range(len(pictures)))
        vectors = [
            self._forward(self._picture_vectors, dict(self.pictures(images=[pictures[row] for row in rows], return_tensors="pt")))
            for rows in batches
        ]
        return _in_order(vectors, range(len(pictures)))

    def _batches(self, order: Sequence[int]) -> list[Sequence[int]]:
        return [order[first : first + self.config.batch_size] for first in range(0, len(order), self.config.batch_size)]

    def _longest(self) -> int:
        told = getattr(self.model.config, "text_config", self.model.config)
        positions = getattr(told, "max_position_embeddings", LONGEST)
        if getattr(told, "model_type", "") in ("roberta", "xlm-roberta", "camembert"):  # these count from behind the padding's number
            positions -= told.pad_token_id + 1
        return min(positions, self.tokenizer.model_max_length)  # type: ignore[union-attr]

    @torch.inference_mode()
    def _forward(self, vectors: Any, batch: dict[str, Tensor]) -> Tensor:
        inputs = {key: value.to(self.device) for key, value in batch.items()}
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            found = vectors(inputs)
        return F.normalize(found.float(), dim=-1).cpu()

    def _text_vectors(self, inputs: dict[str, Tensor]) -> Tensor:
        if self.joint:
            return self._pooled(self.model.get_text_features(**inputs))
        output = self.model(**inputs)
        if self.pooling == "pooler":
            return self._pooled(output)
        tokens = output.last_hidden_state  # [n, T, F]
        if self.pooling == "cls":
            return tokens[:, 0]
        mask = inputs["attention_mask"][..., None].to(tokens.dtype)  # [n, T, 1]
        return (tokens * mask).sum(1) / mask.sum(1).clamp(min=1)

    def _picture_vectors(self, inputs: dict[str, Tensor]) -> Tensor:
        return self._pooled(self.model.get_image_features(**inputs) if self.joint else self.model(**inputs))

    def _pooled(self, output: Any) -> Tensor:
        """What a model pools itself, or else its first token (a picture's class token): [n, F]."""
        if isinstance(output, Tensor):  # transformers 4
            return output
        pooled = None if self.pooling == "cls" else getattr(output, "pooler_output", None)
        return (output.last_hidden_state[:, 0] if pooled is None else pooled).flatten(1)


def _in_order(vectors: list[Tensor], order: Sequence[int]) -> np.ndarray:
    joined = torch.cat(vectors)
    placed = torch.empty_like(joined)
    placed[torch.as_tensor(list(order))] = joined
    return placed.numpy()


def _asked_pooling(config: PretrainedConfig, version: str) -> str:
    """As asked for, or as a sentence encoder's own files say, or the mean."""
    if config.pooling != "auto":
        return config.pooling
    with encode_extra():
        from transformers.utils import cached_file
    where = {} if Path(config.source).is_dir() else {"revision": version}
    with _loading(config.source):
        file = cached_file(config.source, "1_Pooling/config.json", _raise_exceptions_for_missing_entries=False, **where)
        told = {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
        modes = {key.removeprefix("pooling_mode_") for key, on in told.items() if key.startswith("pooling_mode_") and on}
    if not modes <= {"cls_token", "mean_tokens"} or len(modes) > 1:
        rule = f"pools by {', '.join(sorted(modes))}, of which only cls_token or mean_tokens alone is known here."
        raise BadInput(rule, file=config.source, remedy="Give --pooling mean or cls.")
    return "cls" if "cls_token" in modes else "mean"


def _version(config: PretrainedConfig) -> str:
    """A folder's hash, or the commit that the revision means on the hub today."""
    folder = Path(config.source)
    if folder.is_dir():
        digest = hashlib.sha256()
        for file in sorted(
            each for each in folder.rglob("*") if each.is_file() and each.suffix in (".json", ".safetensors", ".txt", ".model")
        ):
            digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()
    with encode_extra():
        from huggingface_hub import HfApi
    if config.revision is not None and len(config.revision) == 40:
        return config.revision
    with _loading(config.source):
        commit = HfApi().model_info(config.source, revision=config.revision).sha
    log.info("%s is %s today; to encode with the same later, give --revision %s", config.source, commit, commit)
    return str(commit)


@contextmanager
def _loading(source: str) -> Iterator[None]:
    """Around what reads a model's files: whatever is wrong with them ends as BadInput."""
    remedy = "Give a folder that save_pretrained wrote, or a model of the hub with safetensors weights."
    try:
        yield
    except BadInput:
        raise
    except Exception as error:  # hundreds of models, and the network: what they raise has no common class
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise BadInput(f"cannot be loaded ({reason[0]})", file=source, remedy=remedy) from error


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without the library's own bars and advice."""
    told = transformers.utils.logging
    before = told.get_verbosity()
    told.set_verbosity_error()
    told.disable_progress_bar()
    try:
        yield
    finally:
        told.set_verbosity(before)
        told.enable_progress_bar()
