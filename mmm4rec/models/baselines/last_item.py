"""Similarity to the last item's features: cosine, summed over the modalities. Needs no training, and is strong."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mmm4rec.data.batches import Batch
from mmm4rec.data.features import ItemFeatures
from mmm4rec.models.recommender import Catalogue, Recommender


class LastItem(Recommender):
    """Scores an item by its cosine with the user's last item in each modality."""

    def items(self, features: ItemFeatures, ids: Tensor | slice | None = None) -> Catalogue:
        tables = (features.rows(modality, ids) for modality in features.vectors)
        unit = [F.normalize(vectors * present[:, None], dim=-1) for vectors, present in tables]
        joined = torch.cat(unit, dim=-1)  # [n, sum of F]
        return Catalogue({"last": joined}, joined)

    def users(self, batch: Batch, catalogue: Catalogue) -> Tensor:
        return catalogue.inputs["last"][batch.packing.at_last(batch.items)]
