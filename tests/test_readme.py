"""The README's figures are those of the committed results."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev

import pytest

ROOT = Path(__file__).parents[1]
SCIENTIFIC = ROOT / "results" / "scientific_small"


def rows_of(file: Path) -> list[list[str]]:
    """The cells of each Markdown table row, header and rule left out."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if row[0] not in ("domain", "trained for") and set(row[0]) != {"-"}]


RERUN_HERE = any((ROOT / "results").glob("*/mlflow.db"))


@pytest.mark.skipif(RERUN_HERE, reason="a study was run here: results/ holds this machine's figures, the README the committed ones")
def test_every_row_stands_in_a_generated_table() -> None:
    generated = [row for file in sorted((ROOT / "results").glob("*/tables/*.md")) for row in rows_of(file)]
    shown = [row for row in rows_of(ROOT / "README.md") if not row[0].endswith(")")]
    assert len(shown) == 12 + 9 + 4
    for row in shown:
        twins = [other for other in generated if other[:2] == row[:2]]
        assert any(set(row) <= set(other) for other in twins), row


def test_scientific_small_is_what_its_runs_say() -> None:
    rows = {row[0]: row[1:] for row in rows_of(ROOT / "README.md") if row[0].endswith(")")}
    short = json.loads((SCIENTIFIC / "62_steps" / "result.json").read_text(encoding="utf-8"))
    assert short["optimizer_steps"] == 62
    figures = [f"{short['test'][name]:.4f}" for name in ("hit@10", "ndcg@10")]
    assert rows["62 steps (31 epochs)"] == ["1", *figures, str(short["best_epoch"])]
    seeds = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(SCIENTIFIC.glob("seed*/result.json"))]
    values = [[result["test"][name] for result in seeds] for name in ("hit@10", "ndcg@10")]
    spread = [f"{mean(value):.4f} ± {stdev(value):.4f}" for value in values]
    epochs = ", ".join(str(result["best_epoch"]) for result in seeds)
    assert rows["to convergence (patience 10)"] == [str(len(seeds)), *spread, epochs]
