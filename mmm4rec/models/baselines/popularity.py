"""Popularity: every user gets the items in the order of their training interactions. Needs no training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmm4rec.data.batches import Batch, ranges
from mmm4rec.data.domain import Domain
from mmm4rec.data.features import ItemFeatures
from mmm4rec.models.baselines.config import BaselineConfig
from mmm4rec.models.recommender import Catalogue, Recommender


@dataclass(frozen=True)
class PopularityConfig(BaselineConfig):
    max_len: int = 1  # a history says nothing


class Popularity(Recommender):
    """Scores an item by its count among the interactions before validation."""

    def __init__(self, domain: Domain) -> None:
        super().__init__()
        starts = domain.offsets[:-1] + before_validation(domain)
        heldout = ranges(starts, domain.offsets[1:] - starts)
        counts = np.bincount(domain.items, minlength=domain.n_items + 1) - np.bincount(domain.items[heldout], minlength=domain.n_items + 1)
        self.register_buffer("counts", torch.from_numpy(counts.astype(np.float32))[:, None])  # [I + 1, 1]

    def items(self, features: ItemFeatures, ids: Tensor | slice | None = None) -> Catalogue:
        counts = self.get_buffer("counts")
        return Catalogue({}, counts if ids is None else counts[ids])

    def users(self, batch: Batch, catalogue: Catalogue) -> Tensor:
        return catalogue.candidates.new_ones(len(batch), 1)


def before_validation(domain: Domain) -> np.ndarray:
    """How many interactions of each user stand before the validation target, [users]."""
    before_valid, _ = domain.before(np.arange(domain.n_users))
    return np.maximum(before_valid, 0)
