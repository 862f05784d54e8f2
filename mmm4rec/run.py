"""RunConfig -> Run: the one place that assembles a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from mmm4rec.config import to_dict
from mmm4rec.data.batches import DomainData, TimeView
from mmm4rec.data.domain import Domain, Examples, open_domain
from mmm4rec.data.features import Damage, ItemFeatures, Modality, load_features
from mmm4rec.device import choose_device
from mmm4rec.errors import BadInput
from mmm4rec.models.kinds import KINDS, Name, Shop
from mmm4rec.models.recommender import Recommender
from mmm4rec.models.ssd import why_no_kernel
from mmm4rec.training.checkpoint import Transfer, hash_file, load_model, transfer
from mmm4rec.training.loop import Run, TrainingConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataConfig:
    """Which domains a run reads, and which of their examples."""

    domains: tuple[str, ...]  # folders: one for fine-tuning, several for pre-training
    examples: Literal["train", "all"] = "train"  # all: validation and test targets too, for pre-training on sources
    heldout_users: float = 0.05  # with `all`: the share of users kept out of training; their last item is the validation
    damage: Damage = field(default_factory=Damage)  # for stress tests (studies/robustness.py)
    shuffle_features: int | None = None  # seed that deals the features out anew among the items: a control
    most_heldout_users: int = 10_000  # at most so many
    zero_shot: tuple[str, ...] = ()  # folders of domains whose validation examples are ranked after every epoch, and not trained on
    mask_seen: bool = False  # evaluation: items of a user's history are no candidates; part of the fingerprint

    def __post_init__(self) -> None:
        if not self.domains:
            raise ValueError("domains is empty; name at least one folder.")
        if not 0 < self.heldout_users < 1:
            raise ValueError(f"heldout_users is {self.heldout_users}; it must be between 0 and 1.")


@dataclass(frozen=True)
class RunConfig:
    """All that decides a run's numbers, with the code version."""

    data: DataConfig
    model: Any = None  # the recommender's own config (models/kinds.py); None: its defaults
    training: TrainingConfig = field(default_factory=TrainingConfig)
    recommender: Name = "mmm4rec"
    init: str | None = None  # best.safetensors to transfer from; None: from scratch
    seed: int = 0
    device: str = "auto"
    test: bool = True  # evaluate the best weights on the test split at the end

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be at least 0.")
        kind = KINDS[self.recommender]
        if self.model is None:
            object.__setattr__(self, "model", kind.config())
        if not isinstance(self.model, kind.config):
            raise ValueError(f"model is a {type(self.model).__name__}; {self.recommender} needs a {kind.config.__name__}.")

    @staticmethod
    def field_kinds(told: dict[str, Any]) -> dict[str, type]:
        """Which config `model` is, for from_dict."""
        name = told.get("recommender", "mmm4rec")
        return {"model": KINDS[name].config} if name in get_args(Name) else {}


@dataclass(frozen=True)
class Assembled:
    """A run with what its files must say about it."""

    run: Run
    config: RunConfig  # resolved: time is off where a domain has no timestamps
    domains: tuple[Domain, ...]
    transfer: Transfer | None
    description: dict[str, Any]  # what the numbers mean: config, fingerprints, features, initial weights


def assemble(config: RunConfig) -> Assembled:
    """Open the domains, build the model under the seed, carry the initial weights over.

    Raises BadInput when domains, features, config or initial weights do not fit together.
    """
    domains = tuple(open_domain(path) for path in config.data.domains)
    config = resolve(config, domains)
    device = choose_device(config.device)
    if config.model.scan == "triton" and (problem := why_no_kernel(device, torch.float32)):
        raise BadInput(f"model.scan=triton {problem}.", remedy="Or use model.scan=auto.")
    shuffle, damage = config.data.shuffle_features, config.data.damage
    features = [load_features(domain, config.model.streams, shuffle_seed=shuffle, damage=damage).to(device) for domain in domains]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    torch.manual_seed(config.seed)
    model = _build_model(config, domains, features).to(device)
    moved, init_hash = None, None
    if config.init is not None:
        weights, metadata = load_model(config.init)
        if (kind := metadata["config"].get("recommender", "mmm4rec")) != config.recommender:
            rule = f"holds a model of {kind}; the run's recommender is {config.recommender}."
            raise BadInput(rule, file=config.init, remedy=f"Set recommender={kind}, or give another file.")
        check_encoders(metadata, features, domains, config.init)
        check_unseen(metadata, domains, config.init)
        moved, init_hash = transfer(model, weights, source=config.init), hash_file(config.init)
        if moved.dropped_layers:
            log.warning("%s: %s", config.init, moved)
    data = [_domain_data(config, domain, part) for domain, part in zip(domains, features, strict=True)]
    unseen = [_unseen_data(config, path, features, domains, device) for path in config.data.zero_shot]
    run = Run(model, data, config.training, config.seed, device, config.model.quirks, unseen)
    description = {
        "config": to_dict(config),
        "fingerprints": {domain.name: domain.fingerprint for domain in domains},
        "features": {domain.name: part.digests for domain, part in zip(domains, features, strict=True)},
        "init": init_hash,
        "feature_dimensions": _shared_dimensions(features, domains),
        "encoders": {modality: name for part in features for modality, name in part.encoders.items()},
        "n_items": domains[0].n_items if len(domains) == 1 else None,
    }
    return Assembled(run, config, domains, moved, description)


