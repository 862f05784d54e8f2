"""BSARec (Shin et al., AAAI 2024, arXiv 2312.10325): self-attention beside a filter that weighs high frequencies anew.

Kept: in every layer alpha * filter + (1 - alpha) * attention; the filter splits a history, laid out so that it ends at
position T, into its lowest frequencies and the rest, which it scales by a learned square an element.
Left out: position vectors where no history stands. In the release they reach the filter; here those places are 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmm4rec.data.batches import Batch
from mmm4rec.models.baselines.blocks import NORM_EPS, OfIds, initialise, initialise_attention
from mmm4rec.models.baselines.config import TransformerConfig, check
from mmm4rec.models.dropout import Dropout
from mmm4rec.models.recommender import Catalogue

PADDED_AT_ONCE = 4  # positions with padding, for one of those that a batch has


@dataclass(frozen=True)
class BSARecConfig(TransformerConfig):
    """The release's example for Amazon Beauty."""

    heads: int = 1
    alpha: float = 0.7  # the filter's share
    cutoff: int = 5  # c: the c // 2 + 1 lowest frequencies are the low ones

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, alpha=0 <= self.alpha <= 1, cutoff=self.cutoff // 2 + 1 <= self.max_len // 2 + 1)

    @property
    def sizes(self) -> tuple[str, ...]:
        return (*super().sizes, "cutoff")


class FrequencyLayer(nn.Module):
    """The low frequencies of a history as they are, the high ones scaled; with a residual and a layer norm."""

    def __init__(self, config: BSARecConfig) -> None:
        super().__init__()
        self.low = config.cutoff // 2 + 1
        self.scale = nn.Parameter(torch.randn(config.width))  # its square is the factor
        self.dropout, self.norm = Dropout(config.dropout), nn.LayerNorm(config.width, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        spectrum = torch.fft.rfft(x, dim=1, norm="ortho")  # [B, T // 2 + 1, D]
        kept = torch.arange(spectrum.shape[1], device=x.device)[:, None] < self.low
        low = torch.fft.irfft(spectrum * kept, n=x.shape[1], dim=1, norm="ortho")
        return self.norm(self.dropout(low + self.scale.square() * (x - low)) + x)


class BSARecLayer(nn.Module):
    """Filter and attention side by side, then a feed-forward part."""

    def __init__(self, config: BSARecConfig) -> None:
        super().__init__()
        D = config.width
        self.alpha = config.alpha
        self.filter = FrequencyLayer(config)
        self.attention = nn.MultiheadAttention(D, config.heads, config.dropout, batch_first=True)
        self.attention_norm, self.norm = nn.LayerNorm(D, eps=NORM_EPS), nn.LayerNorm(D, eps=NORM_EPS)
        self.first, self.second = nn.Linear(D, config.ffn_width), nn.Linear(config.ffn_width, D)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """x [B, T, D], hidden [B * heads, T, T]: which columns a row does not see -> [B, T, D]."""
        attended, _ = self.attention(x, x, x, attn_mask=hidden, need_weights=False)
        attended = self.attention_norm(self.dropout(attended) + x)
        x = self.alpha * self.filter(x) + (1 - self.alpha) * attended
        return self.norm(self.dropout(self.second(F.gelu(self.first(x)))) + x)


class BSARec(OfIds):
    """The model of one domain."""

    def __init__(self, config: BSARecConfig, *, n_items: int) -> None:
        super().__init__(n_items, config.width)
        self.config = config
        self.positions = nn.Embedding(config.max_len, config.width)
        self.norm, self.dropout = nn.LayerNorm(config.width, eps=NORM_EPS), Dropout(config.dropout)
        self.layers = nn.ModuleList(BSARecLayer(config) for _ in range(config.layers))
        self.apply(initialise).apply(initialise_attention)

    def users(self, batch: Batch, catalogue: Catalogue) -> Tensor:
        x, T = F.embedding(batch.items, catalogue.inputs["item"]), self.config.max_len
        examples = torch.arange(len(batch), device=x.device).split(max(1, x.shape[0] * x.shape[1] * PADDED_AT_ONCE // T))
        return torch.cat([self._encode(batch.packing.padded_before(x, T, own), batch.packing.lengths[own]) for own in examples])

    def _encode(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Padded histories [b, T, D] of these lengths [b] -> [b, D]."""
        T = self.config.max_len
        exists = torch.arange(T, device=x.device) >= T - lengths[:, None]  # [b, T]
        x = self.dropout(self.norm(x + self.positions.weight))
        place = torch.arange(T, device=x.device)
        seen = (exists[:, None] & (place <= place[:, None])) | (place == place[:, None])  # [b, T, T]; what does not exist sees itself
        hidden = (~seen).repeat_interleave(self.config.heads, dim=0)
        for layer in self.layers:
            x = layer(x * exists[..., None], hidden)
        return x[:, -1]
