"""The losses: plain cross-entropy, over the whole catalogue or over the targets of the micro-batch.

Dimensions: B examples, I items (column 0 is padding), n candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def full_cross_entropy(scores: Tensor, targets: Tensor, *, padding_class: bool = False) -> Tensor:
    """Sum over the examples of the cross-entropy over items 1..I. scores [B, I + 1], targets [B] in 1..I.

    With `padding_class` padding is a class too, as in the release (models/quirks.py).
    """
    if padding_class:
        return F.cross_entropy(scores, targets, reduction="sum")
    return F.cross_entropy(scores[:, 1:], targets - 1, reduction="sum")


def in_batch_cross_entropy(scores: Tensor, targets: Tensor, counts: Tensor, *, duplicate_negatives: bool = False) -> Tensor:
    """Sum over the examples of the cross-entropy over the targets of the whole micro-batch.

    scores [B, n] over the distinct targets of the micro-batch, targets [B] their columns, counts [n] how
    many examples of the micro-batch have that target. An item counts as often as it is a target, but
    never as a negative of itself, unless `duplicate_negatives` (models/quirks.py).
    """
    weight = torch.log(counts.to(scores.dtype))  # [n]
    if duplicate_negatives:
        return F.cross_entropy(scores + weight, targets, reduction="sum") + weight[targets].sum()
    own = F.one_hot(targets, len(counts)).to(torch.bool)
    return F.cross_entropy(scores + torch.where(own, 0.0, weight), targets, reduction="sum")
