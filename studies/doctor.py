"""Look before a week starts: would this study run, here, on every node, and what would it cost?

    python -m studies.doctor --spec demo
    python -m studies.doctor --spec SPEC --data DIR --storage s3://bucket/studies --measure

Nothing is begun and nothing stays behind. `mmm4rec doctor` looks at one machine; this one asks it of every node of Ray.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # run as a file: the repository's root, not studies/, belongs on the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from mmm4rec.errors import BadInput
from studies.findings import Finding, exit_status, in_order, table
from studies.spec import Resources, Spec, Stores, add_arguments, extended, told_spec

if TYPE_CHECKING:  # torch, Ray and MLflow take seconds to import
    from studies.cells import Cell, Source
    from studies.cost import Cost, Weight

ANSWER_SECONDS = 5  # a store or a Ray that takes longer is away
MEASURE_SECONDS = 600.0  # for the steps of one cell


def examine(spec: Spec, out: Path, *, data: Path | None = None, storage: str | None = None, measure: bool = False) -> list[Finding]:
    """All that is found. Raises BadInput where the spec itself is wrong."""
    from studies.cells import build_cells
    from studies.storage import Storage
    from studies.study import check

    check(spec)
    began, folder = spec, out / spec.study
    spec = extended(spec, joined_since(folder))
    stores, findings = fill_stores(replace(spec.stores, storage=storage) if storage else spec.stores)
    trials = Storage(stores.storage).path if stores.storage else (folder / "trials").absolute()  # None: on each node's own disk
    findings += [*check_folder(folder), *check_journal(began, folder), *check_stores(stores)]
    sources, more = check_domains(spec, folder, data)
    cells, warnings = build_cells(spec, {**_unprepared(spec), **sources})
    findings += [*more, *(Finding("cells", "warning", warning, "Look whether this is meant.") for warning in warnings)]
    weights, more = weigh_cells([cell for cell in cells if cell.domain in sources])
    findings += more
    with joined_ray(spec, findings) as joined:
        if joined:
            findings += _on_ray(spec, trials, stores.storage, sources, _cost(spec, cells, weights).disk_bytes)
            if measure:
                weights, more = measure_cells([cell for cell in cells if cell.name in weights], spec.resources)
                findings += more
    return findings + cost_findings(_cost(spec, cells, weights), unprepared=len(cells) - len(weights))


def joined_since(folder: Path) -> list[dict[str, Any]]:
    """What joined the study after it had begun."""
    from studies.state import Journal

    if not (folder / "study.sqlite3").is_file():
        return []
    try:
        with closing(Journal(folder / "study.sqlite3")) as journal:
            return journal.additions()
    except BadInput:
        return []  # check_journal says why


def fill_stores(stores: Stores) -> tuple[Stores, list[Finding]]:
    """The stores with the environment's values in the place of ${NAME}; one whose variable is missing is left out."""
    filled, findings = Stores(), []
    for name, text in asdict(stores).items():
        try:
            filled = replace(filled, **{name: getattr(replace(Stores(), **{name: text}).filled(), name)})
        except BadInput as error:
            findings.append(Finding(f"stores.{name}", "error", error.rule, error.remedy))
    return filled, findings


