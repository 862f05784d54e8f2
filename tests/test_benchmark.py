"""The benchmark: its data are what it says, its floor is the formula worked by hand, and its cases run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmm4rec.data import batches
from mmm4rec.models.kinds import KINDS, NAMES
from studies import benchmark
from studies.benchmark_cases import (
    PREFIXES,
    Case,
    assemble,
    cpu_evaluation,
    cpu_step,
    first_plans,
    floor_flop,
    generated_domain,
    gpu_blocks,
    in_fresh_process,
    long_histories,
    one_step,
    operations,
    train_step,
    write_features,
)

SMALL = Case(items=60, feature_width=8, batch=16, accumulation=2, width=64)
ROOT = Path(__file__).parents[1]


def test_prefixes_are_those_of_the_domain_that_they_stand_for() -> None:
    """Of every length as many as in Amazon Scientific, but for the last two of the 63 that were cut at 20."""
    lengths = np.minimum(list(generated_domain(Case(), examples=8192).examples("train"))[1], 20)
    assert np.bincount(lengths, minlength=21)[1:20].tolist() == list(PREFIXES[:19])
    assert abs(int((lengths == 20).sum()) - PREFIXES[19]) <= 2
    assert lengths.mean() == pytest.approx(3.4, abs=0.02)


def test_the_floor_by_hand() -> None:
    """Adapters: two modalities, 25,000 x 768 x 256 multiply-adds, forward and weights, over 8; logits: three products."""
    adapters = 2 * 25_000 * 768 * 256 * 2 * 2 / 8
    logits = 1024 * 25_000 * 256 * 2 * 3
    assert floor_flop(Case(), 3_500) == adapters + logits + 13.9e6 * 3_500


def test_the_gpus_blocks_change_the_calls_and_not_the_step() -> None:
    weights = []
    for blocks in (False, True):
        run = assemble(SMALL)
        run.model.eval()  # dropout is drawn a chunk at a time
        before = dict(batches.POSITIONS_AT_ONCE)
        if blocks:
            with gpu_blocks():
                assert batches.POSITIONS_AT_ONCE["cpu"] == before["cuda"]
                train_step(run, first_plans(run))
        else:
            train_step(run, first_plans(run))
        assert before == batches.POSITIONS_AT_ONCE
        weights.append(torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


def test_small_cases_give_figures() -> None:
    step = cpu_step(SMALL, 1)
    assert step["times_faster"]["median"] == pytest.approx(step["plain_seconds"]["median"] / step["step_seconds"]["median"])
    assert step["share_of_floor"]["median"] == pytest.approx(step["floor_seconds"]["median"] / step["step_seconds"]["median"])
    assert cpu_evaluation(SMALL, 1, users=8)["test"]["batch_seconds"]["median"] > 0
    counts = operations(SMALL)
    assert 0 < counts["ours"] < counts["plain"]


@pytest.mark.slow
def test_a_large_catalogue_and_long_histories(tmp_path: Path) -> None:
    """More items than one block, features mapped from files: a step and a ranking; then two lengths, in processes of their own."""
    write_features(tmp_path, 40_000, 4)
    case = replace(SMALL, items=40_000, feature_width=4, accumulation=1, ids=False, folder=str(tmp_path))
    result = in_fresh_process(one_step, case, None, 4)  # here other tests' memory would be given back meanwhile
    assert result["peak_bytes"] > result["before_bytes"] > 0
    assert result["evaluation_seconds"] > 0
    rows = long_histories(replace(SMALL, feature_width=4), (20, 150), 400, 1)
    assert [row["max_len"] for row in rows] == [20, 150]


def test_the_committed_table_is_made_of_the_committed_figures() -> None:
    found = json.loads((ROOT / "results" / "benchmark.json").read_text(encoding="utf-8"))
    assert (ROOT / "results" / "benchmark.md").read_text(encoding="utf-8") == benchmark.table(found)


@pytest.mark.slow
def test_pre_training_is_measured_on_a_domain_as_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten interactions a user: nine are predicted, of all users but those held out. The table has a row a size and one a worker."""
    pytest.importorskip("ray", reason="pre-training's throughput is measured through Ray")
    from studies import benchmark_pretrain as pretraining

    monkeypatch.setattr(pretraining, "BATCH", 64)
    monkeypatch.setattr(pretraining, "STEPS", 3)
    pretraining.generate(tmp_path / "shop", 4_000, 200)
    found = pretraining.train(tmp_path)
    assert found["examples"] == 9 * (400 - 20)
    assert found["peak_bytes"] > found["before_bytes"] > 0
    assert found["file_bytes"] > 4_000 * (4 + 8) + 2 * 200 * 32 * 2
    rates = {"batch_size": 256, "workers": 1, "interactions_per_second": 100.0, "low": 90.0, "high": 110.0, "peak_memory_bytes": 10**9}
    both = [rates, rates | {"workers": 2, "interactions_per_second": 150.0}]
    machine = {"name": "x", "cores": 2, "torch": "2", "code_version": "1"}
    text = pretraining.table({"machine": machine, "memory": [{"interactions": 4_000, "items": 200, **found}], "throughput": both})
    assert "| 4,000 | 200 |" in text
    assert "| 256 | 2 | 150 (90 to 110) | 75 | 75% | 1.00 GB |" in text


def test_every_recommender_is_timed_in_training_and_in_ranking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row a model; what needs no training has no training rate; the committed table is made of the committed figures."""
    from studies import benchmark_models

    monkeypatch.setattr(benchmark_models, "EXAMPLES", 64)
    monkeypatch.setattr(benchmark_models, "RANKED", 8)
    rows = benchmark_models.rates(1, Case(items=60, feature_width=8, batch=16, width=64))
    assert [row["model"] for row in rows] == list(NAMES)
    assert all(("train" in row) == KINDS[row["model"]].trained and row["rank"]["median"] > 0 for row in rows)
    found = json.loads((ROOT / "results" / "benchmark_models.json").read_text(encoding="utf-8"))
    assert (ROOT / "results" / "benchmark_models.md").read_text(encoding="utf-8") == benchmark_models.table(found)
