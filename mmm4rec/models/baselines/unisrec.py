"""UniSRec (Hou et al., KDD 2022, arXiv 2206.05941): item texts through a mixture of whitening experts into a transformer.

Kept: the adaptor (parametric whitening, noisy gates over all experts), SASRec's encoder, unit vectors with a temperature;
pre-training over the texts of several domains by the next item among those of the batch (`training.loss=in_batch` with
`mixed_batches`); fine-tuning with text alone (`ids=false`, its "inductive" form) or with item ids ("transductive"), the
encoder held fast (`freeze_encoder`) or not.
Otherwise: what is random in the items' vectors is drawn once an optimizer step and not anew for histories and candidates (a
catalogue of many blocks excepted), and one dropout serves all experts; padding is no class of the softmax.
Left out: the contrast of a history with a thinned one in pre-training, which the paper weighs with 0.001.
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
from mmm4rec.models.baselines.blocks import CausalTransformer, feature_rows, initialise, item_table, unit
from mmm4rec.models.baselines.config import ContentConfig, check
from mmm4rec.models.dropout import Dropout
from mmm4rec.models.recommender import Catalogue, Recommender, rows_of

NOISE_FLOOR = 1e-2  # of the gates' noise


@dataclass(frozen=True)
class UniSRecConfig(ContentConfig):
    """The release's defaults. After pre-training the paper trains adaptor, input norm and item ids alone (`freeze_encoder`)."""

    modalities: Literal["text", "image", "both"] = "text"  # the paper's content is text; of both the features are joined
    experts: int = 8
    adaptor_dropout: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, adaptor_dropout=0 <= self.adaptor_dropout < 1)

    @property
    def sizes(self) -> tuple[str, ...]:
        return (*super().sizes, "experts")


class Adaptor(nn.Module):
    """A mixture of experts, each of which shifts and projects a feature vector; a softmax with noise weighs them."""

    def __init__(self, size: int, config: UniSRecConfig) -> None:
        super().__init__()
        self.dropout = Dropout(config.adaptor_dropout)
        self.shifts = nn.Parameter(torch.zeros(config.experts, size))
        self.experts = nn.Linear(size, config.experts * config.width, bias=False)
        self.gate, self.noise = nn.Parameter(torch.zeros(size, config.experts)), nn.Parameter(torch.zeros(size, config.experts))
        initialise(self.experts)

    def forward(self, raw: Tensor) -> Tensor:
        """raw [n, F] -> [n, D]. In the release each expert draws a dropout of its own; here they share one."""
        E, size = self.shifts.shape
        weights = raw @ self.gate  # [n, E]
        if self.training:
            weights = weights + torch.randn_like(weights) * (F.softplus(raw @ self.noise) + NOISE_FLOOR)
        of_experts = self.experts.weight.view(E, -1, size)  # [E, D, F]
        shifted = torch.einsum("edf,ef->ed", of_experts, self.shifts)
        projected = self.experts(self.dropout(raw)).unflatten(-1, (E, -1)) - shifted  # [n, E, D]
        return torch.einsum("ne,ned->nd", weights.softmax(-1), projected)


class UniSRec(Recommender):
    """The model of one domain, or without ids of many."""

    def __init__(self, config: UniSRecConfig, *, n_items: int | None, feature_dimensions: Mapping[Modality, int]) -> None:
        super().__init__()
        self.temperature = config.temperature
        self.sizes = dict(feature_dimensions)
        self.ids = item_table(n_items if config.ids else None, config.width)
        self.adaptor = Adaptor(sum(feature_dimensions.values()), config)
        self.encoder = CausalTransformer(config)
        for part in (self.encoder.positions, self.encoder.encoder):
            part.requires_grad_(not config.freeze_encoder)

    def items(self, features: ItemFeatures, ids: Tensor | slice | None = None) -> Catalogue:
        raw = torch.cat([feature_rows(features, modality, size, ids)[0] for modality, size in self.sizes.items()], dim=-1)  # [n, F]
        vectors = self.adaptor(raw)
        if "item" in self.ids:
            vectors = vectors + rows_of(self.ids["item"], ids)
        return Catalogue({"item": vectors}, unit(vectors))

    def users(self, batch: Batch, catalogue: Catalogue) -> Tensor:
        return unit(self.encoder(F.embedding(batch.items, catalogue.inputs["item"]), batch.packing))
