"""The runs of a study as tables, from MLflow or from an export: all that results are made from.

    runs     a row a run: run_id, experiment, name, status, start_ms, end_ms, and tags.*, params.* (text), metrics.* (last values)
    curves   a row a value: run_id, metric, step (optimizer steps), value
    ranks    a row a user of a confirm trial: run_id, split, user, rank

Names are those of MLflow. An export is a folder with one parquet file each, whose metadata holds a schema_version:

    python studies/runs.py results/demo                # writes results/demo/export/
    python studies/tables.py results/demo --export     # the tables anew, from there
"""

from __future__ import annotations

import argparse
import os
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Protocol

if __package__ in (None, ""):  # run as a file: the repository's root, not studies/, belongs on the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # before MLflow is imported

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from requests.exceptions import RequestException
from sqlalchemy.exc import SQLAlchemyError

from mmm4rec.errors import BadInput
from studies.files import RANKS
from studies.mlflow_store import is_database, open_store, search, shown, store_uri
from studies.state import Journal

SCHEMA_VERSION = 1
TABLES = {"runs": ("run_id", "experiment", "name", "status"), "curves": ("run_id", "metric", "step", "value"), "ranks": ("run_id", "rank")}
BULK = 500  # runs whose histories are asked for at once
MOST_VALUES = 2**31 - 1  # of one metric: all
CONNECTIONS = 8  # to a server at once
SERVER = "http://127.0.0.1:5000"  # where `mlflow ui` shows a store that is no server


class Runs(Protocol):
    """Where a study's runs are read from."""

    @property
    def runs(self) -> pd.DataFrame:
        """All runs, of every phase and outcome."""

    def curves(self, run_ids: Sequence[str], metrics: Iterable[str]) -> pd.DataFrame:
        """The values of these metrics, by run, metric and step."""

    def ranks(self, run_id: str) -> pd.DataFrame | None:
        """The columns split, user and rank of a run; None where it kept none."""


class MlflowRuns:
    """A study's runs in an MLflow store."""

    def __init__(self, folder: Path, uri: str | None = None) -> None:
        """Args: uri: of the store; None: the sqlite file in the study's folder. Raises BadInput where there is none."""
        if uri is None and not (folder / "mlflow.db").is_file():
            raise BadInput("holds no mlflow.db.", file=folder, remedy="Give the folder of a study, for instance results/demo.")
        self._folder, self._own, self._uri = folder, uri is None, uri or store_uri(folder)
        if self._uri.startswith("sqlite:///") and not (file := Path(self._uri.removeprefix("sqlite:///"))).is_file():
            raise BadInput("is no file.", file=file, remedy="Correct --store.")

    @cached_property
    def _client(self) -> MlflowClient:
        return open_store(self._uri)

    @contextmanager
    def _asked(self) -> Iterator[None]:
        """Inside, a store that does not answer is bad input."""
        try:
            yield
        except (MlflowException, SQLAlchemyError, sqlite3.Error, RequestException) as error:
            told = shown(error, self._uri).strip().splitlines()[0]
            rule = f"MLflow at {shown(self._uri, self._uri)} does not answer: {told}"
            raise BadInput(rule, remedy="Start it, or correct its address.") from None

    @cached_property
    def runs(self) -> pd.DataFrame:
        with self._asked():
            experiments = {str(found.experiment_id): found.name for found in self._client.search_experiments()}
            if not self._own:  # a store that many share
                name = _experiment_name(self._folder)
                experiments = {number: found for number, found in experiments.items() if found == name}
            found = search(self._client, list(experiments), "") if experiments else []
        address = SERVER if is_database(self._uri) else self._uri.rstrip("/")
        rows = [_row(run, experiments[run.info.experiment_id], address) for run in found]
        return pd.DataFrame(rows, columns=None if found else ["run_id"])

    def curves(self, run_ids: Sequence[str], metrics: Iterable[str]) -> pd.DataFrame:
        with self._asked():
            rows = [row for metric in metrics for row in self._history(run_ids, metric)]
        table = pd.DataFrame(rows, columns=["run_id", "metric", "step", "value"])
        return table.sort_values(["run_id", "metric", "step"], kind="stable", ignore_index=True)

    def _history(self, run_ids: Sequence[str], metric: str) -> list[tuple[str, str, int, float]]:
        """In bulk from a database; a server is asked run by run, for its address for many runs is of MLflow's own page."""
        if is_database(self._uri):
            parts = (run_ids[start : start + BULK] for start in range(0, len(run_ids), BULK))
            found = [one for part in parts for one in self._database.get_metric_history_bulk(part, metric, MOST_VALUES)]
            return [(one.run_id, metric, one.step, one.value) for one in found]
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            told = pool.map(lambda run_id: self._client.get_metric_history(run_id, metric), run_ids)
            return [(run_id, metric, one.step, one.value) for run_id, found in zip(run_ids, told, strict=True) for one in found]

    @cached_property
    def _database(self) -> SqlAlchemyStore:
        self._client.search_experiments(max_results=1)  # makes the tables where they are not there yet
        return SqlAlchemyStore(self._uri, str(self._folder / "artifacts"))

    def ranks(self, run_id: str) -> pd.DataFrame | None:
        """MLflow notes where artifacts lie when a study begins; of a study that was moved since, they are found in its folder."""
        with tempfile.TemporaryDirectory() as room, self._asked():
            file = self._folder / "artifacts" / run_id / "artifacts" / RANKS
            if not file.is_file() and any(artifact.path == RANKS for artifact in self._client.list_artifacts(run_id)):
                file = Path(self._client.download_artifacts(run_id, RANKS, dst_path=room))
            return pd.read_parquet(file, columns=["split", "user", "rank"]) if file.is_file() else None


