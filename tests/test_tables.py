"""Facts about the MLflow mirror and the tables, on a study made by hand whose answers are worked out here."""

from __future__ import annotations

import csv
import re
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import pytest
from mlflow import MlflowClient

from mmm4rec.config import from_dict, to_dict
from mmm4rec.errors import BadInput
from studies.cells import Source, build_cells
from studies.mlflow_tracker import MlflowTracker, store_uri
from studies.runs import MlflowRuns
from studies.runs import main as export
from studies.sensitivity import importances
from studies.spec import Spec
from studies.state import Journal
from studies.table import Sample, Table
from studies.tables import main, main_table, overview_table, write_tables
from studies.tracked import METRICS, Pretraining, read_study
from studies.transfer import transfer_table

SPEC = from_dict(
    Spec,
    {
        "study": "by_hand",
        "domains": {"demo": True},
        "pretrain": {"sources": ["s"]},
        "arms": {
            "pretrained": {"init": "pretrained"},
            "scratch": {},
            "shuffled_pretrained": {"init": "pretrained", "shuffle_features": True},
            "popularity": {"recommender": "popularity"},
        },
        "cells": [{"domains": ["toys"], "arms": ["pretrained", "scratch", "shuffled_pretrained", "popularity"]}],
        "space": {"training.learning_rate": {"low": 0.001, "high": 0.1}},
        "budget": {"search_trials": 1, "epochs": 4, "confirm_seeds": 2},
    },
    source="test",
)
CURVES = {  # validation NDCG@10 after epochs 1, 2, ...; an epoch has 10 optimizer steps
    ("toys/pretrained", "search", 0): [0.9],
    ("toys/pretrained", "confirm", 0): [0.30, 0.50, 0.40],
    ("toys/pretrained", "confirm", 1): [0.20, 0.30],
    ("toys/scratch", "search", 0): [0.8],
    ("toys/scratch", "confirm", 0): [0.10, 0.20, 0.25, 0.40],
    ("toys/scratch", "confirm", 1): [0.10, 0.35, 0.30],
    ("toys/shuffled_pretrained", "search", 0): [0.1],
    ("toys/shuffled_pretrained", "confirm", 0): [0.05, 0.06],
    ("toys/popularity", "confirm", 0): [0.07],
}
TEST = {"pretrained": (0.40, 0.50), "scratch": (0.35, 0.30), "shuffled_pretrained": (0.04,), "popularity": (0.06,)}


def valid(value: float) -> dict[str, float]:
    return {name: value if name == "ndcg@10" else value / 2 for name in METRICS}


def result(curve: list[float], test: float | None) -> dict:
    best = curve.index(max(curve)) + 1
    told = {
        "best_epoch": best,
        "valid": valid(max(curve)),
        "config": {"model": {"width": 8}},
        "fingerprint": "print",
        "code_version": "1",
    }
    return told if test is None else {**told, "test": dict.fromkeys(METRICS, test)}


def row_of(epoch: int, value: float) -> dict:
    steps = {"epoch": epoch, "optimizer_steps": 10 * epoch}
    return {**steps, "train_loss": 1 / epoch, "train_seconds": 2.0, "valid_seconds": 1.0, "valid": valid(value)}


def fill(journal: Journal, cells: dict) -> None:
    for (name, phase, number), curve in CURVES.items():
        trial = journal.start(cells[name], phase, number, number + 10_000 * (phase == "confirm"), {"training.learning_rate": 0.01})
        for epoch, value in enumerate(curve, start=1):
            journal.add_report(trial.trial_key, row_of(epoch, value), value)
        test = TEST[name.split("/")[1]][number] if phase == "confirm" else None
        journal.end(trial.trial_key, "finished", result=result(curve, test))


