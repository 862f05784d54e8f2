"""Facts about the effects table: differences by hand and by brute force, and the way of the ranks through MLflow."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from scipy.stats import t as student

from mmm4rec.config import from_dict
from mmm4rec.errors import BadInput
from mmm4rec.training.metrics import metrics
from studies import significance as module
from studies.cells import Source, build_cells
from studies.effects import study_effects, study_leads
from studies.mlflow_tracker import MlflowTracker, store_uri
from studies.runs import MlflowRuns
from studies.significance import RESAMPLES, SEED, gains, satterthwaite
from studies.spec import Spec
from studies.state import Journal
from studies.tables import effects_table, main
from studies.tracked import METRICS, TrackedCell, TrackedTrial, UserRanks, ranks_reader, read_study


def cell(arm: str, seeds: tuple[int, ...], *, domain: str = "toys", baseline: str | None = "scratch") -> TrackedCell:
    trials = tuple(TrackedTrial(f"run-{domain}-{arm}-{seed}", seed, "print", {}, 0.0, 0, 0, ()) for seed in seeds)
    return TrackedCell(domain, arm, "scratch", "x", 1, 1, baseline, trials)


def with_test(cell: TrackedCell, rank: int) -> TrackedCell:
    test = metrics(np.full(1, float(rank)))
    return replace(cell, trials=tuple(replace(trial, test=test) for trial in cell.trials))


def reader(ranks: dict[tuple[str, int], Any]) -> Callable[[TrackedTrial], UserRanks | None]:
    """Ranks by (arm, seed); users count from 0 but where a pair (users, ranks) is given."""

    def read(trial: TrackedTrial) -> UserRanks | None:
        given = ranks.get((trial.run_id.split("-")[2], trial.seed))
        if given is None:
            return None
        users, rank = given if isinstance(given, tuple) else (np.arange(len(given)), given)
        return UserRanks(np.asarray(users), np.asarray(rank, dtype=float))

    return read


def random_ranks(arms: tuple[str, ...], seeds: tuple[int, ...], users: int) -> dict[tuple[str, int], Any]:
    draw = np.random.default_rng(0)
    return {(arm, seed): draw.integers(1, 25, users) / 2 + 0.5 for arm in arms for seed in seeds}


def test_gains_are_those_of_the_metrics_ties_too() -> None:
    rank = np.random.default_rng(1).integers(2, 40, 500) / 2
    assert dict(zip(METRICS, gains(rank).mean(axis=1), strict=True)) == pytest.approx(metrics(rank))
    found = gains(np.array([1.0, 3.0, 10.0, 10.5]), ("ndcg@10", "hit@10"))
    np.testing.assert_allclose(found, [[1, 0.5, 1 / np.log2(11), 0], [1, 1, 1, 0]])


def test_the_interval_is_a_loop_over_resampled_users_and_seeds() -> None:
    seeds, users = (3, 5, 9), 4
    ranks = random_ranks(("scratch", "a", "b"), seeds, users)
    found = study_effects([cell("a", seeds), cell("scratch", seeds), cell("b", seeds)], reader(ranks))
    assert [effect.arm for effect in found] == ["a", "b"]
    for effect in found:
        draw_users, draw_seeds = np.random.default_rng(SEED), np.random.default_rng((SEED, len(seeds)))
        values = []
        for _ in range(RESAMPLES):  # one user and one seed fewer than there are
            chosen, runs = draw_users.integers(users, size=users - 1), draw_seeds.integers(len(seeds), size=len(seeds) - 1)
            total = np.zeros(2)
            for seed in (seeds[run] for run in runs):
                for user in chosen:
                    for sign, arm in ((1, effect.arm), (-1, "scratch")):
                        rank = ranks[arm, seed][user]
                        total += sign * np.array([1 / np.log2(rank + 1), 1.0]) * (rank <= 10)
            values.append(total / ((users - 1) * (len(seeds) - 1)))
        errors = np.std(values, axis=0, ddof=1)
        for found, name, error in ((effect.ndcg, "ndcg@10", errors[0]), (effect.hit, "hit@10", errors[1])):
            means = [metrics(ranks[effect.arm, seed])[name] - metrics(ranks["scratch", seed])[name] for seed in seeds]
            assert (found.mean, found.error) == pytest.approx((np.mean(means), error), abs=1e-10)
            seeds_part = min(np.var(means, ddof=1) / len(seeds), error**2)
            freedom = satterthwaite([(seeds_part, len(seeds) - 1), (error**2 - seeds_part, users - 1)])
            half = student.ppf(0.975, freedom) * error
            assert (found.low, found.high) == pytest.approx((np.mean(means) - half, np.mean(means) + half), abs=1e-9)
            assert found.p == pytest.approx(2 * student.sf(abs(np.mean(means)) / error, freedom), abs=1e-9)


def test_equal_arms_differ_by_nothing_and_a_shift_by_its_gain() -> None:
    seeds = (0, 1)
    ranks = {(arm, seed): np.full(7, {"scratch": 1, "same": 1, "third": 3}[arm]) for arm in ("scratch", "same", "third") for seed in seeds}
    same, third = study_effects([cell(arm, seeds) for arm in ("scratch", "same", "third")], reader(ranks))
    assert (same.ndcg.low, same.ndcg.high, same.ndcg.p) == (same.hit.low, same.hit.high, same.hit.p) == (0, 0, 1)
    assert same.ndcg.text() == "+0.0000 [+0.0000, +0.0000]"
    assert not same.ndcg.excludes_zero
    assert (third.ndcg.mean, third.ndcg.low, third.ndcg.high, third.ndcg.p) == (-0.5, -0.5, -0.5, 0)  # 1 / log2(4) - 1 / log2(2)
    assert third.ndcg.excludes_zero
    assert not third.marked, "two seeds are too few for a mark"
    assert third.hit.mean == third.hit.low == 0


def test_the_interval_spans_users_where_seeds_agree_and_seeds_where_users_do() -> None:
    draw, users, seeds = np.random.default_rng(2), 1500, (0, 1, 2)
    own, base = draw.integers(1, 15, users), draw.integers(1, 15, users)
    ranks = {("a", seed): own for seed in seeds} | {("scratch", seed): base for seed in seeds}
    ranks |= {("b", seed): np.full(users, 3 - seed) for seed in seeds} | {("scratch_b", seed): np.full(users, 3) for seed in seeds}
    (a,) = study_effects([cell("a", seeds), cell("scratch", seeds)], reader(ranks))
    spread = (gains(own, ("ndcg@10",)) - gains(base, ("ndcg@10",))).std() / np.sqrt(users)
    assert a.ndcg.low is not None
    assert a.ndcg.high is not None
    assert a.ndcg.high - a.ndcg.low == pytest.approx(2 * 1.96 * spread, rel=0.08)
    assert a.ndcg.freedom == pytest.approx(users - 1, rel=1e-6)
    (b,) = study_effects([cell("b", seeds, baseline="scratch_b"), cell("scratch_b", seeds, baseline="scratch_b")], reader(ranks))
    by_seed = np.array([1 / np.log2(3 - seed + 1) - 0.5 for seed in seeds])  # ranks 3, 2 and 1 against 3, of every user
    assert b.ndcg.freedom == pytest.approx(2)
    error = by_seed.std(ddof=1) / np.sqrt(3)  # what three numbers say of their mean
    assert b.ndcg.high - b.ndcg.mean == pytest.approx(4.303 * error, rel=0.08)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cells, read = [cell("a", (0, 1)), cell("scratch", (0, 1))], reader(random_ranks(("a", "scratch"), (0, 1), 30))
    whole = study_effects(cells, read)
    monkeypatch.setattr(module, "COUNTS_AT_ONCE", 30 * 7)
    assert study_effects(cells, read) == whole


def test_what_has_no_partner_is_left_out_and_one_seed_gives_a_mean_only() -> None:
    ranks = random_ranks(("scratch", "a", "b", "c"), (0, 1, 2), 5)
    del ranks["a", 2]  # a run that kept no ranks
    cells = [cell("scratch", (0, 1, 2)), cell("a", (0, 1, 2)), cell("b", (2, 7)), cell("c", (8, 9)), cell("a", (0,), domain="games")]
    a, b = study_effects(cells, reader(ranks))
    assert (a.arm, a.seeds, a.users) == ("a", 2, 5)
    assert a.baseline_ndcg == tuple(metrics(ranks["scratch", seed])["ndcg@10"] for seed in (0, 1))
    assert (b.arm, b.seeds, b.ndcg.low, b.hit.high) == ("b", 1, None, None)
    expected = metrics(ranks["b", 2])["ndcg@10"] - metrics(ranks["scratch", 2])["ndcg@10"]
    assert b.ndcg.text() == f"{expected:+.4f} (mean only)"
    assert not b.ndcg.excludes_zero


@pytest.mark.parametrize("users", [[0, 2, 1], [0, 1, 3], [0, 1]])
def test_other_users_are_refused_by_the_names_of_the_runs(users: list[int]) -> None:
    ranks = {("scratch", 0): [1, 2, 3], ("scratch", 1): [1, 2, 3], ("a", 0): [1, 2, 3], ("a", 1): (users, [1, 2, 3][: len(users)])}
    with pytest.raises(BadInput, match=r"run-toys-a-0 \(toys/a, seed 0\) and run-toys-a-1 \(toys/a, seed 1\) rank other users"):
        study_effects([cell("a", (0, 1)), cell("scratch", (0, 1))], reader(ranks))


def test_ranks_are_not_read_without_a_baseline() -> None:
    def read(trial: TrackedTrial) -> UserRanks | None:
        raise AssertionError(trial)

    assert study_effects([cell("a", (0,), baseline=None), cell("scratch", (0,), baseline=None)], read) == []


def test_an_arm_that_fits_nothing_stands_beside_every_seed() -> None:
    ranks = random_ranks(("scratch", "popularity"), (0, 1, 2), 40)
    popularity = replace(cell("popularity", (0,)), search_trials=0)
    (effect,) = study_effects([cell("scratch", (0, 1, 2)), popularity], reader(ranks))
    again = {(arm, seed): ranks[arm, 0 if arm == "popularity" else seed] for arm, seed in ranks}
    (expected,) = study_effects([cell("scratch", (0, 1, 2)), cell("popularity", (0, 1, 2))], reader(again))
    assert effect == expected
    assert effect.seeds == 3


def test_a_lead_that_the_common_seeds_do_not_share_gets_no_mark() -> None:
    """Arm a is ahead by seeds that b does not have; where both ran, it is behind."""
    ranks = {("a", seed): np.full(50, 3 if seed < 5 else 1) for seed in range(20)} | {("b", seed): np.full(50, 2) for seed in range(5)}
    by_seed = [metrics(np.full(1, 3.0 if seed < 5 else 1.0)) for seed in range(20)]
    a = cell("a", tuple(range(20)))
    a = replace(a, trials=tuple(replace(trial, test=test) for trial, test in zip(a.trials, by_seed, strict=True)))
    leads = {lead.metric: lead for lead in study_leads([a, with_test(cell("b", tuple(range(5))), 2)], reader(ranks))}
    assert (leads["ndcg@10"].arm, leads["ndcg@10"].seeds) == ("a", 5)
    assert leads["ndcg@10"].difference.mean < 0
    assert not leads["ndcg@10"].marked


def test_leads_are_of_the_best_over_the_second_and_marks_need_five_seeds() -> None:
    ranks = {("a", seed): np.full(50, 1) for seed in range(5)} | {("b", seed): np.full(50, 3) for seed in range(5)}
    ranks |= {("c", seed): np.full(50, 9) for seed in range(5)}
    for seeds, marks in ((tuple(range(5)), True), ((0, 1, 2, 3), False)):
        cells = [with_test(cell(arm, seeds), rank) for arm, rank in (("b", 3), ("c", 9), ("a", 1))]
        leads = {lead.metric: lead for lead in study_leads(cells, reader(ranks))}
        assert {(lead.arm, lead.second, lead.seeds) for name, lead in leads.items() if name in ("ndcg@10", "mrr")} == {
            ("a", "b", len(seeds))
        }
        assert leads["ndcg@10"].difference.mean == 0.5
        assert (leads["ndcg@10"].marked, leads["mrr"].marked) == (marks, marks)
        assert not leads["hit@50"].marked, "all of them hit"


PLAIN = {
    "study": "by_hand",
    "domains": {"demo": True},
    "arms": {"scratch": {}, "worse": {"model": {"width": 64}}, "popularity": {"recommender": "popularity"}},
    "cells": [{"domains": ["toys", "games"], "arms": ["worse", "scratch", "popularity"]}],
    "baseline": "scratch",
    "space": {"training.learning_rate": {"low": 0.001, "high": 0.1}},
    "budget": {"search_trials": 1, "epochs": 4, "confirm_seeds": 2},
}
RANK = {"scratch": 1, "worse": 3, "popularity": 12}  # of every user
USERS = np.array([4, 7, 9])


def row(epoch: int) -> dict[str, Any]:
    known = {"epoch": epoch, "optimizer_steps": 10 * epoch, "train_loss": 1.0, "train_seconds": 1.0, "valid_seconds": 1.0}
    return {**known, "valid": dict.fromkeys(METRICS, epoch / 10)}


def write_ranks(out: Path, rank: int) -> None:
    out.mkdir(parents=True)
    valid = pd.DataFrame({"domain": "d", "split": "valid", "user": USERS[:2], "rank": 99.0})  # read by nothing
    test = pd.DataFrame({"domain": "d", "split": "test", "user": USERS, "rank": float(rank)})
    pd.concat([valid, test]).to_parquet(out / "ranks.parquet", index=False)


def track(folder: Path) -> None:
    """A finished study in `folder`, mirrored twice, as if the driver had died before it noted what MLflow has."""
    spec = from_dict(Spec, PLAIN, source="test")
    cells, _ = build_cells(spec, {name: Source(f"/{name}", f"print-{name}", True) for name in ("toys", "games")})
    folder.mkdir()
    journal = Journal(folder / "study.sqlite3")
    journal.add_cells([cell.name for cell in cells])
    for cell in cells:
        told = {"best_epoch": 2, "valid": row(2)["valid"], "config": {}, "fingerprint": cell.fingerprint}
        for phase, number in [("search", 0)] * bool(cell.search_trials) + [("confirm", n) for n in range(cell.confirm_seeds)]:
            trial = journal.start(cell, phase, number, number + 10 * (phase == "confirm"), {})  # type: ignore[arg-type]
            for epoch in (1, 2):
                journal.add_report(trial.trial_key, row(epoch), epoch / 10)
            gain = metrics(np.full(3, float(RANK[cell.arm])))
            journal.end(trial.trial_key, "finished", result={**told, "test": gain} if phase == "confirm" else told)
            write_ranks(folder / "trials" / trial.trial_key, RANK[cell.arm])
    for _ in range(2):
        journal._db.execute("UPDATE trials SET tracked = 0")
        tracker = MlflowTracker(folder, spec, cells, journal.path)
        tracker.start()
        for trial in journal.trials():
            tracker.trial(trial.trial_key)
        tracker.baseline()
        tracker.finish([])
        tracker.close()
    journal.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results") / "by_hand"
    track(folder)
    shutil.rmtree(folder / "trials")
    (folder / "study.sqlite3").unlink()
    return folder


def test_ranks_lie_once_with_each_finished_confirm_run(made: Path) -> None:
    client = MlflowClient(tracking_uri=store_uri(made))
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()], max_results=1000)
    kept = {run.info.run_name: [file.path for file in client.list_artifacts(run.info.run_id)] for run in runs}
    confirm = {
        f"{domain}/{arm} confirm {n}" for domain in ("toys", "games") for arm in RANK for n in range(1 if arm == "popularity" else 2)
    }
    assert {name for name, files in kept.items() if files} == confirm
    assert all(kept[name] == ["ranks.parquet"] for name in confirm)


def test_the_table_and_figure_come_out_of_mlflow_alone_and_the_same_each_time(made: Path) -> None:
    assert main([str(made)]) == 0
    with (made / "tables" / "effects.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["domain"], row["arm"], row["seeds"], row["users"]) for row in rows] == [
        (domain, arm, seeds, "3") for domain in ("toys", "games") for arm, seeds in (("worse", "2"), ("popularity", "1"))
    ]
    assert {(row["baseline"], row["baseline ndcg@10 mean"]) for row in rows} == {("scratch", "1.0")}
    worse, popularity = rows[:2]
    assert [worse[f"Δ ndcg@10 {part}"] for part in ("mean", "low", "high")] == ["-0.5"] * 3
    assert [worse[f"Δ hit@10 {part}"] for part in ("mean", "low", "high")] == ["0.0"] * 3
    assert [popularity[f"Δ ndcg@10 {part}"] for part in ("mean", "low", "high")] == ["-1.0", "", ""]
    markdown, latex = ((made / "tables" / f"effects.{suffix}").read_text(encoding="utf-8") for suffix in ("md", "tex"))
    assert markdown.count("**-0.5000 [-0.5000, -0.5000]**") == markdown.count("+0.0000 [+0.0000, +0.0000] ") == 2
    assert markdown.count("-1.0000 (mean only)") == 4
    assert r"\textbf{$-$0.5000 [$-$0.5000, $-$0.5000]} & +0.0000 [+0.0000, +0.0000] & " in latex
    assert r"$\Delta$ ndcg@10" in latex
    assert main([str(made), "--baseline", "nobody"]) == 2
    files = [file for name in ("tables", "figures") for file in (made / name).iterdir()]
    before = {file: file.read_bytes() for file in files}
    assert {"effects.csv", "effects.md", "effects.tex", "effects.png", "effects.svg"} <= {file.name for file in files}
    assert main([str(made)]) == 0
    assert before == {file: file.read_bytes() for file in files}


@pytest.fixture
def moved(made: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy; what lay where MLflow noted the artifacts is gone."""
    (made / "artifacts").rename(tmp_path / "artifacts")
    yield Path(shutil.copytree(made, tmp_path / "by_hand", ignore=shutil.ignore_patterns("tables", "figures")))
    (tmp_path / "artifacts").rename(made / "artifacts")


