"""MISSRec (Wang et al., ACM MM 2023, arXiv 2308.11175): texts and images of a history, decoded beside the interests they belong to.

Kept: linear adaptors, the sum of both modalities (and the item's own vector) with a position as the decoder's input; the
clusters of all items' features ("interests"), half as many as there are features, each of a history's once, as the encoder's
input; torch's transformer, which sees both ways; unit vectors with a temperature; candidates scored a modality at a time, the
item's own vector as one more, or by the sum of all where a single modality is read. Pre-training is by the next item among those
of the batch, as UniSRec's.
Left out, or otherwise: clusters are found once a domain and modality in the features themselves, not anew before every
epoch in the adapted ones of both: an adaptor is linear, so that a cluster's centre is adapted like an item, and learned
through. The candidates' modalities weigh alike: that is where the release's learned factor starts, and a user and an item
stay two vectors. What an item lacks has no weight; in the release the adaptor's bias stands there. What is random in an
item's vectors is drawn once an optimizer step. Padding is no class of the softmax. The penalty on interests (0.0001) and the
contrast with thinned histories in pre-training (0.001) are absent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmm4rec.data.batches import Batch
from mmm4rec.data.features import ItemFeatures, Modality
from mmm4rec.models.baselines.blocks import NORM_EPS, faster_dropout, feature_rows, initialise, item_table, transformer_encoder, unit
from mmm4rec.models.baselines.config import ContentConfig, check
from mmm4rec.models.dropout import Dropout
from mmm4rec.models.recommender import Catalogue, Recommender, rows_of

CLUSTER_ROUNDS = 5  # of k-means, as in the release
DISTANCES_AT_ONCE = 2**24  # elements


@dataclass(frozen=True)
class MISSRecConfig(ContentConfig):
    """The release's defaults; half of the layers are in the encoder, half in the decoder."""

    heads: int = 4
    interest_ratio: float = 0.5  # clusters a feature; the release pre-trains with .02

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers % 2:
            raise ValueError(f"layers is {self.layers}; it must be even: one half encodes, the other decodes.")
        check(self, interest_ratio=0 < self.interest_ratio <= 1)


@dataclass(frozen=True)
class Interests:
    """The clusters of a domain's features of one modality."""

    of_item: Tensor  # [I + 1] int64; 0 where the item has no such feature
    centres: Tensor  # [k + 1, F], row 0 is 0