def check_folder(folder: Path) -> list[Finding]:
    """The study's own place: writable, and on a disk that sqlite can trust."""
    from studies.mounts import network_filesystem

    place = next(part for part in (folder.absolute(), *folder.absolute().parents) if part.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        return [Finding("folder", "error", f"{place} is no folder that may be written", "Choose another place with --out.")]
    kind = network_filesystem(place)
    if kind:
        remedy = "Give --out on a disk of the driver's own, and the shared place as --storage."
        return [Finding("folder", "error", f"{place} is on a network disk ({kind}), where sqlite loses what it is told", remedy)]
    return [Finding("folder", "ok", f"{folder} can be written")]


def check_journal(spec: Spec, folder: Path) -> list[Finding]:
    """Where an existing study stands, and whether it is this one."""
    from mmm4rec.config import to_dict
    from mmm4rec.execute import code_version
    from studies.state import Journal
    from studies.study import CODE, UNPINNED

    file = folder / "study.sqlite3"
    if not file.is_file():
        return [Finding("journal", "ok", "none yet: the study begins anew")]
    try:
        journal = Journal(file)
    except BadInput as error:
        return [Finding("journal", "error", str(error), "Give the study another name, or move its folder away.")]
    try:
        facts = {"spec": {key: value for key, value in to_dict(spec).items() if key not in UNPINNED}, CODE: {"version": code_version()}}
        changes = {key: lines for key, told in facts.items() if (lines := journal.change(key, told))}
        by_outcome: dict[str, int] = {}
        for (_, _, outcome), count in journal.counts().items():
            by_outcome[outcome] = by_outcome.get(outcome, 0) + count
    finally:
        journal.close()
    said = ", ".join(f"{count} {outcome}" for outcome, count in sorted(by_outcome.items())) or "none yet"
    findings = [Finding("journal", "ok", f"the study was begun; trials: {said}")]
    remedy = "Undo the change; or go on with --yes, and what rests on it begins anew; or give the changed study another name."
    findings += [
        Finding(key, "warning", f"is not what the study was begun with:\n{lines.rstrip()}", remedy) for key, lines in changes.items()
    ]
    return findings


def check_stores(stores: Stores) -> list[Finding]:
    """Whether MLflow's and Optuna's stores answer, where they are not in the study's folder."""
    findings = []
    for name, uri in (("mlflow", stores.mlflow), ("optuna", stores.optuna)):
        if uri is None:
            findings.append(Finding(f"stores.{name}", "ok", "an sqlite file in the study's folder"))
        elif name == "mlflow" and uri.startswith(("http://", "https://")):
            findings.append(_check_server(uri))
        else:
            findings.append(_check_database(f"stores.{name}", uri))
    return findings


def _check_server(uri: str) -> Finding:
    from studies.mlflow_store import MlflowClient, shown

    with _environment({"MLFLOW_HTTP_REQUEST_TIMEOUT": str(ANSWER_SECONDS), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}):
        try:
            MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
        except Exception as error:  # of MLflow, requests or urllib3: the server is not there for us
            said = shown(str(error).splitlines()[0], uri)
            remedy = "Start the server, correct stores.mlflow, or set MLFLOW_TRACKING_USERNAME and _PASSWORD."
            return Finding("stores.mlflow", "error", f"{shown(uri, uri)} does not answer: {said}", remedy)
    return Finding("stores.mlflow", "ok", f"{shown(uri, uri)} answers")


def _check_database(name: str, url: str) -> Finding:
    import sqlalchemy

    from studies.mlflow_store import shown

    waiting = {"connect_timeout": ANSWER_SECONDS} if url.startswith("postgresql") else {}
    try:
        engine = sqlalchemy.create_engine(url, connect_args=waiting)
        with engine.connect() as connection:
            connection.execute(sqlalchemy.text("SELECT 1"))
        engine.dispose()
    except (sqlalchemy.exc.SQLAlchemyError, ImportError, OSError) as error:
        remedy = "Start the database, or correct the URL: postgresql+psycopg2://user:${PASSWORD}@host/database."
        if isinstance(error, ImportError):
            remedy = "pip install the database's package on the driver."
        return Finding(name, "error", f"{shown(url, url)} does not answer: {shown(str(error).splitlines()[0], url)}", remedy)
    return Finding(name, "ok", f"{shown(url, url)} answers")


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def check_domains(spec: Spec, folder: Path, data: Path | None) -> tuple[dict[str, Source], list[Finding]]:
    """The domains that are prepared already, and what is amiss with the others."""
    from mmm4rec.data.domain import open_domain
    from studies.domains import source_of

    sources, findings = {}, []
    for name in _unprepared(spec):
        raw = spec.domains.prepare.get(name)
        places = [folder / "domains" / name] + ([data / raw] if data is not None and raw is not None else [])
        place = next((place for place in places if (place / "domain.json").is_file()), None)
        if place is not None:
            try:
                sources[name] = source_of(open_domain(place))
            except BadInput as error:
                findings.append(Finding("domain", "error", error.args[0], "Prepare or encode it again."))
        elif raw is not None and (data is None or not (data / raw).is_dir()):
            what = f"'{name}' is not prepared, and its raw folder '{raw}' is " + (f"not in {data}" if data else "not given")
            findings.append(Finding("domain", "error", what, "Give the folder that holds it with --data DIR."))
        else:
            findings.append(Finding("domain", "ok", f"'{name}' is not prepared yet: the study does that when it begins"))
    return sources, findings


def _unprepared(spec: Spec) -> dict[str, Source]:
    """A source for each domain that the spec names, as long as nothing more is known of it."""
    from studies.cells import Source

    names = [domain for group in spec.cells for domain in group.domains] + list(spec.pretrain.sources if spec.pretrain else ())
    return {name: Source(name, "", True) for name in dict.fromkeys(names)}


@contextmanager
def joined_ray(spec: Spec, findings: list[Finding]) -> Iterator[bool]:
    """Ray, joined or started as a study does it; adds what keeps a study from that to the findings."""
    import ray

    from studies.engine import start_ray

    try:
        start_ray(spec.resources, workers=spec.pretrain.workers if spec.pretrain and spec.pretrain.sources else 1)
    except BadInput as error:
        findings.append(Finding("Ray", "error", error.rule, error.remedy))
    except (OSError, RuntimeError, ValueError) as error:
        remedy = "Start it with `ray up`, correct RAY_ADDRESS, or unset it for this machine alone."
        findings.append(Finding("Ray", "error", f"cannot be joined: {error}", remedy))
    try:
        yield ray.is_initialized()
    finally:
        ray.shutdown()


def _on_ray(spec: Spec, trials: Path | None, storage: str | None, sources: Mapping[str, Source], disk_bytes: int | None) -> list[Finding]:
    import ray

    from studies import probe
    from studies.doctor_nodes import Expected, check_nodes

    there, wanted = ray.cluster_resources(), spec.resources
    room = min(int(there.get(kind, 0) // part) for kind, part in (("CPU", wanted.cpus), ("GPU", wanted.gpus)) if part)
    findings = []
    if room < wanted.concurrent:
        what = f"Ray has room for {room} trials at once, and the spec wants {wanted.concurrent}"
        findings.append(Finding("resources", "warning", what, "Add nodes, or lower resources in the spec; a cluster that grows may grow."))
    return findings + check_nodes(Expected(probe.machine(), wanted, trials, storage, sources, disk_bytes))


def weigh_cells(cells: Sequence[Cell]) -> tuple[dict[str, Weight], list[Finding]]:
    """What a run of each cell weighs, by the cell's name, and what keeps one from being assembled. Reads the cells' domains."""
    from studies.cost import typical_run, weigh

    weights, findings = {}, []
    for cell in cells:
        try:
            weights[cell.name] = weigh(typical_run(cell))
        except BadInput as error:
            findings.append(Finding("cell", "error", f"'{cell.name}' cannot be run: {error.args[0]}", error.remedy))
    return weights, findings


def measure_cells(cells: Sequence[Cell], resources: Resources) -> tuple[dict[str, Weight], list[Finding]]:
    """As `weigh_cells`, with the seconds of an epoch, measured by one step where Ray runs a trial; one cell after another."""
    import ray

    from studies.cost import measure, typical_run

    remote: Any = ray.remote
    measured = remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=0)(measure)
    weights, findings = {}, []
    for cell in cells:
        try:
            task = measured.remote(typical_run(cell), threads=resources.cpus)
            weights[cell.name] = ray.get(task, timeout=MEASURE_SECONDS)
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
            what = f"a step of cell '{cell.name}' could not be taken: {str(error).strip().splitlines()[-1]}"
            findings.append(Finding("cell", "error", what, "Run one trial of it alone: mmm4rec train."))
    return weights, findings


def _cost(spec: Spec, cells: Sequence[Cell], weights: Mapping[str, Weight]) -> Cost:
    from studies.cost import expected_cost

    return expected_cost(spec, cells, weights)


def cost_findings(cost: Cost, *, unprepared: int) -> list[Finding]:
    from studies.cost import cost_lines

    lines = cost_lines(cost)
    if unprepared:
        lines.append(f"{unprepared} cells' time and disk are not known: their domains are not prepared yet")
    return [Finding("cost", "ok", "\n".join(lines))]


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 all well, warnings allowed; 1 something would fail; 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.doctor",
        description="Look before a study starts, on every node of Ray: storage, versions, clocks, GPUs, domains, stores, disk, cost.",
        epilog="Example: python -m studies.doctor --spec demo --measure",
    )
    add_arguments(parser)
    parser.add_argument("--storage", metavar="URI", help="shared storage: a folder that every node mounts, s3://..., gs://...")
    parser.add_argument("--measure", action="store_true", help="time an optimizer step of every cell whose domain is prepared")
    parser.add_argument("--json", action="store_true", help="print the findings as a list")
    told = parser.parse_args(arguments)
    try:
        findings = examine(told_spec(told), told.out, data=told.data, storage=told.storage, measure=told.measure)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps([asdict(finding) for finding in in_order(findings)], indent=2) if told.json else table(findings))
    return exit_status(findings)


if __name__ == "__main__":
    raise SystemExit(main())
