"""What the searches saw: how much each parameter mattered, and where along it the good trials lie.

Importance is fANOVA's (Hutter et al., 2014, in Optuna, seeded): the share of a cell's variance of validation scores that a
parameter explains. The marginals pool cells: each trial's score over the best of its cell, in bins of equally many trials.
Pruned trials count with what they had reached; trials that had no epoch do not.
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
        trials = scored(cell)
        best = max((trial.value for trial in trials), default=0.0)
        for trial in trials:
            if parameter in trial.config:
                value = parsed(cell.space[parameter], trial.config[parameter])
                share = trial.value / best if best else 0.0
                found.append(Point(cell.name, cell.arm, cell.domain, value, trial.value, share, trial.pruned))
    return found


def scored(cell: TrackedCell) -> list[SearchTrial]:
    return [trial for trial in cell.searched if not math.isnan(trial.value)]


def parsed(dimension: Sequence[Any], text: str) -> float | str:
    """A parameter's value from its text: a choice as it is written, a number otherwise."""
    return text if dimension[3] is not None else float(text)


def importances(cell: TrackedCell) -> Mapping[str, float]:
    """The share of the variance that each parameter explains; empty where the search says too little."""
    trials = [trial for trial in scored(cell) if set(trial.config) == set(cell.space)]  # conditional ones are left out
    if len({trial.value for trial in trials}) < FEWEST or len(cell.space) < 2:
        return {}
    distributions = {name: _distribution(dimension) for name, dimension in cell.space.items()}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=SEED))
    for trial in trials:
        config = {name: parsed(cell.space[name], text) for name, text in trial.config.items()}
        study.add_trial(optuna.create_trial(params=config, distributions=distributions, value=trial.value))
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
    """Domain × arm × parameter: its importance, and the value of the best trial."""
    rows: list[tuple[Entry, ...]] = []
    for cell in cells:
        trials = scored(cell)
        if not trials:
            continue
        told, best = importances(cell), max(trials, key=lambda trial: trial.value)
        for name in cell.space:
            share = f"{told[name]:.2f}" if name in told else "-"
            rows.append((cell.domain, cell.arm, len(trials), name, share, _short(best.config.get(name, "-")), f"{best.value:.4f}"))
    columns = ("domain", "arm", "search trials", "parameter", "importance", "best at", "best valid")
    return Table(columns, tuple(rows), f"Searched parameters; importance by fANOVA, from {FEWEST} different scores on.")


def marginal_table(cells: Sequence[TrackedCell]) -> Table:
    """Parameter × arm × bin: trials, and their scores over the best of their cell."""
    rows: list[tuple[Entry, ...]] = []
    for name in parameters(cells):
        for arm in dict.fromkeys(cell.arm for cell in cells if name in cell.space):
            for label, part in bins(points([cell for cell in cells if cell.arm == arm], name)):
                shares = [point.share for point in part]
                spread = f"{stdev(shares):.3f}" if len(shares) > 1 else "-"
                rows.append((name, arm, label, len(part), f"{mean(shares):.3f}", spread))
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
