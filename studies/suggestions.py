"""Optuna's part: one study a cell, which suggests the configs of its search trials.

The journal is the truth. When a driver starts, a cell's Optuna study is made anew from the journal, so that the
two never disagree, whatever a kill left behind. The sampler of a trial is seeded from (study, cell, trial number):
a suggestion is a function of these and of what the cell's journal holds at that moment.
"""

from __future__ import annotations

import hashlib
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from mmm4rec.errors import BadInput
from studies.cells import Cell
from studies.space import Parameter, walk
from studies.state import Journal, Trial

JOURNAL = "mmm4rec.journal"  # attribute of an Optuna study: the journal that it was made from


def sqlite_url(file: Path) -> str:
    """Optuna's storage in a file."""
    return f"sqlite:///{file.resolve()}"


class Suggestions:
    """Suggests configs, and hears what became of them."""

    def __init__(self, journal: Journal, url: str, *, study: str, seed: int) -> None:
        """Args: url: of Optuna's storage, as SQLAlchemy writes it; study, seed: the study's name and seed."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._journal, self._study_name, self._seed_name = journal, study, f"{study} {seed}"
        waiting = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
        self._storage = optuna.storages.RDBStorage(url, engine_kwargs=waiting)
        self._studies: dict[str, optuna.Study] = {}

    def suggest(self, cell: Cell, number: int, given: Mapping[str, Any]) -> dict[str, Any]:
        """The config of the cell's search trial `number`, by the tree-structured Parzen estimator (Bergstra et al., 2011).

        The first half of the trials (within 2..10) is drawn at random; running trials count as bad ones, so that
        trials side by side spread out. Args: given: values that are not drawn.
        """
        study = self._study(cell)
        startup = min(10, max(2, cell.search_trials // 2))
        with warnings.catch_warnings(category=optuna.exceptions.ExperimentalWarning, action="ignore"):
            study.sampler = optuna.samplers.TPESampler(
                seed=_seed(self._seed_name, cell.name, number), n_startup_trials=startup, constant_liar=True
            )
        if given:
            study.enqueue_trial(dict(given))
        trial = study.ask()
        return walk(cell.space, lambda name, parameter: _draw(trial, name, parameter))

    def tell(self, cell: Cell, trial: Trial) -> None:
        """Pass on how a search trial ended."""
        self._tell(self._study(cell), trial)

    def _study(self, cell: Cell) -> optuna.Study:
        if cell.name not in self._studies:
            name = f"{self._study_name}/{cell.name}"
            self._delete_earlier(name)
            study = optuna.create_study(study_name=name, storage=self._storage, direction="maximize")
            study.set_user_attr(JOURNAL, self._identity())
            for trial in self._journal.trials(cell.name, "search"):
                distributions = {name: _distribution(cell.space[name]) for name in trial.config}
                study.add_trial(create_trial(state=TrialState.RUNNING, params=trial.config, distributions=distributions))
                self._tell(study, trial)
            self._studies[cell.name] = study
        return self._studies[cell.name]

    def _delete_earlier(self, name: str) -> None:
        """Take away what an earlier driver of this journal left. Raises BadInput where another study has the name."""
        if name not in optuna.get_all_study_names(self._storage):
            return
        owner = optuna.load_study(study_name=name, storage=self._storage).user_attrs.get(JOURNAL)
        if owner not in (None, self._identity()):  # None: killed between its creation and the next line
            rule = f"Optuna's storage holds '{name}' of another study '{self._study_name}'."
            raise BadInput(rule, remedy="Give this study another name, or another storage in stores.optuna.")
        optuna.delete_study(study_name=name, storage=self._storage)

    def _identity(self) -> str:
        return self._journal.remember("identity", uuid.uuid4().hex)

    def _tell(self, study: optuna.Study, trial: Trial) -> None:
        frozen = study._storage.get_trial(study._storage.get_trial_id_from_study_id_trial_number(study._study_id, trial.number))
        if trial.outcome == "running" or frozen.state.is_finished():
            return
        best = self._journal.best_value(trial.trial_key)
        if best is None or trial.outcome == "failed":
            study.tell(trial.number, state=TrialState.FAIL)
        elif trial.outcome == "pruned":
            optuna.Trial(study, frozen._trial_id).report(best, self._journal.reports(trial.trial_key)[-1].epoch)
            study.tell(trial.number, state=TrialState.PRUNED)
        else:
            study.tell(trial.number, best)


def _draw(trial: optuna.Trial, name: str, parameter: Parameter) -> Any:
    if parameter.choices is not None:
        return trial.suggest_categorical(name, parameter.choices)
    assert parameter.low is not None
    assert parameter.high is not None
    if parameter.integer:
        return trial.suggest_int(name, int(parameter.low), int(parameter.high), log=parameter.log)
    return trial.suggest_float(name, parameter.low, parameter.high, log=parameter.log)


def _distribution(parameter: Parameter) -> BaseDistribution:
    if parameter.choices is not None:
        return CategoricalDistribution(parameter.choices)
    assert parameter.low is not None
    assert parameter.high is not None
    if parameter.integer:
        return IntDistribution(int(parameter.low), int(parameter.high), log=parameter.log)
    return FloatDistribution(parameter.low, parameter.high, log=parameter.log)


def _seed(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256("\0".join(map(str, parts)).encode()).digest()[:4], "big")
