"""Full-ranking metrics from ranks. The rank of a target = 1 + candidates that score higher + half of the ties."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # what only names metrics, a command's --help for one, need not wait for torch
    from torch import Tensor

CUTOFFS = (10, 20, 50)
DEFINITION = "full ranking, rank = 1 + above + ties / 2"  # numbers of another one never stand beside ours


def outranked(scores: Tensor, target: Tensor) -> Tensor:
    """What candidates add to a target's rank, [B]: those above it and half of its equals. scores [B, n], target [B, 1] its score."""
    import torch

    above, equal = (compare(scores, target).sum(1, dtype=torch.int32) for compare in (torch.gt, torch.eq))
    return above + equal.double() / 2


def metrics(rank: np.ndarray) -> dict[str, float]:
    """Means over the users of hit@k, ndcg@k (one relevant item) and mrr. rank [users], from 1."""
    found = {k: rank <= k for k in CUTOFFS}
    gain = 1 / np.log2(rank + 1)
    result = {f"hit@{k}": float(found[k].mean()) for k in CUTOFFS}
    result |= {f"ndcg@{k}": float((gain * found[k]).mean()) for k in CUTOFFS}
    return result | {"mrr": float((1 / rank).mean())}


def mean_metrics(ranks_by_domain: Iterable[np.ndarray]) -> dict[str, float]:
    """Each domain's metrics, averaged over the domains."""
    by_domain = [metrics(rank) for rank in ranks_by_domain]
    return {name: float(np.mean([values[name] for values in by_domain])) for name in by_domain[0]}


METRIC_NAMES = tuple(metrics(np.ones(1)))
