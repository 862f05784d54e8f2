"""Frozen encoders that turn an item's title or picture into a vector of length 1.

`LexicalTextEncoder`: TF-IDF of words and of characters, reduced by a truncated SVD (latent semantic
analysis, Deerwester et al. 1990). `PixelImageEncoder`: the principal components of small pictures
(Turk and Pentland 1991). Both come from scikit-learn; they are fitted once, on the domains that a
model is pre-trained on, and then encode any domain. A saved encoder is data only:

    encoder.json         schema_version, kind, name; the vocabulary of a lexical encoder
    arrays.safetensors   its arrays

Dimensions: n texts or pictures, V terms, P pixel values, F dimensions of a vector.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as to_bytes

from mmm4rec.data.domain import Domain, new_folder, open_domain
from mmm4rec.data.features import Modality, add_features
from mmm4rec.errors import BadInput

MAX_TERMS = 50_000  # of words, and as many of characters
SIDE_PIXELS = 32  # a picture is seen as 32 x 32 colours
MAX_FITTED_PICTURES = 20_000  # a larger collection is fitted on a part of it, evenly spaced
CHUNK = 4096  # pictures in memory at once

log = logging.getLogger(__name__)


@contextmanager
def encode_extra() -> Iterator[None]:
    """Around imports of the `encode` extra: BadInput that says what to install when one is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise BadInput(f"Encoding needs {error.name}, which is not installed.", remedy="Run: pip install 'mmm4rec[encode]'") from error


@dataclass(frozen=True)
class LexicalTextEncoder:
    """What titles say, in the words and spellings of the titles it was fitted on."""

    kind: ClassVar[str] = "lexical"
    modality: ClassVar[Modality] = "text"
    words: tuple[str, ...]  # single words and pairs
    spellings: tuple[str, ...]  # 3 to 5 characters within a word
    weights: np.ndarray  # [V] inverse document frequency: the words, then the spellings
    components: np.ndarray  # [F, V]

    @property
    def name(self) -> str:
        """A name that fixes what the vectors mean."""
        return _name(self.kind, {"weights": self.weights, "components": self.components}, (*self.words, *self.spellings))

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Vectors [n, F] float32 of length 1, and present [n] bool: absent is a text without a known term, a row of zeros."""
        return _unit_rows(_weigh_terms(texts, self.words, self.spellings, self.weights) @ self.components.T)

    def save(self, folder: str | Path, *, force: bool = False) -> None:
        """Write the encoder into a new folder. Raises BadInput when it exists and `force` is off."""
        info = {"kind": self.kind, "name": self.name, "words": self.words, "spellings": self.spellings}
        _save(folder, {"weights": self.weights, "components": self.components}, info, force=force)


@dataclass(frozen=True)
class PixelImageEncoder:
    """What pictures show, in the principal components of the pictures it was fitted on."""

    kind: ClassVar[str] = "pixel"
    modality: ClassVar[Modality] = "image"
    mean: np.ndarray  # [P]
    components: np.ndarray  # [F, P]

    @property
    def name(self) -> str:
        """A name that fixes what the vectors mean."""
        return _name(self.kind, vars(self), ())

    def encode(self, pictures: Sequence[Path | None]) -> tuple[np.ndarray, np.ndarray]:
        """Vectors [n, F] float32 of length 1, and present [n] bool: absent is no picture or none that can be read, a row of zeros."""
        vectors = np.zeros((len(pictures), len(self.components)), dtype=np.float32)
        for start in range(0, len(pictures), CHUNK):
            pixels, readable = read_pictures(pictures[start : start + CHUNK])
            vectors[start : start + CHUNK][readable] = (pixels[readable] - self.mean) @ self.components.T
        return _unit_rows(vectors)

    def save(self, folder: str | Path, *, force: bool = False) -> None:
        """Write the encoder into a new folder. Raises BadInput when it exists and `force` is off."""
        _save(folder, vars(self), {"kind": self.kind, "name": self.name}, force=force)


Encoder = LexicalTextEncoder | PixelImageEncoder


def fit_lexical_text(texts: Sequence[str], dimensions: int) -> LexicalTextEncoder:
    """Fit a text encoder. Raises BadInput when the texts hold no word, or too few for that many dimensions."""
    with encode_extra():
        from sklearn.decomposition import TruncatedSVD
    word_counter, spelling_counter = _counters(None, None)
    try:
        terms = [counter.fit(texts) for counter in (word_counter, spelling_counter)]
    except ValueError as error:  # scikit-learn: empty vocabulary
        raise BadInput(f"No text holds a word ({len(texts):,} texts).", remedy="Encode domains whose items have texts.") from error
    words, spellings = (tuple(counter.get_feature_names_out().tolist()) for counter in terms)
    weights = np.concatenate([counter.idf_ for counter in terms]).astype(np.float32)
    counts = _weigh_terms(texts, words, spellings, weights)
    _check_dimensions(dimensions, int((counts.getnnz(axis=1) > 0).sum()), counts.shape[1], "texts")
    components = TruncatedSVD(dimensions, random_state=0).fit(counts).components_
    return LexicalTextEncoder(words, spellings, weights, np.ascontiguousarray(components, dtype=np.float32))


def fit_pixel_image(pictures: Sequence[Path | None], dimensions: int) -> PixelImageEncoder:
    """Fit an image encoder. Raises BadInput when too few pictures can be read for that many dimensions."""
    with encode_extra():
        from sklearn.decomposition import PCA
    named = [picture for picture in pictures if picture is not None]
    pixels, readable = read_pictures(named[:: -(-len(named) // MAX_FITTED_PICTURES) or 1])
    _check_dimensions(dimensions, int(readable.sum()), pixels.shape[1], "pictures")
    fitted = PCA(dimensions, svd_solver="randomized", random_state=0).fit(pixels[readable])
    return PixelImageEncoder(fitted.mean_.astype(np.float32), np.ascontiguousarray(fitted.components_, dtype=np.float32))


def read_pictures(pictures: Sequence[Path | None]) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [n, P] float32 in 0..1, and readable [n] bool: a picture that is missing or damaged is a row of zeros."""
    with encode_extra():
        from PIL.Image import Resampling
    pixels = np.zeros((len(pictures), SIDE_PIXELS * SIDE_PIXELS * 3), dtype=np.float32)
    readable = np.zeros(len(pictures), dtype=bool)
    for row, picture in enumerate(pictures):
        image = None if picture is None else open_picture(picture)
        if image is not None:
            small = image.resize((SIDE_PIXELS, SIDE_PIXELS), Resampling.BILINEAR)
            pixels[row] = np.asarray(small, dtype=np.float32).ravel() / 255
            readable[row] = True
    return pixels, readable


