"""GRU4Rec (Hidasi et al., ICLR 2016, arXiv 1511.06939): a gated recurrent unit over the items' vectors.

Kept: the recurrent network. As in RecBole, which the literature's figures come from: items have vectors of their own, the
state is projected to their width, and the loss is cross-entropy over the whole catalogue (the improved GRU4Rec of
arXiv 1706.03847 names it too).
Left out: session-parallel batches, the ranking losses BPR and TOP1 with their sampling.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from mmm4rec.data.batches import Batch
from mmm4rec.models.baselines.blocks import OfIds
from mmm4rec.models.baselines.config import EncoderConfig
from mmm4rec.models.dropout import Dropout
from mmm4rec.models.recommender import Catalogue


@dataclass(frozen=True)
class GRU4RecConfig(EncoderConfig):
    """RecBole's defaults."""

    layers: int = 1
    dropout: float = 0.3
    recurrent_width: int = 128  # of the state

    @property
    def sizes(self) -> tuple[str, ...]:
        return (*super().sizes, "recurrent_width")


class GRU4Rec(OfIds):
    """The model of one domain."""

    def __init__(self, config: GRU4RecConfig, *, n_items: int) -> None:
        super().__init__(n_items, config.width)
        nn.init.xavier_normal_(self.ids["item"])  # as RecBole
        self.dropout = Dropout(config.dropout)
        self.gru = nn.GRU(config.width, config.recurrent_width, config.layers, bias=False, batch_first=True)
        for name, weight in self.gru.named_parameters():
            if name.startswith("weight"):
                nn.init.xavier_uniform_(weight)
        self.out = nn.Linear(config.recurrent_width, config.width)

    def users(self, batch: Batch, catalogue: Catalogue) -> Tensor:
        x = self.dropout(batch.packing.padded(F.embedding(batch.items, catalogue.inputs["item"])))  # [B, L, D]
        lengths = batch.packing.lengths.cpu()
        _, states = self.gru(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))  # [layers, B, state]
        return self.out(states[-1])
