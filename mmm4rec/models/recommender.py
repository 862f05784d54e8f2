"""The interface of every model: items and users as vectors of one space, their product the score.

Dimensions: B users, n rows of a catalogue, D width of a vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmm4rec.data.batches import Batch
from mmm4rec.data.features import ItemFeatures

ITEMS_IN_CACHE = 4096  # items whose vectors are computed at once on a CPU


@dataclass(frozen=True)
class Catalogue:
    """Items as vectors; row r is the item that the caller asked for in place r."""

    inputs: dict[str, Tensor]  # [n, D] a stream, what a history is made of
    candidates: Tensor  # [n, D], what a user's vector is multiplied with


class Recommender(nn.Module):
    """A model that fit() trains and evaluate() ranks with."""

    temperature = 1.0  # what the products of users and items are divided by

    def items(self, features: ItemFeatures, ids: Tensor | slice | None = None) -> Catalogue:
        """The vectors of all items 0..I, or of those in `ids`: [n], or a range of rows."""
        raise NotImplementedError

    def users(self, batch: Batch, catalogue: Catalogue) -> Tensor:
        """User vectors [B, D] in the batch's order; the batch's items are rows of the catalogue."""
        raise NotImplementedError

    def scores(self, users: Tensor, catalogue: Catalogue) -> Tensor:
        """Logits [B, n] of every row of the catalogue for every user."""
        return users @ catalogue.candidates.T / self.temperature


def full_precision(vectors: Tensor) -> Tensor:
    """What autocast left in half precision as float32: losses are computed in that."""
    return vectors.float() if vectors.dtype in (torch.bfloat16, torch.float16) else vectors


def items_in_blocks(model: Recommender, features: ItemFeatures, ids: Tensor | None = None) -> list[Catalogue]:
    """The vectors of the items `ids` [n], or of all with padding, in order; on a CPU so many at a time as its cache bears."""
    device = next((part.device for part in features.present.values()), torch.device("cpu"))
    step = ITEMS_IN_CACHE if device.type == "cpu" else features.n_items + 1
    ranges = (slice(first, first + step) for first in range(0, features.n_items + 1, step))
    blocks = (model.items(features, block) for block in (ranges if ids is None else ids.split(step)))
    return [Catalogue({name: full_precision(x) for name, x in own.inputs.items()}, full_precision(own.candidates)) for own in blocks]


def joined(blocks: list[Catalogue]) -> Catalogue:
    """The blocks' vectors one behind the other, without their graphs."""
    inputs = {name: torch.cat([block.inputs[name].detach() for block in blocks]) for name in blocks[0].inputs}
    return Catalogue(inputs, torch.cat([block.candidates.detach() for block in blocks]))


def rows_of(table: Tensor, ids: Tensor | slice | None) -> Tensor:
    """Rows of a parameter that has a row an item: [n, ...]."""
    if isinstance(ids, slice):
        return _Range.apply(table, ids)
    return table if ids is None else F.embedding(ids, table)


class _Range(torch.autograd.Function):
    """A range of a parameter's rows, whose gradient is added to `parameter.grad` in place.

    Autograd's own gradient of a range is an array as large as the whole table, once for every block of a large catalogue.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: slice) -> Tensor:
        ctx.table, ctx.rows = table, rows
        return table[rows]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        if ctx.table.grad is None:
            ctx.table.grad = torch.zeros_like(ctx.table)
        ctx.table.grad[ctx.rows] += gradients[0]
        return None, None
