"""Metrics and losses against brute force; a resumed, a split and a distributed run against the plain one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from conftest import TINY_MODEL
from torch import Tensor
from torch.nn import functional as F

from mmm4rec.config import from_dict
from mmm4rec.data.batches import Batch, DomainData
from mmm4rec.data.domain import Domain
from mmm4rec.data.features import ItemFeatures, add_features
from mmm4rec.data.sampler import Plan
from mmm4rec.errors import BadInput
from mmm4rec.execute import execute
from mmm4rec.inference import open_model, recommend
from mmm4rec.models.recommender import Catalogue, Recommender
from mmm4rec.run import RunConfig, assemble
from mmm4rec.training.checkpoint import load_model, transfer
from mmm4rec.training.evaluate import OWN_TIE, evaluate
from mmm4rec.training.loop import Run, _optimizer_step, fit
from mmm4rec.training.losses import cross_entropy, in_batch_weights
from mmm4rec.training.metrics import metrics, outranked
from mmm4rec.training.step import add_gradient, prepare


def tiny(domains: Domain | list[Domain], **sections: object) -> RunConfig:
    folders = [str(domain.path) for domain in (domains if isinstance(domains, list) else [domains])]
    base = TINY_MODEL if sections.get("recommender", "mmm4rec") == "mmm4rec" else {}
    model = {**base, **sections.pop("model", {})}  # type: ignore[dict-item]
    training = {"epochs": 4, "batch_size": 32, "accumulation": 2, "learning_rate": 3e-3, **sections.pop("training", {})}  # type: ignore[dict-item]
    data = {"domains": folders, **sections.pop("data", {})}  # type: ignore[dict-item]
    return from_dict(RunConfig, {"data": data, "model": model, "training": training, "device": "cpu", **sections}, source="test")


def drain(config: RunConfig, out: Path, **options: bool) -> dict:
    reports = execute(config, out, **options)
    while True:
        try:
            next(reports)
        except StopIteration as stop:
            return stop.value


class Told(Recommender):
    """Scores a batch of all its users as it is told, [B, I + 1]."""

    def __init__(self, told: Tensor) -> None:
        super().__init__()
        self.told = told

    def items(self, features: ItemFeatures, ids: Tensor | slice | None = None) -> Catalogue:
        return Catalogue({}, torch.eye(self.told.shape[1])[slice(None) if ids is None else ids])

    def users(self, batch: Batch, catalogue: Catalogue) -> Tensor:
        return self.told


def test_rank_counts_higher_scores_and_half_of_the_ties() -> None:
    scores = torch.tensor([[9.0, 3, 1, 3, 5, 3], [9.0, 1, 2, 3, 4, 5]])
    found = OWN_TIE + outranked(scores[:, 1:], scores.gather(1, torch.tensor([[3], [5]])))
    assert found.tolist() == [1 + 1 + 1.0, 1.0]  # one higher, two ties
    domain = Domain(Path("two"), {"name": "two", "items": 5}, np.array([0, 2, 4]), np.array([1, 3, 1, 5]), None)
    users, ends = domain.examples("all")
    data = DomainData(domain, ItemFeatures(5, {}, {}, {}), domain.examples("all"), domain.examples("all"), max_len=8, time=False)
    assert evaluate(Told(scores), data, users, ends, torch.device("cpu")).tolist() == found.tolist()  # padding's 9 is no candidate


def test_metrics_by_hand() -> None:
    values = metrics(np.array([1.0, 3.0, 11.0, 60.0]))
    assert values["hit@10"] == 0.5
    assert values["hit@20"] == 0.75
    assert values["ndcg@10"] == pytest.approx((1 + 0.5) / 4)
    assert values["ndcg@50"] == pytest.approx((1 + 0.5 + 1 / np.log2(12)) / 4)
    assert values["mrr"] == pytest.approx((1 + 1 / 3 + 1 / 11 + 1 / 60) / 4)


def test_full_loss_is_over_real_items() -> None:
    torch.manual_seed(0)
    users, vectors = torch.randn(4, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    scores, targets = users @ vectors.T, torch.tensor([1, 5, 3, 3])
    expected = sum(-float(row[t] - torch.logsumexp(row[1:], 0)) for row, t in zip(scores, targets, strict=True))
    loss, _ = cross_entropy(users, vectors[1:], targets - 1, gradient=torch.zeros(5, 3, dtype=torch.float64))
    assert float(loss) == pytest.approx(expected, rel=1e-12)


def in_float64(config: RunConfig) -> Run:
    run = assemble(config).run
    run.model.double()
    run.data = [replace(data, features=data.features.to(run.device, torch.float64)) for data in run.data]
    return run


def dense_loss(run: Run, plan: Plan) -> Tensor:
    """The loss of a micro-batch, summed, by autograd: a column an item, or in-batch a column an example."""
    batch, catalogue = run.data[0].batch(plan.shares[0].users, plan.shares[0].ends), run.model.items(run.data[0].features)
    scores, targets = run.model.scores(run.model.users(batch, catalogue), catalogue), batch.targets
    if run.config.loss == "full":
        first = 0 if run.quirks.padding_class else 1
        return F.cross_entropy(scores[:, first:], targets - first, reduction="sum")
    duplicates = (targets[:, None] == targets[None, :]).fill_diagonal_(False)
    assert duplicates.any()
    scores = scores[:, targets].masked_fill(duplicates & (not run.quirks.duplicate_negatives), -torch.inf)
    return F.cross_entropy(scores, torch.arange(len(targets)), reduction="sum")


@pytest.mark.parametrize(
    ("loss", "quirks"), [("full", {}), ("full", {"padding_class": True}), ("in_batch", {}), ("in_batch", {"duplicate_negatives": True})]
)
def test_a_step_is_the_sum_of_its_micro_batches_dense_losses(
    make_domain: Callable[..., Domain], monkeypatch: pytest.MonkeyPatch, loss: str, quirks: dict[str, bool]
) -> None:
    """Over real items unless padding is a class; over each micro-batch's own targets. In chunks of fewer examples than it has."""
    monkeypatch.setattr("mmm4rec.data.batches.POSITIONS_AT_ONCE", {"cpu": 100})
    run = in_float64(tiny(make_domain(), model={"dropout": 0.0, "quirks": quirks}, training={"loss": loss}))
    users, ends = run.data[0].train
    plans = [Plan.of_one(0, users[first : first + 40], ends[first : first + 40]) for first in (0, 40, 80)]
    expected = torch.stack([dense_loss(run, plan) for plan in plans]).sum()
    (expected / 120).backward()
    gradients = {name: parameter.grad for name, parameter in run.model.named_parameters() if parameter.grad is not None}
    run.model.zero_grad()
    assert sum(loss for _, loss in add_gradient(run, prepare(run, plans, 0))) == pytest.approx(expected.item(), rel=1e-12)
    for name, parameter in run.model.named_parameters():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        expected_gradient = gradients.get(name, torch.zeros_like(parameter))
        torch.testing.assert_close(found, expected_gradient, rtol=1e-9, atol=1e-9 * float(expected_gradient.abs().max()) + 1e-15, msg=name)


