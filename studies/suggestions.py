"""Optuna's part: one study a cell, which suggests the configs of its search trials.

The journal is the truth. When a driver starts, a cell's Optuna study is made anew from the journal, so that the
two never disagree, whatever a kill left behind. The sampler of a trial is seeded from (study, cell, trial number):
a suggestion is a function of these and of what the cell's journal holds at that moment.
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from studies.cells import Cell
from studies.spec import Parameter
from studies.state import Journal, Trial


class Suggestions:
    """Suggests configs, and hears what became of them."""

    def __init__(self, journal: Journal, store: Path, *, seed_name: str) -> None:
        """Args: store: the sqlite file of Optuna's storage; seed_name: the study's name and seed."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._journal, self._seed_name = journal, seed_name
        self._storage = optuna.storages.RDBStorage(f"sqlite:///{store.resolve()}", engine_kwargs={"connect_args": {"timeout": 60}})
        self._studies: dict[str, optuna.Study] = {}

    def suggest(self, cell: Cell, number: int) -> dict[str, Any]:
        """The config of the cell's search trial `number`, by the tree-structured Parzen estimator (Bergstra et al., 2011).

        The first half of the trials (within 2..10) is drawn at random; running trials count as bad ones, so that
        trials side by side spread out.
        """
        study = self._study(cell)
        startup = min(10, max(2, cell.search_trials // 2))
        with warnings.catch_warnings(category=optuna.exceptions.ExperimentalWarning, action="ignore"):
            study.sampler = optuna.samplers.TPESampler(
                seed=_seed(self._seed_name, cell.name, number), n_startup_trials=startup, constant_liar=True
            )
        return dict(study.ask({name: _distribution(parameter) for name, parameter in cell.space.items()}).params)

    def tell(self, cell: Cell, trial: Trial) -> None:
        """Pass on how a search trial ended."""
        self._tell(self._study(cell), trial)

    def _study(self, cell: Cell) -> optuna.Study:
        if cell.name not in self._studies:
            if cell.name in optuna.get_all_study_names(self._storage):
                optuna.delete_study(study_name=cell.name, storage=self._storage)
            study = optuna.create_study(study_name=cell.name, storage=self._storage, direction="maximize")
            distributions = {name: _distribution(parameter) for name, parameter in cell.space.items()}
            for trial in self._journal.trials(cell.name, "search"):
                study.add_trial(create_trial(state=TrialState.RUNNING, params=trial.config, distributions=distributions))
                self._tell(study, trial)
            self._studies[cell.name] = study
        return self._studies[cell.name]

    def _tell(self, study: optuna.Study, trial: Trial) -> None:
        frozen = study.trials[trial.number]
        if trial.outcome == "running" or frozen.state.is_finished():
            return
        reports = self._journal.reports(trial.trial_key)
        best = max((report.value for report in reports if report.value is not None), default=None)
        if best is None or trial.outcome == "failed":
            study.tell(trial.number, state=TrialState.FAIL)
        elif trial.outcome == "pruned":
            optuna.Trial(study, frozen._trial_id).report(best, reports[-1].epoch)
            study.tell(trial.number, state=TrialState.PRUNED)
        else:
            study.tell(trial.number, best)


def _distribution(parameter: Parameter) -> BaseDistribution:
    if parameter.choices is not None:
        return CategoricalDistribution(parameter.choices)
    assert parameter.low is not None
    assert parameter.high is not None
    return FloatDistribution(parameter.low, parameter.high, log=parameter.log)


def _seed(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256("\0".join(map(str, parts)).encode()).digest()[:4], "big")
