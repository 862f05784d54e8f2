"""What a driver does, whoever runs the trials: it hands them out, hears them, and writes each fact into the journal first.

Ray's searcher and scheduler are thin around it (engine.py); a loop without Ray is a few lines (`run_here`).
"""

from __future__ import annotations

import errno
import json
import sqlite3
import traceback
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from mmm4rec.config import from_dict, to_dict
from mmm4rec.data.at_once import smaller_blocks
from mmm4rec.execute import execute
from mmm4rec.run import Assembled, RunConfig
from mmm4rec.training.loop import EpochReport
from studies.files import KEPT
from studies.plan import Plan
from studies.spec import Resources
from studies.state import FailureKind, Trial, locked

if TYPE_CHECKING:  # a trial's worker imports this module, and needs no Optuna
    from studies.suggestions import Suggestions

MOST_HALVINGS = 6  # of the blocks of a trial that ran out of memory: to 1/64


class Tracker(Protocol):
    """What hears that something is new about a trial."""

    def trial(self, trial_key: str) -> None: ...


class Listener(Protocol):
    """What tells the user."""

    def epoch(self, trial_key: str, row: dict[str, Any]) -> None: ...
    def ended(self, trial: Trial) -> None: ...
    def failed(self, trial: Trial, kind: FailureKind, reason: str) -> None: ...


@dataclass
class Conductor:
    """Hands trials out and hears what becomes of them."""

    plan: Plan
    suggestions: Suggestions
    tracker: Tracker
    listener: Listener
    resources: Resources
    take_up: Callable[[], None] = lambda: None  # brings what joined the study into the plan
    bring: Callable[[str, Iterable[str]], None] = lambda trial_key, names: None  # gets files of a trial from where it ran
    tidy: Callable[[Trial], None] = lambda trial: None  # what is left of a trial's files when it has ended
    stopping: str | None = None  # why no new trial begins, and running ones end with their epoch

    def catch_up(self) -> None:
        """Do what an earlier driver's end cut off: tell the sampler's store of ended searches, and tidy the files of ended trials."""
        for trial in self.plan.journal.trials():
            if trial.cell in self.plan.cells and trial.outcome != "running":
                self.tidy(trial)
        for cell in self.plan.cells.values():
            if searched := self.plan.journal.trials(cell.name, "search"):
                self.suggestions.tell(cell, searched[-1])

    def next_trial(self) -> Trial | None:
        """The next trial to run; None when there is nothing to start now."""
        self._hear_requests()
        return None if self.stopping else self.plan.next_trial(self.suggestions.suggest)

    def over(self) -> bool:
        """Whether nothing will be started any more."""
        return self.stopping is not None or self.plan.done()

    def halvings(self, trial: Trial) -> int:
        """How often the trial's blocks are halved: once for each time that it ran out of memory."""
        return sum(attempt.kind == "out_of_memory" for attempt in self.plan.journal.attempts(trial.trial_key))

    def report(self, trial_key: str, row: dict[str, Any]) -> bool:
        """Note an epoch, and say whether the trial goes on."""
        keep = self.plan.report(trial_key, row)
        self.tracker.trial(trial_key)
        self.listener.epoch(trial_key, row)
        self._hear_requests()
        return keep and self.stopping is None

    def ended(self, trial_key: str, result: dict[str, Any] | None) -> None:
        """Note that a trial's process is through with it: with a result, pruned, or stopped in the middle to be continued."""
        if result is not None:
            self._end(trial_key, "finished", result=result)
        elif self.plan.journal.trial(trial_key).outcome == "pruned":
            self._end(trial_key, "pruned")
        elif self.stopping is None:
            self.failed(trial_key, "error", "ended without a result.json")
        self.plan.take_back(trial_key)

    def failed(self, trial_key: str, kind: FailureKind, reason: str) -> None:
        """Note a try that failed. The trial is tried again, from its last.ckpt, or recorded as failed."""
        journal = self.plan.journal
        journal.add_attempt(trial_key, kind, reason)
        self.listener.failed(journal.trial(trial_key), kind, reason)
        if kind == "disk_full":
            self.stopping = f"the disk is full ({_last_line(reason)})"
        elif self._tries_left(trial_key, kind) < 0:
            self._end(trial_key, "failed", reason=reason)
        self.plan.take_back(trial_key)

    def _tries_left(self, trial_key: str, kind: FailureKind) -> int:
        """A failure counts until the trial has finished another epoch; running out of memory counts for ever."""
        attempts = [attempt for attempt in self.plan.journal.attempts(trial_key) if attempt.kind == kind]
        if kind == "out_of_memory":
            return MOST_HALVINGS - len(attempts)
        allowed = self.resources.lost_retries if kind == "lost" else self.resources.retries
        return allowed - sum(attempt.epochs == attempts[-1].epochs for attempt in attempts)

    def _end(self, trial_key: str, outcome: Any, **facts: Any) -> None:
        journal = self.plan.journal
        journal.end(trial_key, outcome, **facts)
        trial = journal.trial(trial_key)
        if trial.phase == "search":
            self.suggestions.tell(self.plan.cells[trial.cell], trial)
        if (trial.phase, trial.outcome) == ("confirm", "finished"):
            self.bring(trial_key, KEPT)
        self.tracker.trial(trial_key)
        self.listener.ended(trial)
        self.tidy(trial)

    def _hear_requests(self) -> None:
        journal = self.plan.journal
        if self.stopping is None and journal.asked("stop"):
            journal.heard("stop")
            self.stopping = "it was asked to stop"
        if journal.asked("add"):
            journal.heard("add")
            self.take_up()


