"""Catalogues of more than one block, samples of them, lower precision, and what runs beside the steps: the same as without."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_reference import assert_same_gradients, gradients, make_run, plans_of
from test_training import drain, tiny
from torch import Tensor
from torch.nn import functional as F

from mmm4rec.data import features as features_module
from mmm4rec.data.batches import Batch, DomainData
from mmm4rec.data.domain import Domain
from mmm4rec.data.features import FeatureTable, ItemFeatures, add_features, load_features
from mmm4rec.execute import execute
from mmm4rec.inference import open_model, recommend
from mmm4rec.models.quirks import Quirks
from mmm4rec.models.recommender import Catalogue, Recommender, rows_of
from mmm4rec.run import assemble
from mmm4rec.training.evaluate import evaluate
from mmm4rec.training.loop import Run, _optimizer_step, fit, matmul_precision
from mmm4rec.training.step import Part, add_gradient, ahead, prepare

ITEMS = 30  # of make_domain
SAME_RESULT = ("best_epoch", "valid", "test", "checkpoint")
MakeDomain = Callable[..., Domain]


@contextmanager
def blocks_of(items: int) -> Iterator[None]:
    """A catalogue goes by so many items at a time, from so many items on; all else is in small parts too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmm4rec.data.features.ITEMS_AT_ONCE", items)
        patch.setattr("mmm4rec.data.features.BLOCK_ITEMS", {"cpu": items})
        patch.setattr("mmm4rec.models.recommender.ITEMS_IN_CACHE", 4)
        patch.setattr("mmm4rec.training.losses.SCORES_AT_ONCE", {"cpu": 100})
        patch.setattr("mmm4rec.data.batches.POSITIONS_AT_ONCE", {"cpu": 150})
        yield


def in_half_precision(domain: Domain) -> Domain:
    """The domain with float16 features; items 4 and 17 have none."""
    random = np.random.default_rng(5)
    for modality, width in (("text", 12), ("image", 10)):
        vectors, present = random.standard_normal((ITEMS, width)).astype(np.float16), np.ones(ITEMS, dtype=bool)
        present[[3, 16]] = False
        add_features(domain, modality, vectors, present, encoder=f"half-{modality}", force=True)  # type: ignore[arg-type]
    return domain


def loss_and_gradients(run: Run, parts: list[Part]) -> tuple[float, dict[str, Tensor]]:
    run.model.zero_grad()
    return sum(loss for _, loss in add_gradient(run, parts)), gradients(run)


# --- features -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle_seed", [None, 3])
def test_large_tables_stay_on_disk_as_they_are(make_domain: MakeDomain, monkeypatch: pytest.MonkeyPatch, shuffle_seed: int | None) -> None:
    """Rows are those that memory would hold in float32, however they are asked for, and in whatever order."""
    domain, opened = in_half_precision(make_domain()), []
    in_memory = load_features(domain, ("text", "image"), shuffle_seed=shuffle_seed)
    open_features = features_module.open_features

    def spy(*told: Any) -> FeatureTable | None:
        opened.append(open_features(*told))
        return opened[-1]

    monkeypatch.setattr("mmm4rec.data.features.open_features", spy)
    with blocks_of(7):
        mapped = load_features(domain, ("text", "image"), shuffle_seed=shuffle_seed)
    assert mapped.dimensions == in_memory.dimensions
    assert mapped.digests == in_memory.digests
    for table in opened:
        vectors = mapped.vectors[table.modality]
        assert (tuple(vectors.shape), vectors.dtype) == (table.vectors.shape, torch.float16)
        assert isinstance(table.vectors, np.memmap)
        assert np.shares_memory(vectors.numpy(), table.vectors) == (shuffle_seed is None)
    asked = [slice(0, 5), torch.tensor([0, 5, 30, 5, 0, 1]), None, slice(1, 8), slice(28, 99), torch.tensor([1]), torch.arange(31)]
    for modality in ("text", "image"):
        for ids in asked:
            for ours, plain in zip(mapped.rows(modality, ids), in_memory.rows(modality, ids), strict=True):  # type: ignore[arg-type]
                assert ours.dtype == plain.dtype
                assert torch.equal(ours, plain)
        vectors, present = mapped.rows(modality, None)  # type: ignore[arg-type]
        assert not present[0]
        assert int((~present).sum()) == 3
        assert not vectors[~present].any()