def test_in_batch_loss_masks_only_an_items_own_duplicates() -> None:
    """Against the dense form: a column an example, columns of the example's own item masked but its own."""
    torch.manual_seed(0)
    users, vectors = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (6, 5))
    targets = torch.tensor([4, 0, 4, 2, 0, 4])
    dense = users @ vectors[targets].T
    same = targets[:, None] == targets[None, :]
    dense = dense.masked_fill(same & ~torch.eye(6, dtype=torch.bool), -torch.inf)
    expected = F.cross_entropy(dense, torch.arange(6), reduction="sum")
    expected.backward()
    candidates, columns, counts = targets.unique(return_inverse=True, return_counts=True)
    log_weights, gradient = torch.from_numpy(in_batch_weights(counts.numpy())), torch.zeros(len(candidates), 3, dtype=torch.float64)
    with torch.no_grad():
        found, d_users = cross_entropy(users, vectors[candidates], columns, log_weights=log_weights, gradient=gradient)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert users.grad is not None
    assert vectors.grad is not None
    torch.testing.assert_close(d_users, users.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, vectors.grad[candidates], rtol=1e-12, atol=1e-12)
    assert not vectors.grad[[1, 3]].any()  # items that are no target are no candidates


def test_accumulated_batches_give_the_gradient_of_one(make_domain: Callable[..., Domain]) -> None:
    """In full cross-entropy the mean over examples does not depend on how they are cut into micro-batches."""
    domain = make_domain()
    curves = []
    for batch_size, accumulation in ((1024, 1), (16, 1024)):
        training = {"batch_size": batch_size, "accumulation": accumulation, "epochs": 3}
        run = assemble(tiny(domain, model={"dropout": 0.0}, training=training)).run
        curves.append([report.train_loss for report in fit(run)])
    np.testing.assert_allclose(*curves, rtol=1e-5)


