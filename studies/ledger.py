"""The budget ledger: what each cell was given and what it used, so that a table can say under which budgets its arms stand."""

from __future__ import annotations

from collections.abc import Iterable

from studies.cells import Cell
from studies.plan import Plan
from studies.warm_start import noted_cost

GIVEN = ("search_trials_given", "confirm_trials_given", "epochs_given")  # what must be equal for arms to be compared fairly


def cell_ledger(plan: Plan, cell: Cell) -> dict[str, float]:
    """A cell's numbers by name.

    `epochs_given` is at most (no pruning); `seconds` are those of training and validation, epochs that were done again
    after a kill not counted; `tries_failed` are tries that were repeated or given up; `prior_*` is what searches elsewhere
    had cost whose best configs this one began with.
    """
    journal, counts, spent = plan.journal, plan.journal.counts(), plan.journal.spent(cell.name)
    begun = {phase: sum(n for (name, of, _), n in counts.items() if (name, of) == (cell.name, phase)) for phase in ("search", "confirm")}
    epochs, seconds = (sum(column) for column in zip((0, 0.0), *(spent.get(phase, (0, 0.0)) for phase in begun), strict=True))
    prior_trials, prior_epochs = noted_cost(journal, cell.name)
    return {
        "search_trials_given": cell.search_trials,
        "search_trials_used": begun["search"],
        "pruned": counts.get((cell.name, "search", "pruned"), 0),
        "confirm_trials_given": cell.confirm_seeds,
        "confirm_trials_used": begun["confirm"],
        "failed": sum(counts.get((cell.name, phase, "failed"), 0) for phase in begun),
        "tries_failed": sum(len(journal.attempts(trial.trial_key)) for trial in journal.trials(cell.name)),
        "epochs_given": (cell.search_trials + cell.confirm_seeds) * plan.budget.epochs,
        "epochs_used": epochs,
        "seconds": round(seconds, 3),
        "gpu_hours": round(seconds * plan.gpus / 3600, 6),
        "prior_trials": prior_trials,
        "prior_epochs": prior_epochs,
    }


def unequal(ledgers: Iterable[dict[str, float]]) -> list[str]:
    """The budgets that were not the same for all of these cells that train and were searched, which stand side by side."""
    told = [ledger for ledger in ledgers if ledger["search_trials_given"] and ledger["epochs_used"]]
    return [name for name in GIVEN if len({ledger[name] for ledger in told}) > 1]