Tell = Callable[[dict[str, Any]], None]


def run_trial_files(told: dict[str, Any], out: Path, tell: Tell, *, keep: Callable[[], None] = lambda: None) -> dict[str, Any] | None:
    """Run a trial in its folder: tell its curve so far, then go on from where it stands, epoch by epoch.

    Args:
        told: `run` (a RunConfig's plain data) and `halvings` (of its blocks).
        tell: hears {"row": ...} for each epoch and a failure as {"failure": kind, "reason": text} at the end; it may end the
            trial by raising SystemExit.
        keep: called when the files of an epoch are complete, before it is told.
    Returns the result; None after a failure.
    """
    try:
        if (out / "result.json").exists():
            for row in read_lines(out / "curve.jsonl"):
                tell({"row": row})
            return _result(out)
        run = from_dict(RunConfig, told["run"], source=f"trial {out.name}")

        def tell_history(assembled: Assembled) -> None:  # a kill may have come before the last of it was told
            for report in assembled.run.state.history:
                tell({"row": to_dict(report)})

        with smaller_blocks(told["halvings"]), closing(execute(run, out, resume=True, on_start=tell_history)) as reports:
            for report in reports:
                if isinstance(report, EpochReport):
                    keep()
                    tell({"row": to_dict(report)})
        keep()
        return _result(out)
    except Exception as error:
        reason = "".join(traceback.format_exception(error))
        kind = failure_kind(error)
        del error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        tell({"failure": kind, "reason": reason})
        return None


def failure_kind(error: BaseException) -> FailureKind:
    """Whether memory or disk came to its end, or something else went wrong."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return "out_of_memory"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "disk_full"
    if isinstance(error, sqlite3.OperationalError) and "full" in str(error):
        return "disk_full"
    return "error"


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a run's curve.jsonl or steps.jsonl; one that a kill cut short is left out, and no file is no lines."""
    return whole_lines(file.read_bytes() if file.exists() else None)


def whole_lines(content: bytes | None) -> list[dict[str, Any]]:
    """The objects of JSON lines; None is no lines."""
    return [json.loads(line) for line in (content or b"").decode().splitlines(keepends=True) if line.endswith("\n")]


def _result(out: Path) -> dict[str, Any]:
    return json.loads((out / "result.json").read_text(encoding="utf-8"))


def run_here(conductor: Conductor, launch: Callable[[Trial], dict[str, Any]]) -> None:
    """Run what the plan still wants in this process, one trial after another, without Ray."""
    while (trial := conductor.next_trial()) is not None:
        told, failed = launch(trial), False
        key, out = trial.trial_key, Path(told["out"])

        def hear(message: dict[str, Any], key: str = key) -> None:
            nonlocal failed
            if "failure" in message:
                failed = True
                conductor.failed(key, message["failure"], message["reason"])
            elif not conductor.report(key, message["row"]):
                raise SystemExit

        out.mkdir(parents=True, exist_ok=True)
        result = None
        with locked(out / ".lock", wait=True), suppress(SystemExit):
            result = run_trial_files(told, out, hear)
        if not failed:
            conductor.ended(key, result)


def _last_line(reason: str) -> str:
    return (reason.strip().splitlines() or ["no reason"])[-1]
