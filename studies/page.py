"""A study's page: one HTML file with its tables, figures, ledger and links to its runs, and nothing from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from studies.runs import SERVER
from studies.table import Entry, Link, Table
from studies.tracked import TrackedCell, TrackedStudy

TEMPLATE = "page.html.j2"


@dataclass(frozen=True)
class Section:
    """A part of a page."""

    title: str
    tables: tuple[Table, ...] = ()
    figures: tuple[Path, ...] = ()  # SVG files, taken into the page
    paragraphs: tuple[str, ...] = ()
    folded: bool = False  # its tables are shown on demand


PARTS: tuple[tuple[str, tuple[str, ...], tuple[str, ...], bool], ...] = (  # title, tables, figures, folded
    ("Results", ("overview", "main"), (), False),
    ("Transfer", ("transfer", "matrix"), ("transfer_matrix",), False),
    ("Convergence", ("convergence",), ("convergence",), False),
    ("Against the baseline arm", ("effects", "overall"), ("effects",), False),
    ("Against the literature", ("literature",), (), False),
    ("What was searched", (), ("sensitivity",), False),
    ("What each arm was given and used", ("ledger",), (), False),
    ("What other scores cost", ("quality",), (), True),
    ("Searched parameters in numbers", ("sensitivity", "marginals"), (), True),
)


def write_page(study: TrackedStudy, tables: Mapping[str, Table], folder: Path) -> None:
    """Write `index.html` of a study from its tables and the figures in its folder."""
    sections = []
    for title, names, pictures, folded in PARTS:
        files = tuple(file for name in pictures if (file := folder / "figures" / f"{name}.svg").is_file())
        section = Section(title, tuple(tables[name] for name in names if name in tables), files, folded=folded)
        sections += [section] if section.tables or section.figures else []
    sections.append(Section("Runs", (runs_table(study.cells),), folded=True))
    confirmed = sum(len(cell.trials) for cell in study.cells)
    said = f"{len(study.cells)} cells, {confirmed} confirm trials."
    write_html(folder / "index.html", f"Study {study.name}", said, sections)


def runs_table(cells: Sequence[TrackedCell]) -> Table:
    """Every confirm trial with a link to its run, as a tracking server shows it."""
    rows: list[tuple[Entry, ...]] = []
    for cell in cells:
        for trial in cell.trials:
            run: Entry = Link(trial.run_id, trial.url) if trial.url else trial.run_id
            rows.append((cell.domain, cell.arm, trial.seed, f"{trial.test['ndcg@10']:.4f}", trial.fingerprint, run))
    notes = (f"Links to {SERVER} need `mlflow ui --backend-store-uri sqlite:///mlflow.db` in the study's folder.",)
    return Table(("domain", "arm", "seed", "ndcg@10", "fingerprint", "run"), tuple(rows), "Confirm trials.", notes)


def write_html(file: Path, title: str, lead: str, sections: Sequence[Section]) -> None:
    """Write a page that needs nothing but itself."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["data_uri"] = _data_uri
    text = environment.get_template(TEMPLATE).render(title=title, lead=lead, sections=sections)
    file.write_text(text + "\n", encoding="utf-8")


def _data_uri(file: Path) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(file.read_bytes()).decode()}"
