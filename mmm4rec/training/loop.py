"""fit(): one epoch after another. It knows no orchestrator: the caller decides what a report is for.

Randomness is a function of (seed, epoch, micro-batch) for the order of the examples and of (seed, optimizer step,
worker) for dropout, never of a state: a resumed run draws what the uninterrupted one draws, in the middle of an epoch too.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Adam, NAdam, Optimizer

from mmm4rec.data.batches import DomainData
from mmm4rec.data.sampler import Sampler
from mmm4rec.models.quirks import NONE, Quirks
from mmm4rec.models.recommender import Recommender
from mmm4rec.training import distributed
from mmm4rec.training.evaluate import evaluate
from mmm4rec.training.metrics import METRIC_NAMES, mean_metrics, metrics
from mmm4rec.training.step import Chunk, Part, add_gradient, ahead, prepare


@dataclass(frozen=True)
class TrainingConfig:
    """How a run is trained; the defaults are the paper's fine-tuning.

    The published code sums the gradients of `accumulation` batches; here they are averaged over the
    examples, and the coupled weight decay is 1/8 of the published 5e-3, which keeps their balance.
    """

    # Cross-entropy over all items of the domain, the targets of the micro-batch, those of this worker's share of it, or a sample;
    # gbce: gSASRec's binary cross-entropy over a sample.
    loss: Literal["full", "in_batch", "in_batch_local", "sampled", "gbce"] = "full"
    epochs: int = 100
    batch_size: int = 1024
    accumulation: int = 8  # micro-batches an optimizer step
    optimizer: Literal["nadam", "adam"] = "nadam"
    learning_rate: float = 1e-4
    weight_decay: float = 6.25e-4
    precision: Literal["float32", "tf32", "bf16"] = "float32"  # of the matrix products of a training step; evaluation is float32
    patience: int = 10  # epochs without a better validation score before the run stops
    valid_metric: str = "ndcg@10"
    logq: bool = False  # with `in_batch`: a candidate counts for less the more often it is a target
    negatives: int = 8192  # with `sampled` and `gbce`: draws a micro-batch, with replacement
    calibration: float = 0.75  # with `gbce`: its t, from 0 (plain binary cross-entropy) to 1 (scores calibrated as over all items)
    negative_power: float = 0.0  # with `sampled` and `gbce`: how the chance of an item grows with its count as a target; 0: all alike
    report_untrained: bool = False  # an epoch-0 report before the first step
    sampling_power: float = 1.0  # over several domains, one of n examples weighs n ** it (1 / temperature): 1 proportional, 0 uniform
    mixed_batches: bool = False  # over several domains: examples of all of them in every micro-batch, rather than of one
    epoch_examples: int | None = None  # how many an epoch draws; None: as many as there are
    steps_between_reports: int = 0  # a report every so many optimizer steps; 0: of epochs alone
    divergence: float | None = None  # a step's mean loss above so many times the run's first one ends the run

    def __post_init__(self) -> None:
        lowests = {"epochs": 0, "batch_size": 1, "accumulation": 1, "learning_rate": 0, "weight_decay": 0, "patience": 1}
        lowests |= {"negatives": 1, "calibration": 0, "negative_power": 0, "sampling_power": 0, "steps_between_reports": 0, "divergence": 1}
        for name, lowest in {**lowests, "epoch_examples": 1}.items():
            if (value := getattr(self, name)) is not None and not value >= lowest:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {lowest}.")
        if self.calibration > 1:
            raise ValueError(f"calibration is {self.calibration}; it must be at most 1.")
        if self.valid_metric not in METRIC_NAMES:
            raise ValueError(f"valid_metric is '{self.valid_metric}'; it must be one of {', '.join(METRIC_NAMES)}.")


@dataclass(frozen=True)
class StepReport:
    """What the optimizer steps since the report before came to."""

    epoch: int
    optimizer_steps: int  # so far
    train_loss: float  # mean over the steps' examples
    domain_losses: dict[str, float]  # the same, of each domain that had examples
    gradient_norm: float  # of the last step
    learning_rate: float
    examples_per_second: float  # of all workers together; an example is one interaction that is predicted
    workers: int
    at_ms: int  # Unix time, milliseconds


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
    domain_losses: dict[str, float] = field(default_factory=dict)  # where there are several domains
    zero_shot: dict[str, float] = field(default_factory=dict)  # the validation metric on each domain that is not trained on


@dataclass(frozen=True)
class Sums:
    """Examples and their summed losses, by domain."""

    examples: tuple[int, ...]
    losses: tuple[float, ...]

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(tuple(map(sum, zip(*pair, strict=True))) for pair in ((self.examples, other.examples), (self.losses, other.losses))))

    @property
    def mean(self) -> float:
        return sum(self.losses) / sum(self.examples)

    def means(self, names: Sequence[str]) -> dict[str, float]:
        """Of the domains that had examples, by name."""
        told = zip(names, self.losses, self.examples, strict=True)
        return {name: loss / examples for name, loss, examples in told if examples}


@dataclass
class RunState:
    """Where a run stands; with the model's and the optimizer's it is all that a run needs to continue."""

    optimizer_steps: int = 0
    epoch_steps: int = 0  # of these in the epoch that is not over: the sampler's cursor
    epoch_seconds: float = 0.0  # spent on them
    epoch_sums: Sums | None = None  # of them
    first_loss: float | None = None  # the mean loss of the run's first step
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
    zero_shot: Sequence[DomainData] = ()  # domains that are validated and not trained on
    optimizer: Optimizer | None = None
    state: RunState = field(default_factory=RunState)
    on_step: Callable[[int, int], None] = lambda done, total: None  # progress inside an epoch, in micro-batches

    def __post_init__(self) -> None:
        if self.optimizer is None and any(True for _ in self.model.parameters()):
            learned = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            kind = NAdam if self.config.optimizer == "nadam" else Adam
            self.optimizer = kind(learned, lr=self.config.learning_rate, weight_decay=self.config.weight_decay)

    @cached_property
    def sampler(self) -> Sampler:
        told, examples = self.config, [data.train for data in self.data]
        return Sampler(examples, told.batch_size, self.seed, told.sampling_power, told.mixed_batches, told.epoch_examples)


class Diverged(FloatingPointError):
    """The loss or its gradient is not finite, or has grown beyond `divergence`; the weights are those before the step."""


def fit(run: Run) -> Generator[EpochReport | StepReport, None, None]:
    """Train from where run.state stands and yield a report after each epoch, until patience or epochs run out.

    With `steps_between_reports` a StepReport too: a run may be saved at any report, and goes on from there. The best weights
    (the latest of equals) are in run.state.best_weights. Raises Diverged, with what caused it.
    """
    state, config = run.state, run.config
    if not state.history and (config.report_untrained or config.epochs == 0):
        yield _close_epoch(run, epoch=0)
    while state.next_epoch <= config.epochs and state.next_epoch - 1 - state.best_epoch < config.patience:
        yield from _train_epoch(run, state.next_epoch)
        yield _close_epoch(run, epoch=state.next_epoch)


def _train_epoch(run: Run, epoch: int) -> Iterator[StepReport]:
    """What is left of one pass over the examples."""
    state, every, size = run.state, run.config.accumulation, len(run.sampler)
    first_step = state.optimizer_steps
    run.model.train()
    groups = [range(first, min(first + every, size)) for first in range(state.epoch_steps * every, size, every)]
    plans = ([run.sampler.plan(epoch, number) for number in group] for group in groups)
    prepared = (prepare(run, group, first_step + number) for number, group in enumerate(plans))
    since, started, reported = _no_sums(run), time.perf_counter(), time.perf_counter()
    for group, parts in zip(groups, ahead(prepared, run.device), strict=True):
        sums, norm = _optimizer_step(run, parts, f"epoch {epoch}, micro-batches {group.start}-{group.stop - 1}")
        since = since + sums
        state.epoch_sums = sums if state.epoch_sums is None else state.epoch_sums + sums
        state.epoch_steps += 1
        now = time.perf_counter()
        state.epoch_seconds, started = state.epoch_seconds + now - started, now
        run.on_step(group.stop, size)
        if run.config.steps_between_reports and state.optimizer_steps % run.config.steps_between_reports == 0:
            yield _step_report(run, epoch, since, norm, seconds=now - reported)
            since, started, reported = _no_sums(run), time.perf_counter(), time.perf_counter()


def _no_sums(run: Run) -> Sums:
    return Sums((0,) * len(run.data), (0.0,) * len(run.data))


def _names(run: Run) -> list[str]:
    return [data.domain.name for data in run.data]


def _step_report(run: Run, epoch: int, sums: Sums, norm: float, *, seconds: float) -> StepReport:
    assert run.optimizer is not None
    return StepReport(
        epoch=epoch,
        optimizer_steps=run.state.optimizer_steps,
        train_loss=sums.mean,
        domain_losses=sums.means(_names(run)),
        gradient_norm=norm,
        learning_rate=run.optimizer.param_groups[0]["lr"],
        examples_per_second=sum(sums.examples) / seconds,
        workers=distributed.world_size(),
        at_ms=time.time_ns() // 1_000_000,
    )


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


def _optimizer_step(run: Run, parts: Sequence[Part], where: str) -> tuple[Sums, float]:
    """One step on the mean gradient over the examples of all workers; returns their sums, and the gradient's norm."""
    assert run.optimizer is not None
    run.optimizer.zero_grad()
    with matmul_precision(run.config.precision, run.device):
        chunks = add_gradient(run, parts)
    own = np.zeros((2, len(run.data)))  # examples, losses
    for chunk, loss in chunks:
        own[:, chunk.domain] += len(chunk.batch), loss
    totals = distributed.sum_gradients(run.model.parameters(), own.ravel().tolist())
    sums = Sums(tuple(map(round, totals[: len(run.data)])), tuple(totals[len(run.data) :]))
    norm = float(get_total_norm([parameter.grad for parameter in run.model.parameters() if parameter.grad is not None]))
    if run.state.first_loss is None:
        run.state.first_loss = sums.mean
    too_high = np.inf if run.config.divergence is None else run.config.divergence * run.state.first_loss
    if not np.isfinite([sums.mean, norm]).all() or sums.mean > too_high:
        raise Diverged(
            f"training diverged: the mean loss is {sums.mean:.4g} (the first step's was {run.state.first_loss:.4g}), the gradient's norm"
            f" {norm:.4g}, at optimizer step {run.state.optimizer_steps + 1}, {where}; {_cause(run, parts, chunks)}"
        )
    run.optimizer.step()
    run.state.optimizer_steps += 1
    return sums, norm


