"""Mamba4Rec (Liu et al., 2024, arXiv 2403.03900): Mamba blocks over the items' vectors.

Kept: dropout and a layer norm on the items' vectors; layers of a Mamba block, a layer norm and a feed-forward part, with a
residual around the block where there are several layers.
The block is that of transformers (`pip install 'mmm4rec[baselines]'`): on a GPU the kernels of mamba-ssm where they are
installed, elsewhere a loop over the positions.
Left out: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmm4rec.data.batches import Batch
from mmm4rec.data.features import ItemFeatures
from mmm4rec.errors import BadInput
from mmm4rec.models.baselines.blocks import NORM_EPS, initialise, item_table
from mmm4rec.models.baselines.config import EncoderConfig
from mmm4rec.models.dropout import Dropout
from mmm4rec.models.recommender import Catalogue, Recommender, rows_of


@dataclass(frozen=True)
class Mamba4RecConfig(EncoderConfig):
    """The release's defaults."""

    layers: int = 1
    dropout: float = 0.2
    state: int = 32
    conv_width: int = 4
    expand: int = 2

    @property
    def sizes(self) -> tuple[str, ...]:
        return (*super().sizes, "state", "conv_width", "expand")


class MambaLayer(nn.Module):
    def __init__(self, config: Mamba4RecConfig) -> None:
        super().__init__()
        D = config.width
        self.block = _mamba_block(config)
        self.residual = config.layers > 1
        self.block_norm, self.norm = nn.LayerNorm(D, eps=NORM_EPS), nn.LayerNorm(D, eps=NORM_EPS)
        self.first, self.second = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        self.dropout = Dropout(config.dropout)
        self.first.apply(initialise)
        self.second.apply(initialise)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, D] -> [B, L, D]."""
        mixed = self.dropout(self.block(x))
        x = self.block_norm(mixed + x if self.residual else mixed)
        return self.norm(self.dropout(self.second(self.dropout(F.gelu(self.first(x))))) + x)


def _mamba_block(config: Mamba4RecConfig) -> nn.Module:
    try:
        from transformers import MambaConfig
        from transformers.models.mamba.modeling_mamba import MambaMixer
    except ImportError as error:
        raise BadInput("mamba4rec needs the package transformers.", remedy="pip install 'mmm4rec[baselines]'") from error
    sizes = MambaConfig(
        hidden_size=config.width,
        state_size=config.state,
        conv_kernel=config.conv_width,
        expand=config.expand,
        use_bias=False,
        num_hidden_layers=1,
    )
    return MambaMixer(sizes, 0)


class Mamba4Rec(Recommender):
    """The model of one domain."""

    def __init__(self, config: Mamba4RecConfig, *, n_items: int) -> None:
        super().__init__()
        self.ids = item_table(n_items, config.width)
        self.dropout, self.norm = Dropout(config.dropout), nn.LayerNorm(config.width, eps=NORM_EPS)
        self.layers = nn.ModuleList(MambaLayer(config) for _ in range(config.layers))

    def items(self, features: ItemFeatures, ids: Tensor | slice | None = None) -> Catalogue:
        vectors = rows_of(self.ids["item"], ids)
        return Catalogue({"item": vectors}, vectors)

    def users(self, batch: Batch, catalogue: Catalogue) -> Tensor:
        x = self.norm(self.dropout(F.embedding(batch.items, catalogue.inputs["item"])))
        x = batch.packing.padded(x)  # [B, L, D]
        for layer in self.layers:
            x = layer(x)
        return x[torch.arange(len(x), device=x.device), batch.packing.lengths - 1]
