"""What others do with a study while its driver runs, or after: see how it stands, stop it, add to it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import yaml

from mmm4rec.errors import BadInput
from studies.cells import Cell, build_cells
from studies.domains import make_domains
from studies.files import GB, used_bytes
from studies.plan import Plan
from studies.progress import clock
from studies.spec import Spec, extended
from studies.state import Journal, locked, now_ms
from studies.study import check


@contextmanager
def _journal(spec: Spec, out: Path) -> Iterator[Journal]:
    file = out / spec.study / "study.sqlite3"
    if not file.is_file():
        raise BadInput("holds no study yet.", file=file.parent, remedy="Begin it, or correct --spec and --out.")
    with closing(Journal(file)) as journal:
        yield journal


def is_running(folder: Path) -> bool:
    """Whether a driver works on the study in the folder."""
    try:
        with locked(folder / ".lock", wait=False):
            return False
    except BadInput:
        return True


def status(spec: Spec, out: Path) -> str:
    """How the study stands: a line a cell (search and confirm trials, best so far), what runs, what failed, time left, disk."""
    folder = out / spec.study
    with _journal(spec, out) as journal:
        cells = check(extended(spec, journal.additions()))
        plan = Plan(journal, cells, spec.budget, spec.seed, warm=spec.warm_start_from, gpus=spec.resources.gpus)
        width = max(len(cell.name) for cell in cells)
        lines = [f"{'cell':{width}}  search   confirm  running  failed  best valid {spec.metric}"]
        lines += [_cell_line(plan, cell, width) for cell in cells]
        running = [trial for trial in journal.trials(outcome="running") if trial.cell in plan.cells]
        for trial in running:
            reports = journal.reports(trial.trial_key)
            lines.append(f"{trial.name} is at epoch {reports[-1].epoch if reports else 0} of {spec.budget.epochs}")
        driver = "a driver works on it" if is_running(folder) else "no driver works on it"
        disk = f"{used_bytes(folder / 'trials') / GB:.2f} GB of trials' files"
        budget = "" if spec.resources.disk_gb is None else f" of {spec.resources.disk_gb:g}"
        lines.append(f"{plan.cells_done()}/{len(cells)} cells done, {driver}, {_time_left(plan)} left, {disk}{budget}.")
    return "\n".join(lines)


def _cell_line(plan: Plan, cell: Cell, width: int) -> str:
    counts = plan.journal.counts()

    def ended(phase: str) -> int:
        return sum(n for (name, of, outcome), n in counts.items() if (name, of) == (cell.name, phase) and outcome != "running")

    running, failed = (
        sum(counts.get((cell.name, phase, outcome), 0) for phase in ("search", "confirm")) for outcome in ("running", "failed")
    )
    best = max((value for value in plan.journal.best_values(cell.name).values() if value is not None), default=None)
    told = "-" if best is None else f"{best:.4f}"
    search, confirm = f"{ended('search')}/{cell.search_trials}", f"{ended('confirm')}/{cell.confirm_seeds}"
    return f"{cell.name:{width}}  {search:7}  {confirm:7}  {running:7}  {failed:6}  {told}"


def _time_left(plan: Plan) -> str:
    """By what the trials of the last hour took, or of all where none ended in it."""
    ended = [trial for trial in plan.journal.trials() if trial.ended_ms is not None and trial.cell in plan.cells]
    total = sum(cell.search_trials + cell.confirm_seeds for cell in plan.cells.values())
    recent = [trial for trial in ended if now_ms() - (trial.ended_ms or 0) < 3_600_000] or ended
    if not recent:
        return "an unknown time"
    first, last = min(trial.started_ms for trial in recent), max(trial.ended_ms or 0 for trial in recent)
    return clock((total - len(ended)) * (last - first) / 1000 / len(recent))


def stop(spec: Spec, out: Path, *, wait_seconds: float = 0.0) -> str:
    """Ask the driver to begin nothing new and to end when the running epochs have ended."""
    folder = out / spec.study
    with _journal(spec, out) as journal:
        if not is_running(folder):
            return f"No driver works on {folder}: there is nothing to stop."
        journal.ask("stop")
    deadline = time.monotonic() + wait_seconds
    while is_running(folder) and time.monotonic() < deadline:
        time.sleep(0.2)
    return f"The study in {folder} stops when its running epochs have ended. --resume goes on."


def add(spec: Spec, out: Path, *, data: Path | None, domains: Sequence[str], arms: Sequence[str]) -> str:
    """Add domains (each gets every arm) and arms (each gets every domain) to a study; its driver, if one runs, takes them up.

    Raises BadInput where one is there already, or wrong.
    """
    if not domains and not arms:
        raise BadInput("add needs something to add.", remedy="Give --domain NAME or --arm NAME=YAML.")
    shops = spec.domains.shops()
    own = [name for name in domains if shops is not None and name in (*shops.sources, *shops.targets)]
    addition: dict[str, Any] = {"domains": list(domains), "arms": dict(map(_definition, arms)), "demo": own}
    folder = out / spec.study
    with _journal(spec, out) as journal:
        whole = extended(spec, [*journal.additions(), addition])
        check(whole)
        cells, warnings = build_cells(whole, make_domains(whole.domains, folder / "domains", data=data, seed=spec.seed))
        journal.add_addition(addition)
        before = set(journal.cell_names())
    new = [cell.name for cell in cells if cell.name not in before]
    heard = "The running driver takes them up." if is_running(folder) else "--resume runs them."
    return "\n".join([*(f"warning: {text}" for text in warnings), f"Added {len(new)} cells: {', '.join(new)}. {heard}"])


def _definition(text: str) -> tuple[str, Any]:
    name, equals, told = text.partition("=")
    try:
        definition = yaml.safe_load(told or "{}")
    except yaml.YAMLError as error:
        raise BadInput(f"--arm '{text}' is not YAML.", remedy="Write NAME={init: pretrained, model: {filter: false}}.") from error
    if not equals or not name or not isinstance(definition, dict):
        raise BadInput(f"--arm '{text}' defines no arm.", remedy="Write NAME={init: pretrained, model: {filter: false}}.")
    return name, definition
