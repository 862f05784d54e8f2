"""What MLflow is told, by its fixed names: parameters, tags and metrics of cells and trials, and a note for newcomers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # before MLflow is imported

from mlflow.entities import Metric

from mmm4rec.tracking import mlflow_name
from studies.cells import Cell
from studies.spec import Spec
from studies.state import Trial

COMPARE = (  # a page of MLflow's own
    "#/experiments/{}/runs?workflowType=machine_learning&searchFilter={}&orderByKey={}&orderByAsc=false&compareRunsMode=CHART"
)


def cell_tags(cell: Cell) -> dict[str, str]:
    """What the runs of a cell and of its trials have in common."""
    return {
        "mmm4rec.cell": cell.name,
        "mmm4rec.domain": cell.domain,
        "mmm4rec.arm": cell.arm,
        "mmm4rec.fingerprint": cell.fingerprint,
    }


def cell_facts(cell: Cell, position: int, spec: Spec) -> dict[str, str]:
    """A cell's tags: MLflow lets no parameter change, and a spec may, while the study lives."""
    besides_init = hashlib.sha256(json.dumps([cell.run, cell.shuffle_features], sort_keys=True).encode()).hexdigest()[:8]
    facts = {
        "position": position,
        "init": cell.init,
        "besides_init": besides_init,  # equal where arms differ in nothing but init
        "search_trials": cell.search_trials,
        "epochs": spec.budget.epochs,
        "confirm_seeds": cell.confirm_seeds,
        "space": json.dumps({key: [p.low, p.high, p.log, p.choices] for key, p in cell.space.items()}),
        "baseline": spec.baseline or "",
        "metric": cell.metric,
    }
    return cell_tags(cell) | {f"mmm4rec.{key}": str(value) for key, value in facts.items()}


def trial_params(cell: Cell, trial: Trial) -> dict[str, Any]:
    """What is known of a trial when it starts; MLflow can group runs by each of these."""
    told = {"arm": cell.arm, "domain": cell.domain, "init": cell.init, "phase": trial.phase}
    return told | trial.config | {"seed": trial.seed, "number": trial.number}


def result_tags(result: Mapping[str, Any]) -> dict[str, str]:
    """What a run's result says of its domain, its protocol, its code, its checkpoint and the one that it began from."""
    told = {name: result.get(name) for name in ("fingerprint", "split", "metrics", "users", "items", "code_version", "checkpoint")}
    told["began_from"] = result.get("init")
    return {f"mmm4rec.{tag}": str(value) for tag, value in told.items() if value is not None}


def epoch_metrics(row: Mapping[str, Any], seconds: float, timestamp_ms: int) -> list[Metric]:
    """An epoch's metrics at its optimizer step; `seconds` is the trial's time up to here."""
    values: dict[str, float] = {"seconds": seconds}
    if row["train_loss"] is not None:
        values["train loss"] = row["train_loss"]
    values |= {f"valid {name}": value for name, value in row["valid"].items()}
    values |= {f"train loss {domain}": loss for domain, loss in row.get("domain_losses", {}).items()}
    values |= {f"zero_shot {domain}": value for domain, value in row.get("zero_shot", {}).items()}
    values["epoch"] = row["epoch"]  # written last: where it stands, all of them do
    return [Metric(mlflow_name(name), float(value), timestamp_ms, row["optimizer_steps"]) for name, value in values.items()]


def step_metrics(row: Mapping[str, Any]) -> list[Metric]:
    """What optimizer steps of pre-training came to, under `step/`: a line of steps.jsonl."""
    names = ("gradient_norm", "learning_rate", "workers", "examples_per_second")
    values = {name: row[name] for name in names} | {"examples_per_second_per_worker": row["examples_per_second"] / row["workers"]}
    values |= {"loss": row["train_loss"]} | {f"loss {domain}": loss for domain, loss in row["domain_losses"].items()}
    return [Metric(mlflow_name(f"step {name}"), float(value), row["at_ms"], row["optimizer_steps"]) for name, value in values.items()]


def result_metrics(result: Mapping[str, Any], steps: int, timestamp_ms: int) -> list[Metric]:
    """The metrics at the best epoch, at that epoch's optimizer step; and the most memory that the run held."""
    values = {f"best_valid {name}": value for name, value in result["valid"].items()}
    values |= {f"test {name}": value for name, value in result.get("test", {}).items()}
    values |= {"peak_memory_bytes": result["peak_memory_bytes"]} if "peak_memory_bytes" in result else {}
    return [Metric(mlflow_name(name), float(value), timestamp_ms, steps) for name, value in values.items()]


def note(experiment: str, domains: Sequence[str]) -> str:
    """Tells a newcomer, at the head of MLflow's page of the experiment (its id), where to look. Markdown."""
    order = quote("metrics.`test/ndcg_at_10`")
    filters = {name: quote(f"tags.mmm4rec.phase = 'confirm' and tags.mmm4rec.domain = '{name}'") for name in domains}
    links = " · ".join(f"[{name}]({COMPARE.format(experiment, wanted, order)})" for name, wanted in filters.items())
    return (
        f"**Compare the arms** by their confirm trials, best first: {links}\n\n"
        "There, *Group by* `arm` draws means over seeds, and the chart `valid/ndcg_at_10` has the curves; a step is an optimizer step."
        " `test/*` and `best_valid/*` are of the best epoch, at its step. Sorted by *Created*, runs nest: study, cell, trial,"
        " and charts leave out trials whose cell is folded."
    )
