"""What pre-training is worth: pre-trained arms beside the arms that differ from them in nothing but init (their scratch controls)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import mean

from studies.effects import Pairs, by_domain, mean_of
from studies.significance import Interval, holm, is_sure
from studies.table import Entry, Sample, Table
from studies.tracked import Pretraining, ReadRanks, TrackedCell, TrackedTrial

SHARES = (0.25, 0.5, 1.0)  # of scratch's steps to its best: where both are compared at equal steps
GAIN = "ndcg@10"


def controls(cells: Iterable[TrackedCell]) -> list[tuple[TrackedCell, TrackedCell]]:
    """Pairs (pre-trained, scratch) of a domain that differ in nothing but init."""
    told = list(cells)
    return [
        (cell, control)
        for control in told
        for cell in told
        if (cell.domain, cell.besides_init) == (control.domain, control.besides_init)
        and (cell.init, control.init) == ("pretrained", "scratch")
    ]


def transfer_table(cells: Sequence[TrackedCell], pretraining: Pretraining | None = None) -> Table:
    """Pairs of arms that differ in nothing but init, seed by seed.

    Validation "at equal steps" is the best until then (what early stopping would keep), at shares of the steps that
    scratch of the same seed took to its best. "Steps to scratch's best" counts the optimizer steps until an arm's
    validation is no lower than scratch's best; where a seed never gets there its last step stands in, the mean is a
    bound (≥), and `reached` says how many seeds did.
    """
    metric = cells[0].metric if cells else GAIN
    at_steps = tuple(f"valid {metric} at {share:.0%} of steps" for share in SHARES)
    columns = ("domain", "arm", "seeds", "test ndcg@10", f"best valid {metric}", *at_steps, "steps to scratch's best", "reached")
    rows: list[tuple[Entry, ...]] = []
    for cell, control in controls(cells):
        seeds = {trial.seed for trial in cell.trials} & {trial.seed for trial in control.trials}
        both = [replace(one, trials=tuple(trial for trial in one.trials if trial.seed in seeds)) for one in (control, cell)]
        rows += [_transfer_row(one, both[0]) for one in both]
    note = pretraining_note(pretraining)
    return Table(columns, tuple(rows), "Pre-trained arms and their scratch controls.", (note,) if note else ())


def pretraining_note(spent: Pretraining | None) -> str:
    """What came before the pre-trained arms' first step, in a sentence; empty where the study pre-trained nothing."""
    if spent is None:
        return ""
    return (
        f"Pre-training, once for all pre-trained arms and in none of the numbers above: {spent.optimizer_steps:,} optimizer steps"
        f" in {spent.epochs} epochs (the epoch kept: {spent.best_steps:,} steps), {spent.seconds:,.0f} s."
    )


def _transfer_row(cell: TrackedCell, scratch: TrackedCell) -> tuple[Entry, ...]:
    by_seed = {trial.seed: trial for trial in cell.trials}
    pairs = [(by_seed[rival.seed], rival) for rival in scratch.trials if rival.seed in by_seed]
    at_steps = [_at_steps(pairs, share) for share in SHARES]
    arrivals = [arrival(trial, rival.best_valid) for trial, rival in pairs]
    last = [trial.curve[-1][0] for trial, _ in pairs]
    steps = tuple(end if place is None else trial.curve[place][0] for place, end, (trial, _) in zip(arrivals, last, pairs, strict=True))
    reached = sum(place is not None for place in arrivals)
    return (
        cell.domain,
        cell.arm,
        len(pairs),
        Sample(tuple(trial.test[GAIN] for trial, _ in pairs)),
        Sample(tuple(trial.best_valid for trial, _ in pairs)),
        *at_steps,
        Sample(steps, digits=0, at_least=reached < len(pairs)),
        f"{reached}/{len(pairs)}",
    )


