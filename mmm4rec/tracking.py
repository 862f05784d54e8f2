"""What a tracker is, and the names that metrics have where `@` is forbidden."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

from mmm4rec.config import to_dict
from mmm4rec.data.domain import write_atomically
from mmm4rec.training.loop import EpochReport


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


def mlflow_name(metric: str) -> str:
    """`valid ndcg@10` -> `valid/ndcg_at_10`: MLflow's names hold no `@`."""
    return metric.replace(" ", "/").replace("@", "_at_")


def metric_name(name: str) -> str:
    """`valid/ndcg_at_10` -> `valid ndcg@10`, the inverse of `mlflow_name`."""
    return name.replace("/", " ").replace("_at_", "@")
