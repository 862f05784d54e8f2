"""Every recommender by its name: its config, and how it is built for a domain."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from mmm4rec.data.domain import Domain
from mmm4rec.data.features import Modality
from mmm4rec.models.baselines.bsarec import BSARec, BSARecConfig
from mmm4rec.models.baselines.gru4rec import GRU4Rec, GRU4RecConfig
from mmm4rec.models.baselines.hm4sr import HM4SR, HM4SRConfig
from mmm4rec.models.baselines.item_knn import ItemKNN, ItemKNNConfig
from mmm4rec.models.baselines.last_item import LastItem, LastItemConfig
from mmm4rec.models.baselines.mamba4rec import Mamba4Rec, Mamba4RecConfig
from mmm4rec.models.baselines.missrec import MISSRec, MISSRecConfig
from mmm4rec.models.baselines.popularity import Popularity, PopularityConfig
from mmm4rec.models.baselines.sasrec import SASRec, SASRecConfig
from mmm4rec.models.baselines.tim4rec import TiM4Rec, TiM4RecConfig
from mmm4rec.models.baselines.unisrec import UniSRec, UniSRecConfig
from mmm4rec.models.mmm4rec import MMM4Rec, ModelConfig
from mmm4rec.models.recommender import Recommender

Name = Literal[
    "mmm4rec",
    "popularity",
    "last_item",
    "item_knn",
    "gru4rec",
    "sasrec",
    "bsarec",
    "mamba4rec",
    "tim4rec",
    "unisrec",
    "missrec",
    "hm4sr",
]
NAMES: tuple[Name, ...] = get_args(Name)


@dataclass(frozen=True)
class Shop:
    """What a model is built for."""

    domain: Domain  # the one, or the first of many
    n_items: int | None  # of the one domain; None for many
    feature_dimensions: Mapping[Modality, int]  # F of each modality that the model reads and some domain has


@dataclass(frozen=True)
class Kind:
    """A recommender's config, and what builds it."""

    config: type[Any]
    build: Callable[[Any, Shop], Recommender]
    trained: bool = True
    needs_features: bool = False  # it cannot do without any


def anywhere(config: Any) -> Any:
    """The config for any machine: the scan as it comes, not as the first machine had it."""
    return config if config.scan == "auto" else replace(config, scan="auto")


def _of_ids(model: Callable[..., Recommender]) -> Callable[[Any, Shop], Recommender]:
    return lambda config, shop: model(config, n_items=shop.n_items)


def _of_content(model: Callable[..., Recommender]) -> Callable[[Any, Shop], Recommender]:
    return lambda config, shop: model(config, n_items=shop.n_items, feature_dimensions=shop.feature_dimensions)


KINDS: dict[Name, Kind] = {
    "mmm4rec": Kind(
        ModelConfig, lambda config, shop: MMM4Rec(config, feature_dimensions=dict(shop.feature_dimensions), n_items=shop.n_items)
    ),
    "popularity": Kind(PopularityConfig, lambda config, shop: Popularity(shop.domain), trained=False),
    "last_item": Kind(LastItemConfig, lambda config, shop: LastItem(), trained=False, needs_features=True),
    "item_knn": Kind(ItemKNNConfig, lambda config, shop: ItemKNN(config, shop.domain), trained=False),
    "gru4rec": Kind(GRU4RecConfig, _of_ids(GRU4Rec)),
    "sasrec": Kind(SASRecConfig, _of_content(SASRec)),
    "bsarec": Kind(BSARecConfig, _of_ids(BSARec)),
    "mamba4rec": Kind(Mamba4RecConfig, _of_ids(Mamba4Rec)),
    "tim4rec": Kind(TiM4RecConfig, _of_ids(TiM4Rec)),
    "unisrec": Kind(UniSRecConfig, _of_content(UniSRec), needs_features=True),
    "missrec": Kind(MISSRecConfig, _of_content(MISSRec), needs_features=True),
    "hm4sr": Kind(HM4SRConfig, _of_content(HM4SR)),
}


def known_fields(name: Name) -> tuple[str, ...]:
    """What a recommender's config knows."""
    return tuple(field.name for field in fields(KINDS[name].config))