def _at_steps(pairs: Sequence[tuple[TrackedTrial, TrackedTrial]], share: float) -> Sample:
    """The best values at a share of the rivals' steps; none where some seed has no report so early."""
    values = [_best_until(trial, share * rival.best_steps) for trial, rival in pairs]
    return Sample(tuple(value for value in values if value is not None) if None not in values else ())


def _best_until(trial: TrackedTrial, steps: float) -> float | None:
    return max((value for step, value in trial.curve if step <= steps), default=None)


def arrival(trial: TrackedTrial, value: float) -> int | None:
    """The place in a trial's curve where it first is no lower than a value; None: nowhere."""
    return next((place for place, (_, reached) in enumerate(trial.curve) if reached >= value), None)


@dataclass(frozen=True)
class Gain:
    """What a checkpoint adds to an arm of a domain: test NDCG@10 minus the scratch control's."""

    domain: str
    arm: str
    control: str
    checkpoint: str
    modalities: str
    ids: str
    seeds: int
    level: float  # the control's NDCG@10
    difference: Interval
    corrected: float | None  # p, by Holm over the matrix

    @property
    def percent(self) -> float:
        return 100 * self.difference.mean / self.level if self.level else float("nan")

    @property
    def verdict(self) -> str:
        """Negative transfer is what an interval shows; below in the mean is said too."""
        if self.difference.low is None:
            return "below, no interval" if self.difference.mean < 0 else "no interval"
        if not self.difference.excludes_zero:
            return "below, within its interval" if self.difference.mean < 0 else "within its interval"
        return ("NEGATIVE TRANSFER" if self.difference.mean < 0 else "gain") + "*" * is_sure(self.corrected, self.seeds)


def transfer_gains(cells: Sequence[TrackedCell], read_ranks: ReadRanks) -> list[Gain]:
    """The gain of every pre-trained arm that has a control, by domain. Without common ranks there is a mean and no interval."""
    found: list[tuple[TrackedCell, TrackedCell, int, float, Interval]] = []
    for here in by_domain(cells):
        told = [(cell, control) for cell, control in controls(here) if cell.trials and control.trials]
        involved = {cell.name: cell for pair in told for cell in pair}
        pairs = Pairs(list(involved.values()), read_ranks, (GAIN,))
        for cell, control in told:
            level, seeds = mean_of(control, GAIN), 0
            difference = Interval(mean_of(cell, GAIN) - level)
            for _, (common, parts) in pairs.minus(control, [cell]):
                difference, seeds = parts[0], len(common)
                level = mean(float(pairs.by_seed(control, seed).mean()) for seed in common)
            found.append((cell, control, seeds, level, difference))
    corrected = holm([difference.p for *_, difference in found])
    return [
        Gain(
            cell.domain,
            cell.arm,
            control.arm,
            (cell.trials[0].checkpoint or "-")[:8],
            cell.of_first("model.modalities") or "-",
            cell.ids,
            seeds,
            level,
            difference,
            p,
        )
        for (cell, control, seeds, level, difference), p in zip(found, corrected, strict=True)
    ]


def transfer_matrix(gains: Sequence[Gain], cells: Sequence[TrackedCell]) -> Table:
    """Checkpoint × domain × modality × ids: the gain over the scratch control; says which arms have none."""
    columns = ("domain", "arm", "control", "checkpoint", "modalities", "ids", "seeds", "control ndcg@10", "Δ ndcg@10", "gain %", "verdict")
    rows = tuple(
        (g.domain, g.arm, g.control, g.checkpoint, g.modalities, g.ids, g.seeds, g.level, g.difference, f"{g.percent:+.1f}", g.verdict)
        for g in gains
    )
    paired = {(gain.domain, gain.arm) for gain in gains}
    alone = [cell.arm for cell in cells if cell.init == "pretrained" and cell.trials and (cell.domain, cell.arm) not in paired]
    notes = (f"No scratch control differs in init alone, so no gain: {', '.join(dict.fromkeys(alone))}.",) if alone else ()
    return Table(columns, rows, "Gain of each checkpoint over its scratch control, test NDCG@10; * after Holm, five seeds or more.", notes)
