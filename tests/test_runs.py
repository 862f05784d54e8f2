"""Facts about a study's export and its page: one reader for MLflow and parquet, the same bytes from both."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from test_effects import track

from studies.mlflow_store import store_uri
from studies.runs import TABLES, ExportedRuns, MlflowRuns, main
from studies.tables import main as tables
from studies.tracked import read_study

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of two domains and three arms, its tables from MLflow, and its export."""
    folder = tmp_path_factory.mktemp("results") / "by_hand"
    track(folder)
    shutil.rmtree(folder / "trials")
    assert tables([str(folder)]) == 0
    assert main([str(folder)]) == 0
    return folder


@pytest.fixture
def study(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "by_hand"))


def written(folder: Path) -> dict[str, bytes]:
    files = [file for place in ("tables", "figures") for file in (folder / place).iterdir()] + [folder / "index.html"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_the_export_gives_every_byte_that_mlflow_gives(study: Path) -> None:
    before = written(study)
    assert {"tables/main.tex", "tables/effects.csv", "tables/convergence.md", "figures/convergence.svg"} <= set(before)
    for name in ("mlflow.db", "artifacts"):
        place = study / name
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    for place in ("tables", "figures"):
        shutil.rmtree(study / place)
    (study / "index.html").unlink()
    assert tables([str(study), "--export"]) == 0
    assert written(study) == before


def test_an_export_holds_three_versioned_tables(study: Path) -> None:
    for name, columns in TABLES.items():
        schema = pq.read_schema(study / "export" / f"{name}.parquet")
        assert schema.metadata[b"schema_version"] == b"1"
        assert set(columns) <= set(schema.names)
    runs = pd.read_parquet(study / "export" / "runs.parquet")
    assert runs["tags.mmm4rec.phase"].value_counts().to_dict() == {"confirm": 10, "cell": 6, "search": 4, "study": 1}
    ranks = pd.read_parquet(study / "export" / "ranks.parquet")
    assert len(ranks) == 10 * (2 + 3)
    assert read_study(ExportedRuns(study / "export")) == read_study(MlflowRuns(study))


def test_what_is_no_export_is_refused(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = study / "export" / "runs.parquet"
    table = pq.read_table(file)
    for broken, rule in (
        (lambda: pq.write_table(table.replace_schema_metadata({b"schema_version": b"9"}), file), "has schema_version 9"),
        (lambda: pq.write_table(table.drop_columns(["status"]), file), "lacks the column status"),
        (lambda: file.write_bytes(b"PAR1"), "is no parquet file"),
        (file.unlink, "is missing"),
    ):
        before = written(study)
        broken()
        assert tables([str(study), "--export"]) == 2
        said = capsys.readouterr().err
        assert rule in said
        assert "python studies/runs.py" in said
        assert written(study) == before, "the old tables stand"


def test_a_deleted_run_changes_the_tables(study: Path) -> None:
    client = MlflowClient(tracking_uri=store_uri(study))
    runs = client.search_runs([found.experiment_id for found in client.search_experiments()], max_results=1000)
    gone = next(run for run in runs if run.info.run_name == "games/scratch confirm 1")
    client.delete_run(gone.info.run_id)
    assert tables([str(study)]) == 0
    rows = {
        line.split("|")[1].strip() + "/" + line.split("|")[2].strip(): line
        for line in (study / "tables" / "main.md").read_text().splitlines()
        if "|" in line
    }
    assert rows["games/scratch"].split("|")[3].strip() == "1"
    assert rows["toys/scratch"].split("|")[3].strip() == "2"


def test_latex_is_well_formed(study: Path) -> None:
    """As far as it can be seen without a TeX: environments and braces close, every row has its columns, no sign is bare."""
    for file in (study / "tables").glob("*.tex"):
        text = file.read_text(encoding="utf-8")
        begun, ended = (re.findall(rf"\\{word}{{(\w+)}}", text) for word in ("begin", "end"))
        assert (begun, ended) == (["table", "tabular"], ["tabular", "table"]), file.name
        assert len(re.findall(r"(?<!\\){", text)) == len(re.findall(r"(?<!\\)}", text)), file.name
        assert text.count("$") % 2 == 0, file.name
        columns = len(re.search(r"\\begin{tabular}{(l+)}", text)[1])  # type: ignore[index]
        body = text.split(r"\midrule", 1)[1].split(r"\bottomrule")[0]
        rows = [line for line in body.splitlines() if line.strip() and line != r"\midrule"]
        assert rows, file.name
        assert not re.findall(r"(?<!\$)[<>|^]", text), file.name
        for row in rows:
            assert row.endswith(r"\\"), file.name
            assert len(re.findall(r"(?<!\\)&", row)) == columns - 1, (file.name, row)
            assert not re.findall(r"(?<!\\)[%#_]", row), (file.name, row)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no TeX is installed")
def test_latex_compiles(study: Path, tmp_path: Path) -> None:
    inputs = "".join(rf"\input{{{file}}}" for file in sorted((study / "tables").glob("*.tex")))
    document = rf"\documentclass[a0paper]{{article}}\usepackage{{booktabs}}\begin{{document}}{inputs}\end{{document}}"
    (tmp_path / "all.tex").write_text(document, encoding="utf-8")
    subprocess.run(["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "all.tex"], cwd=tmp_path, check=True, timeout=120)


class Outside(HTMLParser):
    """Collects what a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        told = dict(attributes)
        if tag != "a":
            self.fetched += [value for name in ("src", "href") if (value := told.get(name)) and not value.startswith("data:")]


def test_the_page_needs_nothing_but_itself_and_holds_every_table(study: Path) -> None:
    page = (study / "index.html").read_text(encoding="utf-8")
    parser = Outside()
    parser.feed(page)
    assert parser.fetched == []
    for name in ("main", "effects", "overall", "convergence"):
        assert (study / "tables" / f"{name}.html").read_text(encoding="utf-8").strip() in page, name
    assert page.count("<img") == len(list((study / "figures").glob("*.svg")))
    confirm = MlflowRuns(study).runs
    run_id = confirm[confirm["tags.mmm4rec.phase"] == "confirm"]["run_id"].iloc[0]
    assert f"/runs/{run_id}'" in page


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_a_browser_shows_the_page(study: Path, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--virtual-time-budget=2000"]
    shot = tmp_path / "page.png"
    page = f"file://{study / 'index.html'}"
    shown = subprocess.run([*command, "--dump-dom", page], capture_output=True, text=True, check=True, timeout=120).stdout
    assert "<h1>Study by_hand</h1>" in shown
    assert shown.count("<table") == shown.count("</table>") >= 5
    subprocess.run([*command, "--window-size=1400,2400", f"--screenshot={shot}", page], check=True, timeout=120, capture_output=True)
    from PIL import Image

    with Image.open(shot) as image:
        colours = image.convert("RGB").getcolors(maxcolors=2**24)
    assert colours is not None
    assert len(colours) > 100, "the figures are not drawn"