def _cause(run: Run, parts: Sequence[Part], chunks: Sequence[tuple[Chunk, float]]) -> str:
    """Items whose vectors are not finite, or else the examples of the highest loss, of all workers."""
    found = [(-np.inf, "no examples")]
    for chunk, loss in chunks:
        mean, name, batch = loss / len(chunk.batch), run.data[chunk.domain].domain.name, chunk.batch
        pairs = ", ".join(f"{user}:{end}" for user, end in zip(batch.users[:5], batch.ends[:5], strict=True))
        text = f"worst in domain '{name}': {mean:.4g} over {len(batch)} examples (user:end {pairs}, ...)"
        found.append((mean if np.isfinite(mean) else sys.float_info.max, text))
    read = [(chunk.domain, chunk.ids) for chunk, _ in chunks]
    read += [pair for part in parts if part.candidates is not None for pair in part.candidates.items.items()]
    for domain, ids in read:
        with torch.no_grad():
            finite = run.model.items(run.data[domain].features, ids).candidates.isfinite().all(1)
        if not finite.all():
            items = ", ".join(map(str, ids[~finite][:5].tolist()))
            found.append((np.inf, f"domain '{run.data[domain].domain.name}' has items whose vectors are not finite: {items}, ..."))
    return max(pair for worker in distributed.gather(found) for pair in worker)[1]


