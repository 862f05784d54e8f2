"""The interface of every model: items and users as vectors of one space, their product the score.

Dimensions: B users, n rows of a catalogue, D width of a vector.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from mmm4rec.data.batches import Batch
from mmm4rec.data.features import ItemFeatures


@dataclass(frozen=True)
class Catalogue:
    """Items as vectors; row r is the item that the caller asked for in place r."""

    inputs: dict[str, Tensor]  # [n, D] a stream, what a history is made of
    candidates: Tensor  # [n, D], what a user's vector is multiplied with


class Recommender(nn.Module):
    """A model that fit() trains and evaluate() ranks with."""

    def items(self, features: ItemFeatures, ids: Tensor | None = None) -> Catalogue:
        """The vectors of all items 0..I, or of those in `ids` [n]."""
        raise NotImplementedError

    def users(self, batch: Batch, catalogue: Catalogue) -> Tensor:
        """User vectors [B, D] in the batch's order; the batch's items are rows of the catalogue."""
        raise NotImplementedError

    def scores(self, users: Tensor, catalogue: Catalogue) -> Tensor:
        """Logits [B, n] of every row of the catalogue for every user."""
        return users @ catalogue.candidates.T
