"""Priors carried on: where a cell's search begins, taken from searches of the same arm elsewhere.

The first trials of a search are then the configs that were best elsewhere, and a blend of them; what follows is drawn by
the sampler, which learns from these as from its own. It is the same for every arm, scratch too, and a prior is no result:
its trial is run here, and counts in the budget here. What the searches elsewhere had cost stands in the ledger.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from mmm4rec.errors import BadInput
from studies.cells import Cell
from studies.space import Space, Value, within
from studies.spec import WarmStart
from studies.state import Journal


@dataclass(frozen=True)
class Prior:
    """A config to begin with (it may lack parameters), where it came from, and the trials and epochs that found it."""

    config: dict[str, Any]
    origin: str
    trials: int
    epochs: int


def waits_for(cell: Cell, warm: WarmStart | None, cells: Mapping[str, Cell]) -> list[str]:
    """The cells whose searches must be over before this one's may begin: those of its arm in the domains before it in the order."""
    if warm is None or not warm.domains:
        return []
    order = list(warm.domains)
    before = order[: order.index(cell.domain)] if cell.domain in order else order
    return [name for domain in before if (name := f"{domain}/{cell.arm}") in cells]


def priors(cell: Cell, warm: WarmStart | None, journal: Journal, cells: Mapping[str, Cell]) -> list[Prior]:
    """Where the cell's search begins, at most half of its trials. Noted in the journal when first asked for, and kept.

    Raises BadInput where a study to begin from is not there.
    """
    if warm is None or not cell.space:
        return []
    if journal.fact(_key(journal, cell.name)) is None:
        found = [prior for name in waits_for(cell, warm, cells) if (prior := _best(journal, name, cell.space, name)) is not None]
        for study in warm.studies:
            found += _of_study(Path(study), cell)
        begin = blended(found, cell.space)[: max(1, cell.search_trials // 2)]
        cost = {"trials": sum(prior.trials for prior in found), "epochs": sum(prior.epochs for prior in found)}
        journal.remember(_key(journal, cell.name), json.dumps({"begin": [vars(prior) for prior in begin], **cost}))
    return noted_priors(journal, cell.name)


def noted_priors(journal: Journal, cell: str) -> list[Prior]:
    """What the journal says of a cell's beginning; nothing where its search has not begun, or began without priors."""
    return [Prior(**prior) for prior in json.loads(journal.fact(_key(journal, cell)) or '{"begin": []}')["begin"]]


def noted_cost(journal: Journal, cell: str) -> tuple[int, int]:
    """Trials and epochs of all searches elsewhere that a cell's search began from, also of those whose best found no place."""
    told = json.loads(journal.fact(_key(journal, cell)) or "{}")
    return told.get("trials", 0), told.get("epochs", 0)


def _key(journal: Journal, cell: str) -> str:
    return f"priors {cell} {journal.generation(cell)}"


def blended(found: Sequence[Prior], space: Space) -> list[Prior]:
    """The priors without repetition; of several, their blend first: means (of logarithms where the space is), commonest choices."""
    distinct = list({json.dumps(prior.config, sort_keys=True): prior for prior in reversed(found)}.values())[::-1]
    if len(distinct) < 2:
        return distinct
    config = {name: _middle(values, space, name) for name in space if (values := [p.config[name] for p in found if name in p.config])}
    origin = "warm start: blend of " + ", ".join(prior.origin.removeprefix("warm start: ") for prior in found)
    blend = Prior(config, origin, sum(prior.trials for prior in found), sum(prior.epochs for prior in found))
    return [blend, *distinct]


def _middle(values: Sequence[Value], space: Space, name: str) -> Value:
    parameter = space[name]
    if parameter.choices is not None:
        counts = Counter(map(repr, values))
        return max(values, key=lambda value: (counts[repr(value)], -values.index(value)))
    middle = math.exp(mean(map(math.log, values))) if parameter.log else mean(values)
    return round(middle) if parameter.integer else middle


def _of_study(folder: Path, cell: Cell) -> list[Prior]:
    file = folder / "study.sqlite3"
    if not file.is_file():
        raise BadInput(
            "holds no study to begin from.", file=folder, remedy="Give the folder of a finished study in warm_start_from.studies."
        )
    with closing(Journal(file)) as other:
        names = [name for name in other.cell_names() if name.rpartition("/")[2] == cell.arm]
        found = [_best(other, name, cell.space, f"{folder.name}, {name}") for name in names]
    return [prior for prior in found if prior is not None]


def _best(journal: Journal, name: str, space: Space, place: str) -> Prior | None:
    """The best search trial of a cell; None where none has a value."""
    values = journal.best_values(name)
    trials = [trial for trial in journal.trials(name, "search") if trial.outcome != "failed" and values.get(trial.trial_key) is not None]
    if not trials:
        return None
    best = max(trials, key=lambda trial: (values[trial.trial_key], -trial.number))
    epochs, _ = journal.spent(name).get("search", (0, 0.0))
    return Prior(within(space, best.config), f"warm start: {place} search {best.number}", len(trials), epochs)
