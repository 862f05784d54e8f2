"""The published logs, read with our audit: epochs, ratios and gains as they were counted independently."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mmm4rec.errors import BadInput
from studies.audit import is_censored
from studies.literature import (
    DOMAINS,
    PUBLISHED,
    arm_name,
    gain_table,
    literature_table,
    main,
    published_cells,
    ratio_table,
    verdict,
)
from studies.tracked import TrackedCell, TrackedTrial

CELLS = published_cells()


def test_best_epochs_are_those_of_the_logs_by_their_own_metric() -> None:
    by_ids = {ids: [cell for cell in CELLS if cell.arm == arm_name("MMM4Rec", ids, "pretrained")] for ids in ("on", "off")}
    assert [cell.trials[0].best_epoch for cell in by_ids["on"]] == [13, 10, 7, 5, 5]
    assert [cell.trials[0].best_epoch for cell in by_ids["off"]] == [37, 53, 58, 87, 99]
    assert [cell.domain for cell in by_ids["off"]] == list(DOMAINS)
    assert {cell.domain: cell.metric for cell in by_ids["on"]} == {
        "scientific": "hit@10",
        "pantry": "hit@10",
        "instruments": "ndcg@10",
        "arts": "ndcg@10",
        "office": "ndcg@10",
    }
    assert [(cell.domain, cell.arm) for cell in CELLS if is_censored(cell.trials[0], cell)] == [("office", "MMM4Rec, ids off, pretrained")]


def test_ratios_of_epochs_and_gains() -> None:
    """11.247 is the geometric mean of 76/13, 32/10, 65/7, 166/5 and 156/5."""
    ratios = {(row[0], row[1]): (row[-2], row[-1]) for row in ratio_table(CELLS).rows}
    assert ratios == {
        ("MISSRec, pretrained", "on"): ("16.5", "11.2"),
        ("MISSRec, scratch", "on"): ("5.9", "5.1"),
        ("MISSRec, pretrained", "off"): ("1.4", "1.3"),
        ("MISSRec, scratch", "off"): ("1.0", "0.9"),
    }
    with_ids = next(row for row in gain_table(CELLS).rows if row[0] == "on")
    assert with_ids[1:6] == ("-3.8", "+31.7", "-2.5", "+1.3", "+5.9")


def test_the_page_says_what_the_two_claims_rest_on(tmp_path: Path) -> None:
    epochs, share, cut = verdict(CELLS)
    assert "16.5 times earlier in the mean" in epochs
    assert "without ids 1.4 times (1.3)" in epochs
    assert "pantry: +31.78 % from the rounded numbers, +31.66 % from the log" in share
    assert "below 0 in 2" in share
    assert "office (MMM4Rec, ids off, pretrained)" in cut
    shutil.copytree(PUBLISHED, tmp_path / "published")
    assert main(["--folder", str(tmp_path / "published")]) == 0
    page = (tmp_path / "published" / "index.html").read_text(encoding="utf-8")
    assert "31.78" in page
    assert page == (PUBLISHED / "index.html").read_text(encoding="utf-8"), "the committed page is not of these numbers"


def test_an_epoch_that_is_not_the_best_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "published"
    shutil.copytree(PUBLISHED, folder)
    file = folder / "missrec_test.csv"
    file.write_text(file.read_text().replace("arts,with_id,pretrained,NDCG@10,166", "arts,with_id,pretrained,NDCG@10,3"))
    with pytest.raises(BadInput, match="MISSRec, arts, with_id: epoch 3 is called the best, and another scores higher"):
        published_cells(folder)
    (folder / "mmm4rec_test.csv").unlink()
    assert main(["--folder", str(folder)]) == 2


def scientific(**facts: int | str | None) -> TrackedCell:
    trial = TrackedTrial("run", 0, "print", {"hit@10": 0.13, "ndcg@10": 0.07}, 0.1, 1, 1, ())
    return TrackedCell("Scientific", "scratch", "scratch", "x", 1, 1, None, (trial,), **facts)  # type: ignore[arg-type]


def test_published_numbers_stand_beside_ours_only_where_the_data_agree() -> None:
    same = literature_table([scientific(users=8442, items=4385, split="leave-one-out")])
    models = [row[1] for row in same.rows]
    assert models.count("MISSRec") == 4
    assert len({row[1:4] for row in same.rows}) == len(same.rows), "every row says which run it is"
    assert same.rows[-1] == ("Scientific", "scratch", "scratch", "-", "0.1300", "0.0700", "this study")
    assert ("Scientific", "SASRec", "scratch", "on", "0.1080", "0.0553", "published: papers; not verified again") in same.rows
    for facts, problem in (
        ({"users": 8443, "items": 4385, "split": "leave-one-out"}, "8,442 users and 4,385 items there, 8,443 and 4,385 here"),
        ({"users": 8442, "items": 4385, "split": "global time"}, "split leave-one-out there, global time here"),
        ({}, "this study's runs do not say"),
    ):
        ((*_, why),) = literature_table([scientific(**facts)]).rows  # type: ignore[arg-type]
        assert problem in str(why)