@pytest.mark.parametrize("items", [1, 7, 15, 29, 30, 31, 100])
def test_blocks_are_the_real_items_once(make_domain: MakeDomain, items: int) -> None:
    features = load_features(make_domain(), ("text",))
    with blocks_of(items):
        blocks = features.blocks()
        assert features.one_block == (items > ITEMS)
    assert [item for block in blocks for item in range(block.start, block.stop)] == list(range(1, ITEMS + 1))
    assert max(block.stop - block.start for block in blocks) == min(items, ITEMS)


# --- the step -----------------------------------------------------------------------------------------------------------------

STEPS: list[dict[str, Any]] = [
    {},
    {"ids": False},
    {"layers": 2},
    {"dropout": 0.4},
    {"dropout": 0.4, "layers": 2, "ids": False},
    {"modalities": "image"},
    {"fusion": "dynamic_instance"},
    {"quirks": Quirks(padding_class=True)},
    {"quirks": Quirks.published(), "time_encoding": "layer_norm", "time_step": "scale", "ids": False},
]


@pytest.mark.parametrize("switches", STEPS, ids=str)
def test_the_streamed_step_is_the_step_over_one_block(make_domain: MakeDomain, switches: dict[str, Any]) -> None:
    """Loss and every gradient, from features in memory and as on disk; under the same dropout too."""
    domain = in_half_precision(make_domain())
    with blocks_of(1000):
        run = make_run(domain, switches)
        parts = prepare(run, plans_of(run.data[0]), 0)
        assert len(parts[0].chunks) > 2
        loss, plain = loss_and_gradients(run, parts)
    for items, in_memory in ((7, True), (7, False), (30, False)):
        with blocks_of(items):
            streamed = run if in_memory else make_run(domain, switches)
            assert (len(streamed.data[0].features.vectors["image"]) == ITEMS + 1) == in_memory
            found, ours = loss_and_gradients(streamed, parts)
        assert found == pytest.approx(loss, rel=1e-12)
        assert_same_gradients(ours, plain)


@pytest.mark.parametrize("items", [7, 1000], ids=["streamed", "one block"])
def test_a_step_under_dropout_is_the_plain_loss_of_what_its_chunks_encode(make_domain: MakeDomain, items: int) -> None:
    """By autograd through a single encoding of each chunk: both of a streamed step drew that dropout."""
    with blocks_of(items):
        run = make_run(make_domain(), {"dropout": 0.4, "layers": 2})
        parts = prepare(run, plans_of(run.data[0]), 0)
        loss, ours = loss_and_gradients(run, parts)
        _, again = loss_and_gradients(run, parts)
    assert all(torch.equal(ours[name], again[name]) for name in ours), "the same seeds, the same step"
    chunks, plain_loss = parts[0].chunks, torch.zeros((), dtype=torch.float64)
    assert len({chunk.seed for chunk in chunks}) == len(chunks)
    for chunk in chunks:
        candidates = run.model.items(run.data[0].features)
        torch.manual_seed(chunk.seed)
        users = run.model.users(chunk.batch, Catalogue({k: v[chunk.ids] for k, v in candidates.inputs.items()}, candidates.candidates))
        losses = F.cross_entropy(run.model.scores(users, candidates)[:, 1:], chunk.batch.targets - 1, reduction="none")
        (losses * chunk.scale).sum().backward()
        plain_loss += losses.sum().detach()
    assert loss == pytest.approx(float(plain_loss), rel=1e-12)
    assert_same_gradients(ours, gradients(run))
    run.model.eval()
    with blocks_of(items):
        assert abs(sum(found for _, found in add_gradient(run, parts)) - loss) > 1e-3 * loss, "dropout is felt"


def test_gradients_of_ranges_of_rows_are_autograds() -> None:
    """Ranges that overlap, beyond the end, read twice, beside rows by number, and beside a gradient that is there."""
    torch.manual_seed(0)
    weights = torch.randn(12, 3, dtype=torch.float64)
    for before in (None, torch.randn(12, 3, dtype=torch.float64)):
        found = []
        for read in (rows_of, lambda table, ids: table[slice(None) if ids is None else ids]):
            table = weights.clone().requires_grad_()
            table.grad = None if before is None else before.clone()
            ranges = (slice(0, 5), slice(3, 8), slice(8, 40), slice(3, 8), torch.tensor([1, 1, 11]), None)
            parts = [read(table, ids) for ids in ranges]
            sum((part.sin() * (k + 1)).sum() for k, part in enumerate(parts)).backward()  # type: ignore[union-attr]
            found.append((torch.cat(parts).detach(), table.grad))
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