def open_picture(picture: Path) -> Any | None:
    """A PIL picture in RGB; None, and a warning, where it is missing or damaged."""
    with encode_extra():
        from PIL import Image
    try:
        with Image.open(picture) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        log.warning("%s cannot be read and counts as absent (%s).", picture, error)
        return None


def is_own(encoder: str) -> bool:
    """Whether this names an encoder of this module, fitted or to be fitted, and not a pre-trained one (pretrained.py)."""
    return encoder in (LexicalTextEncoder.kind, PixelImageEncoder.kind) or (Path(encoder) / "encoder.json").is_file()


def load_encoder(folder: str | Path) -> Encoder:
    """Load a saved encoder; nothing in it is executed. Raises BadInput when it is none, or damaged."""
    file = Path(folder) / "encoder.json"
    remedy = "Give 'lexical', 'pixel' or a folder that mmm4rec encode --save wrote."
    if not file.is_file():
        raise BadInput("is no encoder: it has no encoder.json.", file=folder, remedy=remedy)
    encoder: Encoder
    try:
        info: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if info["schema_version"] != 1:
            raise BadInput(f"has schema_version {info['schema_version']}; this version reads 1.", file=file, remedy=remedy)
        arrays = load_file(file.with_name("arrays.safetensors"))
        if info["kind"] == LexicalTextEncoder.kind:
            encoder = LexicalTextEncoder(tuple(info["words"]), tuple(info["spellings"]), arrays["weights"], arrays["components"])
        elif info["kind"] == PixelImageEncoder.kind:
            encoder = PixelImageEncoder(arrays["mean"], arrays["components"])
        else:
            raise BadInput(f"has an unknown kind: {info['kind']!r}.", file=file, remedy=remedy)
        intact = encoder.name == info["name"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise BadInput(f"cannot be read ({error!r}).", file=folder, remedy="Save the encoder again.") from error
    if not intact:
        raise BadInput(f"is damaged: its contents are not those of {info['name']}.", file=folder, remedy="Save the encoder again.")
    return encoder


def encode_domains(
    domains: Sequence[str | Path],
    *,
    encoder: str = "lexical",
    fit_on: Sequence[str | Path] = (),
    save: str | Path | None = None,
    dimensions: int = 256,
    force: bool = False,
) -> list[Domain]:
    """Give domains the features of one encoder: all of them or, when one cannot be encoded, none.

    Args:
        encoder: `lexical` (texts) or `pixel` (pictures), fitted now, or the folder of a saved encoder.
        fit_on: the domains to fit on; without any, the domains themselves, which a warning says.
        save: a new folder for the fitted encoder.
        dimensions: of a fitted encoder's vectors.
        force: replace features, and an encoder in `save`.
    Raises BadInput when a domain has features and `force` is off or has nothing to encode, when the
    encoder is unknown, and when `fit_on` or `save` goes with a saved encoder.
    """
    opened, fitted_on = [open_domain(path) for path in domains], [open_domain(path) for path in fit_on]
    chosen: Encoder | None = None
    if encoder not in (LexicalTextEncoder.kind, PixelImageEncoder.kind):
        chosen = load_encoder(encoder)
        if fit_on or save is not None:
            raise BadInput("is a saved encoder, which is not fitted or saved again.", file=encoder, remedy="Leave fit_on and save out.")
    modality: Modality = chosen.modality if chosen else "text" if encoder == LexicalTextEncoder.kind else "image"
    for domain in opened:
        place = domain.path / "features" / f"{modality}.json"
        if place.exists() and not force:
            raise BadInput(f"domain '{domain.name}' has {modality} features already.", file=place, remedy="Replace them with --force.")
    if chosen is None:
        chosen = _fit(modality, opened, fitted_on, dimensions)
    tables = [_encode_domain(chosen, domain) for domain in opened]
    if save is not None:
        chosen.save(save, force=force)
    for domain, (vectors, present) in zip(opened, tables, strict=True):
        add_features(domain, modality, vectors, present, encoder=chosen.name, force=force)
        log.info("%s: %s features for %d of %d items by %s.", domain.name, modality, present.sum(), len(present), chosen.name)
    return opened


def _fit(modality: Modality, domains: list[Domain], fit_on: list[Domain], dimensions: int) -> Encoder:
    if not fit_on:
        log.warning("The %s encoder is fitted on the domains it encodes: %s.", modality, ", ".join(domain.name for domain in domains))
    if modality == "text":
        return fit_lexical_text([text for domain in fit_on or domains for text in read_texts(domain)], dimensions)
    return fit_pixel_image([picture for domain in fit_on or domains for picture in picture_files(domain)], dimensions)


def _encode_domain(encoder: Encoder, domain: Domain) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(encoder, LexicalTextEncoder):
        vectors, present = encoder.encode(read_texts(domain))
    else:
        vectors, present = encoder.encode(picture_files(domain))
    if not present.any():
        raise BadInput(
            f"has no {encoder.modality} that {encoder.name} can encode ({domain.n_items:,} items).",
            file=domain.path / "items.parquet",
            remedy=f"Leave this domain out, or prepare it with {'texts' if encoder.modality == 'text' else 'pictures'}.",
        )
    return vectors, present


def read_texts(domain: Domain) -> list[str]:
    """The items' texts; '' where there is none."""
    return [text if isinstance(text, str) else "" for text in domain.item_table()["text"]]


def picture_files(domain: Domain) -> list[Path | None]:
    """The items' pictures; None where there is none. Raises BadInput when one lies outside the domain."""
    images = [image if isinstance(image, str) and image else None for image in domain.item_table()["image"]]
    for image in images:
        if image is not None and (PurePosixPath(image).is_absolute() or ".." in PurePosixPath(image).parts):
            raise BadInput(f"names a picture outside the domain: {image}.", file=domain.path / "items.parquet", remedy="Copy pictures in.")
    return [None if image is None else domain.path / image for image in images]


def _counters(words: Sequence[str] | None, spellings: Sequence[str] | None) -> tuple[Any, Any]:
    with encode_extra():
        from sklearn.feature_extraction.text import TfidfVectorizer
    shared: dict[str, Any] = {"sublinear_tf": True, "dtype": np.float32, "max_features": MAX_TERMS}
    return (
        TfidfVectorizer(analyzer="word", ngram_range=(1, 2), vocabulary=words, **shared),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), vocabulary=spellings, **shared),
    )