def resolve(config: RunConfig, domains: tuple[Domain, ...]) -> RunConfig:
    """The config as it can be run: time off without timestamps, ids off over several domains, no epochs without training."""
    model, training = config.model, config.training
    untimed = [domain.name for domain in domains if domain.timestamps is None]
    if model.time and untimed:
        with_it = ", and with it the Fourier filter" if config.recommender == "mmm4rec" else ""
        log.warning("domain %s has no timestamps: model.time is turned off%s", ", ".join(untimed), with_it)
        model = replace(model, time=False)
    if len(domains) > 1:
        model = model.without_ids()
    if not KINDS[config.recommender].trained:
        training = replace(training, epochs=0, report_untrained=True)
    return replace(config, model=model, training=training)


def _domain_data(config: RunConfig, domain: Domain, features: ItemFeatures) -> DomainData:
    if config.data.examples == "train":
        train, valid = domain.examples("train"), domain.examples("valid")
    else:
        able = np.random.default_rng(config.seed).permutation(domain.examples("test").users)
        count = max(1, min(config.data.most_heldout_users, round(config.data.heldout_users * len(able))))
        train, valid = domain.examples("all", np.sort(able[count:])), domain.examples("test", np.sort(able[:count]))
    if not len(valid) or (not len(train) and config.training.epochs):
        rule = f"has {len(train)} training and {len(valid)} validation examples; a run needs some of both."
        raise BadInput(rule, file=domain.path, remedy="Users need 4 interactions (pre-training: 2); prepare a larger domain.")
    return domain_data(config, domain, features, train, valid)


NO_EXAMPLES = Examples(*(np.empty(0, dtype=np.int64) for _ in range(3)))


def domain_data(
    config: RunConfig, domain: Domain, features: ItemFeatures, train: Examples = NO_EXAMPLES, valid: Examples = NO_EXAMPLES
) -> DomainData:
    """The domain as a run of this config reads it."""
    model, quirks = config.model, config.model.quirks
    view = TimeView(quirks.label_time, quirks.zero_stamps)
    return DomainData(domain, features, train, valid, model.max_len, model.time, view, config.data.mask_seen)


def _unseen_data(
    config: RunConfig, path: str, features: Sequence[ItemFeatures], domains: Sequence[Domain], device: torch.device
) -> DomainData:
    """A domain that is validated and not trained on."""
    domain = open_domain(path)
    if config.model.per_item:
        raise BadInput("data.zero_shot needs a model without item ids.", file=path, remedy="Set model.ids=false.")
    if domain.fingerprint in {source.fingerprint for source in domains}:
        raise BadInput(f"domain '{domain.name}' is trained on too.", file=path, remedy="Take it out of data.zero_shot.")
    own = load_features(domain, config.model.streams).to(device)
    _shared_dimensions([*features, own], [*domains, domain])
    return domain_data(config, domain, own, valid=domain.examples("valid"))


def _build_model(config: RunConfig, domains: tuple[Domain, ...], features: list[ItemFeatures]) -> Recommender:
    kind, model, first = KINDS[config.recommender], config.model, domains[0]
    if len(domains) > 1 and model.per_item:
        rule = f"{config.recommender} belongs to the items of one domain with these settings, and the run has {len(domains)}."
        raise BadInput(rule, remedy="Name one domain.")
    if not any(part.vectors for part in features) and (kind.needs_features or not model.per_item):
        needed = " or ".join(model.streams) or "text or image"
        rule = f"no domain has {needed} features, and {config.recommender} has nothing else to learn from."
        raise BadInput(rule, file=first.path, remedy="Run: mmm4rec encode DOMAIN")
    n_items = first.n_items if len(domains) == 1 else None
    return kind.build(model, Shop(first, n_items, _shared_dimensions(features, domains)))


def _shared_dimensions(features: Sequence[ItemFeatures], domains: Sequence[Domain]) -> dict[Modality, int]:
    """F of each modality that some domain has. Raises BadInput when domains differ in it or in the encoder."""
    seen: dict[Modality, tuple[int, str, Domain]] = {}
    for part, domain in zip(features, domains, strict=True):
        for modality, dimension in part.dimensions.items():
            first = seen.setdefault(modality, (dimension, part.encoders[modality], domain))
            if first[:2] != (dimension, part.encoders[modality]):
                rule = f"has {modality} features of {part.encoders[modality]}; domain '{first[2].name}' has {first[1]}."
                raise BadInput(rule, file=domain.path, remedy="Encode all domains of a run with one encoder.")
    return {modality: dimension for modality, (dimension, _, _) in seen.items()}


def check_encoders(metadata: dict[str, Any], features: Sequence[ItemFeatures], domains: Sequence[Domain], source: str | Path) -> None:
    """Raise BadInput when a domain's features are not of the encoder and dimension that the checkpoint was trained on."""
    for part, domain in zip(features, domains, strict=True):
        for modality, encoder in part.encoders.items():
            expected = metadata.get("encoders", {}).get(modality, encoder)
            dimension = metadata.get("feature_dimensions", {}).get(modality, part.dimensions[modality])
            if (encoder, part.dimensions[modality]) != (expected, dimension):
                rule = (
                    f"was trained on {modality} features of {expected} ({dimension} dimensions); domain '{domain.name}' has {encoder}"
                    f" ({part.dimensions[modality]})."
                )
                raise BadInput(rule, file=source, remedy=f"Re-run: mmm4rec encode {domain.path} --force, with that encoder.")


def check_unseen(metadata: dict[str, Any], domains: Sequence[Domain], source: str | Path) -> None:
    """Raise BadInput when the checkpoint was pre-trained on validation and test targets of one of these domains."""
    seen = set(metadata["fingerprints"].values()) if metadata["config"]["data"]["examples"] == "all" else set()
    for domain in domains:
        if domain.fingerprint in seen:
            rule = f"was pre-trained on all targets of domain '{domain.name}', the test split's too: a figure on it would mean nothing."
            raise BadInput(rule, file=source, remedy="Pre-train without this domain, or with data.examples=train.")