def mirror(folder: Path, cells: tuple, *, keys: list[str]) -> None:
    tracker = MlflowTracker(folder, SPEC, cells, folder / "study.sqlite3")
    tracker.start()
    for key in keys:
        tracker.trial(key)
    tracker.finish([])
    tracker.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results") / "by_hand"
    folder.mkdir()
    cells, _ = build_cells(SPEC, {"toys": Source("/toys", "print", True)})
    journal = Journal(folder / "study.sqlite3")
    journal.add_cells([cell.name for cell in cells])
    journal.remember("begun_ms", "1000")
    fill(journal, {cell.name: cell for cell in cells})
    broken = journal.start(cells[0], "confirm", 2, 10_002, {})
    journal.end(broken.trial_key, "failed", reason="broken on purpose")
    pruned = journal.start(cells[0], "search", 1, 1, {})
    journal.prune(pruned.trial_key, 1)
    keys = [trial.trial_key for trial in journal.trials()]
    mirror(folder, cells, keys=keys)
    journal._db.execute("UPDATE trials SET tracked = 0")  # as if the driver had died before it noted what MLflow has
    mirror(folder, cells, keys=keys)
    journal.close()
    return folder


@pytest.fixture
def study(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "by_hand"))


def runs_of(folder: Path) -> list:
    client = MlflowClient(tracking_uri=store_uri(folder))
    return list(client.search_runs([experiment.experiment_id for experiment in client.search_experiments()], max_results=1000))


def test_mlflow_holds_study_cells_and_trials_once_nested_and_ended(study: Path) -> None:
    runs = runs_of(study)
    by_phase: dict[str, list] = {}
    for run in runs:
        by_phase.setdefault(run.data.tags["mmm4rec.phase"], []).append(run)
    assert {phase: len(found) for phase, found in by_phase.items()} == {"study": 1, "cell": 4, "search": 4, "confirm": 7}
    assert {run.info.status for run in runs} == {"FINISHED", "FAILED", "KILLED"}
    cell = {run.data.tags["mmm4rec.cell"]: run.info.run_id for run in by_phase["cell"]}
    assert all(run.data.tags["mlflow.parentRunId"] == by_phase["study"][0].info.run_id for run in by_phase["cell"])
    for run in by_phase["search"] + by_phase["confirm"]:
        assert run.data.tags["mlflow.parentRunId"] == cell[run.data.tags["mmm4rec.cell"]]
    outcomes = sorted((run.data.tags["mmm4rec.outcome"], run.info.status) for run in by_phase["search"] + by_phase["confirm"])
    assert outcomes == [("failed", "FAILED"), *[("finished", "FINISHED")] * 9, ("pruned", "KILLED")]


def test_a_curve_stands_in_mlflow_once_by_optimizer_steps(study: Path) -> None:
    client = MlflowClient(tracking_uri=store_uri(study))
    run = next(run for run in runs_of(study) if run.info.run_name == "toys/scratch confirm 0")

    def history(name: str) -> list[tuple[int, float]]:
        return sorted((metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name))

    assert history("valid/ndcg_at_10") == [(10, 0.1), (20, 0.2), (30, 0.25), (40, 0.4)]
    assert history("seconds") == [(10, 3.0), (20, 6.0), (30, 9.0), (40, 12.0)]
    assert history("test/hit_at_50") == [(40, 0.35)]
    assert history("best_valid/ndcg_at_10") == [(40, 0.4)]
    assert run.data.params["training.learning_rate"] == "0.01"
    assert run.data.params["model.width"] == "8"


