"""Full-ranking evaluation of a model on a split."""

from __future__ import annotations

import numpy as np
import torch

from mmm4rec.data.batches import DomainData, in_order
from mmm4rec.models.recommender import Recommender
from mmm4rec.training import distributed
from mmm4rec.training.metrics import ranks

EVALUATION_BATCH = 1024


@torch.inference_mode()
def evaluate(model: Recommender, data: DomainData, users: np.ndarray, ends: np.ndarray, device: torch.device) -> np.ndarray:
    """Ranks [len(users)] of the targets of the examples (users[k], ends[k]) among all of the domain's items.

    Items that a user has seen stay candidates, as in the published protocol, unless `data.mask_seen` says
    otherwise; a target that was seen before then ties with all that is masked. Each worker ranks its share.
    Raises FloatingPointError when a score is not finite: a NaN is beaten by none and would rank first.
    """
    was_training = model.training
    model.eval()
    mine = slice(distributed.rank(), None, distributed.world_size())
    order = np.argsort(ends[mine], kind="stable")  # examples of similar length share a batch
    share_users, share_ends = users[mine][order], ends[mine][order]
    catalogue = model.items(data.features)
    parts = []
    for block_users, block_ends in in_order(share_users, share_ends, EVALUATION_BATCH):
        batch = data.batch(block_users, block_ends).to(device)
        scores = model.scores(model.users(batch, catalogue), catalogue)
        if not torch.isfinite(scores).all():
            raise FloatingPointError(f"the model's scores on domain '{data.domain.name}' are not finite: its training diverged")
        data.mask(scores, batch)
        parts.append(ranks(scores, batch.targets).cpu().numpy())
    found = np.empty(len(order))
    found[order] = np.concatenate(parts) if parts else np.empty(0)
    model.train(was_training)
    return distributed.gather_ordered(found, len(users))