# --- ranks and recommendations ------------------------------------------------------------------------------------------------


class Whole(Recommender):
    """Scores of small whole numbers, exact in whatever order they are summed, with ties all over the catalogue."""

    def items(self, features: ItemFeatures, ids: Tensor | slice | None = None) -> Catalogue:
        vectors = features.rows("text", ids)[0].round()
        return Catalogue({"last": vectors}, vectors)

    def users(self, batch: Batch, catalogue: Catalogue) -> Tensor:
        return catalogue.inputs["last"][batch.packing.at_last(batch.items)]


def ranks_by_loop(model: Recommender, data: DomainData, users: np.ndarray, ends: np.ndarray) -> list[float]:
    """One example and one candidate after the other."""
    catalogue = model.items(data.features)
    scores = model.scores(model.users(data.batch(users, ends), catalogue), catalogue).tolist()
    found = []
    for row, user, end in zip(scores, users, ends, strict=True):
        history = data.domain.items[data.domain.offsets[user] :][: end + 1].tolist()
        target, seen = history.pop(), set(history) if data.mask_seen else set()
        ranked = [-np.inf if item in seen else row[item] for item in range(1, ITEMS + 1)]
        own = ranked[target - 1]
        found.append(1 + sum(other > own for other in ranked) + (sum(other == own for other in ranked) - 1) / 2)
    return found


@pytest.mark.parametrize("mask_seen", [False, True])
@pytest.mark.parametrize("ties", [False, True])
def test_ranks_are_those_of_one_block(make_domain: MakeDomain, ties: bool, mask_seen: bool) -> None:
    """Also where a target's equals lie in other blocks, and where it was seen."""
    domain = in_half_precision(make_domain(users=30))
    run = make_run(domain, {})
    model = Whole() if ties else run.model.eval()
    data = replace(run.data[0], mask_seen=mask_seen)
    users, ends = domain.examples("all")
    assert any(domain.items[o + end] in domain.items[o : o + end] for o, end in zip(domain.offsets[users], ends, strict=True))
    with torch.no_grad():
        expected = ranks_by_loop(model, data, users, ends)
    assert (np.mean(np.array(expected) % 1 == 0.5) > 0.3) == ties
    for items in (1000, 1, 7, 30):
        with blocks_of(items):
            mapped = replace(data, features=load_features(domain, ("text", "image")).to(run.device, torch.float64))
            for ours in (data, mapped):
                np.testing.assert_array_equal(evaluate(model, ours, users, ends, run.device), expected)


@pytest.mark.parametrize("mask_seen", [False, True])
@pytest.mark.parametrize("top", [10, 50])
def test_recommendations_are_those_of_one_block(make_domain: MakeDomain, tmp_path: Path, mask_seen: bool, top: int) -> None:
    domain = in_half_precision(make_domain())
    drain(tiny(domain, training={"epochs": 1}), tmp_path / "run")
    asked: dict[str, Any] = {"users": ["u7", "u3", "u59", "u7"], "top": top}
    lists = []
    for items in (1000, 1, 7, 30):
        with blocks_of(items):
            opened = open_model(tmp_path / "run" / "best.safetensors", domain.path, device="cpu", mask_seen=mask_seen)
            lists.append((list(recommend(*opened, **asked)), list(recommend(*opened, top=top))))
    (chosen, everyone), *streamed = lists
    assert [entry["user"] for entry in chosen] == asked["users"]
    assert chosen[0]["items"] == chosen[3]["items"]
    assert len(everyone) == domain.n_users
    names = domain.item_table()["item"].to_numpy()
    for user, entry in enumerate(everyone):
        seen = {str(names[item - 1]) for item in domain.items[domain.offsets[user] : domain.offsets[user + 1]]} if mask_seen else set()
        assert entry["scores"] == sorted(entry["scores"], reverse=True)
        assert len(set(entry["items"])) == min(top, ITEMS - len(seen))
        assert not seen & set(entry["items"])
    for parts in streamed:
        for ours, plain in zip(parts, (chosen, everyone), strict=True):
            assert [(entry["user"], entry["items"]) for entry in ours] == [(entry["user"], entry["items"]) for entry in plain]
            for one, other in zip(ours, plain, strict=True):
                assert one["scores"] == pytest.approx(other["scores"], rel=1e-5, abs=1e-5)


