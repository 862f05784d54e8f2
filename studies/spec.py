"""A study's spec: the dataclasses of its YAML file.

    study: demo                     # the name of the folder under --out
    domains: {demo: true}           # or {demo: {targets: [attic], sizes: {attic: [users, items]}}}, generated shops of your own;
                                    # or {prepare: {name: folder under --data}, text_encoder: {...}}
    pretrain: {sources: [...], training: {...}, workers: 2}     # or {checkpoint: path}; recommender: unisrec for another model
    model: {width: 64}              # what every run starts from, pre-training too
    training: {batch_size: 256}     # what every cell starts from
    space: {training.learning_rate: {low: 1e-4, high: 1e-2, log: true}}      # or choices; integer; when: {other: [value]}
    metric: ndcg@10                 # of validation: what is searched, pruned and chosen by
    arms: {pretrained: {init: pretrained}, text_only: {init: pretrained, model: {modalities: text}}, sasrec: {recommender: sasrec}}
    cells: [{domains: [...], arms: [...]}]
    baseline: scratch               # the arm that every other one is compared with, user by user (optional)
    mask_seen: false                # true: what a user has had is left out of the ranking, in every run
    budget: {search_trials: 6, epochs: 20, confirm_seeds: 3, gpu_hours: 4}    # of every cell
    warm_start_from: {domains: [...]}        # or {studies: [folder]}: begin a search at the best configs found elsewhere
    resources: {concurrent: 2, cpus: 1, gpus: 0.5, retries: 2, disk_gb: 100}
    stores: {storage: s3://bucket/studies, optuna: "postgresql://me:${PGPASSWORD}@db/optuna", mlflow: http://tracking:5000}

An arm is never a dimension of the search: every cell is searched alone. Of the study's `model` and `space` a recommender takes what
its own config knows (mmm4rec/models/kinds.py); what an arm itself says must fit.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmm4rec.config import from_dict, load_yaml, to_dict
from mmm4rec.data.demo import DemoConfig
from mmm4rec.errors import BadInput
from mmm4rec.models.kinds import KINDS, Name, known_fields
from mmm4rec.training.metrics import METRIC_NAMES
from studies.space import Parameter

SPECS = Path(__file__).parent / "specs"


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

    demo: bool | DemoConfig = False  # generated shops: the demo's own (true), or others
    prepare: dict[str, str] = field(default_factory=dict)  # name: folder under --data
    text_encoder: TextEncoder | None = None

    def __post_init__(self) -> None:
        if not self.demo and not self.prepare:
            raise ValueError("needs `demo: true` or `prepare`.")

    def shops(self) -> DemoConfig | None:
        """The generated shops; None where there are none."""
        return self.demo if isinstance(self.demo, DemoConfig) else DemoConfig() if self.demo else None


@dataclass(frozen=True)
class Pretrain:
    """One pre-training on all sources, or the checkpoint of an earlier one."""

    sources: tuple[str, ...] = ()
    checkpoint: str | None = None
    recommender: Name = "mmm4rec"  # what is pre-trained, and what the pretrained arms are
    model: dict[str, Any] = field(default_factory=dict)  # on top of the study's model
    training: dict[str, Any] = field(default_factory=dict)
    zero_shot: bool = True  # rank the validation examples of the cells' domains after every epoch
    workers: int = 1
    min_workers: int | None = None  # go on with as few where machines are lost, and grow back; None: only with all
    max_failures: int = 8  # restarts from the newest checkpoint
    checkpoint_every_steps: int | None = 100
    checkpoint_every_seconds: float | None = None  # where both are given: whichever is due
    keep_checkpoints: int = 3

    def __post_init__(self) -> None:
        if self.workers < 1 or not 1 <= (self.min_workers or 1) <= self.workers:
            raise ValueError(
                f"workers is {self.workers} and min_workers {self.min_workers}; they must be at least 1, and min_workers no more."
            )
        if not KINDS[self.recommender].trained:
            raise ValueError(f"has recommender {self.recommender}, which is not trained.")
        if self.keep_checkpoints < 1:
            raise ValueError(f"keep_checkpoints is {self.keep_checkpoints}; it must be at least 1.")
        if bool(self.sources) == (self.checkpoint is not None):
            raise ValueError("needs either sources or checkpoint.")


@dataclass(frozen=True)
class Arm:
    """A treatment: what it changes in the study's run."""

    init: Literal["pretrained", "scratch"] = "scratch"
    recommender: Name = "mmm4rec"
    zero_shot: bool = False  # the pre-trained model as it is: not trained on the domain, without ids
    shuffle_features: bool = False  # deal the items' features out anew, by the trial's seed
    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    space: dict[str, Parameter | None] = field(default_factory=dict)  # over the study's space; null takes one away

    def __post_init__(self) -> None:
        if self.zero_shot and self.init != "pretrained":
            raise ValueError("zero_shot needs init: pretrained.")
        if self.zero_shot and "ids" not in known_fields(self.recommender):
            raise ValueError(f"zero_shot needs a model that can be without item ids, and {self.recommender} cannot.")


