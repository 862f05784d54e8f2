"""TiM4Rec (Fan et al., 2024, arXiv 2409.16182): MMM4Rec's forerunner, a time-aware SSD over the items' vectors.

Kept: dropout and a layer norm on the items' vectors; layers of the time-aware SSD block and a feed-forward part, the time
signal passed on from layer to layer. They are MMM4Rec's own blocks with one stream (models/mmm4rec.py).
Otherwise: gaps are normalised over a history's own positions, without what MMM4Rec's release inherits as faults
(models/quirks.py); there is a residual around the block in a single layer too; the time signal has no dropout rate of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from mmm4rec.data.batches import Batch
from mmm4rec.models.baselines.blocks import OfIds, initialise
from mmm4rec.models.baselines.config import EncoderConfig
from mmm4rec.models.blocks import TimeStep
from mmm4rec.models.dropout import Dropout
from mmm4rec.models.mmm4rec import Layer, ModelConfig, TimeInput
from mmm4rec.models.recommender import Catalogue
from mmm4rec.models.ssd import Implementation


@dataclass(frozen=True)
class TiM4RecConfig(EncoderConfig):
    """The release's settings for Amazon Beauty; the published form of the time input, without its padding."""

    dropout: float = 0.4
    ffn_width: int = 256
    expand: int = 2
    head_width: int = 32
    state: int = 32
    conv_width: int = 4
    time: bool = True
    time_encoding: Literal["log", "masked_norm"] = "masked_norm"
    time_step: TimeStep = "scale"
    time_gate: Literal["head", "position"] = "position"
    scan: Implementation = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.one_stream()

    @property
    def sizes(self) -> tuple[str, ...]:
        return (*super().sizes, "ffn_width", "expand", "head_width", "state", "conv_width")

    def one_stream(self) -> ModelConfig:
        """The same as a config of MMM4Rec's blocks. Raises ValueError where sizes do not fit."""
        return ModelConfig(modalities="text", **vars(self))


class TiM4Rec(OfIds):
    """The model of one domain."""

    def __init__(self, config: TiM4RecConfig, *, n_items: int) -> None:
        super().__init__(n_items, config.width)
        stream = config.one_stream()
        self.dropout, self.norm = Dropout(config.dropout), nn.LayerNorm(config.width, eps=stream.norm_eps)
        self.time_input = TimeInput(stream) if config.time else None
        self.layers = nn.ModuleList(Layer(stream) for _ in range(config.layers))
        self.layers.apply(initialise)

    def users(self, batch: Batch, catalogue: Catalogue) -> Tensor:
        x = self.norm(self.dropout(F.embedding(batch.items, catalogue.inputs["item"])))
        taus: list[Tensor] | None = None
        if self.time_input is not None:
            if batch.gap_seconds is None:
                raise ValueError("the model reads time gaps and the domain has no timestamps; set model.time=false.")
            taus = [self.time_input(batch.gap_seconds.to(x.dtype), batch.timed)]
        streams = [x]
        for layer in self.layers:
            streams, taus = layer(streams, taus, batch.packing, at_last=layer is self.layers[-1])
        return streams[0]