def _weigh_terms(texts: Sequence[str], words: Sequence[str], spellings: Sequence[str], weights: np.ndarray) -> Any:
    """TF-IDF [n, V], sparse: the words' part and the spellings' part of a row have length 1 each."""
    with encode_extra():
        from scipy import sparse
    word_counter, spelling_counter = _counters(words, spellings)
    word_counter.idf_, spelling_counter.idf_ = weights[: len(words)], weights[len(words) :]
    return sparse.hstack([word_counter.transform(texts), spelling_counter.transform(texts)], format="csr")


def _unit_rows(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows at length 1, and which rows have a length."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0), lengths[:, 0] > 0


def _check_dimensions(dimensions: int, fitted: int, inputs: int, what: str) -> None:
    most = min(fitted, inputs)
    if not 1 <= dimensions <= most:
        raise BadInput(f"{fitted:,} {what} cannot give {dimensions:,} dimensions.", remedy=f"Give --dimensions from 1 to {most:,}.")


def _name(kind: str, arrays: dict[str, np.ndarray], terms: Sequence[str]) -> str:
    digest = hashlib.sha256("\0".join(terms).encode())
    for array in arrays.values():
        digest.update(np.ascontiguousarray(array, dtype="<f4").tobytes())
    return f"{kind}-{len(arrays['components'])}-{digest.hexdigest()[:12]}"


def _save(folder: str | Path, arrays: dict[str, np.ndarray], info: dict[str, Any], *, force: bool) -> None:
    with new_folder(folder, force=force, marker="encoder.json") as part:
        (part / "arrays.safetensors").write_bytes(to_bytes(arrays))
        (part / "encoder.json").write_text(json.dumps({"schema_version": 1, **info}, ensure_ascii=False) + "\n", encoding="utf-8")