# --- runs ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "shuffle"), [("full", None), ("sampled", 1)])
def test_a_run_over_blocks_learns_resumes_and_leaves_the_features(
    make_domain: MakeDomain, tmp_path: Path, loss: str, shuffle: int | None
) -> None:
    domain = in_half_precision(make_domain(users=40))
    files = sorted((domain.path / "features").iterdir())
    digests = [hashlib.sha256(file.read_bytes()).digest() for file in files]
    training = {"loss": loss, "epochs": 3, "negatives": 20, "negative_power": 0.5, "batch_size": 64}
    config = tiny(domain, training=training, data={"shuffle_features": shuffle})
    with blocks_of(7):
        whole = drain(config, tmp_path / "whole")
        cut = execute(config, tmp_path / "cut")
        next(cut)
        cut.close()
        resumed = drain(config, tmp_path / "cut", resume=True)
    curves = [(tmp_path / name / "curve.jsonl").read_text().splitlines() for name in ("whole", "cut")]
    losses = [[json.loads(line)["train_loss"] for line in curve] for curve in curves]
    assert len(losses[0]) == 3
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == losses[1]
    assert {name: resumed[name] for name in SAME_RESULT} == {name: whole[name] for name in SAME_RESULT}
    assert digests == [hashlib.sha256(file.read_bytes()).digest() for file in files]


# --- a sample of the catalogue ------------------------------------------------------------------------------------------------


def sampling_run(domain: Domain, *, negatives: int, power: float = 0.0, **switches: Any) -> Run:
    return make_run(domain, switches, loss="sampled", negatives=negatives, negative_power=power)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_candidates_are_the_targets_and_as_many_draws_as_told(make_domain: MakeDomain, power: float) -> None:
    """Their weights tell how often each was drawn: whole numbers, and as many as told, if the chances are those meant."""
    run = sampling_run(make_domain(), negatives=40, power=power)
    data, plans = run.data[0], plans_of(run.data[0])
    users, ends = data.train
    counts = np.bincount(data.domain.items[data.domain.offsets[users] + ends], minlength=ITEMS + 1)[1:]
    chance = (counts + 1.0) ** power / ((counts + 1.0) ** power).sum()
    parts = prepare(run, plans, 0)
    assert len(parts) == len(plans)
    for part, plan in zip(parts, plans, strict=True):
        assert part.candidates is not None
        items, log_weights = part.candidates.items[0].numpy(), part.candidates.weights.numpy()
        assert (np.diff(items) > 0).all()
        assert set(data.domain.items[data.domain.offsets[plan.shares[0].users] + plan.shares[0].ends]) <= set(items)
        drawn = np.exp(log_weights) * 40 * chance[items - 1]
        np.testing.assert_allclose(drawn, drawn.round(), atol=1e-9)
        assert drawn.sum() == pytest.approx(40)
    again, later = prepare(run, plans, 0), prepare(run, plans, 1)
    assert all(torch.equal(a.candidates.weights, b.candidates.weights) for a, b in zip(parts, again, strict=True))  # type: ignore[union-attr]
    every = [part.candidates for part in [*parts, *later] if part.candidates is not None]
    samples = [tuple(candidates.items[0][candidates.weights.isfinite()].tolist()) for candidates in every]
    assert len(set(samples)) == 2 * len(plans), "each micro-batch of each step draws anew"


@pytest.mark.parametrize("power", [0.0, 0.75])
def test_items_are_drawn_by_their_chance(make_domain: MakeDomain, power: float) -> None:
    """100,000 draws: a chi-square of 29 degrees of freedom, below 70 but in one case of 30,000."""
    n = 100_000
    run = sampling_run(make_domain(), negatives=n, power=power)
    counts = run.data[0].target_counts[1:] + 1.0
    expected = n * counts**power / (counts**power).sum()
    candidates = prepare(run, plans_of(run.data[0]), 0)[0].candidates
    assert candidates is not None
    drawn = np.exp(candidates.weights.numpy()) * expected
    assert len(drawn) == ITEMS
    assert ((drawn - expected) ** 2 / expected).sum() < 70


