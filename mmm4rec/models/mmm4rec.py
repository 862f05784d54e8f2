"""MMM4Rec: a user's history and the catalogue as vectors of one space (arXiv 2506.02916).

Dimensions: B examples, W windows and Q positions of items (`Packing`), T = max_len, I items (row 0 is padding),
n rows of a catalogue (I + 1, or fewer), D width, H heads, F width of a feature vector.

The text stream is what the published code calls the encoder, the image stream the decoder: the user
is read off the image stream. With one modality its stream alone remains, without Cross-SSD.

Departures from the published code, all by default and each with a switch: none of the release's faults
(`Quirks`); time enters as the logarithm of the gaps between real items (`time_encoding`) and moves the steps
of the scan (`time_step`). Without a switch: padding is never ranked; a missing feature is a learned vector; the item
tables and per-item fusion start anew in a new domain. `ModelConfig.published()` is the release.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmm4rec.config import from_dict
from mmm4rec.data.batches import Batch, Packing
from mmm4rec.data.features import MODALITIES, ItemFeatures, Modality
from mmm4rec.models.blocks import Activation, CrossSSD, FeedForward, FourierFilter, SSDConfig, TimeSSD, TimeStep
from mmm4rec.models.dropout import Dropout
from mmm4rec.models.hub import HubModel
from mmm4rec.models.quirks import NONE, Quirks
from mmm4rec.models.recommender import Catalogue, Recommender, rows_of
from mmm4rec.models.ssd import Implementation

LOG_GAP_UNIT = 10.0  # log1p(gap_seconds) / 10: six hours are 1.0, a year is 1.7


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches; the sizes are the paper's fine-tuning configuration."""

    width: int = 256
    layers: int = 1
    ffn_width: int = 256
    expand: int = 2
    head_width: int = 64
    state: int = 64
    groups: int | None = None  # None: one a head
    conv_width: int = 4
    max_len: int = 20
    dropout: float = 0.4
    modalities: Literal["both", "text", "image"] = "both"
    missing: Literal["learned", "zero", "other"] = "learned"  # an item without a modality: that one's learned vector, 0, or the other's own
    ids: bool = True  # a learned vector an item and modality, added to its projected features
    time: bool = True
    time_encoding: Literal["log", "masked_norm", "layer_norm"] = "log"  # of the gaps; layer_norm is the published one
    time_step: TimeStep = "shift"  # how time acts on the scan's steps; scale is the published one
    time_gate: Literal["head", "position"] = "head"  # with `scale`: gates of the signal that a layer passes on (release: p2p_residual)
    filter: bool = True  # off: the two time signals are added
    filter_size: int | None = None  # lowest frequencies that the Fourier filter keeps; None: all, max_len // 2 + 1
    cross: Literal["ssd", "add"] = "ssd"
    fusion: Literal["static", "dynamic_shared", "dynamic_instance"] = "static"
    cross_activation: Activation = "silu"  # of Cross-SSD; the release takes hardswish where causal_conv1d is not installed
    temperature: float = 0.8
    scan: Implementation = "auto"  # how the scan is computed: the same to float tolerance; the GPU kernel may round to TF32
    quirks: Quirks = NONE

    def __post_init__(self) -> None:
        sizes = ("width", "layers", "ffn_width", "expand", "head_width", "state", "conv_width", "max_len")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.expand * self.width % self.head_width:
            raise ValueError(f"expand * width is {self.expand * self.width}; it must be a multiple of head_width {self.head_width}.")
        if self.groups is not None and (self.groups < 1 or self.heads % self.groups):
            raise ValueError(f"groups is {self.groups}; it must divide the {self.heads} heads.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be in [0, 1).")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0.")
        if self.filter_size is not None and not 1 <= self.filter_size <= self.frequencies:
            raise ValueError(f"filter_size is {self.filter_size}; with max_len {self.max_len} it must be in 1..{self.frequencies}.")

    @classmethod
    def published(cls, **changes: Any) -> ModelConfig:
        """The release: its time input, and all its quirks. Train it with weight_decay=5e-3, which summed gradients go with."""
        return cls(**{"time_encoding": "layer_norm", "time_step": "scale", "quirks": Quirks.published(), **changes})

    @property
    def per_item(self) -> bool:
        """Whether something in it belongs to single items, so that it ranks one domain alone."""
        return self.ids or self.fusion == "dynamic_instance"

    def without_ids(self) -> ModelConfig:
        """The config over several domains."""
        return replace(self, ids=False)

    @property
    def heads(self) -> int:
        return self.expand * self.width // self.head_width

    @property
    def frequencies(self) -> int:
        return self.max_len // 2 + 1

    @property
    def norm_eps(self) -> float:
        return 1e-12 if self.quirks.tiny_epsilon else 1e-5

    @property
    def has_filter(self) -> bool:
        """Whether there is a Fourier filter: it joins the time signals of two streams for Cross-SSD."""
        return self.modalities == "both" and self.cross == "ssd" and self.time and self.filter

    @property
    def streams(self) -> tuple[Modality, ...]:
        return MODALITIES if self.modalities == "both" else (self.modalities,)

    @property
    def ssd(self) -> SSDConfig:
        return SSDConfig(
            width=self.width,
            inner=self.expand * self.width,
            head_width=self.head_width,
            groups=self.groups or self.heads,
            state=self.state,
            conv_width=self.conv_width,
            max_len=self.max_len,
            dropout=self.dropout,
            time_step=self.time_step if self.time else None,
            time_gate=self.time_gate,
            cross_activation=self.cross_activation,
            scan=self.scan,
            scaled_skip=self.quirks.scaled_skip,
            norm_eps=self.norm_eps,
        )


