"""What a study prints while it runs: a line for each trial that ends, and a sign of life in between."""

from __future__ import annotations

import time
from typing import Any

from studies.plan import Plan
from studies.state import FailureKind, Trial

QUIET_SECONDS = 30  # between signs of life


class Progress:
    """Cells done, trials, the best so far, time left."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._began = self._printed = time.monotonic()
        self._settled_before = self._settled()

    def epoch(self, trial_key: str, row: dict[str, Any]) -> None:
        if time.monotonic() - self._printed >= QUIET_SECONDS:
            trial = self._plan.journal.trial(trial_key)
            self._print(f"{trial.name} is at epoch {row['epoch']}")

    def failed(self, trial: Trial, kind: FailureKind, reason: str) -> None:
        """A try that failed; the trial may be tried again."""
        self._print(f"{trial.name}: {kind.replace('_', ' ')}: {(reason.strip().splitlines() or ['no reason'])[-1]}")

    def ended(self, trial: Trial) -> None:
        metric, value = self._plan.cells[trial.cell].metric, self._plan.journal.best_value(trial.trial_key)
        said = "" if value is None else f", valid {metric} {value:.4f}"
        if trial.outcome == "failed":
            said = f": {(trial.reason or '').strip().splitlines()[-1]}"
        best = [value for value in self._plan.journal.best_values(trial.cell).values() if value is not None]
        compared = f" (best of the search {max(best):.4f})" if best else ""
        self._print(f"{trial.name} {trial.outcome}{said}{compared}")

    def _print(self, text: str) -> None:
        self._printed = time.monotonic()
        settled, total = self._settled(), sum(cell.search_trials + cell.confirm_seeds for cell in self._plan.cells.values())
        done = settled - self._settled_before
        left = (self._printed - self._began) / done * (total - settled) if done else None
        cells = f"{self._plan.cells_done()}/{len(self._plan.cells)} cells"
        print(f"[{settled}/{total} trials, {cells}, {clock(left)} left] {text}", flush=True)

    def _settled(self) -> int:
        counts = self._plan.journal.counts().items()
        return sum(count for (cell, _, outcome), count in counts if cell in self._plan.cells and outcome != "running")


def clock(seconds: float | None) -> str:
    """`1:02:03`, or `2:03` below an hour; `?` for None."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