@dataclass(frozen=True)
class Group:
    """Cells: each of these domains with each of these arms."""

    domains: tuple[str, ...]
    arms: tuple[str, ...]


@dataclass(frozen=True)
class Budget:
    """What each cell may use: the same for every arm."""

    search_trials: int = 8
    epochs: int = 100
    grace_epochs: int = 2  # ASHA: the first rung; each next one is `reduction` times as far
    reduction: int = 3
    confirm_seeds: int = 3
    gpu_hours: float | None = None  # when its search has used so many, no new search trial begins in the cell

    def __post_init__(self) -> None:
        if self.gpu_hours is not None and self.gpu_hours <= 0:
            raise ValueError(f"has gpu_hours {self.gpu_hours}; it must be above 0, or null for no limit.")
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
class WarmStart:
    """Where searches begin: at the best configs of the same arm, in domains of this study before in the order, or in finished studies."""

    domains: tuple[str, ...] = ()  # their order: a cell waits for the searches of its arm in the domains before it
    studies: tuple[str, ...] = ()  # folders of finished studies

    def __post_init__(self) -> None:
        if bool(self.domains) == bool(self.studies):
            raise ValueError("needs either domains or studies.")
        if len(set(self.domains)) != len(self.domains):
            raise ValueError("names a domain twice.")


@dataclass(frozen=True)
class Resources:
    """How many trials run at once, what each takes, and what a failure may cost."""

    concurrent: int = 2
    cpus: int = 1
    gpus: float = 0.0
    retries: int = 2  # of a trial that raised an error; an epoch finished in between starts the count anew
    lost_retries: int = 10  # the same for one whose process or machine was lost
    disk_gb: float | None = None  # for trials' files: above it, weights of search trials go, worst first; null: no limit

    def __post_init__(self) -> None:
        if self.concurrent < 1 or self.cpus < 1 or self.gpus < 0 or min(self.retries, self.lost_retries) < 0:
            raise ValueError("needs concurrent and cpus of at least 1, gpus, retries and lost_retries of at least 0.")
        if self.gpus > 1 and not float(self.gpus).is_integer():
            raise ValueError(f"has gpus {self.gpus}; above 1 it must be a whole number.")
        if self.disk_gb is not None and self.disk_gb <= 0:
            raise ValueError(f"has disk_gb {self.disk_gb}; it must be above 0, or null for no limit.")


@dataclass(frozen=True)
class Stores:
    """Where a study's facts go, if not into its folder. ${NAME} stands for an environment variable: no secret belongs into a file."""

    storage: str | None = None  # a folder or s3://, gs:// that every node reaches: trials' files, domains, snapshots
    optuna: str | None = None  # postgresql://... of Optuna's storage
    mlflow: str | None = None  # http://... or postgresql://... of MLflow

    def filled(self) -> Stores:
        """With the environment's values in the place of ${NAME}. Raises BadInput where one is missing."""
        return Stores(*(None if text is None else re.sub(r"\$\{(\w+)\}", _variable, text) for text in vars(self).values()))