def test_a_study_that_was_moved_gives_its_effects(moved: Path, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "artifacts", moved / "artifacts")
    table = effects_table(study_effects(read_study(MlflowRuns(moved)).cells, ranks_reader(MlflowRuns(moved))))
    assert [row[:2] for row in table.rows] == [(domain, arm) for domain in ("toys", "games") for arm in ("worse", "popularity")]


def test_a_study_whose_runs_kept_no_ranks_has_its_other_tables(moved: Path) -> None:
    assert main([str(moved)]) == 0
    assert "main.csv" in {file.name for file in (moved / "tables").iterdir()}
    assert not list((moved / "tables").glob("effects*"))
    assert not (moved / "figures" / "effects.png").exists()


def test_a_baseline_is_an_arm_of_the_cells() -> None:
    with pytest.raises(BadInput, match="baseline is 'other', which is no arm of the cells: worse, scratch, popularity"):
        from_dict(Spec, {**PLAIN, "baseline": "other"}, source="test")


def test_what_is_searched_and_takes_no_step_does_not_train() -> None:
    """As item_knn: its one run, at optimizer step 0, stands beside every seed."""
    trained = cell("scratch", (1, 2))
    counted = replace(trained, trials=tuple(replace(trial, curve=((0, 0.1),)) for trial in trained.trials), search_trials=4)
    stepped = replace(trained, trials=tuple(replace(trial, curve=((0, 0.1), (7, 0.2))) for trial in trained.trials))
    assert (trained.trains, counted.trains, stepped.trains) == (True, False, True)
