"""A released checkpoint into a file of ours."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mmm4rec.config import to_dict
from mmm4rec.data.domain import Domain, open_domain
from mmm4rec.data.features import ItemFeatures, load_features
from mmm4rec.errors import BadInput
from mmm4rec.models.mmm4rec import MMM4Rec
from mmm4rec.models.published import CHANNELS, from_published, read_published, read_tensors
from mmm4rec.run import DataConfig, RunConfig
from mmm4rec.training.checkpoint import save_model
from mmm4rec.training.loop import TrainingConfig


def import_published(
    checkpoint: Path,
    out: Path,
    *,
    features: Mapping[str, Path] | None = None,
    domain: Path | None = None,
    force: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Write a released checkpoint as a `best.safetensors`: to transfer from, and to rank `domain` with.

    Args:
        features: the release's tables (text_feat.pth, ...) of modalities `text` and `image`: their sizes are
            checked against the checkpoint and their digests recorded.
        domain: the domain of the checkpoint's item tables, in the release's order of items. Without one, a
            checkpoint with item tables ranks no domain; transfer leaves the tables behind anyway.
        options: of `from_published`.
    Returns what was read off the tensors. Raises BadInput where the files do not fit, or `out` exists without `force`.
    """
    if out.exists() and not force:
        raise BadInput("exists already.", file=out, remedy="Choose another name, or replace it with --force.")
    tables = {modality: _table(file) for modality, file in (features or {}).items()}
    opened = None if domain is None else open_domain(domain)
    own = None if opened is None else load_features(opened, ("text", "image"))
    weights = read_published(checkpoint)
    if opened is not None and own is not None:
        _check_domain(weights, opened, own)
    try:
        model = from_published(weights, features=tables or (own.vectors if own else None), **options)  # type: ignore[arg-type]
    except BadInput as error:
        raise error if error.file else BadInput(error.rule, file=checkpoint, remedy=error.remedy) from error
    description = _describe(checkpoint, model, opened, own)
    out.parent.mkdir(parents=True, exist_ok=True)
    digest = save_model(out, {name: value.detach() for name, value in model.state_dict().items()}, description)
    return {
        **to_dict(model.config),
        "n_items": description["n_items"],
        "feature_dimensions": description["feature_dimensions"],
        "hash": digest,
    }


def _table(file: Path) -> Tensor:
    table = read_tensors(file)
    if not isinstance(table, Tensor) or table.dim() != 2:
        raise BadInput(
            "is no table of vectors [items, dimension].", file=file, remedy="Give text_feat.pth or image_feat.pth of the release."
        )
    return table


def _check_domain(weights: Mapping[str, Tensor], domain: Domain, features: ItemFeatures) -> None:
    """Raise BadInput unless the domain has the items and the features that the checkpoint's tensors are made for."""
    for name in ("text_item_embedding_bias", "text_embedding", "fusion_factor"):
        if name in weights and weights[name].dim() == 2 and len(weights[name]) != domain.n_items + 1:
            rule = f"has {domain.n_items:,} items; the checkpoint's '{name}' is of {len(weights[name]) - 1:,}."
            raise BadInput(rule, file=domain.path, remedy="Prepare the domain that it was trained on, with the same items.")
    for modality, channel in CHANNELS.items():
        adapter = weights.get(f"{channel}_adapter.0.weight")
        if adapter is not None and features.dimensions.get(modality) != adapter.shape[1]:
            rule = f"has {modality} features of dimension {features.dimensions.get(modality)}; the checkpoint reads {adapter.shape[1]}."
            raise BadInput(rule, file=domain.path, remedy="Encode the domain with the encoder that it was trained with.")


def _describe(checkpoint: Path, model: MMM4Rec, domain: Domain | None, own: ItemFeatures | None) -> dict[str, Any]:
    config = RunConfig(
        DataConfig((checkpoint.name if domain is None else str(domain.path),)), model.config, TrainingConfig(weight_decay=5e-3)
    )
    vectors = {} if model.features is None else model.features.vectors
    return {
        "config": to_dict(config),
        "fingerprints": {} if domain is None else {domain.name: domain.fingerprint},
        "features": {
            "released": {name: hashlib.sha256(table.float().numpy().tobytes()).hexdigest()[:16] for name, table in vectors.items()}
        },
        "init": None,
        "feature_dimensions": {modality: adapter.in_features for modality, adapter in model.adapters.items()},
        "encoders": {} if own is None else dict(own.encoders),
        "n_items": next((len(table) - 1 for table in (*model.ids.values(), model.fusion) if table is not None and table.dim() == 2), None),
    }
