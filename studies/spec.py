"""A study's spec: the dataclasses of its YAML file.

    study: demo                     # the name of the folder under --out
    domains: {demo: true}           # or {prepare: {name: folder under --data}, text_encoder: {...}}
    pretrain: {sources: [...], training: {...}, workers: 2}     # or {checkpoint: path}
    model: {width: 64}              # what every run starts from, pre-training too
    training: {batch_size: 256}     # what every cell starts from
    space: {training.learning_rate: {low: 1e-4, high: 1e-2, log: true}}
    arms: {pretrained: {init: pretrained}, text_only: {init: pretrained, model: {modalities: text}}}
    cells: [{domains: [...], arms: [...]}]
    baseline: scratch               # the arm that every other one is compared with, user by user (optional)
    mask_seen: false                # true: what a user has had is left out of the ranking, in every run
    budget: {search_trials: 6, epochs: 20}

An arm is never a dimension of the search: every cell is searched alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmm4rec.config import from_dict, load_yaml, to_dict
from mmm4rec.errors import BadInput

SPECS = Path(__file__).parent / "specs"


@dataclass(frozen=True)
class Parameter:
    """One dimension of a search space: a range of floats, or choices."""

    low: float | None = None
    high: float | None = None
    log: bool = False
    choices: tuple[Any, ...] | None = None

    def __post_init__(self) -> None:
        ranged = self.low is not None and self.high is not None
        if ranged == (self.choices is not None):
            raise ValueError("needs either low and high, or choices.")
        if ranged and not (self.low < self.high and (self.low > 0 or not self.log)):  # type: ignore[operator]
            raise ValueError(f"runs from {self.low} to {self.high}; it must rise, and start above 0 where log is on.")

    def ends(self) -> tuple[Any, ...]:
        """Values that must all be allowed: the bounds, or every choice."""
        return (self.low, self.high) if self.choices is None else self.choices


@dataclass(frozen=True)
class TextEncoder:
    """An encoder fitted on some prepared domains and applied to others, which get a text feature table."""

    fit_on: tuple[str, ...]
    domains: tuple[str, ...]
    kind: Literal["lexical"] = "lexical"
    dimensions: int = 256


@dataclass(frozen=True)
class Domains:
    """Where the domains come from."""

    demo: bool = False
    prepare: dict[str, str] = field(default_factory=dict)  # name: folder under --data
    text_encoder: TextEncoder | None = None

    def __post_init__(self) -> None:
        if self.demo == bool(self.prepare):
            raise ValueError("needs either `demo: true` or `prepare`.")


@dataclass(frozen=True)
class Pretrain:
    """One pre-training on all sources, or the checkpoint of an earlier one."""

    sources: tuple[str, ...] = ()
    checkpoint: str | None = None
    model: dict[str, Any] = field(default_factory=dict)  # on top of the study's model
    training: dict[str, Any] = field(default_factory=dict)
    workers: int = 1
    max_failures: int = 2  # restarts from the last checkpoint

    def __post_init__(self) -> None:
        if bool(self.sources) == (self.checkpoint is not None):
            raise ValueError("needs either sources or checkpoint.")


@dataclass(frozen=True)
class Arm:
    """A treatment: what it changes in the study's run."""

    init: Literal["pretrained", "scratch"] = "scratch"
    recommender: Literal["mmm4rec", "popularity", "last_item"] = "mmm4rec"
    shuffle_features: bool = False  # deal the items' features out anew, by the trial's seed
    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    space: dict[str, Parameter | None] = field(default_factory=dict)  # over the study's space; null takes one away


@dataclass(frozen=True)
class Group:
    """Cells: each of these domains with each of these arms."""

    domains: tuple[str, ...]
    arms: tuple[str, ...]


@dataclass(frozen=True)
class Budget:
    """What each cell may use."""

    search_trials: int = 8
    epochs: int = 100
    grace_epochs: int = 2  # ASHA: the first rung; each next one is `reduction` times as far
    reduction: int = 3
    confirm_seeds: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.search_trials <= 10_000 or self.epochs < 1 or self.confirm_seeds < 1:
            raise ValueError("needs search_trials within 1..10000, epochs and confirm_seeds of at least 1.")
        if self.grace_epochs < 1 or self.reduction < 2:
            raise ValueError("needs grace_epochs of at least 1 and a reduction of at least 2.")

    def rungs(self) -> tuple[int, ...]:
        """The epochs at which a search trial may be pruned."""
        rungs, epoch = [], self.grace_epochs
        while epoch < self.epochs:
            rungs.append(epoch)
            epoch *= self.reduction
        return tuple(rungs)


