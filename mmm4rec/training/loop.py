"""fit(): one epoch after another. It knows no orchestrator: the caller decides what a report is for.

Randomness is a function of (seed, epoch) for the order of the examples and of (seed, optimizer step,
worker) for dropout, never of a state: a resumed run draws what the uninterrupted one draws.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.optim import NAdam, Optimizer

from mmm4rec.data.batches import DomainData, plan_epoch
from mmm4rec.models.quirks import NONE, Quirks
from mmm4rec.models.recommender import Recommender
from mmm4rec.training import distributed
from mmm4rec.training.evaluate import evaluate
from mmm4rec.training.metrics import METRIC_NAMES, mean_metrics
from mmm4rec.training.step import Part, add_gradient, ahead, prepare


@dataclass(frozen=True)
class TrainingConfig:
    """How a run is trained; the defaults are the paper's fine-tuning.

    The published code sums the gradients of `accumulation` batches; here they are averaged over the
    examples, and the coupled weight decay is 1/8 of the published 5e-3, which keeps their balance.
    """

    loss: Literal["full", "in_batch", "sampled"] = "full"  # cross-entropy over all items, the batch's targets, or a sample of items
    epochs: int = 100
    batch_size: int = 1024
    accumulation: int = 8  # micro-batches an optimizer step
    learning_rate: float = 1e-4
    weight_decay: float = 6.25e-4
    precision: Literal["float32", "tf32", "bf16"] = "float32"  # of the matrix products of a training step; evaluation is float32
    patience: int = 10  # epochs without a better validation score before the run stops
    valid_metric: str = "ndcg@10"
    negatives: int = 8192  # with `sampled`: draws a micro-batch, with replacement
    negative_power: float = 0.0  # with `sampled`: how the chance of an item grows with its count as a target; 0: all alike
    report_untrained: bool = False  # an epoch-0 report before the first step

    def __post_init__(self) -> None:
        lowests = {"epochs": 0, "batch_size": 1, "accumulation": 1, "learning_rate": 0, "weight_decay": 0, "patience": 1}
        for name, lowest in {**lowests, "negatives": 1, "negative_power": 0}.items():
            if not getattr(self, name) >= lowest:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {lowest}.")
        if self.valid_metric not in METRIC_NAMES:
            raise ValueError(f"valid_metric is '{self.valid_metric}'; it must be one of {', '.join(METRIC_NAMES)}.")


@dataclass(frozen=True)
class EpochReport:
    """What an epoch came to. Epoch 0 is the model before its first step."""

    epoch: int
    optimizer_steps: int  # so far
    train_loss: float | None  # mean over the epoch's examples
    train_seconds: float
    valid_seconds: float
    valid: dict[str, float]  # mean over the domains
    best_epoch: int  # so far


@dataclass
class RunState:
    """Where a run stands; with the model's and the optimizer's it is all that a run needs to continue."""

    optimizer_steps: int = 0
    best_score: float = -np.inf
    best_epoch: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)  # on the CPU
    history: list[EpochReport] = field(default_factory=list)

    @property
    def next_epoch(self) -> int:
        return self.history[-1].epoch + 1 if self.history else 1


@dataclass
class Run:
    """What fit() needs."""

    model: Recommender
    data: Sequence[DomainData]  # one domain, or many in pre-training
    config: TrainingConfig
    seed: int
    device: torch.device
    quirks: Quirks = NONE
    optimizer: Optimizer | None = None
    state: RunState = field(default_factory=RunState)
    on_step: Callable[[int, int], None] = lambda done, total: None  # progress inside an epoch, in micro-batches

    def __post_init__(self) -> None:
        if self.optimizer is None and any(True for _ in self.model.parameters()):
            self.optimizer = NAdam(self.model.parameters(), lr=self.config.learning_rate, weight_decay=self.config.weight_decay)


def fit(run: Run) -> Generator[EpochReport, None, None]:
    """Train from where run.state stands and yield a report after each epoch, until patience or epochs run out.

    The best weights (the latest of equals) are in run.state.best_weights. Raises FloatingPointError when
    the loss is not finite.
    """
    state, config = run.state, run.config
    if not state.history and (config.report_untrained or config.epochs == 0):
        yield _close_epoch(run, epoch=0, loss=None, train_seconds=0.0)
    while state.next_epoch <= config.epochs and state.next_epoch - 1 - state.best_epoch < config.patience:
        epoch, started = state.next_epoch, time.perf_counter()
        loss = _train_epoch(run, epoch)
        yield _close_epoch(run, epoch=epoch, loss=loss, train_seconds=time.perf_counter() - started)


def _train_epoch(run: Run, epoch: int) -> float:
    """One pass over the examples; returns the mean loss."""
    plans = plan_epoch([data.train for data in run.data], run.config.batch_size, seed=run.seed, epoch=epoch)
    run.model.train()
    total_loss, done, first_step = 0.0, 0, run.state.optimizer_steps
    groups = [plans[first : first + run.config.accumulation] for first in range(0, len(plans), run.config.accumulation)]
    prepared = (prepare(run, group, first_step + number) for number, group in enumerate(groups))
    for group, parts in zip(groups, ahead(prepared, run.device), strict=True):
        total_loss += _optimizer_step(run, parts)
        if not np.isfinite(total_loss):
            raise FloatingPointError(f"the loss is {total_loss} in epoch {epoch}, optimizer step {run.state.optimizer_steps}")
        run.on_step(done := done + len(group), len(plans))
    return total_loss / sum(len(plan.users) for plan in plans)


@contextmanager
def matmul_precision(precision: str, device: torch.device) -> Iterator[None]:
    """Matrix products in TF32, or the encoder's in bfloat16 and the loss's in TF32; sums, norms and weights stay float32.

    TF32 is a GPU's; a CPU computes float32 instead.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _optimizer_step(run: Run, parts: Sequence[Part]) -> float:
    """One step on the mean gradient over the examples of all workers; returns their summed loss."""
    assert run.optimizer is not None
    run.optimizer.zero_grad()
    with matmul_precision(run.config.precision, run.device):
        loss = add_gradient(run, parts)
    distributed.sum_gradients(run.model.parameters())
    run.optimizer.step()
    run.state.optimizer_steps += 1
    return distributed.sum_number(loss)


def _close_epoch(run: Run, *, epoch: int, loss: float | None, train_seconds: float) -> EpochReport:
    """Evaluate, keep the weights if they are the best, and put the report into the history."""
    started = time.perf_counter()
    valid = mean_metrics(evaluate(run.model, data, *data.valid, run.device) for data in run.data)
    state, score = run.state, valid[run.config.valid_metric]
    if score >= state.best_score:
        state.best_score, state.best_epoch = score, epoch
        state.best_weights = {name: value.detach().cpu().clone() for name, value in run.model.state_dict().items()}
    report = EpochReport(
        epoch=epoch,
        optimizer_steps=state.optimizer_steps,
        train_loss=loss,
        train_seconds=train_seconds,
        valid_seconds=time.perf_counter() - started,
        valid=valid,
        best_epoch=state.best_epoch,
    )
    state.history.append(report)
    return report
