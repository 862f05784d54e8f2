"""Facts about a study that lives: it is stopped, added to, changed, moved to another head; its trials fail and are tried again."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_SHOPS, TINY_STUDY
from test_state import begin, row
from test_state import spec as two_cells

from mmm4rec.config import from_dict, to_dict
from mmm4rec.data import batches
from mmm4rec.data.at_once import at_once, smaller_blocks
from mmm4rec.data.demo import write_demo
from mmm4rec.errors import BadInput
from studies import conductor as conducting
from studies import control
from studies.conductor import Conductor, failure_kind, run_here
from studies.engine import run_config
from studies.files import tidy, used_bytes
from studies.ledger import cell_ledger, unequal
from studies.places import Places
from studies.plan import Plan
from studies.spec import Budget, Spec, extended
from studies.state import Journal, Trial
from studies.study import Study, open_study, run_study
from studies.transfer_sweep import main

PLAIN = {
    **TINY_STUDY,
    "pretrain": None,
    "baseline": None,
    "space": {"training.learning_rate": {"low": 1e-3, "high": 1e-1, "log": True}},
    "arms": {"scratch": {}},
    "cells": [{"domains": ["attic"], "arms": ["scratch"]}],
    "budget": {"search_trials": 2, "epochs": 3, "grace_epochs": 3, "confirm_seeds": 2},
}


def spec(**changes: object) -> Spec:
    return from_dict(Spec, {**PLAIN, **changes}, source="test")


class Quiet:
    """A listener and tracker that remembers what it heard."""

    def __init__(self, on_epoch: Callable[[str, int], None] = lambda key, epoch: None) -> None:
        self.failures: list[str] = []
        self._on_epoch = on_epoch

    def trial(self, trial_key: str) -> None: ...

    def epoch(self, trial_key: str, row: dict[str, Any]) -> None:
        self._on_epoch(trial_key, row["epoch"])

    def ended(self, trial: Trial) -> None: ...

    def failed(self, trial: Trial, kind: str, reason: str) -> None:
        self.failures.append(kind)


@pytest.fixture
def out(tmp_path: Path, tiny_begun: Path) -> Path:
    shutil.copytree(tiny_begun, tmp_path / "tiny")
    return tmp_path


@contextmanager
def opened(out: Path, wanted: Spec, **how: Any) -> Iterator[Study]:
    with open_study(wanted, out, data=None, say=lambda text: None, **how) as study:
        yield study


def work(study: Study, listener: Quiet | None = None) -> Conductor:
    """Run what is left of the study in this process."""
    conductor = study.conductor()
    conductor.listener = listener or Quiet()

    def launch(trial: Trial) -> dict[str, Any]:
        run = to_dict(run_config(study.plan.cells[trial.cell], trial, None))
        place = study.folder / "trials" / trial.trial_key
        return {"run": run, "out": str(place), "halvings": conductor.halvings(trial)}

    run_here(conductor, launch)
    return conductor


def outcomes(study: Study) -> Counter[tuple[str, str]]:
    return Counter((trial.phase, trial.outcome) for trial in study.plan.journal.trials())


ALL = Counter({("search", "finished"): 2, ("confirm", "finished"): 2})


def failing(monkeypatch: pytest.MonkeyPatch, errors: list[Exception], *, after_epochs: int = 0) -> None:
    """Let the next tries at trials raise these errors, after so many epochs."""
    execute = conducting.execute

    def fails(*args: Any, **keywords: Any) -> Any:
        error = errors.pop(0) if errors else None
        if error is not None and not after_epochs:
            raise error
        for number, report in enumerate(execute(*args, **keywords)):
            if error is not None and number == after_epochs:
                raise error
            yield report

    monkeypatch.setattr(conducting, "execute", fails)


def test_a_stopped_study_ends_with_its_epoch_and_goes_on_where_it_was(out: Path) -> None:
    with opened(out, spec()) as study:
        listener = Quiet(lambda key, epoch: study.plan.journal.ask("stop") if epoch == 2 else None)
        conductor = work(study, listener)
        assert conductor.stopping == "it was asked to stop"
        (running,) = study.plan.journal.trials(outcome="running")
        assert [report.epoch for report in study.plan.journal.reports(running.trial_key)] == [1, 2]
    with opened(out, spec()) as study:
        work(study)
        assert outcomes(study) == ALL
        assert [report.epoch for report in study.plan.journal.reports(running.trial_key)] == [1, 2, 3]


def test_stop_tells_a_driver_and_says_so_where_none_works(out: Path) -> None:
    with pytest.raises(BadInput, match="holds no study yet"):
        control.stop(spec(), out)
    with opened(out, spec()) as study:
        assert "stops when its running epochs have ended" in control.stop(spec(), out)
        assert study.plan.journal.asked("stop")
    assert "nothing to stop" in control.stop(spec(), out)


def test_status_counts_trials_by_cell(out: Path) -> None:
    with opened(out, spec()) as study:
        work(study)
        assert "a driver works on it" in control.status(spec(), out)
    lines = control.status(spec(), out).splitlines()
    assert lines[1].split()[:5] == ["attic/scratch", "2/2", "2/2", "0", "0"]
    assert lines[-1].startswith("1/1 cells done, no driver works on it, 0:00 left")


def test_an_arm_that_joins_a_running_study_is_run_and_what_had_ended_stays(out: Path) -> None:
    with opened(out, spec()) as study:
        added = threading.Event()

        def join(key: str, epoch: int) -> None:
            if not added.is_set():
                added.set()
                control.add(spec(), out, data=None, domains=[], arms=["wide={training: {patience: 2}}"])

        work(study, Quiet(join))
        assert list(study.plan.cells) == ["attic/scratch", "attic/wide"]
        assert outcomes(study) == ALL + Counter({("search", "finished"): 2, ("confirm", "finished"): 2})
        ended = {trial.trial_key: trial.ended_ms for trial in study.plan.journal.trials()}
    with opened(out, spec()) as study:  # the spec as it was given; the addition stands in the journal
        assert study.plan.done()
        assert {trial.trial_key: trial.ended_ms for trial in study.plan.journal.trials()} == ended
    with pytest.raises(BadInput, match="has 'wide' already"):
        control.add(spec(), out, data=None, domains=[], arms=["wide={}"])
    with pytest.raises(BadInput, match="defines no arm"):
        control.add(spec(), out, data=None, domains=[], arms=["narrow"])


def test_a_domain_that_joins_gets_every_arm() -> None:
    whole = extended(spec(), [{"domains": ["shop"], "arms": {}}, {"domains": [], "arms": {"wide": {}}}])
    pairs = [(domain, arm) for group in whole.cells for domain in group.domains for arm in group.arms]
    assert pairs == [("attic", "scratch"), ("shop", "scratch"), ("attic", "wide"), ("shop", "wide")]
    assert whole.domains.prepare == {"shop": "shop"}


def test_a_second_driver_is_refused(out: Path) -> None:
    with opened(out, spec()), pytest.raises(BadInput, match="another process"), opened(out, spec()):
        pass


def test_changes_need_a_yes_and_set_aside_only_what_rests_on_them(out: Path) -> None:
    said: list[str] = []
    with opened(out, spec()) as study:
        work(study)
        before = {trial.trial_key for trial in study.plan.journal.trials()}
    changed = spec(arms={"scratch": {"model": {"dropout": 0.3}}})
    with pytest.raises(BadInput, match=r"run\.model\.dropout: None then, 0\.3 now"), opened(out, changed):
        pass
    with opened(out, changed, accept=lambda text: said.append(text) or True) as study:  # type: ignore[func-returns-value]
        journal = study.plan.journal
        assert "arms.scratch.model.dropout" in said[0]
        assert {trial.cell for trial in journal.trials(outcome="superseded")} == {"attic/scratch (superseded 0)"}
        work(study)
        assert outcomes(study) == ALL + Counter({("search", "superseded"): 2, ("confirm", "superseded"): 2})
        assert before < {trial.trial_key for trial in journal.trials()}
    with opened(out, changed) as study:
        assert study.plan.done()


def test_more_search_trials_keep_the_search_and_confirm_anew(out: Path) -> None:
    with opened(out, spec()) as study:
        work(study)
    more = spec(budget={**PLAIN["budget"], "search_trials": 3})  # type: ignore[dict-item]
    with opened(out, more, accept=lambda text: True) as study:
        work(study)
        assert outcomes(study) == Counter({("search", "finished"): 3, ("confirm", "finished"): 2, ("confirm", "superseded"): 2})


def test_changed_code_needs_a_yes_and_takes_nothing_away(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(out, spec()) as study:
        work(study)
    monkeypatch.setattr("studies.study.code_version", lambda: "9.9+other")
    with pytest.raises(BadInput, match=r"another code:\n  version: .* then, 9\.9\+other now"), opened(out, spec()):
        pass
    with opened(out, spec(), accept=lambda text: True) as study:
        assert study.plan.done()


def test_resume_begins_no_study(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--spec", "demo", "--out", str(out), "--resume"]) == 2
    assert "holds no study to resume" in capsys.readouterr().err
    assert not (out / "demo").exists()


def test_a_trial_that_fails_is_tried_again_and_then_recorded_with_its_reason(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, [ValueError("broken wire")] * 3)
    with opened(out, spec(resources={"retries": 2})) as study:
        listener = Quiet()
        work(study, listener)
        assert listener.failures == ["error"] * 3
        (failed,) = study.plan.journal.trials(outcome="failed")
        assert (failed.reason or "").strip().endswith("ValueError: broken wire")
        assert outcomes(study) == Counter({("search", "failed"): 1, ("search", "finished"): 1, ("confirm", "finished"): 2})


def test_an_epoch_finished_in_between_starts_the_count_anew(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, [OSError("gone"), OSError("gone"), OSError("gone")], after_epochs=1)
    longer = {**PLAIN["budget"], "epochs": 6, "grace_epochs": 6}  # type: ignore[dict-item]
    with opened(out, spec(resources={"retries": 1}, budget=longer)) as study:
        listener = Quiet()
        work(study, listener)
        assert listener.failures == ["error"] * 3
        first = study.plan.journal.trials()[0]
        assert [attempt.epochs for attempt in study.plan.journal.attempts(first.trial_key)] == [1, 3, 5]
        assert outcomes(study) == ALL


def test_out_of_memory_halves_the_blocks_and_keeps_the_batch(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
    sizes: list[int] = []
    with opened(out, spec(resources={"retries": 0})) as study:
        listener = Quiet(lambda key, epoch: sizes.append(at_once(batches.POSITIONS_AT_ONCE, "cpu")))
        work(study, listener)
        assert listener.failures == ["out_of_memory"] * 2
        assert outcomes(study) == ALL
        first = study.plan.journal.trials()[0]
        whole = batches.POSITIONS_AT_ONCE["cpu"]
        assert sizes[:4] == [whole // 4] * 3 + [whole]
        told = json.loads((study.folder / "trials" / first.trial_key / "result.json").read_text())
        assert told["config"]["training"]["batch_size"] == 64


def test_in_smaller_blocks_a_step_without_dropout_is_the_same_step(out: Path) -> None:
    with opened(out, spec(model={**TINY_STUDY["model"], "dropout": 0.0})) as study:  # type: ignore[dict-item]
        (cell, *_) = study.plan.cells.values()
        trial = study.plan.journal.start(cell, "search", 0, 0, {"training.learning_rate": 0.01})
        told = {"run": to_dict(run_config(cell, trial, None))}
        rows: dict[int, list[dict[str, Any]]] = {0: [], 5: []}
        for halvings, found in rows.items():
            with smaller_blocks(0):
                conducting.run_trial_files(
                    {**told, "halvings": halvings}, out / str(halvings), lambda message, found=found: found.append(message["row"])
                )  # type: ignore[misc]
        losses = [[row["train_loss"] for row in found] for found in rows.values()]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_full_disk_stops_the_study_and_fails_no_trial(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, [OSError(errno.ENOSPC, "No space left on device")])
    with opened(out, spec(resources={"retries": 0})) as study:
        conductor = work(study)
        assert "the disk is full" in (conductor.stopping or "")
        assert outcomes(study) == Counter({("search", "running"): 1})
    with opened(out, spec(resources={"retries": 0})) as study:
        work(study)
        assert outcomes(study) == ALL


def test_failures_are_told_apart() -> None:
    assert failure_kind(torch.OutOfMemoryError("CUDA out of memory")) == "out_of_memory"
    assert failure_kind(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")) == "out_of_memory"
    assert failure_kind(OSError(errno.EDQUOT, "Disk quota exceeded")) == "disk_full"
    assert failure_kind(OSError(errno.EIO, "Input/output error")) == "error"


def test_ended_trials_keep_no_last_checkpoint_and_a_disk_budget_takes_the_worst_search_weights(out: Path) -> None:
    with opened(out, spec(budget={**PLAIN["budget"], "search_trials": 4})) as study:  # type: ignore[dict-item]
        work(study)
        journal, trials = study.plan.journal, study.folder / "trials"
        assert not list(trials.glob("*/last.ckpt"))
        values = {trial.trial_key: journal.best_value(trial.trial_key) or 0.0 for trial in journal.trials("attic/scratch", "search")}
        by_value = sorted(values, key=values.__getitem__)
        size = (trials / by_value[0] / "best.safetensors").stat().st_size
        ended = journal.trials("attic/scratch", "confirm")[0]
        tidy(Places(study.folder), journal, ended, disk_gb=(used_bytes(trials) - size - 1) / 1e9)
        assert [key for key in by_value if (trials / key / "best.safetensors").exists()] == by_value[2:]
        tidy(Places(study.folder), journal, ended, disk_gb=1e-9)
        assert [key for key in by_value if (trials / key / "best.safetensors").exists()] == by_value[3:]
        confirmed = journal.trials("attic/scratch", "confirm")
        assert all((trials / trial.trial_key / "best.safetensors").exists() for trial in confirmed)


def test_the_ledger_says_what_was_given_and_used(out: Path) -> None:
    with opened(out, spec()) as study:
        work(study)
        told = cell_ledger(study.plan, study.plan.cells["attic/scratch"])
        given = {name: told[name] for name in ("search_trials_given", "confirm_trials_given", "epochs_given", "search_trials_used")}
        assert given == {"search_trials_given": 2, "confirm_trials_given": 2, "epochs_given": 12, "search_trials_used": 2}
        assert told["epochs_used"] == 12
        assert told["seconds"] > 0
    assert unequal([told, {**told, "epochs_given": 9}]) == ["epochs_given"]
    assert unequal([told, {**told, "epochs_given": 9, "search_trials_given": 0}]) == []
    assert unequal([told, {**told, "epochs_given": 9, "epochs_used": 0}]) == []  # what does not train is compared with none


def test_gpu_hours_end_a_search_and_not_its_confirmation(tmp_path: Path) -> None:
    began = begin(tmp_path, two_cells())
    budget = Budget(epochs=9, gpu_hours=1e-3, search_trials=6, grace_epochs=9)
    plan = Plan(began.journal, list(began.cells.values())[:1], budget, 0, gpus=0.5)
    (name, *_) = plan.cells
    trial = plan.next_trial(lambda cell, number, given: {"training.learning_rate": 0.1})
    assert trial is not None
    for epoch in range(1, 8):  # 1.1 s each: 7.7 s on half a GPU are .00107 GPU hours
        plan.report(trial.trial_key, row(epoch, 0.1))
    plan.journal.end(trial.trial_key, "finished", result={})
    following = plan.next_trial(lambda cell, number, given: {"training.learning_rate": 0.2})
    assert following is not None
    assert (following.cell, following.phase) == (name, "confirm")


def test_on_a_new_head_the_study_goes_on_from_the_storage(out: Path, tmp_path: Path) -> None:
    wanted = spec(stores={"storage": str(tmp_path / "shared")})
    with opened(out, wanted) as study:
        work(study, Quiet(lambda key, epoch: study.plan.journal.ask("stop") if epoch == 2 else None))
    shutil.rmtree(out / "tiny")
    (out / "tiny").mkdir()
    write_demo(out / "tiny" / "domains", config=TINY_SHOPS)
    with opened(out, wanted, resume=True) as study:
        (running,) = study.plan.journal.trials()
        assert [report.epoch for report in study.plan.journal.reports(running.trial_key)] == [1, 2]
        assert Journal(out / "tiny" / "study.sqlite3").trial(running.trial_key) == running
    with (
        pytest.raises(BadInput, match="neither does the storage"),
        opened(tmp_path / "else", spec(stores={"storage": str(tmp_path / "none")}), resume=True),
    ):
        pass


def test_a_changed_pre_training_is_set_aside_here_and_on_the_storage(out: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    plain = {"sources": ["bazaar"], "training": {"epochs": 1}}
    told = {"arms": {"pretrained": {"init": "pretrained"}}, "cells": [{"domains": ["attic"], "arms": ["pretrained"]}]}
    told |= {"stores": {"storage": str(shared)}}
    with opened(out, spec(pretrain=plain, **told)) as study:
        for place in (study.folder, shared / "tiny"):
            (place / "pretrain").mkdir(parents=True)
            (place / "pretrain" / "last.ckpt").write_text(place.name)
    changed = spec(pretrain={**plain, "training": {"epochs": 2}}, **told)
    with pytest.raises(BadInput, match=r"training\.epochs: 1 then, 2 now"), opened(out, changed):
        pass
    assert (out / "tiny" / "pretrain" / "last.ckpt").exists()
    with opened(out, changed, accept=lambda text: True) as study:
        assert not (study.folder / "pretrain").exists()
        assert not (shared / "tiny" / "pretrain" / "last.ckpt").exists()
        (aside,) = study.folder.glob("pretrain.superseded_*")
        assert (aside / "last.ckpt").exists()


def test_another_mlflow_store_gets_everything(out: Path, tmp_path: Path) -> None:
    elsewhere = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    with opened(out, spec()) as study:
        study.plan.journal.start(study.plan.cells["attic/scratch"], "search", 0, 0, {"training.learning_rate": 0.01})
        (trial,) = study.plan.journal.trials()
        study.plan.journal.end(trial.trial_key, "failed", reason="on purpose")
        study.plan.journal.set_tracked(trial.trial_key)
    for stores, left in (({}, []), ({"mlflow": elsewhere}, [trial.trial_key]), ({"mlflow": elsewhere}, [trial.trial_key])):
        with opened(out, spec(stores=stores)) as study:
            assert study.plan.journal.untracked() == left


def test_a_trials_worker_imports_neither_optuna_nor_mlflow() -> None:
    code = "import sys, studies.engine; print([name for name in ('optuna', 'mlflow') if name in sys.modules])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert told.stdout.strip() == "[]"


def test_a_signal_before_the_first_trial_is_a_stop_too(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray answers SIGTERM with SystemExit(15) until the study listens itself."""

    def terminated(*_: object, **__: object) -> None:
        raise SystemExit(15)

    monkeypatch.setattr("studies.study.start_ray", terminated)
    assert run_study(spec(), out, data=None) == 1
    assert "Stopped: signal SIGTERM" in capsys.readouterr().out
