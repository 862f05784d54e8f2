"""Mamba4Rec (Liu et al., 2024, arXiv 2403.03900): Mamba blocks over the items' vectors.

Kept: dropout and a layer norm on the items' vectors; layers of a Mamba block (Gu & Dao, arXiv 2312.00752), a layer norm and a
feed-forward part, with a residual around the block where there are several layers.
Otherwise: the selective scan is our own. That of transformers needs the kernels of mamba-ssm; without them it keeps a state for
every position of padded histories. This one reads packed histories, and the last layer computes the state's product at a
history's end alone, as a sum over its positions. There is no kernel for a GPU here.
The blocks start as Mamba's authors have them; in the release N(0, 0.02) and zero biases are put over it, steps of .7 among them.
Left out: nothing.

Dimensions: B examples, W windows and Q positions (`Packing`), D width, E = expand * D, N state size, R rank of the steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmm4rec.data.batches import Batch, Packing
from mmm4rec.models.baselines.blocks import NORM_EPS, OfIds, initialise
from mmm4rec.models.baselines.config import EncoderConfig
from mmm4rec.models.blocks import CausalConv
from mmm4rec.models.dropout import Dropout
from mmm4rec.models.fused import causal_conv
from mmm4rec.models.recommender import Catalogue


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


class MambaBlock(nn.Module):
    """A Mamba block with its defaults: steps between 0.001 and 0.1 at the start, rank D / 16."""

    def __init__(self, config: Mamba4RecConfig) -> None:
        super().__init__()
        D, E, N, R = config.width, config.expand * config.width, config.state, math.ceil(config.width / 16)
        self.sizes = (R, N, N)
        self.into = nn.Linear(D, 2 * E, bias=False)
        self.conv = CausalConv(E, config.conv_width)
        self.select = nn.Linear(E, sum(self.sizes), bias=False)
        self.step = nn.Linear(R, E)
        nn.init.uniform_(self.step.weight, -(R**-0.5), R**-0.5)
        steps = torch.exp(torch.empty(E).uniform_(math.log(1e-3), math.log(0.1))).clamp(min=1e-4)
        self.step.bias = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))  # inverse of softplus
        self.log_a = nn.Parameter(torch.arange(1.0, N + 1).log().repeat(E, 1))
        self.skip = nn.Parameter(torch.ones(E))
        self.out = nn.Linear(E, D, bias=False)

    def forward(self, x: Tensor, packing: Packing, *, at_last: bool) -> Tensor:
        """x [W, Q, D] -> [W, Q, D], or [B, D] at the end of each history."""
        x, gate = self.into(x).chunk(2, dim=-1)  # [W, Q, E]
        x = causal_conv(x, self.conv.weight, self.conv.bias, packing.positions, "silu").flatten(2)
        step, B, C = self.select(x).split(self.sizes, dim=-1)
        delta, a = F.softplus(self.step(step)), -torch.exp(self.log_a)
        if at_last:
            y = scan_at_end(x, delta, a, B, packing.at_last(C), packing)
            x, gate = packing.at_last(x), packing.at_last(gate)
        else:
            y = selective_scan(x, delta, a, B, C, packing.positions)
        return self.out((y + self.skip * x) * F.silu(gate))


def selective_scan(x: Tensor, delta: Tensor, a: Tensor, B: Tensor, C: Tensor, positions: Tensor) -> Tensor:
    """Position by position: a state [E, N] decays by exp(delta * a), takes delta * x * B in, and is read by C.

    x and delta [W, Q, E], a [E, N], B and C [W, Q, N], positions [W, Q]: the place in its own history -> [W, Q, E].
    """
    state, outputs = x.new_zeros(len(x), *a.shape), []
    for x_t, delta_t, B_t, C_t, position in zip(*(part.unbind(1) for part in (x, delta, B, C, positions)), strict=True):
        state = torch.where((position > 0)[:, None, None], state, 0.0)  # a new history starts with an empty state
        state = torch.exp(delta_t[..., None] * a) * state + (delta_t * x_t)[..., None] * B_t[:, None]
        outputs.append((state * C_t[:, None]).sum(-1))
    return torch.stack(outputs, dim=1)


def scan_at_end(x: Tensor, delta: Tensor, a: Tensor, B: Tensor, C: Tensor, packing: Packing) -> Tensor:
    """`selective_scan` at the end of each history, C there [B, N]: the sum of what its positions wrote, decayed -> [B, E]."""
    exists = (packing.positions >= 0)[..., None]  # [W, Q, 1]
    sums = torch.cumsum((delta * exists).double(), dim=1)
    remaining = (packing.at_tokens(packing.at_last(sums)) - sums).to(x.dtype).clamp(min=0)  # [W, Q, E] of delta, behind a position
    read = torch.einsum("wqen,wqn->wqe", torch.exp(remaining[..., None] * a), B * packing.at_tokens(C))
    return packing.sum_up(delta * x * read * exists)


class MambaLayer(nn.Module):
    """A Mamba block and a feed-forward part, a layer norm behind each."""

    def __init__(self, config: Mamba4RecConfig) -> None:
        super().__init__()
        D = config.width
        self.block = MambaBlock(config)
        self.residual = config.layers > 1
        self.block_norm, self.norm = nn.LayerNorm(D, eps=NORM_EPS), nn.LayerNorm(D, eps=NORM_EPS)
        self.first, self.second = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        self.dropout = Dropout(config.dropout)
        self.first.apply(initialise)
        self.second.apply(initialise)

    def forward(self, x: Tensor, packing: Packing, *, at_last: bool) -> Tensor:
        """x [W, Q, D] -> [W, Q, D], or [B, D] at the end of each history."""
        mixed = self.dropout(self.block(x, packing, at_last=at_last))
        before = packing.at_last(x) if at_last else x
        x = self.block_norm(mixed + before if self.residual else mixed)
        return self.norm(self.dropout(self.second(self.dropout(F.gelu(self.first(x))))) + x)


class Mamba4Rec(OfIds):
    """The model of one domain."""

    def __init__(self, config: Mamba4RecConfig, *, n_items: int) -> None:
        super().__init__(n_items, config.width)
        self.dropout, self.norm = Dropout(config.dropout), nn.LayerNorm(config.width, eps=NORM_EPS)
        self.layers = nn.ModuleList(MambaLayer(config) for _ in range(config.layers))

    def users(self, batch: Batch, catalogue: Catalogue) -> Tensor:
        x = self.norm(self.dropout(F.embedding(batch.items, catalogue.inputs["item"])))
        for layer in self.layers:
            x = layer(x, batch.packing, at_last=layer is self.layers[-1])
        return x
