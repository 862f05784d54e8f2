"""Full ranking: users and catalogue encoded once, their scores block by block.

Dimensions: U examples, I items, n items of a block, r examples whose scores are computed at once, D width.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from mmm4rec.data.at_once import at_once
from mmm4rec.data.batches import Batch, DomainData, cut
from mmm4rec.models.recommender import Catalogue, Recommender, items_in_blocks, joined
from mmm4rec.training import distributed
from mmm4rec.training.losses import row_blocks
from mmm4rec.training.metrics import outranked

RANKED_AT_ONCE = {"cpu": 2**21, "cuda": 2**28}  # scores: 8 MiB, 1 GiB in float32
OWN_TIE = 0.5  # a target equals itself: 1 + above + (equal - 1) / 2


@torch.inference_mode()
def evaluate(model: Recommender, data: DomainData, users: np.ndarray, ends: np.ndarray, device: torch.device) -> np.ndarray:
    """Ranks [len(users)] of the targets of the examples (users[k], ends[k]) among all of the domain's items.

    Items that a user has seen stay candidates, as in the published protocol, unless `data.mask_seen` says
    otherwise; a target that was seen before then ties with all that is masked. Each worker ranks its share.
    Raises FloatingPointError when a score is not finite: a NaN is beaten by none and would rank first.
    """
    mine = slice(distributed.rank(), None, distributed.world_size())
    was_training = model.training
    model.eval()
    rank = Ranking(model, data, device).ranks(users[mine], ends[mine]) if len(users[mine]) else np.empty(0)
    model.train(was_training)
    return distributed.gather_ordered(rank, len(users))


class Ranking:
    """A model's scores of a domain's items, block by block; a catalogue of one block is computed once."""

    def __init__(self, model: Recommender, data: DomainData, device: torch.device) -> None:
        self.model, self.data, self.device = model, data, device
        self.blocks = data.features.blocks()
        self.catalogue = joined(items_in_blocks(model, data.features)) if data.features.one_block else None

    def encode(self, batch: Batch) -> Tensor:
        """The users of a batch, [B, D]."""
        if self.catalogue is not None:
            return self.model.users(batch.to(self.device), self.catalogue)
        ids, batch = batch.compact()
        return self.model.users(batch.to(self.device), self.model.items(self.data.features, ids.to(self.device)))

    def ranks(self, users: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """The ranks [U] of the targets of these examples."""
        data, device = self.data, self.device
        encoded = torch.cat([self.encode(data.batch(users[part], ends[part])) for part in cut(np.minimum(ends, data.max_len), device)])
        targets = torch.from_numpy(data.domain.items[data.domain.offsets[users] + ends].astype(np.int64)).to(device)[:, None]  # [U, 1]
        target, rank = encoded.new_empty(len(users), 1), torch.full((len(users),), OWN_TIE, dtype=torch.float64, device=device)
        for passes_left in (1, 0) if len(self.blocks) > 1 else (0,):  # a target's score is known when its block has passed
            for first, rows, scores in self.scores(encoded, users, ends):
                own = targets[rows] - first
                here = (own >= 0) & (own < scores.shape[1])
                target[rows] = torch.where(here, scores.gather(1, own.where(here, 0)), target[rows])
                if not passes_left:
                    rank[rows] += outranked(scores, target[rows])
        return rank.cpu().numpy()

    def scores(self, encoded: Tensor, users: np.ndarray, ends: np.ndarray) -> Iterator[tuple[int, slice, Tensor]]:
        """The first item of a block, a range of the encoded examples [U, D], and their scores of the block [r, n], seen items masked.

        The same scores to the last digit in every call. Raises FloatingPointError when one is not finite.
        """
        ranked_at_once = at_once(RANKED_AT_ONCE, self.device.type)
        for block in self.blocks:
            if self.catalogue is None:
                items = self.model.items(self.data.features, block)
            else:
                items = Catalogue({}, self.catalogue.candidates[block])
            for rows in row_blocks(len(encoded), len(items.candidates), ranked_at_once):
                scores = self.model.scores(encoded[rows], items)
                if not torch.isfinite(scores.sum()):
                    name = self.data.domain.name
                    raise FloatingPointError(f"the model's scores on domain '{name}' are not finite: its training diverged")
                self.data.mask(scores, users[rows], ends[rows], block.start)
                yield block.start, rows, scores
