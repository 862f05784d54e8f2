"""A study from its spec to its tables: domains, pre-training, cells, report."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
import yaml

from mmm4rec.config import to_dict
from mmm4rec.data.domain import write_atomically
from mmm4rec.errors import BadInput
from mmm4rec.execute import code_version
from studies.cells import Cell, Source, build_cells
from studies.conductor import Conductor, failure_kind
from studies.domains import make_domains
from studies.engine import run_cells, run_config, start_ray
from studies.files import tidy
from studies.ledger import cell_ledger
from studies.mlflow_store import shown, store_uri
from studies.mlflow_tracker import MlflowTracker
from studies.mounts import refuse_network_disk
from studies.outbox import NotWritten
from studies.places import Places
from studies.plan import Plan
from studies.pretrain import pretrain, pretrain_config, tell
from studies.progress import Progress
from studies.snapshots import JOURNAL, REPORT, Lease, Snapshots, restore
from studies.space import walk
from studies.spec import Spec, extended
from studies.state import Journal, Trial, locked, now_ms
from studies.storage import Storage
from studies.suggestions import Suggestions, sqlite_url
from studies.tables import write_tables

UNPINNED = ("resources", "baseline", "stores")  # keys of a spec that decide no number: they may change while the study lives
BUDGETS = ("search_trials", "confirm_seeds")  # of a cell: what has run stays good when they change
PRETRAINING, CHECKPOINT, CODE = "pre-training", "pre-trained checkpoint", "code"  # pinned beside the spec and the cells

Accept = Callable[[str], bool]  # hears what differs from how a study began, and says whether to go on


def refuse(text: str) -> bool:
    """Accept nothing."""
    return False


@dataclass
class Study:
    """An open study. Only one process has it open."""

    spec: Spec  # with what joined it
    folder: Path
    sources: dict[str, Source]
    plan: Plan
    tracker: MlflowTracker
    data: Path | None
    accept: Accept
    optuna_url: str
    places: Places
    began: Spec = field(repr=False)  # without

    def pretrain(self) -> Path | None:
        """The checkpoint of the pretrained arms. When it is another one than before, and that is accepted, their cells begin anew."""
        checkpoint = pretrain(self.spec, self.sources, self.places, self.tracker)
        if checkpoint is not None:
            facts = {"sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest()[:16]}
            settle(self.plan.journal, {CHECKPOINT: facts}, self.plan.cells, self.accept)
        return checkpoint

    def tell_pretraining(self) -> None:
        """Tell MLflow of a pre-training that has ended: it may have been away when it did."""
        if (self.folder / "pretrain" / "result.json").is_file():
            tell(self.tracker, self.folder / "pretrain")

    def conductor(self) -> Conductor:
        """What hands out this study's trials."""
        journal, spec = self.plan.journal, self.spec
        return Conductor(
            self.plan,
            Suggestions(journal, self.optuna_url, study=spec.study, seed=spec.seed),
            self.tracker,
            Progress(self.plan),
            spec.resources,
            take_up=self.take_up,
            tidy=lambda trial: tidy(self.places, journal, trial, disk_gb=spec.resources.disk_gb),
            bring=self.places.bring,
        )

    def take_up(self) -> None:
        """Bring in the cells of domains and arms that were added since the study was opened."""
        self.spec = extended(self.began, self.plan.journal.additions())
        self.sources = make_domains(self.spec.domains, self.folder / "domains", data=self.data, seed=self.spec.seed)
        cells, _ = build_cells(self.spec, self.sources)
        settle(self.plan.journal, {f"cell {cell.name}": _cell_facts(cell) for cell in cells}, {}, refuse)
        self.plan.journal.add_cells([cell.name for cell in cells])
        self.plan.cells.update({cell.name: cell for cell in cells})
        self.tracker.add_cells(cells)
        _write_spec(self.spec, self.folder)


@contextmanager
def open_study(
    spec: Spec, out: Path, *, data: Path | None, accept: Accept = refuse, resume: bool = False, say: Callable[[str], None] = print
) -> Iterator[Study]:
    """Open the study under `out`, or begin it: check the spec, make the domains, read or start the journal.

    Args: resume: only a study that exists. accept: is asked about what differs from how the study began (spec, cells, code).
    Raises BadInput where the spec is wrong or its changes are not accepted, a domain cannot be made, or another process
    works on it.
    """
    check(spec)
    folder, stores = out / spec.study, spec.stores.filled()
    places = Places(folder, None if stores.storage is None else Storage(stores.storage).sub(spec.study))
    if resume and places.storage is None and not (folder / JOURNAL).is_file():
        raise BadInput("holds no study to resume.", file=folder, remedy="Correct --out or the spec, or leave --resume out to begin.")
    folder.mkdir(parents=True, exist_ok=True)
    refuse_network_disk(folder)
    with locked(folder / ".lock", wait=False), _kept(places, resume=resume):
        journal = Journal(folder / JOURNAL)
        try:
            journal.remember("begun_ms", str(now_ms()))
            _settle_tracking(journal, stores.mlflow or "")
            whole = extended(spec, journal.additions())
            sources = make_domains(whole.domains, folder / "domains", data=data, seed=spec.seed)
            cells, warnings = build_cells(whole, sources)
            for warning in warnings:
                say(f"warning: {warning}")
            _settle_all(journal, spec, cells, sources, places, accept)
            _write_spec(whole, folder)
            tracker = MlflowTracker(folder, whole, cells, journal.path, stores.mlflow)
            tracker.start()
            plan = Plan(journal, cells, spec.budget, spec.seed, warm=spec.warm_start_from, gpus=spec.resources.gpus)
            optuna_url = stores.optuna or sqlite_url(folder / "optuna.sqlite3")
            try:
                yield Study(whole, folder, sources, plan, tracker, data, accept, optuna_url, places, spec)
            finally:
                tracker.close()
        finally:
            journal.close()