@pytest.mark.parametrize("loss", ["full", "in_batch", "sampled"])
def test_training_learns_and_a_resumed_run_is_the_uninterrupted_one(make_domain: Callable[..., Domain], tmp_path: Path, loss: str) -> None:
    domain = make_domain()
    config = tiny(domain, training={"loss": loss, "epochs": 6, "negatives": 20})
    whole = drain(config, tmp_path / "whole")
    for stop_after in (1, 4):
        out = tmp_path / f"cut{stop_after}"
        reports = execute(config, out)
        for _ in range(stop_after):
            next(reports)
        reports.close()
        assert not (out / "result.json").exists()
        cut = drain(config, out, resume=True)
        assert {name: cut[name] for name in ("best_epoch", "valid", "test", "checkpoint")} == {
            name: whole[name] for name in ("best_epoch", "valid", "test", "checkpoint")
        }
    curves = [[json.loads(line) for line in (tmp_path / n / "curve.jsonl").read_text().splitlines()] for n in ("whole", "cut1", "cut4")]
    losses = [[line["train_loss"] for line in curve] for curve in curves]
    assert losses[0] == losses[1] == losses[2]
    assert [line["epoch"] for line in curves[0]] == list(range(1, 7))
    assert losses[0][-1] < losses[0][0]


@pytest.mark.slow
def test_kill_9_and_resume_gives_the_same_result(make_domain: Callable[..., Domain], tmp_path: Path) -> None:
    domain = make_domain(users=300)
    sets = [f"model.{key}={value}" for key, value in TINY_MODEL.items()] + ["training.batch_size=32", "training.patience=100"]

    def command(out: str) -> list[str]:
        options = ["--domain", str(domain.path), "--out", str(tmp_path / out), "--epochs", "12", "--seed", "3", "--device", "cpu"]
        return [sys.executable, "-m", "mmm4rec", "train", *options, "--set", *sets]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command("whole"), check=True, env=environment, capture_output=True)
    kills = 0
    for epochs_before_the_kill in (2, 5):
        process = subprocess.Popen([*command("killed"), "--resume"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        curve = tmp_path / "killed" / "curve.jsonl"
        while process.poll() is None and not (curve.exists() and len(curve.read_text().splitlines()) >= epochs_before_the_kill):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills == 2
    subprocess.run([*command("killed"), "--resume"], check=True, env=environment, capture_output=True)
    whole, killed = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "killed"))
    for key in ("best_epoch", "epochs", "optimizer_steps", "valid", "test", "checkpoint", "fingerprint"):
        assert whole[key] == killed[key], key


