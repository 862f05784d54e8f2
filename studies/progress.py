"""What a study prints while it runs: a line for each trial that ends, and a sign of life in between."""

from __future__ import annotations

import time
from typing import Any

from studies.plan import Plan
from studies.state import Trial

QUIET_SECONDS = 30  # between signs of life


class Progress:
    """Cells done, trials, the best so far, time left."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._total = sum(cell.search_trials + cell.confirm_seeds for cell in plan.cells.values())
        self._began = self._printed = time.monotonic()
        self._settled_before = self._settled()

    def epoch(self, trial_key: str, row: dict[str, Any]) -> None:
        if time.monotonic() - self._printed >= QUIET_SECONDS:
            trial = self._plan.journal.trial(trial_key)
            self._print(f"{_name(trial)} is at epoch {row['epoch']}")

    def ended(self, trial: Trial) -> None:
        metric = self._plan.cells[trial.cell].metric
        values = [report.value for report in self._plan.journal.reports(trial.trial_key) if report.value is not None]
        said = f", valid {metric} {max(values):.4f}" if values else ""
        if trial.outcome == "failed":
            said = f": {(trial.reason or '').strip().splitlines()[-1]}"
        best = [value for value in self._plan.journal.best_values(trial.cell).values() if value is not None]
        compared = f" (best of the search {max(best):.4f})" if best else ""
        self._print(f"{_name(trial)} {trial.outcome}{said}{compared}")

    def _print(self, text: str) -> None:
        self._printed = time.monotonic()
        settled = self._settled()
        done = settled - self._settled_before
        left = (self._printed - self._began) / done * (self._total - settled) if done else None
        cells = f"{self._plan.cells_done()}/{len(self._plan.cells)} cells"
        print(f"[{settled}/{self._total} trials, {cells}, {_clock(left)} left] {text}", flush=True)

    def _settled(self) -> int:
        return sum(count for (_, _, outcome), count in self._plan.journal.counts().items() if outcome != "running")


def _name(trial: Trial) -> str:
    return f"{trial.cell} {trial.phase} {trial.number}"


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
