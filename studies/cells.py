"""A study's cells: domain × arm, resolved from the spec and the prepared domains."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmm4rec.config import from_dict, merge
from mmm4rec.errors import BadInput
from mmm4rec.models.kinds import KINDS, Kind, Name, known_fields
from mmm4rec.models.mmm4rec import ModelConfig
from mmm4rec.training.checkpoint import load_description
from studies.space import Parameter, broken_condition
from studies.spec import Spec

FILTER_SIZE = "model.filter_size"


@dataclass(frozen=True)
class Source:
    """What a cell needs to know of a prepared domain."""

    path: str
    fingerprint: str
    has_timestamps: bool
    features: Mapping[str, str] | None = None  # digest a modality; None: not looked at yet
    encoders: Mapping[str, str] = field(default_factory=dict, compare=False)  # what made them


@dataclass(frozen=True)
class Cell:
    """Domain × arm: what all its trials share. `run` is a RunConfig's plain data without domains, seed and init."""

    domain: str
    arm: str
    source: Source
    init: Literal["pretrained", "scratch"]
    shuffle_features: bool
    run: dict[str, Any]
    space: dict[str, Parameter]
    metric: str  # of validation; higher is better
    search_trials: int
    confirm_seeds: int

    @property
    def name(self) -> str:
        return f"{self.domain}/{self.arm}"

    @property
    def fingerprint(self) -> str:
        """What a number of this cell means, as its runs' results say it."""
        return self.source.fingerprint + ("+mask_seen" if self.run["data"]["mask_seen"] else "")

    def trial_key(self, config: Mapping[str, Any], seed: int, phase: str, generation: int = 0) -> str:
        """Names a trial in every store: hash of cell, config, seed and phase. The domain's place on disk is left out.

        Args: generation: how often the cell began anew, because something that its runs do not say (their code, the
        pre-trained weights) had changed.
        """
        told = [self.name, self.source.fingerprint, self.init, self.shuffle_features, self.run, dict(config), seed, phase]
        told += [generation] if generation else []
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def build_cells(spec: Spec, sources: Mapping[str, Source]) -> tuple[tuple[Cell, ...], tuple[str, ...]]:
    """The study's cells in the spec's order, and warnings: time turned off, features missing, pre-trained layers dropped.

    Every arm of the pre-trained recommender has as many layers as were pre-trained, unless its own model says otherwise.
    Raises BadInput where a domain is unknown or was pre-trained on, an arm searches a filter size that it has no
    filter for, or the spec's checkpoint is no model of ours. Reads that file's header, where it exists, and no other.
    """
    pairs = [(domain, arm) for group in spec.cells for domain in group.domains for arm in group.arms]
    unknown = sorted({domain for domain, _ in pairs} - set(sources))
    if unknown:
        raise BadInput(f"study '{spec.study}' names the unknown domain {', '.join(unknown)}.", remedy=f"Known: {', '.join(sources)}.")
    _check_unseen(spec, pairs, sources)
    depth = _pretrained_depth(spec)
    cells = tuple(_build_cell(spec, domain, arm, sources[domain], depth) for domain, arm in pairs)
    timeless = sorted({domain for domain, _ in pairs if not sources[domain].has_timestamps})
    warnings = tuple(
        f"domain '{domain}' has no timestamps: time is off in its cells, and filter_size is not searched." for domain in timeless
    )
    return cells, warnings + _featureless(cells) + _dropped_layers(cells, depth)


def _pretrained_depth(spec: Spec) -> int | None:
    """How many layers were or will be pre-trained; None where nothing is, or the checkpoint is not there (yet)."""
    if spec.pretrain is None:
        return None
    if spec.pretrain.checkpoint is None:
        kind, told = spec.pretrain.recommender, merge(known_model(spec.pretrain.recommender, spec.model), spec.pretrain.model)
        return int(from_dict(KINDS[kind].config, told, source=f"study {spec.study}, pretrain").layers)
    file = Path(spec.pretrain.checkpoint)
    if not file.is_file():
        return None
    told = load_description(file)["config"]
    if (kind := told.get("recommender", "mmm4rec")) != spec.pretrain.recommender:
        rule = f"holds a model of {kind}, and study '{spec.study}' has pretrain.recommender {spec.pretrain.recommender}."
        raise BadInput(rule, file=file, remedy="Set pretrain.recommender, or give another file.")
    return int(told["model"]["layers"])


def _featureless(cells: Sequence[Cell]) -> tuple[str, ...]:
    domains = dict.fromkeys(cell.domain for cell in cells if cell.source.features is not None and not cell.source.features)
    return tuple(
        f"domain '{domain}' has no features: its cells learn from item ids alone. To change that: mmm4rec encode." for domain in domains
    )