def _variable(found: re.Match[str]) -> str:
    if found[1] not in os.environ:
        raise BadInput(f"stores name the environment variable {found[1]}, which is not set.", remedy=f"export {found[1]}=...")
    return os.environ[found[1]]


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
    metric: str = "ndcg@10"
    warm_start_from: WarmStart | None = None
    budget: Budget = Budget()
    resources: Resources = Resources()
    stores: Stores = Stores()

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
        if "valid_metric" in self.training:
            raise ValueError("training.valid_metric is the study's: write metric.")
        if self.metric not in METRIC_NAMES:
            raise ValueError(f"metric is '{self.metric}'; it must be one of {', '.join(METRIC_NAMES)}.")
        if self.budget.gpu_hours is not None and not self.resources.gpus:
            raise ValueError("budget.gpu_hours limits trials on GPUs, and resources.gpus is 0.")
        if self.pretrain is None and any(self.arms[arm].init == "pretrained" for _, arm in pairs):
            raise ValueError("has pretrained arms and no `pretrain`.")
        kinds: set[Name] = {arm.recommender for arm in self.arms.values()}
        kinds |= {self.pretrain.recommender} if self.pretrain else set()
        for key in [*self.model, *(name.split(".")[1] for name in self.space if name.startswith("model."))]:
            if not any(key in known_fields(kind) for kind in kinds):
                raise ValueError(f"sets or searches model.{key}, which none of its recommenders knows: {', '.join(sorted(kinds))}.")
        odd = {arm for _, arm in pairs if self.arms[arm].init == "pretrained" and self.arms[arm].recommender != self.pretrained_kind}
        if odd:
            raise ValueError(f"arm '{min(odd)}' is {self.arms[min(odd)].recommender}, and {self.pretrained_kind} is pre-trained.")
        if not self.study or Path(self.study).name != self.study:
            raise ValueError(f"study is '{self.study}'; it names a folder.")

    @property
    def pretrained_kind(self) -> Name | None:
        """The recommender that is pre-trained; None where none is."""
        return None if self.pretrain is None else self.pretrain.recommender


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


def extended(spec: Spec, additions: Sequence[Mapping[str, Any]]) -> Spec:
    """The spec with what joined the living study: each addition names `domains` and `arms` (name: definition).

    A new domain gets every arm of the study, a new arm every domain. Raises BadInput where one is there already, or wrong.
    """
    told = to_dict(spec)
    for addition in additions:
        domains = list(dict.fromkeys(domain for group in told["cells"] for domain in group["domains"]))
        arms = list(dict.fromkeys(arm for group in told["cells"] for arm in group["arms"]))
        new_domains, new_arms = addition.get("domains", []), addition.get("arms", {})
        if twice := [name for name in (*new_domains, *new_arms) if name in (*domains, *told["arms"])]:
            raise BadInput(f"study '{spec.study}' has '{twice[0]}' already.", remedy="Give another name.")
        groups = [{"domains": new_domains, "arms": [*arms, *new_arms]}, {"domains": domains, "arms": list(new_arms)}]
        told["arms"] |= new_arms
        told["cells"] = [*told["cells"], *(group for group in groups if group["domains"] and group["arms"])]
        prepared = {name: name for name in new_domains if not spec.domains.demo or name not in addition.get("demo", [])}
        told["domains"]["prepare"] = {**told["domains"]["prepare"], **prepared}
    return from_dict(Spec, told, source=f"study {spec.study}, extended")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command on a study is told: --spec, --data, --out, --on; `told_spec` reads it."""
    parser.add_argument("--spec", default="demo", help="a spec's name (among studies/specs) or the path of a YAML file; default: demo")
    parser.add_argument("--data", type=Path, help="holds the raw folders that the spec prepares")
    parser.add_argument("--out", type=Path, default=Path("results"), help="gets a folder of the study's name; default: results")
    parser.add_argument(
        "--on", nargs="+", metavar="NAME", help="run the spec's arms on these folders under --data instead: raw ones, or prepared domains"
    )


def told_spec(told: argparse.Namespace) -> Spec:
    """The spec that a command line names. Raises BadInput as `load_spec` and `on_domains` do."""
    spec = load_spec(told.spec)
    return on_domains(spec, told.on) if told.on else spec
