"""What a study does next, decided from its journal alone. Free of Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from studies.cells import Cell
from studies.spec import Budget, WarmStart
from studies.state import Journal, Phase, Trial
from studies.warm_start import Prior, priors, waits_for

SEEDS = 10_000  # a phase's share of seeds: a study of seed s searches with 2 s SEEDS + number, and confirms with SEEDS more

Suggest = Callable[[Cell, int, Mapping[str, Any]], dict[str, Any]]  # a cell's n-th config; what the mapping holds is given


class Plan:
    """What comes next, and which trials are worth going on with. A function of the journal alone, but for `handed out`."""

    def __init__(
        self, journal: Journal, cells: Sequence[Cell], budget: Budget, seed: int, *, warm: WarmStart | None = None, gpus: float = 0.0
    ) -> None:
        """Args: gpus: what a trial takes, for a budget in GPU hours."""
        self.journal, self.budget, self.seed, self.warm, self.gpus = journal, budget, seed, warm, gpus
        self.cells = {cell.name: cell for cell in cells}
        self._handed_out: set[str] = set()  # trials that this process runs

    def next_trial(self, suggest: Suggest) -> Trial | None:
        """The next trial to run, noted as running; None when there is nothing to start now.

        First what an earlier driver or a failed attempt left unfinished. Then confirm trials of cells whose search is over;
        then search trials, where fewest run (so that a suggestion knows as many results as can be); then the spec's order.
        Args: suggest: gives the config of a cell's n-th search trial.
        """
        left_over = [t for t in self.journal.trials(outcome="running") if t.cell in self.cells and t.trial_key not in self._handed_out]
        trial = left_over[0] if left_over else self._new_trial(suggest)
        if trial is not None:
            self._handed_out.add(trial.trial_key)
        return trial

    def take_back(self, trial_key: str) -> None:
        """This process runs the trial no longer; where it is unfinished, it is handed out again."""
        self._handed_out.discard(trial_key)

    def _new_trial(self, suggest: Suggest) -> Trial | None:
        counts = self.journal.counts()
        open_phases: list[tuple[bool, int, int, Phase, Cell]] = []
        for cell in self.cells.values():
            phase = self._open_phase(cell, counts)
            if phase is not None and not (phase == "search" and self._waits(cell, counts)):
                open_phases.append((phase == "search", counts.get((cell.name, phase, "running"), 0), len(open_phases), phase, cell))
        if not open_phases:
            return None
        *_, phase, cell = min(open_phases, key=lambda entry: entry[:3])
        number = _total(counts, cell, phase)
        seed = (2 * self.seed + (phase == "confirm")) * SEEDS + number
        if phase == "confirm":
            return self.journal.start(cell, phase, number, seed, self.chosen(cell) or {})
        prior = self._prior(cell, number)
        config = suggest(cell, number, prior.config if prior else {})
        return self.journal.start(cell, phase, number, seed, config, prior.origin if prior else None)

    def _prior(self, cell: Cell, number: int) -> Prior | None:
        """What the cell's n-th search trial begins with."""
        begin = priors(cell, self.warm, self.journal, self.cells)
        return begin[number] if number < len(begin) else None

    def _waits(self, cell: Cell, counts: dict[tuple[str, str, str], int]) -> bool:
        """Whether searches that this one begins from are not over."""
        before = [self.cells[name] for name in waits_for(cell, self.warm, self.cells)]
        return any(self._searches(other, counts) or counts.get((other.name, "search", "running"), 0) for other in before)

    def _searches(self, cell: Cell, counts: dict[tuple[str, str, str], int]) -> bool:
        """Whether the cell has search trials to begin."""
        return _total(counts, cell, "search") < cell.search_trials and not self._spent(cell)

    def _spent(self, cell: Cell) -> bool:
        """Whether the cell's search has used its GPU hours."""
        if self.budget.gpu_hours is None:
            return False
        _, seconds = self.journal.spent(cell.name).get("search", (0, 0.0))
        return seconds * self.gpus / 3600 >= self.budget.gpu_hours

    def _open_phase(self, cell: Cell, counts: dict[tuple[str, str, str], int]) -> Phase | None:
        """The phase in which the cell has a trial to begin, be it now or when the cells that it waits for are over."""
        if self._searches(cell, counts):
            return "search"
        if counts.get((cell.name, "search", "running"), 0) or _total(counts, cell, "confirm") >= cell.confirm_seeds:
            return None
        return "confirm" if not cell.search_trials or self.chosen(cell) is not None else None

    def chosen(self, cell: Cell) -> dict[str, Any] | None:
        """The config that the cell's confirm trials run: that of the search trial with the best validation value.

        Ties go to the earlier trial. Only called when the search is over. None when no search trial has a value, or
        the cell has nothing to search.
        """
        if self.journal.chosen(cell.name) is None:
            values = self.journal.best_values(cell.name)
            valued = [t for t in self.journal.trials(cell.name, "search") if t.outcome != "failed" and values.get(t.trial_key) is not None]
            if valued:
                self.journal.set_chosen(cell.name, max(valued, key=lambda t: (values[t.trial_key], -t.number)))
        return self.journal.chosen(cell.name)

    def report(self, trial_key: str, row: dict[str, Any]) -> bool:
        """Note an epoch and say whether the trial goes on; a trial that does not is noted as pruned with it.

        An epoch that was noted before (a resumed trial tells its curve again) keeps the word given then.
        """
        with self.journal.transaction():
            before = self.journal.report(trial_key, row["epoch"])
            if before is not None:
                return before.keep
            trial = self.journal.trial(trial_key)
            value = row["valid"][self.cells[trial.cell].metric]
            self.journal.add_report(trial_key, row, value)
            keep = trial.phase == "confirm" or row["epoch"] not in self.budget.rungs() or self._survives(trial, row["epoch"])
            if not keep:
                self.journal.prune(trial_key, row["epoch"])
        return keep

    def _survives(self, trial: Trial, rung: int) -> bool:
        """Asynchronous successive halving (Li et al., 2020), with stopping: the best 1 / reduction of a rung go on.

        A rung compares the best values up to its epoch, within the cell, at the moment a trial reaches it. At least
        one goes on, and ties do.
        """
        values = self.journal.best_values(trial.cell, rung)
        return survives(values[trial.trial_key], list(values.values()), self.budget.reduction)

    def done(self) -> bool:
        """Every cell has all its confirm trials, or no search trial that could give a config."""
        return self.cells_done() == len(self.cells)

    def cells_done(self) -> int:
        counts = self.journal.counts()
        running = {cell for cell, _, outcome in counts if outcome == "running"}
        return sum(name not in running and self._open_phase(cell, counts) is None for name, cell in self.cells.items())


def survives(value: float | None, rung: Sequence[float | None], reduction: int) -> bool:
    """Whether `value` is among the best max(1, n // reduction) of the n values of a rung (its own included)."""
    better = sum(other is not None and (value is None or other > value) for other in rung)
    return better < max(1, len(rung) // reduction)


def _total(counts: dict[tuple[str, str, str], int], cell: Cell, phase: str) -> int:
    return sum(count for (name, of, _), count in counts.items() if (name, of) == (cell.name, phase))
