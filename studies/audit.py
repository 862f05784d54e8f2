"""The convergence audit: what a quality costs, in epochs, optimizer steps, seconds and GPU hours, patience counted in.

A quality is a validation score: 90, 95 or 99 % of a run's own best, the best itself, or one that is the same for all arms of
a domain (fixed): FIXED_SHARE of what the arm named as baseline, or the scratch control, reaches in the mean. "To the end" is the whole run:
whoever stops early has waited `patience` epochs for nothing, and must count them. A run that its epoch cap ended, not its
patience, is censored: its best epoch may be no more than where it was cut off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from studies.effects import by_domain
from studies.table import Entry, Sample, Table
from studies.tracked import TrackedCell, TrackedTrial
from studies.transfer import arrival

OWN_SHARES = (0.9, 0.95, 0.99, 1.0)
FIXED_SHARE = 0.95
SECONDS_AN_HOUR = 3600


@dataclass(frozen=True)
class Cost:
    """What a run had used when it came to a quality."""

    epochs: int
    steps: int
    seconds: float


def cost_until(trial: TrackedTrial, value: float) -> Cost | None:
    """What the run had used when its validation score first was no lower than `value`; None: it never was."""
    place = arrival(trial, value)
    return None if place is None else _cost_at(trial, place)


def cost_to_end(trial: TrackedTrial) -> Cost:
    return _cost_at(trial, len(trial.curve) - 1)


def cost_to_best(trial: TrackedTrial) -> Cost:
    return _cost_at(trial, trial.epochs.index(trial.best_epoch))


def _cost_at(trial: TrackedTrial, place: int) -> Cost:
    return Cost(trial.epochs[place], trial.curve[place][0], trial.seconds[place])


def is_censored(trial: TrackedTrial, cell: TrackedCell) -> bool:
    """Whether the epoch cap ended the run before its patience did."""
    patience = cell.patience
    return trial.epochs[-1] >= cell.epochs and (patience is None or trial.epochs[-1] - trial.best_epoch < patience)


def any_censored(cell: TrackedCell) -> bool:
    return any(is_censored(trial, cell) for trial in cell.trials)


def trained(cells: Sequence[TrackedCell]) -> list[TrackedCell]:
    return [cell for cell in cells if cell.trains and cell.trials and all(trial.epochs for trial in cell.trials)]


def fixed_quality(here: Sequence[TrackedCell]) -> tuple[float, str] | None:
    """A mean best score of the domain, and whose it is: the baseline's, else the first scratch arm's, else the lowest arm's."""
    told = trained(here)
    if not told:
        return None
    base = next((cell for cell in told if cell.arm == cell.baseline), None) or next((cell for cell in told if cell.init == "scratch"), None)
    base = base or min(told, key=lambda cell: mean(trial.best_valid for trial in cell.trials))
    return mean(trial.best_valid for trial in base.trials), base.arm


def gpu_hours(cell: TrackedCell, costs: Sequence[Cost]) -> tuple[float, ...]:
    """GPU hours of costs, at as many GPUs as the ledger says; none where it says none."""
    hours, seconds = (cell.ledger.get(name, 0.0) for name in ("gpu_hours", "seconds"))
    if not hours or not seconds:
        return ()
    gpus = hours * SECONDS_AN_HOUR / seconds
    return tuple(cost.seconds * gpus / SECONDS_AN_HOUR for cost in costs)


