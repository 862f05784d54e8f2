"""SASRec (Kang & McAuley, ICDM 2018, arXiv 1808.09781): a transformer over the item's own vectors; also with text or images.

Kept: learned positions, causal self-attention, the items' vectors as inputs and as candidates.
As in RecBole and UniSRec, which the literature's figures come from: layer norms behind each block, GELU, cross-entropy over
the whole catalogue. `training.loss=gbce` is gSASRec's loss (Petrov & Macdonald, RecSys 2023, arXiv 2308.07192), with
one sample of negatives a micro-batch and not a position.
`content=text` adds a linear projection of the items' features, as UniSRec's authors do for their SASRec with text.
Left out: the sampled binary cross-entropy of the first paper and its loss at every position: an example is one prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor
from torch.nn import functional as F

from mmm4rec.data.batches import Batch
from mmm4rec.data.features import ItemFeatures, Modality
from mmm4rec.models.baselines.blocks import CausalTransformer, ItemVectors
from mmm4rec.models.baselines.config import Content, TransformerConfig, streams_of
from mmm4rec.models.recommender import Catalogue, Recommender


@dataclass(frozen=True)
class SASRecConfig(TransformerConfig):
    """RecBole's defaults."""

    ids: bool = True
    content: Content = "none"  # features that are added to the items' own vectors, or stand for them

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ids and self.content == "none":
            raise ValueError("ids are off and content is 'none': there is nothing to learn from.")

    @property
    def streams(self) -> tuple[Modality, ...]:
        return streams_of(self.content)

    @property
    def per_item(self) -> bool:
        return self.ids

    def without_ids(self) -> Self:
        return self if self.content == "none" else replace(self, ids=False)


class SASRec(Recommender):
    """The model of one domain, or without ids of many."""

    def __init__(self, config: SASRecConfig, *, n_items: int | None, feature_dimensions: Mapping[Modality, int]) -> None:
        super().__init__()
        self.vectors = ItemVectors(config.width, n_items=n_items if config.ids else None, feature_dimensions=feature_dimensions)
        self.encoder = CausalTransformer(config)

    def items(self, features: ItemFeatures, ids: Tensor | slice | None = None) -> Catalogue:
        vectors = self.vectors(features, ids)
        return Catalogue({"item": vectors}, vectors)

    def users(self, batch: Batch, catalogue: Catalogue) -> Tensor:
        return self.encoder(F.embedding(batch.items, catalogue.inputs["item"]), batch.packing)
