"""What the searches saw: how much each parameter mattered, and where along it the good trials lie.

Cells of an arm are pooled, each trial's validation score over the best of its cell. Importance is fANOVA's (Hutter et al., 2014,
in Optuna, seeded): the share of the variance of these that a parameter explains. The marginals are their means in bins of
equally many trials. Pruned trials count with what they had reached; trials that had no epoch do not.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances

from studies.significance import SEED
from studies.table import Entry, Table
from studies.tracked import SearchTrial, TrackedCell

FEWEST = 4  # trials with different scores, below which nothing is said
BINS = 4


@dataclass(frozen=True)
class Point:
    """A trial along a parameter."""

    cell: str
    arm: str
    domain: str
    value: float | str  # of the parameter
    score: float
    share: float  # of the best score of its cell
    pruned: bool


def parameters(cells: Sequence[TrackedCell]) -> list[str]:
    return list(dict.fromkeys(name for cell in cells for name in cell.space))


def points(cells: Sequence[TrackedCell], parameter: str) -> list[Point]:
    """Every scored search trial that set the parameter, by cell and number."""
    found = []
    for cell in cells:
        for trial, share in shares(cell):
            if parameter in trial.config:
                value = parsed(cell.space[parameter], trial.config[parameter])
                found.append(Point(cell.name, cell.arm, cell.domain, value, trial.value, share, trial.pruned))
    return found


def shares(cell: TrackedCell) -> list[tuple[SearchTrial, float]]:
    """Each scored trial with its score over the best of the cell."""
    trials = scored(cell)
    best = max((trial.value for trial in trials), default=0.0)
    return [(trial, trial.value / best if best else 0.0) for trial in trials]


def scored(cell: TrackedCell) -> list[SearchTrial]:
    return [trial for trial in cell.searched if not math.isnan(trial.value)]


def parsed(dimension: Sequence[Any], text: str) -> float | str:
    """A parameter's value from its text: a choice as it is written, a number otherwise."""
    return text if dimension[3] is not None else float(text)


def importances(cells: Sequence[TrackedCell]) -> Mapping[str, float]:
    """The share of the variance that each parameter explains in cells of one space; empty where the searches say too little."""
    space = cells[0].space
    trials = [(trial, share) for cell in cells for trial, share in shares(cell) if set(trial.config) == set(space)]  # none conditional
    if len({share for _, share in trials}) < FEWEST or len(space) < 2:
        return {}
    distributions = {name: _distribution(dimension) for name, dimension in space.items()}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=SEED))
    for trial, share in trials:
        config = {name: parsed(space[name], text) for name, text in trial.config.items()}
        study.add_trial(optuna.create_trial(params=config, distributions=distributions, value=share))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of experimental parts, and of parameters that never varied
        told = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=SEED))
    return {name: float(value) for name, value in told.items()}


def _distribution(dimension: Sequence[Any]) -> BaseDistribution:
    low, high, log, choices = dimension
    return (
        CategoricalDistribution([str(choice) for choice in choices]) if choices is not None else FloatDistribution(low, high, log=bool(log))
    )


def sensitivity_table(cells: Sequence[TrackedCell]) -> Table:
    """Domain × arm × parameter: its importance for the arm, and where the domain's best trial was."""
    rows: list[tuple[Entry, ...]] = []
    by_arm: dict[tuple[str, str], list[TrackedCell]] = {}
    for cell in cells:
        if scored(cell):
            by_arm.setdefault((cell.arm, repr(cell.space)), []).append(cell)
    found = {key: importances(group) for key, group in by_arm.items()}
    for cell in cells:
        trials = scored(cell)
        if not trials:
            continue
        told, best = found[cell.arm, repr(cell.space)], max(trials, key=lambda trial: trial.value)
        for name in cell.space:
            share = f"{told[name]:.2f}" if name in told else "-"
            rows.append(
                (cell.domain, cell.arm, len(trials), name, share, _at(cell.space[name], best.config.get(name, "-")), f"{best.value:.4f}")
            )
    columns = ("domain", "arm", "search trials", "parameter", "importance for the arm", "best at", "best valid")
    return Table(
        columns, tuple(rows), f"Searched parameters; importance by fANOVA over the arm's domains, from {FEWEST} different scores on."
    )


def marginal_table(cells: Sequence[TrackedCell]) -> Table:
    """Parameter × arm × bin: trials, and their scores over the best of their cell."""
    rows: list[tuple[Entry, ...]] = []
    for name in parameters(cells):
        for arm in dict.fromkeys(cell.arm for cell in cells if name in cell.space):
            for label, part in bins(points([cell for cell in cells if cell.arm == arm], name)):
                shared = [point.share for point in part]
                spread = f"{stdev(shared):.3f}" if len(shared) > 1 else "-"
                rows.append((name, arm, label, len(part), f"{mean(shared):.3f}", spread))
    caption = "Marginals: validation scores of search trials over the best of their cell, by equally filled bins."
    return Table(("parameter", "arm", "range", "trials", "mean share of best", "sd"), tuple(rows), caption)


def bins(told: Sequence[Point]) -> list[tuple[str, list[Point]]]:
    """Points by choice, or in up to BINS bins of equally many, each with its range in words."""
    if all(isinstance(point.value, str) for point in told):
        choices = sorted({str(point.value) for point in told}, key=_natural)
        return [(choice, [point for point in told if point.value == choice]) for choice in choices]
    ordered = sorted(told, key=lambda point: (float(point.value), point.cell))
    parts = np.array_split(np.arange(len(ordered)), min(BINS, max(1, len(ordered) // 3)))
    grouped = [[ordered[place] for place in part] for part in parts]
    return [(f"{_short(str(part[0].value))} to {_short(str(part[-1].value))}", part) for part in grouped]


def _at(dimension: Sequence[Any], text: str) -> str:
    """A value in words: a choice as it is written, a number of a range with three digits."""
    return text if dimension[3] is not None else _short(text)


def _natural(text: str) -> tuple[int, float, str]:
    try:
        return 0, float(text), text
    except ValueError:
        return 1, 0.0, text


def _short(text: str) -> str:
    try:
        return f"{float(text):.3g}"
    except ValueError:
        return text
