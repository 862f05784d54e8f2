"""What a study will cost: trials, epochs, hours, bytes. Free of Ray.

`expected_cost` only counts. Time and bytes come in by what one cell's run weighs, which `weigh` finds out on a prepared
domain (the number of its parameters) and `measure` with it (the seconds of an epoch, from one optimizer step).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from mmm4rec.config import from_dict, merge
from mmm4rec.data.sampler import Plan
from mmm4rec.models.kinds import KINDS, anywhere
from mmm4rec.run import RunConfig, assemble
from mmm4rec.training.evaluate import evaluate
from mmm4rec.training.loop import Run, TrainingConfig, matmul_precision
from mmm4rec.training.step import add_gradient, prepare
from studies.cells import Cell, nested
from studies.space import Parameter, Value, walk
from studies.spec import Budget, Spec

PARAMETER_BYTES = 4  # float32
BEST = 1  # best.safetensors, which stays, holds the parameters once;
LAST = 4  # last.ckpt, which goes when the trial has ended, four times: weights, NAdam's two moments, the best weights
RANKED_USERS = 2_048  # of the validation users, whose ranking is timed


@dataclass(frozen=True)
class Weight:
    """What a cell's run weighs, at the middle of its search space."""

    parameters: int
    epoch_seconds: float | None = None  # training and validation, on the device that measured; None: not measured


@dataclass(frozen=True)
class CellCost:
    """A cell's share."""

    cell: str
    search_trials: int
    confirm_trials: int
    epochs_at_most: int
    epochs_expected: float
    weight: Weight | None

    def seconds(self, epochs: float) -> float | None:
        """Of one trial after another; None where nothing was measured."""
        if not epochs:
            return 0.0
        return None if self.weight is None or self.weight.epoch_seconds is None else epochs * self.weight.epoch_seconds

    @property
    def disk_bytes(self) -> int | None:
        """When all its trials have ended: each leaves its best.safetensors."""
        trials = self.search_trials + self.confirm_trials
        return None if self.weight is None else trials * BEST * PARAMETER_BYTES * self.weight.parameters


@dataclass(frozen=True)
class Cost:
    """What a study costs, from its begin to its end. Pre-training is told apart."""

    cells: tuple[CellCost, ...]
    concurrent: int
    gpus: float  # of a trial
    pretrain_epochs: int  # at most
    disk_limit_bytes: int | None  # what the spec allows trials' files

    @property
    def epochs_at_most(self) -> int:
        return sum(cell.epochs_at_most for cell in self.cells)

    @property
    def epochs_expected(self) -> float:
        return sum(cell.epochs_expected for cell in self.cells)

    @property
    def hours_at_most(self) -> float | None:
        """By the clock, with every place taken until the end; None where a cell was not measured."""
        return self._hours([cell.seconds(cell.epochs_at_most) for cell in self.cells])

    @property
    def hours_expected(self) -> float | None:
        return self._hours([cell.seconds(cell.epochs_expected) for cell in self.cells])

    @property
    def disk_bytes(self) -> int | None:
        """At most, with a last.ckpt and its successor in every running trial; None where a cell's weight is not known."""
        known = [(cell.disk_bytes, cell.weight.parameters) for cell in self.cells if cell.weight and cell.disk_bytes is not None]
        if len(known) < len(self.cells):
            return None
        written = self.concurrent * 2 * LAST * PARAMETER_BYTES * max(parameters for _, parameters in known)
        total = sum(size for size, _ in known) + written
        return total if self.disk_limit_bytes is None else min(total, self.disk_limit_bytes + written)

    def _hours(self, seconds: Sequence[float | None]) -> float | None:
        known = [value for value in seconds if value is not None]
        return sum(known) / 3600 / self.concurrent if len(known) == len(seconds) else None


def expected_cost(spec: Spec, cells: Sequence[Cell], weights: Mapping[str, Weight] | None = None) -> Cost:
    """What the study costs. Args: weights: what is known of the cells' runs, by the cell's name."""
    return Cost(
        cells=tuple(_cell_cost(spec.budget, cell, (weights or {}).get(cell.name)) for cell in cells),
        concurrent=spec.resources.concurrent,
        gpus=spec.resources.gpus,
        pretrain_epochs=int(spec.pretrain.training.get("epochs", TrainingConfig.epochs)) if spec.pretrain and spec.pretrain.sources else 0,
        disk_limit_bytes=None if spec.resources.disk_gb is None else int(spec.resources.disk_gb * 10**9),
    )


def _cell_cost(budget: Budget, cell: Cell, weight: Weight | None) -> CellCost:
    trained = KINDS[cell.run["recommender"]].trained
    confirm_epochs = cell.confirm_seeds * budget.epochs if trained else 0
    return CellCost(
        cell=cell.name,
        search_trials=cell.search_trials,
        confirm_trials=cell.confirm_seeds,
        epochs_at_most=cell.search_trials * budget.epochs + confirm_epochs if trained else 0,
        epochs_expected=expected_search_epochs(cell.search_trials, budget) + confirm_epochs if trained else 0.0,
        weight=weight if trained else Weight(0),
    )


