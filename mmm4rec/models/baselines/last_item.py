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

    def items(self, features: ItemFeatures, ids: Tensor | None = None) -> Catalogue:
        unit = [F.normalize(vectors if ids is None else vectors[ids], dim=-1) for vectors in features.vectors.values()]
        joined = torch.cat(unit, dim=-1)  # [n, sum of F]
        return Catalogue({"last": joined}, joined)

    def users(self, batch: Batch, catalogue: Catalogue) -> Tensor:
        last = [group.items.gather(1, group.lengths[:, None] - 1)[:, 0] for group in batch.groups]
        return catalogue.inputs["last"][torch.cat(last)]