@contextmanager
def _kept(places: Places, *, resume: bool) -> Iterator[None]:
    """Inside, this driver alone has the study on the shared storage; its stores come from there, and are kept there."""
    if places.storage is None:
        yield
        return
    places.storage.check_writable()
    with Lease(places.storage, on_lost=lambda: os.kill(os.getpid(), signal.SIGTERM)) as lease:
        restore(places.folder, places.storage)
        if resume and not (places.folder / JOURNAL).is_file():
            rule = "holds no study to resume, and neither does the storage."
            raise BadInput(rule, file=places.folder, remedy="Correct --out, --storage or the spec, or leave --resume out to begin.")
        snapshots = Snapshots(places.folder, places.storage, may_push=lease.held)
        snapshots.start()
        try:
            yield
        finally:
            snapshots.close()


def _settle_tracking(journal: Journal, uri: str) -> None:
    """Let everything be written again where MLflow's store is another one than before."""
    now, before = shown(uri, uri), journal.fact("tracked_in")
    if before not in (None, now):
        journal.track_again()
    journal.replace("tracked_in", now)


def _settle_all(
    journal: Journal, spec: Spec, cells: tuple[Cell, ...], sources: Mapping[str, Source], places: Places, accept: Accept
) -> None:
    facts: dict[str, dict[str, Any]] = {"spec": {key: value for key, value in to_dict(spec).items() if key not in UNPINNED}}
    facts[CODE] = {"version": code_version()}
    if spec.pretrain is not None and spec.pretrain.sources:
        config = to_dict(pretrain_config(spec, dict(sources)))
        config["data"]["domains"] = {name: [sources[name].fingerprint, sources[name].features] for name in spec.pretrain.sources}
        config["data"].pop("zero_shot")  # looked at on the way
        facts[PRETRAINING] = {key: value for key, value in config.items() if key != "device"}
    facts |= {f"cell {cell.name}": _cell_facts(cell) for cell in cells}
    settle(
        journal, facts, {cell.name: cell for cell in cells}, accept, lambda changed: _set_aside(places) if PRETRAINING in changed else None
    )
    for name in set(journal.cell_names()) - {cell.name for cell in cells}:
        if journal.trials(name):
            journal.supersede(name)
    journal.add_cells([cell.name for cell in cells])


def _set_aside(places: Places) -> None:
    """Move an earlier pre-training away; a kill in between leaves less to move to the next start."""
    aside = places.folder / f"pretrain.superseded_{now_ms()}"
    if (places.folder / "pretrain").exists():
        (places.folder / "pretrain").rename(aside)
    if places.storage is not None:
        place = places.storage.sub("pretrain")
        place.pull(aside)
        place.delete()


def settle(
    journal: Journal,
    facts: Mapping[str, dict[str, Any]],
    cells: Mapping[str, Cell],
    accept: Accept,
    before: Callable[[set[str]], None] = lambda changed: None,
) -> None:
    """Note the facts that a study's numbers rest on. Where they were others, ask; then set aside what rests on the old ones.

    Args: before: hears which keys have changed, before they are noted. Raises BadInput, with the differences, where the
    change is not accepted.
    """
    changes = {key: text for key, told in facts.items() if (text := journal.change(key, told))}
    if changes:
        text = "".join(f"{key}:\n{lines}" for key, lines in changes.items())
        if not accept(text):
            remedy = "Accept the changes with --yes (what rests on them begins anew, nothing is deleted), or give the study another name."
            raise BadInput(f"was begun with another {text}", file=journal.path, remedy=remedy)
        before(set(changes))
    with journal.transaction():
        for key in changes:
            _supersede(journal, key, facts[key], cells)
        for key, told in facts.items():
            journal.pin(key, told)


def _supersede(journal: Journal, key: str, now: Mapping[str, Any], cells: Mapping[str, Cell]) -> None:
    """Set aside the trials that rest on a fact that has changed."""
    if key == CHECKPOINT:
        for cell in cells.values():
            if cell.init == "pretrained":
                journal.supersede(cell.name)
    elif key.startswith("cell "):
        before = json.loads(journal.fact(key) or "{}")
        if any(before.get(name) != now.get(name) for name in {*before, *now} - set(BUDGETS)):
            journal.supersede(key.removeprefix("cell "))
        elif before["search_trials"] != now["search_trials"]:
            journal.supersede(key.removeprefix("cell "), "confirm")