def test_resume_refuses_another_config(make_domain: Callable[..., Domain], tmp_path: Path) -> None:
    domain = make_domain()
    next(execute(tiny(domain), tmp_path / "run"))
    with pytest.raises(BadInput, match=r"seed: 0 -> 1"):
        next(execute(tiny(domain, seed=1), tmp_path / "run", resume=True))
    with pytest.raises(BadInput, match="holds a run already"):
        next(execute(tiny(domain), tmp_path / "run"))


def test_resume_refuses_another_domain_or_features_at_the_same_place(make_domain: Callable[..., Domain], tmp_path: Path) -> None:
    config = tiny(make_domain(), training={"epochs": 2})
    next(execute(config, tmp_path / "cut"))
    drain(config, tmp_path / "done")
    make_domain(seed=1)
    for out in ("cut", "done"):
        with pytest.raises(BadInput, match=r"belongs to another run \(features\.shop\.image.*fingerprints\.shop"):
            drain(config, tmp_path / out, resume=True)
    make_domain()
    with pytest.raises(BadInput, match=r"training\.epochs: 2 -> 9"):
        drain(replace(config, training=replace(config.training, epochs=9)), tmp_path / "done", resume=True)


def test_resume_after_the_domain_moved(make_domain: Callable[..., Domain], tmp_path: Path) -> None:
    domain = make_domain()
    config = tiny(domain)
    whole = drain(config, tmp_path / "whole")
    next(execute(config, tmp_path / "cut"))
    moved = domain.path.rename(tmp_path / "elsewhere")
    config = replace(config, data=replace(config.data, domains=(str(moved),)))
    assert drain(config, tmp_path / "cut", resume=True)["test"] == whole["test"]


def test_no_figure_on_targets_that_pre_training_saw(make_domain: Callable[..., Domain], tmp_path: Path) -> None:
    """Pre-training on all examples of a domain, then fine-tuning or evaluating there, is refused; recommending is not."""
    domain = make_domain()
    drain(tiny(domain, data={"examples": "all"}, model={"ids": False}, training={"epochs": 1}), tmp_path / "pre")
    checkpoint = tmp_path / "pre" / "best.safetensors"
    with pytest.raises(BadInput, match="pre-trained on all targets of domain 'shop'"):
        assemble(tiny(domain, init=str(checkpoint)))
    with pytest.raises(BadInput, match="pre-trained on all targets of domain 'shop'"):
        open_model(checkpoint, domain.path, unseen=True)
    assert list(recommend(*open_model(checkpoint, domain.path, device="cpu"), users=["u1"], top=3))


def test_zero_shot_uses_the_learned_vector_for_a_modality_that_training_lacked(make_domain: Callable[..., Domain], tmp_path: Path) -> None:
    source, target = make_domain("source", modalities=("text",)), make_domain("target", seed=1)
    drain(tiny(source, model={"ids": False}, training={"epochs": 1}), tmp_path / "pre")
    model, data, _ = open_model(tmp_path / "pre" / "best.safetensors", target.path, device="cpu")
    images = model.items(data.features).inputs["image"]
    assert torch.equal(images, images[:1].expand_as(images))


