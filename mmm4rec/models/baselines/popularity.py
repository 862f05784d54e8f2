"""Popularity: every user gets the items in the order of their training interactions. Needs no training."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mmm4rec.data.batches import Batch
from mmm4rec.data.domain import Domain
from mmm4rec.data.features import ItemFeatures
from mmm4rec.models.recommender import Catalogue, Recommender


class Popularity(Recommender):
    """Scores an item by its count among the interactions that are neither validation nor test targets."""

    def __init__(self, domain: Domain) -> None:
        super().__init__()
        is_training = np.ones(len(domain.items), dtype=bool)
        for back in (1, 2):
            is_training[np.maximum(domain.offsets[1:] - back, domain.offsets[:-1])] = False
        counts = np.bincount(domain.items[is_training], minlength=domain.n_items + 1)
        self.register_buffer("counts", torch.from_numpy(counts.astype(np.float32))[:, None])  # [I + 1, 1]

    def items(self, features: ItemFeatures, ids: Tensor | slice | None = None) -> Catalogue:
        counts = self.get_buffer("counts")
        return Catalogue({}, counts if ids is None else counts[ids])

    def users(self, batch: Batch, catalogue: Catalogue) -> Tensor:
        return catalogue.candidates.new_ones(len(batch), 1)
