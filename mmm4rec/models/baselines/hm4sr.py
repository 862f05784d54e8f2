"""HM4SR (Zhang et al., WWW 2025, arXiv 2501.14269): item ids, texts and images through two mixtures of experts, one of time.

Kept: three streams with positions; the interactive mixture, whose experts read all streams and which each stream weighs for
itself; the temporal mixture, whose experts scale all streams and are weighed by the gaps and the time; a transformer a
stream; the sum of the three streams' scores. Where a domain lacks a modality its stream is absent; where it has no
timestamps the temporal mixture is.
Read in a fork (github.com/ngoctuannguyen/HM4SR), for the authors' repository was not at hand; there the temporal experts stand in
a plain list and are not trained, here they are.
Otherwise: absolute time is counted in days since a history's first interaction, for a float32 cosine of Unix seconds is noise.
Left out: the three auxiliary tasks (categories, which our domains do not have; contrasts of ids and of placeholders).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmm4rec.data.batches import Batch
from mmm4rec.data.features import ItemFeatures, Modality
from mmm4rec.models.baselines.blocks import NORM_EPS, ItemVectors, initialise, initialise_attention, transformer_encoder, unseen
from mmm4rec.models.baselines.config import TransformerConfig, streams_of
from mmm4rec.models.dropout import Dropout
from mmm4rec.models.recommender import Catalogue, Recommender

DAY_SECONDS = 86_400.0
LONGEST_LOG2_GAP = 32  # log2 of the longest gap in seconds that has an interval of its own: 136 years
EXPERT_STD = 0.1  # of the temporal experts at the start


@dataclass(frozen=True)
class HM4SRConfig(TransformerConfig):
    """The release's defaults."""

    modalities: Literal["text", "image", "both"] = "both"  # beside the ids
    experts: int = 4  # of the interactive mixture
    time_experts: int = 4
    interval_scale: int = 100  # intervals a doubling of the gap
    time: bool = True

    @property
    def sizes(self) -> tuple[str, ...]:
        return (*super().sizes, "experts", "time_experts", "interval_scale")

    @property
    def streams(self) -> tuple[Modality, ...]:
        return streams_of(self.modalities)


class InteractiveMixture(nn.Module):
    """Adds to each stream what experts that read all of them say, weighed by the stream itself."""

    def __init__(self, config: HM4SRConfig, streams: int) -> None:
        super().__init__()
        D, S, E = config.width, streams, config.experts
        self.experts = nn.Linear(S * D, E * S * D)
        self.gates = nn.ModuleList(nn.Linear(D, E) for _ in range(S))
        self.weights = nn.Parameter(torch.tensor([0.0] + [1.0] * (S - 1)))  # the release's: nothing for the ids at the start

    def forward(self, streams: list[Tensor]) -> list[Tensor]:
        """streams, each [W, Q, D] -> the same with what was added."""
        said = self.experts(torch.cat(streams, dim=-1)).unflatten(-1, (-1, len(streams), streams[0].shape[-1]))  # [W, Q, E, S, D]
        gates = [gate(x).softmax(-1) for gate, x in zip(self.gates, streams, strict=True)]  # each [W, Q, E]
        added = [torch.einsum("wqe,wqed->wqd", gate, said[..., s, :]) for s, gate in enumerate(gates)]
        return [x + self.weights[s] * part for s, (x, part) in enumerate(zip(streams, added, strict=True))]


class TemporalMixture(nn.Module):
    """Scales each stream by vectors that the gap before an interaction and its time choose."""

    def __init__(self, config: HM4SRConfig, streams: int) -> None:
        super().__init__()
        D, E = config.width, config.time_experts
        self.scale = config.interval_scale
        self.intervals = nn.Embedding(config.interval_scale * LONGEST_LOG2_GAP + 1, D)
        self.time = nn.Linear(1, D)
        self.gate = nn.Linear(2 * D, E)
        self.experts = nn.Parameter(torch.randn(E, streams, D) * EXPERT_STD)
        self.register_buffer("frequencies", 10_000 ** -(torch.arange(D) / D), persistent=False)

    def forward(self, streams: list[Tensor], gap_seconds: Tensor, days: Tensor) -> list[Tensor]:
        """streams, each [W, Q, D]; gap_seconds and days since the first interaction [W, Q]."""
        place = (torch.log2(gap_seconds.clamp(min=0) + 1) * self.scale).long().clamp(max=self.intervals.num_embeddings - 1)
        when = torch.cos(self.time(days[..., None]) * self.get_buffer("frequencies"))
        route = self.gate(torch.cat([self.intervals(place), when], dim=-1)).softmax(-1)  # [W, Q, E]
        factors = torch.einsum("wqe,esd->swqd", route, self.experts)
        return [x * factor for x, factor in zip(streams, factors, strict=True)]


class HM4SR(Recommender):
    """The model of one domain."""

    def __init__(self, config: HM4SRConfig, *, n_items: int, feature_dimensions: Mapping[Modality, int]) -> None:
        super().__init__()
        D, names = config.width, ("item", *feature_dimensions)
        self.heads = config.heads
        self.vectors = nn.ModuleDict({"item": ItemVectors(D, n_items=n_items, feature_dimensions={})})
        for modality, size in feature_dimensions.items():
            self.vectors[modality] = ItemVectors(D, n_items=None, feature_dimensions={modality: size})
        self.positions = nn.Embedding(config.max_len, D)
        self.interactive = InteractiveMixture(config, len(names))
        self.temporal = TemporalMixture(config, len(names)) if config.time else None
        self.norms = nn.ModuleDict({name: nn.LayerNorm(D, eps=NORM_EPS) for name in names})
        self.encoders = nn.ModuleDict({name: transformer_encoder(config, config.layers) for name in names})
        self.dropout = Dropout(config.dropout)
        for part in (self.positions, self.encoders, self.temporal):  # the interactive mixture starts as torch has it
            if part is not None:
                part.apply(initialise).apply(initialise_attention)

    def items(self, features: ItemFeatures, ids: Tensor | slice | None = None) -> Catalogue:
        inputs = {name: vectors(features, ids) for name, vectors in self.vectors.items()}
        return Catalogue(inputs, torch.cat(list(inputs.values()), dim=-1))  # [n, S * D]

    def users(self, batch: Batch, catalogue: Catalogue) -> Tensor:
        packing = batch.packing
        places = self.positions(packing.positions.clamp(min=0))
        streams = [F.embedding(batch.items, table) + places for table in catalogue.inputs.values()]  # [W, Q, D]
        streams = self.interactive(streams)
        if self.temporal is not None:
            if batch.gap_seconds is None:
                raise ValueError("the model reads time gaps and the domain has no timestamps; set model.time=false.")
            gaps = (batch.gap_seconds * batch.timed).to(streams[0].dtype)  # [B, T]
            days = gaps.cumsum(1) / DAY_SECONDS
            told = (packing.spread(signal[:, None])[..., 0] for signal in (gaps, days))  # [W, Q]
            streams = self.temporal(streams, *told)
        hidden = unseen(packing).repeat_interleave(self.heads, dim=0)
        encoded = [
            packing.at_last(encoder(self.dropout(self.norms[name](x)), mask=hidden))
            for (name, encoder), x in zip(self.encoders.items(), streams, strict=True)
        ]
        return torch.cat(encoded, dim=-1)