def test_too_few_interactions_are_refused_before_anything_is_written(make_domain: Callable[..., Domain], tmp_path: Path) -> None:
    domain = make_domain()
    np.save(domain.path / "offsets.npy", np.arange(len(domain.items) + 1))  # every interaction a user of its own
    for data in ({}, {"examples": "all"}):
        with pytest.raises(BadInput, match="a run needs some of both"):
            drain(tiny(domain, data=data), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_untrained_baselines_refuse_several_domains(make_domain: Callable[..., Domain]) -> None:
    with pytest.raises(BadInput, match="popularity belongs to the items of one domain"):
        assemble(tiny([make_domain("a"), make_domain("b")], recommender="popularity"))


def test_test_targets_decide_nothing(make_domain: Callable[..., Domain], tmp_path: Path) -> None:
    """With other test targets at other times: the same losses, best epoch and weights; another fingerprint."""

    def change(offsets: np.ndarray, items: np.ndarray, times: np.ndarray) -> None:
        items[offsets[1:] - 1] = 1 + items[offsets[1:] - 1] % 30
        times[offsets[1:] - 1] += 10**6

    results = [drain(tiny(make_domain(change=c)), tmp_path / name) for name, c in (("a", None), ("b", change))]
    assert results[0]["fingerprint"] != results[1]["fingerprint"]
    assert results[0]["test"] != results[1]["test"]
    assert results[0]["best_epoch"] == results[1]["best_epoch"]
    assert results[0]["valid"] == results[1]["valid"]
    weights = [load_model(tmp_path / name / "best.safetensors")[0] for name in ("a", "b")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_transfer_names_every_tensor(make_domain: Callable[..., Domain], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two layers and a full filter into one layer and a small filter, ids into another domain."""
    source, target = make_domain("source"), make_domain("target", seed=1, items=25)
    drain(tiny(source, model={"layers": 2}, training={"epochs": 1}), tmp_path / "pre")
    weights, _ = load_model(tmp_path / "pre" / "best.safetensors")
    config = tiny(target, model={"filter_size": 2})
    model = assemble(config).run.model
    report = transfer(model, weights, source="pre")
    own = dict(model.named_parameters())
    assert sorted(report.reset) == ["ids.image", "ids.text"]
    assert report.partly_loaded
    assert all(name.startswith("layers.0.filter.") for name in report.partly_loaded)
    assert report.skipped
    assert all(name.startswith("layers.1.") for name in report.skipped)
    assert report.dropped_layers == [2]
    assert "the model is shallower: layer 2 is dropped" in str(report)
    assert sorted(report.loaded + report.partly_loaded + report.reset + report.new) == sorted(own)
    assert sorted(report.loaded + report.partly_loaded + report.reset + report.skipped) == sorted(weights)
    name = "layers.0.filter.joint.real.weight"
    torch.testing.assert_close(own[name], weights[name][:2, :2])
    assert torch.equal(own["adapters.text.weight"], weights["adapters.text.weight"])
    assert not own["ids.text"].any()
    assembled = assemble(replace(config, init=str(tmp_path / "pre" / "best.safetensors")))
    assert assembled.transfer == report
    assert "layer 2 is dropped" in caplog.text


def test_transfer_refuses_other_sizes_and_encoders(make_domain: Callable[..., Domain], tmp_path: Path) -> None:
    source = make_domain("source")
    drain(tiny(source, training={"epochs": 1}), tmp_path / "pre")
    checkpoint = str(tmp_path / "pre" / "best.safetensors")
    with pytest.raises(BadInput, match=r"'adapters.text.weight' is \[16, 12\] there and \[32, 12\] here"):
        assemble(tiny(source, model={"width": 32}, init=checkpoint))
    file = source.path / "features" / "text.json"
    file.write_text(file.read_text().replace("random-text", "another"))
    with pytest.raises(BadInput, match=r"trained on text features of random-text \(12 dimensions\); domain 'source' has another \(12\)"):
        assemble(tiny(source, init=checkpoint))
    add_features(source, "text", np.ones((30, 5), dtype=np.float32), np.ones(30, dtype=bool), encoder="random-text", force=True)
    with pytest.raises(BadInput, match=r"random-text \(12 dimensions\); domain 'source' has random-text \(5\)\. Re-run: mmm4rec encode"):
        assemble(tiny(source, init=checkpoint))


@pytest.mark.parametrize("ids", [True, False])
@pytest.mark.parametrize("fusion", ["static", "dynamic_shared", "dynamic_instance"])
def test_a_saved_model_ranks_as_the_run_did(make_domain: Callable[..., Domain], tmp_path: Path, fusion: str, ids: bool) -> None:
    """evaluate from best.safetensors repeats result.json; recommend lists what the scores say."""
    domain = make_domain()
    result = drain(tiny(domain, model={"fusion": fusion, "ids": ids}), tmp_path / "run")
    model, data, device = open_model(tmp_path / "run" / "best.safetensors", domain.path, device="cpu")
    assert metrics(evaluate(model, data, *domain.examples("test"), device)) == result["test"]
    lines = list(recommend(model, data, device, users=["u3", "u40"], top=30))
    assert [line["user"] for line in lines] == ["u3", "u40"]
    assert sorted(lines[0]["items"]) == sorted(f"i{k}" for k in range(30))
    assert lines[0]["scores"] == sorted(lines[0]["scores"], reverse=True)
    with pytest.raises(BadInput, match="no user 'nobody'"):
        list(recommend(model, data, device, users=["u3", "nobody"]))


def test_untrained_models_against_brute_force(make_domain: Callable[..., Domain], tmp_path: Path) -> None:
    """Popularity counts training interactions only; last_item ranks by cosine with the last input."""
    domain = make_domain()
    training = [domain.items[low : high - 2] for low, high in zip(domain.offsets[:-1], domain.offsets[1:], strict=True)]
    counts = np.bincount(np.concatenate(training), minlength=31)[1:]
    targets = domain.items[domain.offsets[1:] - 1]
    last = domain.items[domain.offsets[1:] - 2]
    tables = [np.load(domain.path / "features" / f"{m}.npy").astype(np.float64) for m in ("text", "image")]
    unit = np.concatenate([table / np.linalg.norm(table, axis=1, keepdims=True) for table in tables], axis=1)
    expected = {"popularity": np.tile(counts, (60, 1)), "last_item": (unit @ unit.T)[last - 1]}
    for recommender, scores in expected.items():
        own = scores[np.arange(60), targets - 1][:, None]
        rank = 1 + (scores > own + 1e-9).sum(1) + ((np.abs(scores - own) <= 1e-9).sum(1) - 1) / 2
        result = drain(tiny(domain, recommender=recommender), tmp_path / recommender)
        assert result["epochs"] == 0
        assert result["test"] == pytest.approx(metrics(rank), abs=1e-9)


def _save_gradients(config: RunConfig, file: Path) -> None:
    """The gradients of one optimizer step over the first epoch's first micro-batches."""
    run = assemble(config).run
    _optimizer_step(run, prepare(run, list(islice(run.sampler.plans(1), 3)), 0), "")
    torch.save({name: parameter.grad for name, parameter in run.model.named_parameters()}, file)


def _train_distributed(rank: int, world: int, folder: str, config: RunConfig) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    _save_gradients(config, Path(folder) / f"gradients{rank}.pt")
    drain(config, Path(folder) / "run")
    torch.distributed.destroy_process_group()
    os._exit(0)  # all files stand; in about one exit of thirty a native thread aborts the interpreter while it ends


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "mixed"), [("full", False), ("in_batch", False), ("in_batch", True), ("sampled", True)])
def test_two_workers_give_the_curve_of_one(make_domain: Callable[..., Domain], tmp_path: Path, loss: str, mixed: bool) -> None:
    """Pre-training over two domains, odd batch sizes, dropout 0: losses and metrics to float tolerance."""
    sources = [make_domain("a"), make_domain("b", seed=1, items=20, modalities=("text",))]
    data = {"examples": "all", "heldout_users": 0.2}
    training = {"loss": loss, "negatives": 20, "batch_size": 33, "accumulation": 3, "mixed_batches": mixed, "sampling_power": 0.5}
    config = tiny(sources, data=data, model={"dropout": 0.0}, training=training)
    (tmp_path / "two").mkdir()
    _save_gradients(config, tmp_path / "gradients.pt")
    drain(config, tmp_path / "one")
    mp.spawn(_train_distributed, args=(2, str(tmp_path / "two"), config), nprocs=2)
    expected = torch.load(tmp_path / "gradients.pt", weights_only=True)
    for rank in range(2):
        found = torch.load(tmp_path / "two" / f"gradients{rank}.pt", weights_only=True)
        for name, gradient in expected.items():
            assert (gradient is None) == (found[name] is None), name
            if gradient is not None:
                torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()), msg=name)
    one, two = ([json.loads(line) for line in (tmp_path / place / "curve.jsonl").read_text().splitlines()] for place in ("one", "two/run"))
    assert [line["optimizer_steps"] for line in one] == [line["optimizer_steps"] for line in two]
    np.testing.assert_allclose([line["train_loss"] for line in one], [line["train_loss"] for line in two], rtol=1e-4)
    np.testing.assert_allclose([line["valid"]["mrr"] for line in one], [line["valid"]["mrr"] for line in two], rtol=1e-2)