def _dropped_layers(cells: Sequence[Cell], depth: int | None) -> tuple[str, ...]:
    warnings = []
    for cell in cells:
        if cell.init != "pretrained" or depth is None:
            continue
        layers = from_dict(KINDS[cell.run["recommender"]].config, cell.run["model"], source=f"cell {cell.name}").layers
        if layers < depth:
            dropped = ", ".join(str(number) for number in range(layers + 1, depth + 1))  # counted from 1
            warnings.append(f"cell '{cell.name}' has {layers} of the {depth} pre-trained layers: layer {dropped} is dropped.")
    return tuple(warnings)


def _check_unseen(spec: Spec, pairs: Sequence[tuple[str, str]], sources: Mapping[str, Source]) -> None:
    """Pre-training reads every target of its sources, those of the test split too: a source is no target."""
    pretrained_on = {name: sources[name].fingerprint for name in (spec.pretrain.sources if spec.pretrain else ()) if name in sources}
    for domain, _ in pairs:
        twins = [name for name, fingerprint in pretrained_on.items() if name == domain or fingerprint == sources[domain].fingerprint != ""]
        if twins:
            rule = f"study '{spec.study}' pre-trains on '{twins[0]}', test targets included, and has cells of it as '{domain}'."
            raise BadInput(rule, remedy="Take it out of pretrain.sources or out of the cells.")


def _build_cell(spec: Spec, domain: str, arm_name: str, source: Source, depth: int | None) -> Cell:
    arm, budget = spec.arms[arm_name], spec.budget
    kind, name = KINDS[arm.recommender], f"{domain}/{arm_name}"
    trained = kind.trained and not arm.zero_shot
    deep = {"layers": depth} if depth is not None and arm.recommender == spec.pretrained_kind else {}
    model = merge(merge(known_model(arm.recommender, spec.model), deep), arm.model)
    if arm.zero_shot:
        model["ids"] = False
    if not source.has_timestamps and "time" in known_fields(arm.recommender):
        model["time"] = False
    if forbidden := {"epochs", "valid_metric"} & set(arm.training):
        rule = f"arm '{arm_name}' sets training.{min(forbidden)}, which is the same for every arm."
        raise BadInput(rule, remedy="Write budget.epochs or metric for the whole study.")
    training = merge(merge(spec.training, arm.training), {"epochs": 0 if arm.zero_shot else budget.epochs, "valid_metric": spec.metric})
    if wrong := [key for key, parameter in arm.space.items() if parameter is not None and not _searchable(kind, arm.recommender, key)]:
        rule = f"arm '{arm_name}' searches {wrong[0]}, which {arm.recommender} does not read."
        raise BadInput(rule, remedy=f"Its own: {', '.join(f'model.{key}' for key in known_fields(arm.recommender))}.")
    shared = {key: parameter for key, parameter in spec.space.items() if _searchable(kind, arm.recommender, key)}
    space = {key: parameter for key, parameter in {**shared, **arm.space}.items() if parameter is not None}
    config = from_dict(kind.config, model, source=f"cell {name}")
    if isinstance(config, ModelConfig) and not config.has_filter:
        if arm.space.get(FILTER_SIZE) is not None:
            rule = f"arm '{arm_name}' searches {FILTER_SIZE}, and cell '{name}' has no Fourier filter to size."
            raise BadInput(rule, remedy="Take it out of the arm's space.")
        space.pop(FILTER_SIZE, None)
        model.pop("filter_size", None)
    if broken := broken_condition(space):
        raise BadInput(f"the space of cell '{name}' is wrong: {broken}", remedy="Correct `when`, or the order of the space.")
    searched = space and not arm.zero_shot
    return Cell(
        domain=domain,
        arm=arm_name,
        source=source,
        init=arm.init,
        shuffle_features=arm.shuffle_features,
        run={
            "data": {"mask_seen": spec.mask_seen},
            "recommender": arm.recommender,
            "model": model,
            "training": training,
            "device": "cuda" if spec.resources.gpus else "cpu",
        },
        space=space if searched else {},
        metric=spec.metric,
        search_trials=budget.search_trials if searched else 0,
        confirm_seeds=budget.confirm_seeds if trained else 1,  # the others draw nothing at random
    )


def _searchable(kind: Kind, recommender: Name, key: str) -> bool:
    """Whether a parameter of a search space changes anything in a run of this recommender."""
    section, _, name = key.partition(".")
    return name.partition(".")[0] in known_fields(recommender) if section == "model" else kind.trained


def known_model(recommender: Name, model: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a study's `model` that a recommender's config knows."""
    return {key: value for key, value in model.items() if key in known_fields(recommender)}


def nested(config: Mapping[str, Any]) -> dict[str, Any]:
    """{"model.dropout": 0.2} as {"model": {"dropout": 0.2}}."""
    result: dict[str, Any] = {}
    for name, value in config.items():
        tree = value
        for key in reversed(name.split(".")):
            tree = {key: tree}
        result = merge(result, tree)
    return result


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"width": 64}} as {"model.width": 64}."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return leaves


def differences(before: str, now: str) -> str:
    """What differs between two JSON mappings, a line a key."""
    old, new = flat(json.loads(before)), flat(json.loads(now))
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return "".join(f"  {key}: {old.get(key)} then, {new.get(key)} now\n" for key in changed)
