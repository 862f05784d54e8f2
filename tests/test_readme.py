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


def rows_of(file: Path) -> list[list[str]]:
    """The cells of each Markdown row of figures; headers, rules and the table of switches are left out."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    no_figures = {
        "domain",
        "switch",
        "Δ ndcg@10",
        "Δ hit@10",
        "what",
        "loss",
        "ratings",
        "examples a step",
        "stands for a missing modality",
        "test ndcg@10",
        "model",
    }
    return [row for row in rows if row[0] not in no_figures and set(row[0]) != {"-"} and row[0][0] != "`"]


RERUN_HERE = any((ROOT / "results").glob("*/mlflow.db"))


@pytest.mark.skipif(RERUN_HERE, reason="a study was run here: results/ holds this machine's figures, the README the committed ones")
def test_every_row_stands_in_a_generated_table() -> None:
    files = [
        *sorted((ROOT / "results").glob("*/tables/*.md")),
        *sorted((ROOT / "results").glob("benchmark*.md")),
        ROOT / "results/robustness/choices.md",
        ROOT / "results/parity/table.md",
    ]
    generated = [row for file in files for row in rows_of(file)]
    shown, details = rows_of(ROOT / "README.md"), rows_of(ROOT / "results/README.md")
    assert len(shown) == 6 + 16
    assert len(details) == (12 + 15) + 2 * 2 + (4 + 12) + (12 + 5) + 3 + 3 + 4 + 4
    for row in [*shown, *details]:
        twins = [other for other in generated if other[:2] == row[:2]]
        assert any(set(row) <= set(other) for other in twins), row


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