def test_heldout_users_are_never_trained_on(make_domain: Callable[..., Domain]) -> None:
    domain = make_domain()
    data = assemble(tiny([domain], data={"examples": "all", "heldout_users": 0.25}, model={"ids": False})).run.data[0]
    held = set(data.valid.users)
    assert len(held) == 15
    assert not held & set(data.train.users)
    counts = np.diff(domain.offsets)
    assert len(data.train) == sum(counts[user] - 1 for user in range(60) if user not in held)
    assert (data.valid.first_ends == counts[data.valid.users] - 1).all()


def test_shuffled_features_are_the_same_rows_of_other_items(make_domain: Callable[..., Domain]) -> None:
    domain = make_domain()
    plain, shuffled = (assemble(tiny(domain, data={"shuffle_features": seed})).run.data[0].features.vectors["text"] for seed in (None, 5))
    assert not torch.equal(plain, shuffled)
    assert torch.equal(plain.sort(0).values, shuffled.sort(0).values)
    assert not plain[0].any()
    assert not shuffled[0].any()


def test_damage_takes_features_away_or_passes_them_on(make_domain: Callable[..., Domain]) -> None:
    """Dropped items have none; corrupted ones have each other's, none its own; a larger share spoils the smaller one's items too."""
    domain = make_domain()

    def tables(**damage: float) -> tuple[np.ndarray, np.ndarray]:
        features = assemble(tiny(domain, data={"damage": {"seed": 3, **damage}})).run.data[0].features
        return features.vectors["image"].numpy()[1:], features.present["image"].numpy()[1:]

    whole, _ = tables()
    gone: list[set[int]] = []
    for share in (0.2, 0.5, 1.0):
        vectors, present = tables(drop_image=share)
        assert (~present).sum() == 30 * share
        assert not vectors[~present].any()
        np.testing.assert_array_equal(vectors[present], whole[present])
        gone.append(set(np.flatnonzero(~present)))
    assert gone[0] < gone[1] < gone[2]
    vectors, present = tables(corrupt_image=0.4)
    assert present.all()
    changed = np.flatnonzero((vectors != whole).any(axis=1))
    assert len(changed) == 12
    assert {tuple(row) for row in vectors[changed]} == {tuple(row) for row in whole[changed]}
    np.testing.assert_array_equal(tables(corrupt_text=1.0)[0], whole)


def test_a_domain_without_times_turns_time_off(make_domain: Callable[..., Domain], caplog: pytest.LogCaptureFixture) -> None:
    assembled = assemble(tiny(make_domain(timestamps=False)))
    assert assembled.config.model.time is False
    assert "has no timestamps" in caplog.text


def test_no_features_and_no_ids_is_refused(make_domain: Callable[..., Domain]) -> None:
    domain = make_domain(modalities=())
    with pytest.raises(BadInput, match="nothing else to learn from"):
        assemble(tiny(domain, model={"ids": False}))