def test_the_main_table_holds_mean_and_sd_of_confirm_trials_and_marks_the_best(study: Path) -> None:
    table = main_table(read_study(MlflowRuns(study)).cells)
    rows = {row[1]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert list(rows) == ["pretrained", "scratch", "shuffled_pretrained", "popularity"]
    pretrained = rows["pretrained"]
    assert (pretrained["domain"], pretrained["seeds"], pretrained["search trials"], pretrained["epoch budget"]) == ("toys", 2, 1, 4)
    assert pretrained["hit@10"] == Sample((0.40, 0.50), best=True)
    assert pretrained["hit@10"].text() == "0.4500 ± 0.0707"
    assert rows["scratch"]["ndcg@10"].text() == "0.3250 ± 0.0354"
    assert rows["popularity"]["mrr"].text() == "0.0600"
    assert pretrained["epochs to best"].text() == "2.0 ± 0.0"
    assert rows["scratch"]["steps to best"].text() == "30 ± 14"
    assert [rows[arm]["mrr"].best for arm in rows] == [True, False, False, False]


def test_the_overview_is_ndcg_by_arm_and_domain_and_absent_for_one_domain(study: Path) -> None:
    cells = read_study(MlflowRuns(study)).cells
    assert overview_table(cells).rows == ()
    others = [replace(cell, domain="games") for cell in cells if cell.arm != "scratch"]
    table = overview_table([*cells, *others])
    rows = {row[0]: row[1:] for row in table.rows}
    assert table.columns == ("test ndcg@10", "toys", "games")
    scratch, missing = rows["scratch"]
    assert isinstance(scratch, Sample)
    assert (scratch.text(), scratch.second, missing) == ("0.3250 ± 0.0354", True, "-")
    assert [[entry.best for entry in rows[arm] if isinstance(entry, Sample)] for arm in ("pretrained", "popularity")] == [
        [True] * 2,
        [False] * 2,
    ]


def test_transfer_is_told_at_equal_steps_and_steps_to_scratchs_best_are_censored(study: Path) -> None:
    table = transfer_table(read_study(MlflowRuns(study)).cells)
    rows = {row[1]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert list(rows) == ["scratch", "pretrained"], "shuffled_pretrained has no scratch arm that differs in init alone"
    pretrained, scratch = rows["pretrained"], rows["scratch"]
    # Scratch's best came after 40 and 20 steps, at .40 and .35.
    assert scratch["valid ndcg@10 at 100% of steps"].values == (0.40, 0.35)
    assert pretrained["valid ndcg@10 at 25% of steps"].text() == "-"  # 10 and 5 steps; at 5 a seed had no report
    assert pretrained["valid ndcg@10 at 50% of steps"].values == (0.50, 0.20)  # 20 and 10 steps
    assert pretrained["valid ndcg@10 at 100% of steps"].values == (0.50, 0.30)
    assert scratch["steps to scratch's best"].text() == "30 ± 14"
    assert pretrained["steps to scratch's best"] == Sample((20, 20), digits=0, at_least=True)
    assert pretrained["reached"] == "1/2"


def test_what_pre_training_took_is_told_beside_the_steps_that_it_saved(study: Path) -> None:
    """Two epochs of 10 steps, 3 s each; the first is the best."""
    assert read_study(MlflowRuns(study)).pretraining is None
    cells, _ = build_cells(SPEC, {"toys": Source("/toys", "print", True)})
    tracker = MlflowTracker(study, SPEC, cells, study / "study.sqlite3")
    tracker.start()
    tracker.pretraining([row_of(1, 0.5), row_of(2, 0.4)], [], result([0.5, 0.4], None))
    tracker.finish([])
    tracker.close()
    assert read_study(MlflowRuns(study)).pretraining == Pretraining(optimizer_steps=20, best_steps=10, epochs=2, seconds=6.0)
    write_tables(study)
    told = (study / "tables" / "transfer.md").read_text().splitlines()[-1]
    assert told.endswith("20 optimizer steps in 2 epochs (the epoch kept: 10 steps), 6 s.")


def test_csv_markdown_and_latex_agree(study: Path) -> None:
    write_tables(study)
    with (study / "tables" / "main.csv").open() as file:
        rows = list(csv.DictReader(file))
    markdown = (study / "tables" / "main.md").read_text().splitlines()[2:6]
    latex = [line for line in (study / "tables" / "main.tex").read_text().splitlines() if line.startswith("toys")]
    assert len(rows) == len(markdown) == len(latex) == 4
    for row, line, tex in zip(rows, markdown, latex, strict=True):
        numbers = [float(row[f"{name} mean"]) for name in METRICS]
        for text in (line, tex):
            assert [float(number) for number in re.findall(r"0\.\d{4}", re.sub(r"(±|\$\\pm\$) [\d.]+", "", text))] == pytest.approx(
                numbers, abs=5e-5
            )
        assert ("**" in line) == (r"\textbf" in tex) == (row["arm"] == "pretrained")
    assert float(rows[0]["mrr mean"]) == mean((0.4, 0.5))
    assert float(rows[0]["mrr sd"]) == stdev((0.4, 0.5))
    assert r"shuffled\_pretrained" in latex[2]


def test_the_same_runs_give_the_same_bytes(study: Path) -> None:
    write_tables(study)
    files = [file for name in ("tables", "figures") for file in (study / name).iterdir()]
    before = {file.name: file.read_bytes() for file in files}
    write_tables(study)
    assert {"main.csv", "transfer.tex", "convergence.png", "convergence.svg"} <= set(before)
    assert not any(name.startswith("effects") for name in before), "the study has no baseline"
    assert before == {file.name: file.read_bytes() for file in files}


def test_runs_of_one_domain_with_different_fingerprints_are_refused_by_name(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    client = MlflowClient(tracking_uri=store_uri(study))
    run = next(run for run in runs_of(study) if run.info.run_name == "toys/scratch confirm 1")
    client.set_tag(run.info.run_id, "mmm4rec.fingerprint", "another")
    assert main([str(study)]) == 2
    said = capsys.readouterr().err
    assert "domain 'toys'" in said
    assert "another" in said
    assert "toys/scratch confirm 1" in said
    assert not (study / "tables").exists()


@pytest.mark.parametrize(("tag", "what"), [("split", "splits"), ("metrics", "definitions of metrics")])
def test_another_protocol_anywhere_in_the_study_is_refused_by_name(study: Path, tag: str, what: str) -> None:
    client = MlflowClient(tracking_uri=store_uri(study))
    confirmed = sorted((r for r in runs_of(study) if r.data.tags["mmm4rec.phase"] == "confirm"), key=lambda r: r.info.run_name)
    for place, run in enumerate(confirmed):
        client.set_tag(run.info.run_id, f"mmm4rec.{tag}", "another" if place == len(confirmed) - 1 else "one")
        client.set_tag(run.info.run_id, "mmm4rec.domain", "toys" if place < len(confirmed) - 1 else "games")
    with pytest.raises(BadInput, match=rf"the study had two {what}: .* in run \w+ \({confirmed[-1].info.run_name}\)"):
        read_study(MlflowRuns(study))


def test_a_run_that_lost_a_metric_is_named(study: Path) -> None:
    """As if it had been written in part."""
    run = next(run for run in runs_of(study) if run.info.run_name == "toys/scratch confirm 1")
    with closing(sqlite3.connect(study / "mlflow.db")) as database, database:
        database.execute("DELETE FROM latest_metrics WHERE run_uuid = ? AND key = 'test/mrr'", (run.info.run_id,))
    with pytest.raises(BadInput, match=rf"run {run.info.run_id} \(toys/scratch confirm 1\) lacks test mrr"):
        read_study(MlflowRuns(study))


def test_a_store_that_is_none_is_refused(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(study), "--store", f"sqlite:///{study}/nowhere.db"]) == 2
    assert not (study / "nowhere.db").exists()
    (study / "mlflow.db").write_bytes(b"no database, whatever it is called" * 100)
    for suffix in ("-wal", "-shm"):
        (study / f"mlflow.db{suffix}").unlink(missing_ok=True)
    assert main([str(study)]) == 2
    assert "does not answer" in capsys.readouterr().err


def test_what_was_not_drawn_is_no_searched_value(tmp_path: Path) -> None:
    """negatives is searched with loss sampled only; a finished run tells its default too."""
    space = {
        "training.loss": {"choices": ["full", "sampled"]},
        "training.negatives": {"low": 64, "high": 1024, "integer": True, "when": {"training.loss": ["sampled"]}},
    }
    told = {
        **to_dict(SPEC),
        "arms": {"scratch": {}},
        "cells": [{"domains": ["toys"], "arms": ["scratch"]}],
        "space": space,
        "pretrain": None,
    }
    spec = from_dict(Spec, told, source="test")
    cells, _ = build_cells(spec, {"toys": Source("/toys", "print", True)})
    journal = Journal(tmp_path / "study.sqlite3")
    journal.add_cells(["toys/scratch"])
    for number, config in enumerate([{"training.loss": "full"}, {"training.loss": "sampled", "training.negatives": 128}] * 2):
        trial = journal.start(cells[0], "search", number, number, config)
        journal.add_report(trial.trial_key, row_of(1, 0.1 + 0.01 * number), 0.1)
        ran = {
            **result([0.1], None),
            "config": {"training": {"loss": config["training.loss"], "negatives": config.get("training.negatives", 8192)}},
        }
        journal.end(trial.trial_key, "finished", result=ran)
    tracker = MlflowTracker(tmp_path, spec, cells, tmp_path / "study.sqlite3")
    tracker.start()
    for trial in journal.trials():
        tracker.trial(trial.trial_key)
    tracker.finish([])
    tracker.close()
    journal.close()
    ((cell,),) = [read_study(MlflowRuns(tmp_path)).cells]
    assert [dict(trial.config) for trial in cell.searched] == [
        {"training.loss": "full"},
        {"training.loss": "sampled", "training.negatives": "128"},
    ] * 2
    assert importances([cell]) == {}, "two trials drew both: too few"
    write_tables(tmp_path)
    assert "8192" not in (tmp_path / "tables" / "sensitivity.md").read_text()


def test_an_export_gives_every_byte_of_a_study_that_pre_trained(study: Path) -> None:
    """With transfer, matrix, searched values and their figures."""
    main([str(study)])
    names = [file for place in ("tables", "figures") for file in (study / place).iterdir()] + [study / "index.html"]
    assert {"transfer.md", "matrix.md", "sensitivity.md", "transfer_matrix.svg", "sensitivity.svg"} <= {file.name for file in names}
    before = {file: file.read_bytes() for file in names}
    (study / "tables" / "mine.txt").write_text("a user's own")
    assert export([str(study)]) == 0
    (study / "mlflow.db").unlink()
    for file in names:
        file.unlink()
    assert main([str(study), "--export"]) == 0
    assert {file: file.read_bytes() for file in names} == before
    assert (study / "tables" / "mine.txt").is_file()


def test_a_trial_with_two_runs_is_refused(study: Path) -> None:
    client = MlflowClient(tracking_uri=store_uri(study))
    runs = [run for run in runs_of(study) if run.data.tags["mmm4rec.phase"] == "confirm" and run.info.status == "FINISHED"]
    client.set_tag(runs[0].info.run_id, "mmm4rec.trial_key", runs[1].data.tags["mmm4rec.trial_key"])
    with pytest.raises(BadInput, match="has two runs"):
        read_study(MlflowRuns(study))


def test_a_folder_without_a_store_is_bad_input(tmp_path: Path) -> None:
    assert main([str(tmp_path)]) == 2


def test_a_sample_without_spread_or_values_says_so() -> None:
    assert Sample((0.5,)).text() == "0.5000"
    assert Sample(()).text() == "-"
    assert Sample((10, 20), digits=0, at_least=True).text() == "≥ 15 ± 7"
    assert r"$\geq$ 15 $\pm$ 7 \\" in Table(("a",), ((Sample((10, 20), digits=0, at_least=True),),)).to_latex()