def _cell_facts(cell: Cell) -> dict[str, Any]:
    facts = to_dict(cell)
    for name in ("path", "encoders"):  # the features' digests tell these apart too
        facts["source"].pop(name)
    return json.loads(json.dumps(facts))


def _write_spec(spec: Spec, folder: Path) -> None:
    write_atomically(folder / "spec.yaml", yaml.safe_dump(to_dict(spec), sort_keys=False, allow_unicode=True).encode())


def run_study(spec: Spec, out: Path, *, data: Path | None, accept: Accept = refuse, resume: bool = False) -> int:
    """Run what is left of the study and report. Exit status: 0 done, 1 stopped or a cell without a result."""
    with open_study(spec, out, data=data, accept=accept, resume=resume) as study:
        journal = study.plan.journal
        journal.heard("stop")  # of an earlier driver
        study.tracker.catch_up()
        for key in journal.untracked():
            study.tracker.trial(key)
        study.tell_pretraining()
        stopped = None if study.plan.done() else _work(study)
        for name, cell in study.plan.cells.items():
            study.tracker.ledger(name, cell_ledger(study.plan, cell))
        try:
            study.tracker.flush()
        except NotWritten as error:
            print(f"error: {error}")
            return 1
        if not study.plan.done():
            print(f"Stopped: {stopped or 'interrupted'}. The same command, or --resume, goes on from here.")
            return 1
        return _report(study)


def _work(study: Study) -> str | None:
    """Pre-train, then run the cells; why it stopped, if it did before the end."""
    pre = study.spec.pretrain
    try:
        start_ray(study.spec.resources, workers=pre.workers if pre and pre.sources else 1)
        _check_reach(study.places)
        checkpoint = study.pretrain()
        conductor = study.conductor()
        conductor.catch_up()
        with _stopping_gently(conductor):
            run_cells(conductor, places=study.places, pretrained=checkpoint)
        return conductor.stopping
    except (OSError, sqlite3.Error) as error:
        if failure_kind(error) != "disk_full":
            raise
        return f"the disk is full ({error}); free some space"
    except SystemExit as error:
        if error.code != signal.SIGTERM:
            raise
        signal.alarm(0)  # while it starts, Ray's native handler hears SIGTERM first, and would abort everything three seconds later
        return "signal SIGTERM"  # Ray's answer to it, while Ray starts and while it pre-trains
    finally:
        ray.shutdown()


def _check_reach(places: Places) -> None:
    """Raise BadInput where Ray has several machines and the study's files would lie on one of them."""
    machines = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if places.storage is None and len(machines) > 1:
        rule = f"Ray has {len(machines)} machines, and the study's files would lie on this one alone."
        raise BadInput(rule, remedy="Give a place that all of them reach: --storage s3://bucket/studies, or a shared folder.")


@contextmanager
def _stopping_gently(conductor: Conductor) -> Iterator[None]:
    """Inside, SIGTERM and SIGINT let the running epochs end and begin nothing new; a second one interrupts."""

    def stop(number: int, frame: object) -> None:
        for one in (signal.SIGTERM, signal.SIGINT):
            signal.signal(one, signal.default_int_handler)
        conductor.stopping = f"signal {signal.Signals(number).name}"

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _report(study: Study) -> int:
    folder, journal = study.folder, study.plan.journal
    study.tracker.baseline()
    study.tracker.flush()
    table = write_tables(folder, uri=study.spec.stores.filled().mlflow)
    if (stands := str(len(journal.trials()))) != journal.fact("reported"):
        study.tracker.finish([path for name in (*REPORT, "spec.yaml") if (path := folder / name).exists()])
        journal.replace("reported", stands)
    shutil.rmtree(folder / "ray", ignore_errors=True)
    for trial in journal.trials(outcome="failed"):
        print(f"failed: {trial.name}: {(trial.reason or '').strip().splitlines()[-1]}")
    print(f"\n{table.to_markdown()}")
    print((folder / "tables" / "ledger.md").read_text(encoding="utf-8"))
    print(f"Test metrics of the confirm trials, mean ± sd over seeds. All of it on one page: {folder / 'index.html'}.")
    store = study.spec.stores.mlflow or store_uri(folder)
    print(f"Every trial in MLflow: {store if store.startswith('http') else f'mlflow ui --backend-store-uri {store}'}")
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
            config = walk(cell.space, lambda _, parameter, place=place: parameter.ends()[min(place, len(parameter.ends()) - 1)])  # type: ignore[misc]
            run_config(cell, Trial("", cell.name, "search", 0, 0, config, "running", None, None, 0, None, False), "checkpoint")
    return cells


def with_stores(spec: Spec, **given: str | None) -> Spec:
    """The spec with stores that the command line gave."""
    return replace(spec, stores=replace(spec.stores, **{name: value for name, value in given.items() if value is not None}))
