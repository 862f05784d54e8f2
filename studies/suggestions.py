"""Optuna's part: one study a cell, which suggests the configs of its search trials.

The journal is the truth. When a driver starts, a cell's Optuna study is made anew from the journal, so that the
two never disagree, whatever a kill left behind. The sampler of a trial is seeded from (study, cell, trial number):
a suggestion is a function of these and of what the cell's journal holds at that moment. The sampler works in memory,
and the storage gets a trial in one transaction when it begins and in another when it ends: a slot waits for both.
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
from optuna.trial import FrozenTrial, TrialState, create_trial

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
        self._studies: dict[str, optuna.Study] = {}  # by cell: what the sampler sees, in memory
        self._stored: dict[str, optuna.Study] = {}  # by cell: the same in the storage

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
        config = walk(cell.space, lambda name, parameter: _draw(trial, name, parameter))
        self._stored[cell.name].add_trial(_begun(cell, config))
        return config

    def tell(self, cell: Cell, trial: Trial) -> None:
        """Pass on how a search trial ended."""
        ended = self._tell(self._study(cell), trial)
        if ended is None:
            return
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._stored[cell.name]._study_id, trial.number)
        for epoch, value in ended.intermediate_values.items():
            self._storage.set_trial_intermediate_value(trial_id, epoch, value)
        self._storage.set_trial_state_values(trial_id, ended.state, ended.values)

    def _study(self, cell: Cell) -> optuna.Study:
        if cell.name not in self._studies:
            study = optuna.create_study(direction="maximize")
            for trial in self._journal.trials(cell.name, "search"):
                study.add_trial(_begun(cell, trial.config))
                self._tell(study, trial)
            name = f"{self._study_name}/{cell.name}"
            self._delete_earlier(name)
            stored = optuna.create_study(study_name=name, storage=self._storage, direction="maximize")
            stored.set_user_attr(JOURNAL, self._identity())
            stored.add_trials(study.get_trials(deepcopy=False))
            self._studies[cell.name], self._stored[cell.name] = study, stored
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

    def _tell(self, study: optuna.Study, trial: Trial) -> FrozenTrial | None:
        """Tell the sampler; what the trial came to, or None where it still runs or was told before."""
        frozen = study.get_trials(deepcopy=False)[trial.number]
        if trial.outcome == "running" or frozen.state.is_finished():
            return None
        best = self._journal.best_value(trial.trial_key)
        if best is None or trial.outcome == "failed":
            return study.tell(trial.number, state=TrialState.FAIL)
        if trial.outcome == "pruned":
            optuna.Trial(study, frozen._trial_id).report(best, self._journal.reports(trial.trial_key)[-1].epoch)
            return study.tell(trial.number, state=TrialState.PRUNED)
        return study.tell(trial.number, best)


def _begun(cell: Cell, config: Mapping[str, Any]) -> FrozenTrial:
    distributions = {name: _distribution(cell.space[name]) for name in config}
    return create_trial(state=TrialState.RUNNING, params=dict(config), distributions=distributions)


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
