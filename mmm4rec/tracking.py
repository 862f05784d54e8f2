"""What a tracker is, and the names that metrics have where `@` is forbidden."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

from mmm4rec.config import to_dict
from mmm4rec.data.domain import write_atomically
from mmm4rec.training.loop import EpochReport, StepReport


class Tracker(Protocol):
    """Something that keeps a run's curve."""

    def log(self, history: list[EpochReport]) -> None:
        """Bring the kept curve up to this history; saying the same again changes nothing."""


class JsonLinesTracker:
    """Keeps a curve as a file with one JSON object an epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def log(self, history: list[EpochReport]) -> None:
        lines = (json.dumps(to_dict(report)) for report in history)
        write_atomically(self.path, "".join(f"{line}\n" for line in lines).encode())


class StepLines:
    """Keeps what optimizer steps came to, one JSON object a report, in a file that grows."""

    def __init__(self, path: Path, optimizer_steps: int) -> None:
        """Args: optimizer_steps: where the run stands; later lines, of steps that are done again, are dropped."""
        self.path = path
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["optimizer_steps"] <= optimizer_steps]
            write_atomically(path, "".join(kept).encode())

    def log(self, report: StepReport) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(to_dict(report)) + "\n")


def mlflow_name(metric: str) -> str:
    """`valid ndcg@10` -> `valid/ndcg_at_10`: MLflow's names hold no `@`."""
    return metric.replace(" ", "/").replace("@", "_at_")


def metric_name(name: str) -> str:
    """`valid/ndcg_at_10` -> `valid ndcg@10`, the inverse of `mlflow_name`."""
    return name.replace("/", " ").replace("_at_", "@")