class ExportedRuns:
    """A study's runs in a folder that `export` wrote."""

    def __init__(self, folder: Path) -> None:
        """Raises BadInput where a file is missing or no such table."""
        self._folder = folder
        for name, columns in TABLES.items():
            _check_table(folder / f"{name}.parquet", columns)

    @cached_property
    def runs(self) -> pd.DataFrame:
        return pd.read_parquet(self._folder / "runs.parquet")

    @cached_property
    def _curves(self) -> pd.DataFrame:
        return pd.read_parquet(self._folder / "curves.parquet")

    def curves(self, run_ids: Sequence[str], metrics: Iterable[str]) -> pd.DataFrame:
        table = self._curves
        table = table[table["metric"].isin(list(metrics)) & table["run_id"].isin(list(run_ids))]
        return table.sort_values(["run_id", "metric", "step"], kind="stable", ignore_index=True)

    def ranks(self, run_id: str) -> pd.DataFrame | None:
        table = pd.read_parquet(self._folder / "ranks.parquet", columns=["split", "user", "rank"], filters=[("run_id", "==", run_id)])
        return table.reset_index(drop=True) if len(table) else None


def open_runs(folder: Path, *, uri: str | None = None, exported: bool = False) -> Runs:
    """The runs of the study in `folder`. Args: exported: from its export/ rather than from MLflow. Raises BadInput."""
    return ExportedRuns(folder / "export") if exported else MlflowRuns(folder, uri)


def export(source: Runs, out: Path) -> None:
    """Write the three tables into `out`, all of them or none."""
    runs = source.runs.sort_values("run_id", ignore_index=True)
    told = [name.removeprefix("metrics.") for name in runs.columns if name.startswith("metrics.")]
    names = [name for name in told if not name.startswith(("ledger/", "peak_"))]
    kept = runs[runs["tags.mmm4rec.outcome"] == "finished"] if "tags.mmm4rec.outcome" in runs else runs[:0]
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    _write(runs, part / "runs.parquet")
    _write(source.curves(list(runs["run_id"]), names), part / "curves.parquet")
    with pq.ParquetWriter(part / "ranks.parquet", RANKS_SCHEMA) as writer:
        for run_id in kept["run_id"]:  # a row group a run: one run's ranks are read alone
            if (ranks := source.ranks(run_id)) is not None:
                writer.write_table(pa.Table.from_pandas(ranks.assign(run_id=run_id), schema=RANKS_SCHEMA, preserve_index=False))
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)


VERSIONED = {b"schema_version": str(SCHEMA_VERSION).encode()}
RANKS_SCHEMA = pa.schema(
    [("run_id", pa.string()), ("split", pa.string()), ("user", pa.int64()), ("rank", pa.float64())], metadata=VERSIONED
)


def _write(table: pd.DataFrame, file: Path) -> None:
    told = pa.Table.from_pandas(table, preserve_index=False)
    pq.write_table(told.replace_schema_metadata({**(told.schema.metadata or {}), **VERSIONED}), file)


def _check_table(file: Path, columns: Sequence[str]) -> None:
    remedy = "Write the export again: python studies/runs.py STUDY."
    if not file.is_file():
        raise BadInput("is missing.", file=file, remedy=remedy)
    try:
        schema = pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise BadInput(f"is no parquet file ({error}).", file=file, remedy=remedy) from error
    version = (schema.metadata or {}).get(b"schema_version", b"").decode()
    if version != str(SCHEMA_VERSION):
        raise BadInput(f"has schema_version {version or 'none'}; this version reads {SCHEMA_VERSION}.", file=file, remedy=remedy)
    if missing := [name for name in columns if name not in schema.names]:
        raise BadInput(f"lacks the column {', '.join(missing)}.", file=file, remedy=remedy)


def _row(run: Run, experiment: str, address: str) -> dict[str, object]:
    info, data = run.info, run.data
    told: dict[str, object] = {"run_id": info.run_id, "experiment": experiment}
    told |= {"url": f"{address}/#/experiments/{info.experiment_id}/runs/{info.run_id}"}
    told |= {"name": info.run_name, "status": info.status, "start_ms": info.start_time, "end_ms": info.end_time}
    told |= {f"tags.{name}": value for name, value in data.tags.items() if not name.startswith("mlflow.note")}
    told |= {f"params.{name}": value for name, value in data.params.items()}
    return told | {f"metrics.{name}": value for name, value in data.metrics.items()}


def _experiment_name(folder: Path) -> str:
    """What the study is called in a store that it may share with others."""
    if not (folder / "study.sqlite3").is_file():
        return folder.resolve().name
    journal = Journal(folder / "study.sqlite3")
    try:
        return journal.fact("mlflow_experiment") or folder.resolve().name
    finally:
        journal.close()


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input."""
    from studies.tables import told_store
    from studies.tracked import read_study

    parser = argparse.ArgumentParser(
        description="Export a study's runs, curves and ranks from MLflow as parquet files.",
        epilog="Example: python studies/runs.py results/demo",
    )
    parser.add_argument("folder", type=Path, help="the study's folder")
    parser.add_argument("--store", metavar="URI", help="the MLflow store (default: the spec's stores.mlflow, or the folder's mlflow.db)")
    told = parser.parse_args(arguments)
    try:
        source = MlflowRuns(told.folder, told.store or told_store(told.folder))
        read_study(source)  # refuses what is no study
        export(source, told.folder / "export")
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Export: {told.folder / 'export'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