def _close_epoch(run: Run, *, epoch: int) -> EpochReport:
    """Evaluate, keep the weights if they are the best, and put the report into the history."""
    started = time.perf_counter()
    valid = mean_metrics(_ranks(run, data) for data in run.data)
    zero_shot = {data.domain.name: metrics(_ranks(run, data))[run.config.valid_metric] for data in run.zero_shot}
    state, score, sums = run.state, valid[run.config.valid_metric], run.state.epoch_sums
    if score >= state.best_score:
        state.best_score, state.best_epoch = score, epoch
        state.best_weights = {name: value.detach().cpu().clone() for name, value in run.model.state_dict().items()}
    report = EpochReport(
        epoch=epoch,
        optimizer_steps=state.optimizer_steps,
        train_loss=None if sums is None else sums.mean,
        train_seconds=state.epoch_seconds,
        valid_seconds=time.perf_counter() - started,
        valid=valid,
        best_epoch=state.best_epoch,
        domain_losses={} if sums is None or len(run.data) == 1 else sums.means(_names(run)),
        zero_shot=zero_shot,
    )
    state.history.append(report)
    state.epoch_steps, state.epoch_seconds, state.epoch_sums = 0, 0.0, None
    return report


def _ranks(run: Run, data: DomainData) -> np.ndarray:
    users, ends = data.valid
    return evaluate(run.model, data, users, ends, run.device)