@pytest.mark.parametrize("items", [7, 1000], ids=["large", "one block"])
@pytest.mark.parametrize("switches", [{}, {"ids": False, "layers": 2}], ids=str)
def test_the_sampled_step_is_the_plain_loss_over_its_candidates(make_domain: MakeDomain, items: int, switches: dict) -> None:
    with blocks_of(items):
        run = sampling_run(in_half_precision(make_domain()), negatives=15, power=0.5, **switches)
        parts = prepare(run, plans_of(run.data[0]), 0)
        loss, ours = loss_and_gradients(run, parts)
    plain_loss = torch.zeros((), dtype=torch.float64)
    for part in parts:
        assert part.candidates is not None
        ids, log_weights, catalogue = part.candidates.items[0], part.candidates.weights, run.model.items(run.data[0].features)
        assert log_weights.isinf().any()
        for chunk in part.chunks:
            inputs = {name: vectors[chunk.ids] for name, vectors in catalogue.inputs.items()}
            users = run.model.users(chunk.batch, Catalogue(inputs, catalogue.candidates))
            own = ids == chunk.batch.targets[:, None]  # [B, n]
            scores = run.model.scores(users, catalogue)[:, ids] + torch.where(own, 0.0, log_weights)
            losses = F.cross_entropy(scores, own.nonzero()[:, 1], reduction="none")
            (losses * chunk.scale).sum().backward(retain_graph=True)
            plain_loss += losses.sum().detach()
    assert loss == pytest.approx(float(plain_loss), rel=1e-12)
    assert_same_gradients(ours, gradients(run))


@pytest.mark.parametrize("power", [0.0, 0.75])
def test_many_draws_are_the_full_loss(make_domain: MakeDomain, power: float) -> None:
    """A million of 30 items: a partition sum is off by about 1 / sqrt(1e6 / 30), 0.5 %, of itself, and the loss by less."""
    domain = make_domain()
    run = make_run(domain, {})
    loss, full = loss_and_gradients(run, prepare(run, plans_of(run.data[0]), 0))
    run = sampling_run(domain, negatives=1_000_000, power=power)
    sampled_loss, sampled = loss_and_gradients(run, prepare(run, plans_of(run.data[0]), 0))
    assert sampled_loss == pytest.approx(loss, rel=5e-3)
    assert sampled_loss != loss
    assert cosine(full, sampled) > 0.9999


# --- precision ----------------------------------------------------------------------------------------------------------------


