"""The READMEs' figures are those of the committed results, and their links lead somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean, stdev

import pytest

ROOT = Path(__file__).parents[1]
READMES = [ROOT / "README.md", *(ROOT / part / "README.md" for part in ("mmm4rec", "studies", "cluster", "results"))]
SCIENTIFIC = ROOT / "results" / "scientific_small"


Row = dict[str, str]  # column -> cell


def tables_of(file: Path) -> list[list[Row]]:
    """The Markdown tables of a file."""
    tables: list[list[Row]] = []
    columns: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("| "):
            columns = []
        elif not columns:
            columns = cells
            tables.append([])
        elif set(line) - set("|- "):
            tables[-1].append(dict(zip(columns, cells, strict=True)))
    return tables


RERUN_HERE = any((ROOT / "results").glob("*/mlflow.db"))


@pytest.mark.skipif(RERUN_HERE, reason="a study was run here: results/ holds this machine's figures, the README the committed ones")
def test_every_row_stands_in_a_generated_table() -> None:
    files = [
        *sorted((ROOT / "results").glob("*/tables/*.md")),
        *sorted((ROOT / "results").glob("benchmark*.md")),
        ROOT / "results/robustness/choices.md",
        ROOT / "results/parity/table.md",
    ]
    generated = [row for file in files for table in tables_of(file) for row in table]
    for readme, count in (
        (ROOT / "README.md", 6 + 16),
        (ROOT / "results/README.md", (12 + 15) + 2 * 2 + (6 + 12) + (12 + 5) + 3 + 3 + 4 + 4),
    ):
        shown = [row for table in tables_of(readme) for row in table]
        assert len(shown) == count
        for row in shown:
            assert any(row.items() <= other.items() for other in generated), row


def test_scientific_small_is_what_its_runs_say() -> None:
    text = " ".join((ROOT / "results/README.md").read_text(encoding="utf-8").split())
    seeds = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(SCIENTIFIC.glob("seed*/result.json"))]
    hit, ndcg = ([result["test"][name] for result in seeds] for name in ("hit@10", "ndcg@10"))
    epochs = ", ".join(str(result["best_epoch"]) for result in seeds)
    spread = [f"{mean(values):.4f} ± {stdev(values):.4f}" for values in (ndcg, hit)]
    assert f"NDCG@10 {spread[0]}, Hit@10 {spread[1]} ({len(seeds)} seeds, best epochs {epochs})" in text


@pytest.mark.parametrize("readme", READMES, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(readme: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", readme.read_text(encoding="utf-8"))
    for link in links:
        if link.startswith("http"):
            continue
        path, _, section = link.partition("#")
        file = readme.parent / path
        assert file.exists(), link
        headings = [anchor(line) for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")] if section else []
        assert not section or section in headings, link


def anchor(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lstrip("# ").lower()).replace(" ", "-")