class TimeInput(nn.Module):
    """Gaps between items -> the first time signal, scaled and shifted by position. Where no gap may be read:

    `log`: the signed logarithm of the gaps; 0 in the padding.
    `masked_norm`: the gaps normalised over the real positions, the first's 0 among them; 0 in the padding. The unit is lost.
    `layer_norm`: the published form, the gaps normalised over all T positions, padding included.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.encoding, self.heads = config.time_encoding, config.heads
        self.gap_dropout = Dropout(config.dropout if config.quirks.raw_gap_dropout else 0.0)
        self.norm = nn.LayerNorm(config.max_len, eps=config.norm_eps)

    def forward(self, gap_seconds: Tensor, timed: Tensor) -> Tensor:
        """gap_seconds and timed [B, T] -> tau [B, H, T]."""
        gaps = self.gap_dropout(gap_seconds * timed)
        if self.encoding == "layer_norm":
            tau = self.norm(gaps)
        else:
            signal = log_gaps(gaps) if self.encoding == "log" else masked_norm(gaps, timed, self.norm.eps)
            tau = (signal * self.norm.weight + self.norm.bias) * timed
        return tau[:, None].expand(-1, self.heads, -1)


def log_gaps(gap_seconds: Tensor) -> Tensor:
    return torch.sign(gap_seconds) * torch.log1p(gap_seconds.abs()) / LOG_GAP_UNIT


def masked_norm(values: Tensor, mask: Tensor, eps: float) -> Tensor:
    """values [B, T] less their mean and over their deviation, both over the positions of the mask."""
    count = mask.sum(1, keepdim=True)
    centred = (values - (values * mask).sum(1, keepdim=True) / count) * mask
    return centred / torch.sqrt(centred.square().sum(1, keepdim=True) / count + eps)


class Layer(nn.Module):
    """One layer of both streams; they share the time-aware SSD block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, eps = config.width, config.norm_eps
        self.ssd = TimeSSD(config.ssd)
        self.dropout = Dropout(config.dropout)
        self.norm = nn.ModuleDict({stream: nn.LayerNorm(D, eps=eps) for stream in config.streams})
        self.ffn = nn.ModuleDict({stream: FeedForward(D, config.ffn_width, config.dropout, eps) for stream in config.streams})
        both = config.modalities == "both"
        self.cross = CrossSSD(config.ssd) if both and config.cross == "ssd" else None
        self.cross_norm = nn.LayerNorm(D, eps=eps) if both else None
        self.filter = FourierFilter(config.max_len, config.filter_size or config.frequencies) if config.has_filter else None

    def forward(
        self, streams: list[Tensor], taus: list[Tensor] | None, packing: Packing, *, at_last: bool
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """streams [W, Q, D] and taus [B, H, T], one a modality, text first -> the same for the next layer.

        `at_last`: the last stream comes out as [B, D].
        """
        count, names = len(streams), list(self.norm)
        all_at_last = at_last and self.cross is None  # Cross-SSD reads whole streams
        tau = None if taus is None else torch.cat(taus)
        mixed, tau = self.ssd(torch.cat(streams), tau, packing.stacked(count), at_last=all_at_last)
        taus = None if tau is None else list(tau.chunk(count))
        if all_at_last:
            streams = [packing.at_last(stream) for stream in streams]
        hidden = [
            self.norm[name](self.dropout(part) + stream) for name, part, stream in zip(names, mixed.chunk(count), streams, strict=True)
        ]
        hidden[0] = self.ffn[names[0]](hidden[0])
        if count == 2:
            hidden[1] = self.ffn["image"](self._join(hidden[1], hidden[0], taus, packing, at_last=at_last))
        return hidden, taus

    def _join(self, image: Tensor, text: Tensor, taus: list[Tensor] | None, packing: Packing, *, at_last: bool) -> Tensor:
        assert self.cross_norm is not None
        if self.cross is None:
            return self.cross_norm(image + text)
        tau = None
        if taus is not None:
            tau = taus[0] + taus[1] if self.filter is None else self.filter(taus[1], taus[0])
        crossed = self.cross(image, text, tau, packing, at_last=at_last)
        if at_last:
            image, text = packing.at_last(image), packing.at_last(text)
        return self.cross_norm(self.dropout(crossed) + image + text)


class MMM4Rec(HubModel, Recommender):
    """The model of one or many domains; features come with each call, ids belong to the one domain of `n_items`."""

    def __init__(self, config: ModelConfig, *, feature_dimensions: dict[Modality, int], n_items: int | None = None) -> None:
        """Args: feature_dimensions: F a modality, without those that no domain has; n_items: I, for ids and per-item fusion."""
        super().__init__()
        self.config = config
        self.temperature = config.temperature
        self.features: ItemFeatures | None = None  # a released checkpoint carries those of its items (published.py)
        if config.per_item and n_items is None:
            raise ValueError("ids and per-item fusion need the number of items of one domain; turn them off for several domains.")
        D, eps, streams = config.width, config.norm_eps, config.streams
        known = [stream for stream in streams if stream in feature_dimensions]
        self.adapters = nn.ModuleDict({stream: nn.Linear(feature_dimensions[stream], D) for stream in known})
        self.missing = nn.ParameterDict({stream: nn.Parameter(torch.empty(D)) for stream in streams})
        self.ids = nn.ParameterDict({s: nn.Parameter(torch.zeros(n_items + 1, D)) for s in streams} if config.ids and n_items else {})
        fusion_shape = {"static": None, "dynamic_shared": (2,), "dynamic_instance": (1 + (n_items or 0), 2)}[config.fusion]
        fused = fusion_shape is not None and len(streams) == 2
        self.fusion = nn.Parameter(torch.zeros(fusion_shape)) if fused and fusion_shape else None
        self.input_norm = nn.ModuleDict({stream: nn.LayerNorm(D, eps=eps) for stream in streams})
        self.dropout = Dropout(config.dropout)
        self.time_input = TimeInput(config) if config.time else None
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self._initialise()

    @classmethod
    def described(cls, description: dict[str, Any], *, source: str) -> MMM4Rec:
        """The model that a best.safetensors or a config.json describes, without its weights."""
        config = replace(from_dict(ModelConfig, description["config"]["model"], source=source), scan="auto")  # not its first machine's
        return cls(config, feature_dimensions=description["feature_dimensions"], n_items=description["n_items"])

    def _initialise(self) -> None:
        """The published start: linear layers N(0, 0.02) without bias; convolutions and scan as their blocks set them."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for vector in self.missing.values():
            nn.init.normal_(vector, std=0.02)

    def items(self, features: ItemFeatures, ids: Tensor | slice | None = None) -> Catalogue:
        """The vectors of all items 0..I, or of those in `ids`: [n], or a range of rows."""
        inputs: dict[str, Tensor] = {stream: self._item_inputs(stream, features, ids) for stream in self.config.streams}
        unit = [self._unit(vectors) for vectors in inputs.values()]
        if self.fusion is None:
            return Catalogue(inputs, sum(unit[1:], unit[0]))
        weights = (self.fusion if self.fusion.dim() == 1 else rows_of(self.fusion, ids)).softmax(-1)  # [2] or [n, 2], text first
        return Catalogue(inputs, unit[0] * weights[..., :1] + unit[1] * weights[..., 1:])

    def _item_inputs(self, stream: Modality, features: ItemFeatures, ids: Tensor | slice | None) -> Tensor:
        """[n, D]: projected features, or what stands for them where there are none, and the item's own vector."""
        if stream in features.vectors and stream in self.adapters:
            raw, present = features.rows(stream, ids)  # [n, F], 0 where absent, and [n]
            if self.config.quirks.padding_class:  # the release's padding is an item whose features are zero
                present = present | (features.numbers(ids, raw.device) == 0)
            adapter, missing = self.adapters[stream], self._learned_missing(stream)
            assert isinstance(adapter, nn.Linear)
            known = torch.stack((present, ~present), dim=1).to(raw.dtype)  # [n, 2]
            projected = torch.addmm(known @ torch.stack((adapter.bias, missing)), raw, adapter.weight.T)
            vectors = projected.to(raw.dtype)  # what follows is summed in full precision
        else:
            present, vectors = None, self._learned_missing(stream).expand(len(features.numbers(ids)), -1)
        if self.config.missing == "other":
            vectors = self._from_other(stream, features, ids, vectors, present)
        return vectors + rows_of(self.ids[stream], ids) if stream in self.ids else vectors

    def _unit(self, vectors: Tensor) -> Tensor:
        """[n, D] at length 1. With `missing=zero` a vector may be 0: it stays so, and has no gradient (it would be 1e12 times as large)."""
        unit = F.normalize(vectors, dim=-1, eps=1e-12)
        return torch.where((vectors != 0).any(-1, keepdim=True), unit, 0.0) if self.config.missing == "zero" else unit

    def _learned_missing(self, stream: Modality) -> Tensor:
        """What stands for an absent feature, [D]."""
        return torch.zeros_like(self.missing[stream]) if self.config.missing == "zero" else self.missing[stream]

    def _from_other(
        self, stream: Modality, features: ItemFeatures, ids: Tensor | slice | None, vectors: Tensor, present: Tensor | None
    ) -> Tensor:
        """The vectors [n, D], with the other modality's projection where this one is absent and that one is not."""
        for other in self.config.streams:
            if other != stream and other in features.vectors and other in self.adapters:
                raw, there = features.rows(other, ids)
                instead = there if present is None else there & ~present
                vectors = torch.where(instead[:, None], self.adapters[other](raw).to(vectors.dtype), vectors)
        return vectors

    def users(self, batch: Batch, catalogue: Catalogue) -> Tensor:
        """User vectors [B, D] in the batch's order; the batch's items are rows of the catalogue."""
        embedded = (F.embedding(batch.items, table) for table in catalogue.inputs.values())  # [W, Q, D]
        names = self.config.streams
        streams = [self.input_norm[name](self.dropout(x)) for name, x in zip(names, embedded, strict=True)]
        taus = None
        if self.time_input is not None:
            if batch.gap_seconds is None:
                raise ValueError("the model reads time gaps and the domain has no timestamps; set model.time=false.")
            taus = [self.time_input(batch.gap_seconds.to(streams[0].dtype), batch.timed) for _ in names]
        for layer in self.layers:
            streams, taus = layer(streams, taus, batch.packing, at_last=layer is self.layers[-1])
        return streams[-1]