def cosine(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    one, other = (torch.cat([part.flatten().double() for part in parts.values()]) for parts in (a, b))
    return float(one @ other / (one.norm() * other.norm()))


def moved(run: Run) -> Run:
    """The run with no weight at its start, so that every part of the model has a gradient."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return run


@pytest.mark.parametrize("items", [7, 1000], ids=["streamed", "one block"])
@pytest.mark.parametrize(
    "model", [{}, {"layers": 2, "ids": False, "scan": "chunked"}, {"time_step": "scale", "cross_activation": "hardswish"}], ids=str
)
@pytest.mark.parametrize("loss", ["full", "sampled"])
def test_a_step_in_bfloat16_is_nearly_that_in_float32(make_domain: MakeDomain, model: dict[str, Any], items: int, loss: str) -> None:
    domain, found = in_half_precision(make_domain()), []
    for precision in ("float32", "bf16"):
        with blocks_of(items):
            config = tiny(domain, model={"width": 32, "dropout": 0.0, **model}, training={"precision": precision, "loss": loss})
            run = moved(assemble(config).run)
            run.model.train()
            parts = prepare(run, plans_of(run.data[0]), 0)
            summed = sum(_optimizer_step(run, parts, "")[0].losses)
            found.append((summed, gradients(run)))
        assert all(parameter.dtype == torch.float32 for parameter in run.model.parameters())
    (loss_float32, plain), (loss_bf16, ours) = found
    assert loss_bf16 == pytest.approx(loss_float32, rel=1e-2)
    assert loss_bf16 != loss_float32
    assert cosine(plain, ours) > 0.99
    assert {name for name, part in ours.items() if part.any()} == {name for name, part in plain.items() if part.any()}
    assert all(gradient.dtype == torch.float32 for gradient in ours.values())


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_evaluation_knows_no_precision(make_domain: MakeDomain, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    domain = make_domain()
    run = assemble(tiny(domain, training={"precision": precision, "epochs": 1})).run
    seen = []

    def spy(*told: Any) -> np.ndarray:
        seen.append((torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")))
        return evaluate(*told)

    monkeypatch.setattr("mmm4rec.training.loop.evaluate", spy)
    (report,) = fit(run)
    assert seen == [("highest", False)]
    plain = assemble(tiny(domain, training={"report_untrained": True, "epochs": 0})).run
    plain.model.load_state_dict(run.state.best_weights)
    assert next(fit(plain)).valid == report.valid


def test_tf32_on_a_cpu_is_float32(make_domain: MakeDomain) -> None:
    config = tiny(make_domain(users=40), training={"epochs": 2})
    weights = []
    for precision in ("float32", "tf32"):
        run = assemble(replace(config, training=replace(config.training, precision=precision))).run  # type: ignore[arg-type]
        assert len(list(fit(run))) == 2
        weights.append(run.state.best_weights)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_the_processs_precision_is_restored(precision: str, before: str) -> None:
    def fail() -> None:
        assert torch.get_float32_matmul_precision() == ("highest" if precision == "float32" else "high")
        assert torch.is_autocast_enabled("cpu") == (precision == "bf16")
        raise FloatingPointError

    original = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(before)
        with matmul_precision(precision, torch.device("cpu")):
            pass
        assert torch.get_float32_matmul_precision() == before
        with pytest.raises(FloatingPointError), matmul_precision(precision, torch.device("cpu")):
            fail()
        assert torch.get_float32_matmul_precision() == before
        assert not torch.is_autocast_enabled("cpu")
    finally:
        torch.set_float32_matmul_precision(original)


# --- beside the steps ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_fails_half_way_leaves_the_last_one_whole(
    make_domain: MakeDomain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(make_domain(users=40), training={"epochs": 2})
    whole = drain(config, tmp_path / "whole")
    reports = execute(config, tmp_path / "cut")
    next(reports)
    before = (tmp_path / "cut" / "last.ckpt").read_bytes()

    def full_disk(content: object, file: Any) -> None:
        file.write(b"half of a checkpoint")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        with pytest.raises(OSError, match="no space left"):
            next(reports)
    assert (tmp_path / "cut" / "last.ckpt").read_bytes() == before
    resumed = drain(config, tmp_path / "cut", resume=True)
    assert {name: resumed[name] for name in SAME_RESULT} == {name: whole[name] for name in SAME_RESULT}
    assert not list((tmp_path / "cut").glob(".last.ckpt*")), "the next checkpoint took the failed one's place"


DEVICES = pytest.mark.parametrize("device", [torch.device("cpu"), torch.device("cuda")], ids=str)
DISTINCT: list[list[Part]] = [[Part([], None)] if k % 3 else [] for k in range(7)]  # a worker may have nothing to do


def ends_soon(threads: set[threading.Thread]) -> bool:
    """Whether all threads that are not among these end."""
    for thread in set(threading.enumerate()) - threads:
        thread.join(5)
    return set(threading.enumerate()) <= threads


@DEVICES
def test_steps_come_in_order_and_once(device: torch.device) -> None:
    threads = set(threading.enumerate())
    found = list(ahead(iter(DISTINCT), device))
    assert len(found) == len(DISTINCT)
    assert all(one is other for one, other in zip(found, DISTINCT, strict=True))
    assert list(ahead(iter([]), device)) == []
    assert ends_soon(threads)


def test_one_step_is_made_while_another_is_worked_on() -> None:
    made = [threading.Event() for _ in DISTINCT]

    def make() -> Iterator[list[Part]]:
        for event, parts in zip(made, DISTINCT, strict=True):
            event.set()
            yield parts

    for k, _ in enumerate(ahead(make(), torch.device("cuda"))):
        assert k + 1 == len(made) or made[k + 1].wait(5)
        assert not any(event.wait(0.01) for event in made[k + 2 :][:1]), "one ahead, not more"


@DEVICES
def test_what_fails_beside_a_step_reaches_the_caller(device: torch.device) -> None:
    def make() -> Iterator[list[Part]]:
        yield DISTINCT[1]
        yield DISTINCT[2]
        raise ValueError("a damaged file")

    threads, found = set(threading.enumerate()), []
    with pytest.raises(ValueError, match="a damaged file"):
        found.extend(ahead(make(), device))
    steps = ahead(make(), device)
    assert [next(steps), next(steps)] == DISTINCT[1:3]
    with pytest.raises(ValueError, match="a damaged file"):
        next(steps)
    assert ends_soon(threads)


@DEVICES
def test_who_stops_early_leaves_no_thread(device: torch.device) -> None:
    threads = set(threading.enumerate())
    steps = ahead(iter(DISTINCT), device)
    next(steps), next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert ends_soon(threads)