@dataclass(frozen=True)
class Resources:
    """How many trials run at once, and what each takes."""

    concurrent: int = 2
    cpus: int = 1
    gpus: float = 0.0


@dataclass(frozen=True)
class Spec:
    """A study, as its file says it."""

    study: str
    domains: Domains
    arms: dict[str, Arm]
    cells: tuple[Group, ...]
    baseline: str | None = None  # an arm of the cells: tables/effects holds the others' differences from it
    mask_seen: bool = False
    seed: int = 0
    pretrain: Pretrain | None = None
    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    space: dict[str, Parameter] = field(default_factory=dict)
    budget: Budget = Budget()
    resources: Resources = Resources()

    def __post_init__(self) -> None:
        pairs = [(domain, arm) for group in self.cells for domain in group.domains for arm in group.arms]
        unknown = sorted({arm for _, arm in pairs} - set(self.arms))
        if unknown:
            raise ValueError(f"cells name the unknown arm {', '.join(unknown)}; arms: {', '.join(self.arms)}.")
        if len(set(pairs)) != len(pairs) or not pairs:
            raise ValueError("cells must name at least one domain × arm, and none twice.")
        compared = dict.fromkeys(arm for _, arm in pairs)
        if self.baseline is not None and self.baseline not in compared:
            raise ValueError(f"baseline is '{self.baseline}', which is no arm of the cells: {', '.join(compared)}.")
        if "epochs" in self.training:
            raise ValueError("training.epochs is the budget's: write budget.epochs.")
        if self.pretrain is None and any(self.arms[arm].init == "pretrained" for _, arm in pairs):
            raise ValueError("has pretrained arms and no `pretrain`.")
        if not self.study or Path(self.study).name != self.study:
            raise ValueError(f"study is '{self.study}'; it names a folder.")


def load_spec(name_or_path: str) -> Spec:
    """The spec in a file, or of that name among the specs that come with the package. Raises BadInput."""
    path = Path(name_or_path)
    if not path.is_file():
        path = SPECS / f"{name_or_path}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in SPECS.glob("*.yaml")))
        raise BadInput(f"no spec '{name_or_path}'.", remedy=f"Give the path of a YAML file, or one of these names: {known}.")
    return from_dict(Spec, load_yaml(path), source=str(path))


def on_domains(spec: Spec, names: Sequence[str]) -> Spec:
    """The spec's arms on other domains: every arm of its cells on each of these folders under --data.

    Raises BadInput where the spec pre-trains, for its sources would be gone, and where a name comes twice.
    """
    if spec.pretrain is not None and spec.pretrain.sources:
        rule = f"study '{spec.study}' pre-trains on {', '.join(spec.pretrain.sources)}, which --on takes away."
        raise BadInput(rule, remedy="Pre-train first, and name the best.safetensors in a spec's pretrain.checkpoint.")
    if odd := [name for name in names if not name.strip(".") or Path(name).name != name]:
        raise BadInput(f"--on names '{odd[0]}', which is no folder right under --data.", remedy="Give names, and their parent as --data.")
    arms = dict.fromkeys(arm for group in spec.cells for arm in group.arms)
    changes = {
        "study": "_".join([spec.study, *names]),
        "domains": {"prepare": {name: name for name in names}},
        "cells": [{"domains": list(names), "arms": list(arms)}],
    }
    return from_dict(Spec, {**to_dict(spec), **changes}, source=f"study {spec.study} on {', '.join(names)}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command on a study is told: --spec, --data, --out."""
    parser.add_argument("--spec", default="demo", help="a spec's name (among studies/specs) or the path of a YAML file; default: demo")
    parser.add_argument("--data", type=Path, help="holds the raw folders that the spec prepares")
    parser.add_argument("--out", type=Path, default=Path("results"), help="gets a folder of the study's name; default: results")