class MISSRec(Recommender):
    """The model of one domain, or without ids of many."""

    def __init__(self, config: MISSRecConfig, *, n_items: int | None, feature_dimensions: Mapping[Modality, int]) -> None:
        super().__init__()
        D, half = config.width, config.layers // 2
        self.config, self.temperature = config, config.temperature
        self.ids = item_table(n_items if config.ids else None, D)
        self.positions = nn.Embedding(config.max_len, D)
        self.norm, self.dropout = nn.LayerNorm(D, eps=NORM_EPS), Dropout(config.dropout)
        self.encoder = transformer_encoder(config, half, inside=True)
        self.encoder.norm = nn.LayerNorm(D, eps=NORM_EPS)
        layer = nn.TransformerDecoderLayer(
            D, config.heads, config.ffn_width, config.dropout, "gelu", layer_norm_eps=NORM_EPS, batch_first=True
        )
        faster_dropout(layer, config.dropout, inside=True)
        self.decoder = nn.TransformerDecoder(layer, half, nn.LayerNorm(D, eps=NORM_EPS))
        self.apply(initialise)  # all but attention's first projections and the adapters, which start as torch has them
        for part in self.modules():
            if isinstance(part, nn.MultiheadAttention):
                nn.init.xavier_uniform_(part.in_proj_weight)  # torch's encoder copies its first layer's
        for part in (self.positions, self.encoder, self.decoder):
            part.requires_grad_(not config.freeze_encoder)
        self.adapters = nn.ModuleDict({modality: nn.Linear(size, D) for modality, size in feature_dimensions.items()})
        self._interests: dict[int, tuple[ItemFeatures, dict[str, Interests]]] = {}

    def interests(self, features: ItemFeatures) -> dict[str, Interests]:
        """The clusters of these features, found at their first use."""
        known = self._interests.get(id(features))
        if known is None or known[0] is not features:
            names = [name for name in self.adapters if name in features.vectors]
            known = features, {name: find_interests(features, name, self.config.interest_ratio) for name in names}
            self._interests[id(features)] = known
        return known[1]

    def items(self, features: ItemFeatures, ids: Tensor | slice | None = None) -> Catalogue:
        """As a history reads them: the sum of all that is known of an item, and its interests with their numbers; and as candidates."""
        parts, presence, inputs = [], [], {}
        first_number = 0
        for modality, adapter in self.adapters.items():
            raw, present = feature_rows(features, modality, adapter.in_features, ids)  # type: ignore[arg-type]
            parts.append(adapter(raw) * present[:, None])
            presence.append(present[:, None])
            centres, own = torch.zeros_like(raw), torch.zeros_like(present, dtype=torch.long)  # where the domain has no such modality
            if modality in features.vectors:
                interests = self.interests(features)[modality]
                own = interests.of_item[features.numbers(ids, raw.device)]  # [n]
                centres = interests.centres[own].to(raw.dtype)  # [n, F]
            inputs[f"{modality} interest"] = adapter(centres)  # [n, D]
            inputs[f"{modality} number"] = torch.where(own > 0, own + first_number, 0)[:, None].to(raw.dtype)  # [n, 1]
            first_number += features.n_items + 1
        known = torch.stack(presence).sum(0)  # [n, 1]: how many modalities the item has
        candidates = torch.stack([unit(part) for part in parts]).sum(0) / known.clamp(min=1)
        if "item" in self.ids:
            vectors = rows_of(self.ids["item"], ids)
            content = torch.where(known > 0, 2, 0)
            candidates = (unit(vectors) + content * candidates) / (1 + content) if len(parts) > 1 else unit(vectors + parts[0])
            parts.append(vectors)
        return Catalogue({"item": torch.stack(parts).sum(0), **inputs}, candidates)

    def users(self, batch: Batch, catalogue: Catalogue) -> Tensor:
        packing = batch.packing
        inputs = {name: F.embedding(batch.items, table) for name, table in catalogue.inputs.items()}  # [W, Q, ...]
        groups, encoded = packing.groups(), []
        for group in groups:
            padded = {name: packing.padded(x, group) for name, x in inputs.items()}  # [b, L, ...]
            encoded.append(self._encode(padded, packing.lengths[group.examples]))
        order = torch.cat([group.examples for group in groups])
        return unit(torch.cat(encoded)[torch.argsort(order)])

    def _encode(self, inputs: dict[str, Tensor], lengths: Tensor) -> Tensor:
        """Padded inputs [b, L, ...] of histories of these lengths [b] -> [b, D]."""
        interests = torch.cat([inputs[f"{modality} interest"] for modality in self.adapters], dim=1)  # [b, M * L, D]
        numbers = torch.cat([inputs[f"{modality} number"] for modality in self.adapters], dim=1)[..., 0]  # [b, M * L]
        absent = _repeated(numbers) | (numbers == 0)
        absent = absent & ~(absent.all(1, keepdim=True) & (torch.arange(absent.shape[1], device=absent.device) == 0))  # one stays
        memory = self.encoder(interests, src_key_padding_mask=absent)
        L = inputs["item"].shape[1]
        x = self.dropout(self.norm(inputs["item"] + self.positions.weight[:L]))
        empty = torch.arange(L, device=x.device) >= lengths[:, None]  # [b, L]
        x = self.decoder(x, memory, tgt_key_padding_mask=empty, memory_key_padding_mask=absent)
        return x[torch.arange(len(x), device=x.device), lengths - 1]


def _repeated(numbers: Tensor) -> Tensor:
    """Where a number [B, m] stands earlier in its row too."""
    m = numbers.shape[1]
    earlier = torch.ones(m, m, dtype=torch.bool, device=numbers.device).tril(-1)
    return ((numbers[:, :, None] == numbers[:, None]) & earlier).any(2)


@torch.no_grad()
def find_interests(features: ItemFeatures, modality: Modality, ratio: float) -> Interests:
    """k-means over the features that exist, from centres spread evenly over the items: the same clusters in every run.

    In float64 on the CPU, whatever a step's precision is. Its work grows with the square of the items: up to about 100,000.
    """
    numbers = torch.nonzero(features.present[modality])[:, 0]
    found, _ = features.rows(modality, numbers)  # [m, F]
    raw = found.cpu().double()
    k = max(1, math.ceil(ratio * len(raw)))
    centres = raw[torch.linspace(0, len(raw) - 1, k).round().long()] if len(raw) else raw.new_zeros(0, raw.shape[1])
    own = torch.zeros(len(raw), dtype=torch.long)
    for _ in range(CLUSTER_ROUNDS if len(raw) else 0):
        own = torch.cat([torch.cdist(part, centres).argmin(1) for part in raw.split(max(1, DISTANCES_AT_ONCE // k))])
        counts = torch.bincount(own, minlength=k)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, own, raw)
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    of_item = torch.zeros(features.n_items + 1, dtype=torch.long)
    of_item[numbers.cpu()] = own + 1
    return Interests(of_item.to(found.device), F.pad(centres, (0, 0, 1, 0)).to(found))
