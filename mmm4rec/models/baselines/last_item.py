"""Similarity to the last item's features: cosine, summed over the modalities. Needs no training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mmm4rec.data.batches import Batch
from mmm4rec.data.features import ItemFeatures, Modality
from mmm4rec.errors import BadInput
from mmm4rec.models.baselines.config import BaselineConfig, streams_of
from mmm4rec.models.recommender import Catalogue, Recommender


@dataclass(frozen=True)
class LastItemConfig(BaselineConfig):
    max_len: int = 1  # the last item is enough
    modalities: Literal["text", "image", "both"] = "both"

    @property
    def streams(self) -> tuple[Modality, ...]:
        return streams_of(self.modalities)

    @property
    def per_item(self) -> bool:
        return False


class LastItem(Recommender):
    """Scores an item by its cosine with the user's last item in each modality."""

    def items(self, features: ItemFeatures, ids: Tensor | slice | None = None) -> Catalogue:
        if not features.vectors:
            raise BadInput("last_item needs a domain with features.", remedy="Run: mmm4rec encode DOMAIN")
        tables = (features.rows(modality, ids) for modality in features.vectors)
        unit = [F.normalize(vectors * present[:, None], dim=-1) for vectors, present in tables]
        joined = torch.cat(unit, dim=-1)  # [n, sum of F]
        return Catalogue({"last": joined}, joined)

    def users(self, batch: Batch, catalogue: Catalogue) -> Tensor:
        return catalogue.inputs["last"][batch.packing.at_last(batch.items)]