def expected_search_epochs(trials: int, budget: Budget) -> float:
    """The epochs of a cell's search under asynchronous successive halving, if what a rung says tells nothing of the next one.

    Patience can only make them fewer.
    """
    epochs, left, before = 0.0, float(trials), 0
    for rung in budget.rungs():
        epochs += left * (rung - before)
        left, before = expected_survivors(left, budget.reduction), rung
    return epochs + left * (budget.epochs - before)


def expected_survivors(arrivals: float, reduction: int) -> float:
    """How many of the trials that come to a rung, one after another and in no order of merit, go on.

    The n-th stays when it is among the best max(1, n // reduction) of the n that have come (`plan.survives`), which is as
    likely as any other place. A fraction of an arrival counts for as much of the next one.
    """
    whole = math.floor(arrivals)
    chances = [max(1, place // reduction) / place for place in range(1, whole + 2)]
    return sum(chances[:whole]) + (arrivals - whole) * chances[whole]


def cost_lines(cost: Cost) -> list[str]:
    """The cost in words."""
    search, confirm = (sum(getattr(cell, name) for cell in cost.cells) for name in ("search_trials", "confirm_trials"))
    lines = [
        f"{len(cost.cells)} cells, {search:,} search and {confirm:,} confirm trials;"
        f" about {cost.epochs_expected:,.0f} epochs, at most {cost.epochs_at_most:,}"
    ]
    if cost.pretrain_epochs:
        lines.append(f"before them pre-training of at most {cost.pretrain_epochs:,} epochs, which is in none of these figures")
    if cost.hours_expected is not None and cost.hours_at_most is not None:
        by_the_clock = f"about {_hours(cost.hours_expected)}, at most {_hours(cost.hours_at_most)}, with {cost.concurrent} trials at once"
        gpu_hours = f"; about {_hours(cost.hours_expected * cost.concurrent * cost.gpus)} of a GPU" if cost.gpus else ""
        lines.append(by_the_clock + gpu_hours)
    if cost.disk_bytes is not None:
        lines.append(f"trials' files: at most {cost.disk_bytes / 1e9:,.2f} GB")
    return lines


def _hours(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:,.1f} minutes"


def typical_run(cell: Cell) -> RunConfig:
    """What a trial of the cell runs at the middle of its search space, from scratch. The cell's domain must be prepared."""
    told = {"data": {"domains": [cell.source.path]}}
    config = nested(walk(cell.space, lambda _, parameter: _middle(parameter)))
    return from_dict(RunConfig, merge(merge(cell.run, config), told), source=f"cell {cell.name}")


def _middle(parameter: Parameter) -> Value:
    if parameter.choices is not None:
        return parameter.choices[len(parameter.choices) // 2]
    low, high = parameter.ends()
    middle = math.sqrt(low * high) if parameter.log else (low + high) / 2
    return round(middle) if parameter.integer else middle


def weigh(config: RunConfig) -> Weight:
    """Assemble the run, on the CPU, and count its parameters.

    Raises BadInput where domain, features and config do not fit together.
    """
    run = assemble(replace(config, device="cpu", model=anywhere(config.model))).run
    return Weight(_parameters(run))


def measure(config: RunConfig, *, threads: int) -> Weight:
    """As `weigh`, with the seconds of an epoch, on the run's own device: one optimizer step to warm up, and a second one timed."""
    torch.set_num_threads(threads)
    run = assemble(config).run
    return Weight(_parameters(run), _epoch_seconds(run) if run.config.epochs else 0.0)


def _parameters(run: Run) -> int:
    return sum(part.numel() for part in run.model.parameters())


def _epoch_seconds(run: Run) -> float:
    """Seconds of training and validation: of one step and of some users, scaled up."""
    sampler = run.sampler
    group = [sampler.plan(1, number) for number in range(min(run.config.accumulation, len(sampler)))]
    run.model.train()
    _timed(run, lambda: _take_step(run, group))
    step_seconds = _timed(run, lambda: _take_step(run, group))
    (data,) = run.data
    users, ends = data.valid.at(np.arange(min(RANKED_USERS, len(data.valid))))
    rank_seconds = _timed(run, lambda: evaluate(run.model, data, users, ends, run.device))
    return step_seconds * sum(sampler.taken) / sum(map(len, group)) + rank_seconds * len(data.valid) / len(users)


def _take_step(run: Run, group: Sequence[Plan]) -> None:
    assert run.optimizer is not None
    run.optimizer.zero_grad()
    with matmul_precision(run.config.precision, run.device):
        add_gradient(run, prepare(run, group, run.state.optimizer_steps))
    run.optimizer.step()


def _timed(run: Run, work: Callable[[], object]) -> float:
    """Seconds of one call, until the device is done."""
    started = time.perf_counter()
    work()
    if run.device.type == "cuda":
        torch.cuda.synchronize(run.device)
    return time.perf_counter() - started
