"""What stays of trials' files: the best weights and the last checkpoint while a trial runs, the best when it has ended."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from studies.places import Places
from studies.state import Journal, Trial

log = logging.getLogger(__name__)

GB = 1e9
RANKS = "ranks.parquet"  # a confirm trial's ranks by user: among its files, and as an artifact of its run
KEPT = (RANKS, "best.safetensors")  # of a confirm trial: artifacts of its run


def tidy(places: Places, journal: Journal, ended: Trial, *, disk_gb: float | None) -> None:
    """Delete what an ended trial needs no longer; above the budget, weights of ended search trials too, the worst first.

    The curve, the result and the ranks of a trial are kept, and so are the weights of each cell's best search trial and of
    every confirm trial. The budget counts where trials lie in a folder; an object store has its own limits.
    """
    if ended.outcome in ("finished", "pruned"):
        places.trial(ended.trial_key).delete(["last.ckpt"])
    trials = places.trials
    if disk_gb is None or trials is None:
        return
    excess = used_bytes(trials) - disk_gb * GB
    for file in _expendable(trials, journal):
        if excess <= 0:
            return
        excess -= file.stat().st_size
        file.unlink()


def used_bytes(trials: Path) -> int:
    """What all files of all trials take."""
    return sum(file.stat().st_size for file in trials.glob("*/*") if file.is_file())


def _expendable(trials: Path, journal: Journal) -> list[Path]:
    """Weights of ended search trials that are not the best of their cell, by how far they are from it."""
    found: list[tuple[float, Path]] = []
    for cell in journal.cell_names():
        values = {key: value for key, value in journal.best_values(cell).items() if value is not None}
        best = max(values.values(), default=0.0)
        for trial in journal.trials(cell, "search"):
            file = trials / trial.trial_key / "best.safetensors"
            value = values.get(trial.trial_key, float("-inf"))
            if trial.outcome != "running" and value < best and file.is_file():
                found.append((value - best, file))
    return [file for _, file in sorted(found)]


@contextmanager
def logged(file: Path) -> Iterator[None]:
    """Inside, what is logged and warned of goes to the end of a file too."""
    handler, root = logging.FileHandler(file, encoding="utf-8", delay=True), logging.getLogger()
    handler.setLevel(logging.WARNING)  # libraries say much more
    handler.setFormatter(logging.Formatter(f"%(asctime)s {platform.node()} %(levelname)s %(name)s: %(message)s"))
    logging.captureWarnings(True)
    root.addHandler(handler)
    log.warning("%s begins or goes on, process %d", file.parent.name, os.getpid())
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()
        logging.captureWarnings(False)