def convergence_table(cells: Sequence[TrackedCell]) -> Table:
    """Domain × arm: to the best epoch, to the end, how many runs are censored, and the best epoch's cost over the reference arm's."""
    columns = (
        *("domain", "arm", "seeds", "epochs to best", "steps to best", "seconds to best"),
        *("epochs to end", "seconds to end", "GPU hours to end", "censored", "times the reference's steps", "reference"),
    )
    rows: list[tuple[Entry, ...]] = []
    for here in by_domain(cells):
        told = trained(here)
        fixed = fixed_quality(here)
        if fixed is None:
            continue
        reference = next(cell for cell in told if cell.arm == fixed[1])
        level = mean(cost_to_best(trial).steps for trial in reference.trials)
        for cell in told:
            best, end = [cost_to_best(trial) for trial in cell.trials], [cost_to_end(trial) for trial in cell.trials]
            cut, bound = sum(is_censored(trial, cell) for trial in cell.trials), any_censored(cell)
            times = f"{mean(cost.steps for cost in best) / level:.2f}" if level else "-"
            if bound or any_censored(reference):  # a bound over a number, a number over a bound, or nothing
                times = {(True, False): f"≥ {times}", (False, True): f"≤ {times}"}.get((bound, any_censored(reference)), "-")
                times = "1.00" if cell is reference else times
            rows.append(
                (
                    cell.domain,
                    cell.arm,
                    len(cell.trials),
                    Sample(tuple(cost.epochs for cost in best), digits=1, at_least=bound),
                    Sample(tuple(cost.steps for cost in best), digits=0, at_least=bound),
                    Sample(tuple(cost.seconds for cost in best), digits=1, at_least=bound),
                    Sample(tuple(cost.epochs for cost in end), digits=1, at_least=bound),
                    Sample(tuple(cost.seconds for cost in end), digits=1, at_least=bound),
                    Sample(gpu_hours(cell, end), digits=3, at_least=bound),
                    f"{cut}/{len(cell.trials)}",
                    times,
                    reference.arm,
                )
            )
    caption = "Cost of convergence, mean ± sd over seeds: to the best validation epoch, and to the end, patience counted in."
    notes = ("Censored: the epoch cap ended the run before its patience did; its numbers are bounds (≥).",)
    return Table(columns, tuple(rows), caption, notes)


def quality_table(cells: Sequence[TrackedCell]) -> Table:
    """Domain × arm × quality: epochs, steps, seconds and GPU hours; what a seed never reached counts to its end, as a bound."""
    columns = ("domain", "arm", "seeds", "quality", "valid", "epochs", "steps", "seconds", "GPU hours", "reached")
    rows: list[tuple[Entry, ...]] = []
    for here in by_domain(cells):
        fixed = fixed_quality(here)
        for cell in trained(here):
            if fixed is not None:
                value = [FIXED_SHARE * fixed[0]] * len(cell.trials)
                rows.append(_quality_row(cell, f"{FIXED_SHARE:.0%} of {fixed[1]}'s mean best", value, of_own=False))
            for share in OWN_SHARES:
                own = [share * trial.best_valid for trial in cell.trials]
                rows.append(_quality_row(cell, f"{share:.0%} of its best", own, of_own=True))
    notes = ("≥: some seed never got there, or a run's best is one that the epoch cap left it with.",)
    return Table(columns, tuple(rows), "What a validation score costs, mean ± sd over seeds.", notes)


def _quality_row(cell: TrackedCell, label: str, values: Sequence[float], *, of_own: bool) -> tuple[Entry, ...]:
    found = [cost_until(trial, value) for trial, value in zip(cell.trials, values, strict=True)]
    costs = [cost or cost_to_end(trial) for cost, trial in zip(found, cell.trials, strict=True)]
    reached = sum(cost is not None for cost in found)
    bound = reached < len(found) or (of_own and any_censored(cell))  # the best of a run that was cut off is itself a bound
    return (
        *(cell.domain, cell.arm, len(found), label, Sample(tuple(values))),
        Sample(tuple(cost.epochs for cost in costs), digits=1, at_least=bound),
        Sample(tuple(cost.steps for cost in costs), digits=0, at_least=bound),
        Sample(tuple(cost.seconds for cost in costs), digits=1, at_least=bound),
        Sample(gpu_hours(cell, costs), digits=3, at_least=bound),
        f"{reached}/{len(found)}",
    )
