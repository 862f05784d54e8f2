"""What several baselines are built of.

Dimensions: B examples, W windows and Q positions of items (`Packing`), T = max_len, I items (row 0 is padding),
n rows of a catalogue, D width, F width of a feature vector.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmm4rec.data.batches import Packing
from mmm4rec.data.features import ItemFeatures, Modality
from mmm4rec.models.baselines.config import TransformerConfig
from mmm4rec.models.dropout import Dropout
from mmm4rec.models.recommender import Catalogue, Recommender, rows_of

START_STD = 0.02  # of weights at the start, in all these papers' code
NORM_EPS = 1e-12  # of their layer norms


@torch.no_grad()
def initialise(module: nn.Module) -> None:
    """Linear layers and embeddings N(0, 0.02), biases 0. For `nn.Module.apply`."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=START_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


@torch.no_grad()
def initialise_attention(module: nn.Module) -> None:
    """The same for attention's projections of queries, keys and values, which torch holds as one."""
    if isinstance(module, nn.MultiheadAttention):
        nn.init.normal_(module.in_proj_weight, std=START_STD)
        nn.init.zeros_(module.in_proj_bias)


def item_table(n_items: int | None, width: int) -> nn.ParameterDict:
    """A learned vector an item, `ids.item` [I + 1, D]; none where a model has no item ids."""
    return nn.ParameterDict({} if n_items is None else {"item": nn.Parameter(torch.randn(n_items + 1, width) * START_STD)})


class OfIds(Recommender):
    """A model of one domain that knows of an item its own learned vector alone."""

    def __init__(self, n_items: int, width: int) -> None:
        super().__init__()
        self.ids = item_table(n_items, width)

    def items(self, features: ItemFeatures, ids: Tensor | slice | None = None) -> Catalogue:
        vectors = rows_of(self.ids["item"], ids)
        return Catalogue({"item": vectors}, vectors)


def feature_rows(features: ItemFeatures, modality: Modality, size: int, ids: Tensor | slice | None) -> tuple[Tensor, Tensor]:
    """Vectors [n, F], 0 where absent, and presence [n]: a domain without the modality has none of it."""
    if modality in features.vectors:
        return features.rows(modality, ids)
    device = next((part.device for part in features.present.values()), None)
    n = len(features.numbers(ids))
    return torch.zeros(n, size, device=device), torch.zeros(n, dtype=torch.bool, device=device)


class ItemVectors(nn.Module):
    """An item's own vector, the projections of its features, or their sum. An absent feature adds nothing."""

    def __init__(self, width: int, *, n_items: int | None, feature_dimensions: Mapping[Modality, int]) -> None:
        """Args: n_items: None: no item ids; feature_dimensions: F of each modality that is read."""
        super().__init__()
        self.sizes = dict(feature_dimensions)
        self.ids = item_table(n_items, width)
        self.adapters = nn.ModuleDict({modality: nn.Linear(size, width) for modality, size in feature_dimensions.items()})
        self.adapters.apply(initialise)

    def forward(self, features: ItemFeatures, ids: Tensor | slice | None) -> Tensor:
        """[n, D] of all items 0..I, or of those in `ids`."""
        parts = [rows_of(self.ids["item"], ids)] if "item" in self.ids else []
        for modality, size in self.sizes.items():
            raw, present = feature_rows(features, modality, size, ids)
            parts.append(self.adapters[modality](raw) * present[:, None])
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def faster_dropout(layer: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer, rate: float, *, inside: bool) -> None:
    """Give torch's layer this project's dropout; with `inside` between the two products of its feed-forward part too, as torch has it."""
    layer.dropout = Dropout(rate if inside else 0.0)  # type: ignore[assignment]
    for name in ("dropout1", "dropout2", "dropout3"):
        if hasattr(layer, name):
            setattr(layer, name, Dropout(rate))


class CausalTransformer(nn.Module):
    """Learned positions, a layer norm and torch's transformer encoder (post-norm, GELU), in which an item sees those before it."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        D = config.width
        self.heads = config.heads
        self.positions = nn.Embedding(config.max_len, D)
        self.norm, self.dropout = nn.LayerNorm(D, eps=NORM_EPS), Dropout(config.dropout)
        self.encoder = transformer_encoder(config, config.layers)
        self.apply(initialise).apply(initialise_attention)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """x [W, Q, D] -> [B, D] at the end of each history."""
        x = self.dropout(self.norm(x + self.positions(packing.positions.clamp(min=0))))
        return packing.at_last(self.encoder(x, mask=unseen(packing).repeat_interleave(self.heads, dim=0)))


def transformer_encoder(config: TransformerConfig, layers: int, *, inside: bool = False) -> nn.TransformerEncoder:
    """Torch's layers; without `inside` as BERT's, which have no dropout inside the feed-forward part."""
    layer = nn.TransformerEncoderLayer(
        config.width, config.heads, config.ffn_width, config.dropout, "gelu", layer_norm_eps=NORM_EPS, batch_first=True
    )
    faster_dropout(layer, config.dropout, inside=inside)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def unseen(packing: Packing) -> Tensor:
    """[W, Q, Q]: which columns a row does not see: what is later, or of another history. Where none stands it sees itself."""
    place = torch.arange(packing.positions.shape[1], device=packing.positions.device)
    first = (place - packing.positions.clamp(min=0))[:, :, None]  # [W, Q, 1] where the row's history starts
    return (place < first) | (place > place[:, None])


def unit(vectors: Tensor) -> Tensor:
    """[..., D] at length 1; 0 stays 0, without the gradient that 1 / eps would give it."""
    return torch.where((vectors != 0).any(-1, keepdim=True), F.normalize(vectors, dim=-1, eps=NORM_EPS), 0.0)
