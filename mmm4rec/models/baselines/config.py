"""What the configs of all baselines have in common; each stands beside its model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

from mmm4rec.data.features import MODALITIES, Modality
from mmm4rec.models.quirks import NONE, Quirks
from mmm4rec.models.ssd import Implementation

Content = Literal["none", "text", "image", "both"]


@dataclass(frozen=True)
class BaselineConfig:
    """What a run asks of any model; a config overrides what is otherwise with it by a field of the same name."""

    max_len: int = 50

    def __post_init__(self) -> None:
        for name, lowest in (("max_len", 1), *((size, 1) for size in self.sizes)):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {lowest}.")

    @property
    def sizes(self) -> tuple[str, ...]:
        """Fields that must be at least 1."""
        return ()

    @property
    def streams(self) -> tuple[Modality, ...]:
        """Which features it reads."""
        return ()

    @property
    def time(self) -> bool:
        """Whether it reads the gaps between interactions."""
        return False

    @property
    def per_item(self) -> bool:
        """Whether something in it belongs to single items, so that it ranks one domain alone."""
        return True

    @property
    def scan(self) -> Implementation:
        return "auto"

    @property
    def quirks(self) -> Quirks:
        return NONE

    def without_ids(self) -> Self:
        """The config over several domains: without vectors of single items, where it can be."""
        return self


@dataclass(frozen=True)
class EncoderConfig(BaselineConfig):
    """A baseline with an encoder of so many layers."""

    width: int = 64
    layers: int = 2
    dropout: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be in [0, 1).")

    @property
    def sizes(self) -> tuple[str, ...]:
        return ("width", "layers")


@dataclass(frozen=True)
class TransformerConfig(EncoderConfig):
    """A baseline whose encoder is a transformer."""

    heads: int = 2
    ffn_width: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise ValueError(f"width is {self.width}; it must be a multiple of heads, {self.heads}.")

    @property
    def sizes(self) -> tuple[str, ...]:
        return (*super().sizes, "heads", "ffn_width")


@dataclass(frozen=True)
class ContentConfig(TransformerConfig):
    """A transformer over items' features, with or without vectors of their own, that is pre-trained and moved."""

    width: int = 300
    ids: bool = True
    modalities: Literal["text", "image", "both"] = "both"
    temperature: float = 0.07
    freeze_encoder: bool = False  # positions and transformer stay as they were pre-trained

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, temperature=self.temperature > 0)

    @property
    def streams(self) -> tuple[Modality, ...]:
        return streams_of(self.modalities)

    @property
    def per_item(self) -> bool:
        return self.ids

    def without_ids(self) -> Self:
        return replace(self, ids=False)


def check(config: BaselineConfig, **rules: bool) -> None:
    """Raise ValueError for the first field whose rule is broken."""
    for name, holds in rules.items():
        if not holds:
            raise ValueError(f"{name} is {getattr(config, name)}, which is out of its range.")


def streams_of(content: Content) -> tuple[Modality, ...]:
    if content == "both":
        return MODALITIES
    return () if content == "none" else (content,)
