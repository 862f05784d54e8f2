"""A study from its spec to its tables: domains, pre-training, cells, report."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
import yaml

from mmm4rec.config import to_dict
from studies.cells import Cell, Source, build_cells
from studies.domains import make_domains
from studies.engine import run_cells, run_config, start_ray
from studies.mlflow_tracker import MlflowTracker, store_uri
from studies.plan import Plan
from studies.pretrain import pretrain, pretrain_config
from studies.spec import Spec
from studies.state import Journal, Trial, locked, now_ms
from studies.suggestions import Suggestions
from studies.tables import write_tables

UNPINNED = ("resources", "baseline")  # keys of a spec that decide no number: they may change while the study lives


@dataclass(frozen=True)
class Study:
    """An open study. Only one process has it open."""

    spec: Spec
    folder: Path
    sources: dict[str, Source]
    plan: Plan
    tracker: MlflowTracker

    def pretrain(self) -> Path | None:
        """The checkpoint of the pretrained arms; it stays the one that the study began with."""
        checkpoint = pretrain(self.spec, self.sources, self.folder, self.tracker)
        if checkpoint is not None:
            digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()[:16]
            self.plan.journal.pin("pre-trained checkpoint", {"sha256": digest})
        return checkpoint


@contextmanager
def open_study(spec: Spec, out: Path, *, data: Path | None, say: Callable[[str], None] = print) -> Iterator[Study]:
    """Open the study under `out`, or begin it: check the spec, make the domains, read or start the journal.

    Raises BadInput where the spec is wrong or was another one, a domain cannot be made, or another process works on it.
    """
    check(spec)
    folder = out / spec.study
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock", wait=False):
        journal = Journal(folder / "study.sqlite3")
        told = to_dict(spec)
        journal.pin("spec", {key: value for key, value in told.items() if key not in UNPINNED})
        journal.remember("begun_ms", str(now_ms()))
        (folder / "spec.yaml").write_text(yaml.safe_dump(told, sort_keys=False, allow_unicode=True), encoding="utf-8")
        sources = make_domains(spec.domains, folder / "domains", data=data, seed=spec.seed)
        journal.pin("features", {name: dict(source.features or {}) for name, source in sources.items()})
        cells, warnings = build_cells(spec, sources)
        for warning in warnings:
            say(f"warning: {warning}")
        journal.add_cells(cells)
        tracker = MlflowTracker(folder, spec, cells, journal.path)
        tracker.start()
        try:
            yield Study(spec, folder, sources, Plan(journal, cells, spec.budget, spec.seed), tracker)
        finally:
            tracker.close()
            journal.close()


def run_study(spec: Spec, out: Path, *, data: Path | None) -> int:
    """Run what is left of the study and report. Exit status: 0 done, 1 interrupted or a cell without a result."""
    with open_study(spec, out, data=data) as study:
        for trial in study.plan.journal.trials():
            study.tracker.trial(trial.trial_key)
        if not study.plan.done():
            _work(study)
        study.tracker.flush()
        if not study.plan.done():
            print("Interrupted. The same command goes on from here.")
            return 1
        return _report(study)


def _work(study: Study) -> None:
    pre = study.spec.pretrain
    start_ray(study.spec.resources, workers=pre.workers if pre and pre.sources else 1)
    try:
        checkpoint = study.pretrain()
        seed_name = f"{study.spec.study} {study.spec.seed}"
        suggestions = Suggestions(study.plan.journal, study.folder / "optuna.sqlite3", seed_name=seed_name)
        run_cells(study.plan, suggestions, study.tracker, folder=study.folder, resources=study.spec.resources, pretrained=checkpoint)
    finally:
        ray.shutdown()


def _report(study: Study) -> int:
    folder, journal = study.folder, study.plan.journal
    study.tracker.baseline()
    study.tracker.flush()
    table = write_tables(folder)
    if journal.fact("reported_ms") is None:
        study.tracker.finish([path for name in ("tables", "figures") if (path := folder / name).exists()])
        journal.remember("reported_ms", str(now_ms()))
    failed = [trial for trial in journal.trials() if trial.outcome == "failed"]
    for trial in failed:
        print(f"failed: {trial.cell} {trial.phase} {trial.number}: {(trial.reason or '').strip().splitlines()[-1]}")
    print(f"\n{table.to_markdown()}")
    print(f"Test metrics of the confirm trials, mean ± sd over seeds. Tables: {folder / 'tables'}. Figures: {folder / 'figures'}.")
    print(f"Every trial in MLflow: mlflow ui --backend-store-uri {store_uri(folder)}")
    finished = {name: sum(t.outcome == "finished" for t in journal.trials(name, "confirm")) for name in study.plan.cells}
    wanted = {name: cell.confirm_seeds for name, cell in study.plan.cells.items()}
    short = [f"{name} ({finished[name]} of {wanted[name]})" for name in wanted if finished[name] < wanted[name]]
    if short:
        print(f"Fewer confirm trials than the spec asks for: {', '.join(short)}.")
    return 1 if short else 0


def check(spec: Spec) -> tuple[Cell, ...]:
    """The spec's cells, if every run that they can ask for is a valid one. Raises BadInput. Reads no file but a checkpoint's header."""
    names = {domain for group in spec.cells for domain in group.domains} | set(spec.pretrain.sources if spec.pretrain else ())
    sources = {name: Source(name, "", True) for name in names}
    cells, _ = build_cells(spec, sources)
    if spec.pretrain is not None and spec.pretrain.sources:
        pretrain_config(spec, sources)
    for cell in cells:
        longest = max((len(parameter.ends()) for parameter in cell.space.values()), default=1)
        for place in range(longest):
            config = {name: ends[min(place, len(ends) - 1)] for name, p in cell.space.items() if (ends := p.ends())}
            run_config(cell, Trial("", cell.name, "search", 0, 0, config, "running", None, None, 0, None, False), Path("checkpoint"))
    return cells


def describe(spec: Spec) -> str:
    """What the study would run, at most."""
    cells = check(spec)
    lines = [
        f"{cell.name}: {cell.search_trials} search + {cell.confirm_seeds} confirm trials over {', '.join(cell.space) or '-'}"
        for cell in cells
    ]
    search, confirm = sum(cell.search_trials for cell in cells), sum(cell.confirm_seeds for cell in cells)
    at_most = (search + confirm) * spec.budget.epochs
    pre = "no pre-training" if spec.pretrain is None else spec.pretrain.checkpoint or f"pre-training on {', '.join(spec.pretrain.sources)}"
    lines += [
        f"{len(cells)} cells, {search} search and {confirm} confirm trials, at most {at_most:,} epochs; rungs {spec.budget.rungs()}; {pre}."
    ]
    return "\n".join(lines)
