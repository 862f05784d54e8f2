"""Ours beside theirs: the table from given figures, by hand; and a run of the real thing on a small folder of the same form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("scipy", reason="the comparison's intervals are scipy's")

from studies import parity

ROOT = Path(__file__).parents[1]


def test_the_difference_is_welchs_by_hand() -> None:
    """Samples 1, 2, 3 and 2, 4: means 2 and 3, variances 1 and 2, error sqrt(1/3 + 2/2), 1.87 degrees of freedom."""
    found = parity.difference((1.0, 2.0, 3.0), (2.0, 4.0))
    assert found.mean == pytest.approx(-1.0)
    error = (1 / 3 + 1.0) ** 0.5
    freedom = (1 / 3 + 1.0) ** 2 / ((1 / 3) ** 2 / 2 + 1.0**2 / 1)
    from scipy.stats import t

    assert found.high == pytest.approx(-1.0 + t.ppf(0.975, freedom) * error)
    assert (parity.difference((1.0, 2.0), (3.0,)).mean, parity.difference((1.0, 2.0), (3.0,)).low) == (-1.5, None)
    assert found.low == pytest.approx(-1.0 - t.ppf(0.975, freedom) * error)


def test_the_committed_table_is_made_of_the_committed_figures(tmp_path: Path) -> None:
    folder = ROOT / "results" / "parity"
    parity.table(pd.read_csv(folder / "ours.csv"), pd.read_csv(folder / "theirs.csv")).write(tmp_path, "table")
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == (folder / "table.md").read_text(encoding="utf-8")


def test_a_case_runs_once_and_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder in the form of MISSRec's release; a second call runs nothing, and what is missing alone."""
    raw = tmp_path / "data" / parity.DOMAIN
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    rows: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for user in range(30):
        items = [*map(str, random.integers(0, 12, 6))]
        ends = {"train": range(1, 4), "valid": [4], "test": [5]}
        for split, places in ends.items():
            rows[split] += [f"{user}\t{' '.join(items[:end])}\t{items[end]}" for end in places]
    for split, lines in rows.items():
        text = "\n".join(["user_id:token\titem_id_list:token_seq\titem_id:token", *lines])
        (raw / f"Shop.{split}.inter").write_text(text + "\n", encoding="utf-8")
    (raw / "Shop.item2index").write_text("".join(f"a{k}\t{k}\n" for k in range(12)), encoding="utf-8")
    (raw / "Shop.user2index").write_text("".join(f"u{k}\t{k}\n" for k in range(30)), encoding="utf-8")
    texts = ["item_id:token\ttext:token_seq", *(f"a{k}\tthing {k}" for k in range(12))]
    (raw / "Shop.text").write_text("\n".join(texts) + "\n", encoding="utf-8")
    monkeypatch.setattr(parity, "TRAINING", parity.TRAINING | {"epochs": 1})
    file = tmp_path / "parity" / "ours.csv"
    parity.measure(file, tmp_path / "data", ["sasrec"], 1)
    first = file.read_text(encoding="utf-8")
    parity.measure(file, tmp_path / "data", ["sasrec", "gru4rec"], 1)
    assert first.splitlines()[1] in file.read_text(encoding="utf-8").splitlines()
    assert pd.read_csv(file)["model"].tolist() == ["gru4rec", "sasrec"]
    assert pd.read_csv(file)[list(parity.METRICS)].notna().all(axis=None)
