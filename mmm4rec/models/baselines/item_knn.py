"""Item k-nearest-neighbours in the order of a history (after Ludewig & Jannach, UMUAI 2018, arXiv 1803.09587). Needs no training.

Kept: an item's neighbours stood near it in training histories, the nearer the more (weight 1 / steps between), on both sides or
behind it alone (sequential rules); the latest items of a history count most (1 / steps back). The weights are divided by the
root of both items' counts, as a cosine is.
Left out: neighbours of whole sessions (SKNN), inverse document frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmm4rec.data.batches import Batch
from mmm4rec.data.domain import Domain
from mmm4rec.data.features import ItemFeatures
from mmm4rec.models.baselines.config import BaselineConfig, check
from mmm4rec.models.baselines.popularity import before_validation
from mmm4rec.models.recommender import Catalogue, Recommender


@dataclass(frozen=True)
class ItemKNNConfig(BaselineConfig):
    neighbours: int = 100  # of an item, at most
    window: int = 10  # steps between two items of a history that make them neighbours, at most
    both_ways: bool = True  # an item is the neighbour of what followed it, too; off: sequential rules
    recency: float = 1.0  # an item so many steps back counts 1 / steps ** recency

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, recency=self.recency >= 0)

    @property
    def sizes(self) -> tuple[str, ...]:
        return ("neighbours", "window")


class ItemKNN(Recommender):
    """Scores an item by its likeness to the items of the history."""

    def __init__(self, config: ItemKNNConfig, domain: Domain) -> None:
        super().__init__()
        self.config = config
        neighbours, likeness = nearest(domain, config)
        self.register_buffer("neighbours", torch.from_numpy(neighbours))  # [I + 1, K] int64
        self.register_buffer("likeness", torch.from_numpy(likeness))  # [I + 1, K] float32, 0 where there is none

    def items(self, features: ItemFeatures, ids: Tensor | slice | None = None) -> Catalogue:
        """Items as their numbers: exact in float32 up to 16 million."""
        likeness = self.get_buffer("likeness")
        numbers = features.numbers(ids, likeness.device)[:, None].to(likeness)  # [n, 1]
        return Catalogue({"number": numbers}, numbers)

    def users(self, batch: Batch, catalogue: Catalogue) -> Tensor:
        """The latest items' numbers, and their weights: [B, 2 * T]."""
        T = self.config.max_len
        places, exists = batch.packing.recent(T)  # [B, T]
        numbers = F.embedding(batch.items, catalogue.inputs["number"]).flatten()[places]
        weights = exists / torch.arange(1, T + 1, device=places.device) ** self.config.recency
        return torch.cat([numbers * exists, weights], dim=1)

    def scores(self, users: Tensor, catalogue: Catalogue) -> Tensor:
        numbers, weights = users.chunk(2, dim=1)  # [B, T]
        neighbours, likeness = self.get_buffer("neighbours"), self.get_buffer("likeness")
        first, n = int(catalogue.candidates[0, 0]), len(catalogue.candidates)  # a range of items
        scores = likeness.new_zeros(len(users), n)
        for items, weight in zip(numbers.long().unbind(1), weights.unbind(1), strict=True):  # [B] each, the latest first
            place = neighbours[items] - first  # [B, K]
            here = (place >= 0) & (place < n)
            scores.scatter_add_(1, place.where(here, 0), likeness[items] * weight[:, None] * here)
        return scores


def nearest(domain: Domain, config: ItemKNNConfig) -> tuple[np.ndarray, np.ndarray]:
    """The neighbours of items 0..I [I + 1, K], most alike first, and how alike they are; what is left over is item 0 and 0."""
    rows = domain.n_items + 1
    lengths = before_validation(domain)
    users = np.repeat(np.arange(domain.n_users), np.diff(domain.offsets))
    place = np.arange(len(domain.items)) - domain.offsets[users]
    known = place < lengths[users]  # [interactions] before validation
    items, users = domain.items[known].astype(np.int64), users[known]
    keys, worths = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float64)
    for steps in range(1, min(config.window, int(lengths.max(initial=0))) + 1):
        together = users[:-steps] == users[steps:]
        before, after = items[:-steps][together], items[steps:][together]
        pairs = [before * rows + after] + ([after * rows + before] if config.both_ways else [])
        found = np.concatenate([keys, *pairs])
        worth = np.concatenate([worths, np.full(len(found) - len(keys), 1 / steps)])
        keys, places = np.unique(found, return_inverse=True)
        worths = np.bincount(places, worth, minlength=len(keys)).astype(np.float64)
    own, other = np.divmod(keys, rows)
    counts = np.bincount(items, minlength=rows).astype(np.float64)
    alike = worths / np.sqrt(counts[own] * counts[other])
    order = np.lexsort((other, -alike, own))
    own, other, alike = own[order], other[order], alike[order]
    rank = np.arange(len(own)) - np.searchsorted(own, own)
    K = min(config.neighbours, int(rank.max(initial=0)) + 1)
    kept = rank < K
    neighbours, likeness = np.zeros((rows, K), dtype=np.int64), np.zeros((rows, K), dtype=np.float32)
    neighbours[own[kept], rank[kept]], likeness[own[kept], rank[kept]] = other[kept], alike[kept]
    return neighbours, likeness
