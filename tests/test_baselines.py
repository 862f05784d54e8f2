"""One suite over all recommenders: what each must do, whatever it is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import drain, scores, stirred, told
from torch import Tensor

from mmm4rec.config import from_dict, to_dict
from mmm4rec.data.at_once import smaller_blocks
from mmm4rec.data.domain import Domain
from mmm4rec.data.features import ItemFeatures
from mmm4rec.errors import BadInput
from mmm4rec.execute import execute
from mmm4rec.inference import open_model, recommend
from mmm4rec.leak import check_leaks
from mmm4rec.models.kinds import KINDS, NAMES
from mmm4rec.models.recommender import Catalogue, joined
from mmm4rec.run import RunConfig, assemble
from mmm4rec.training.checkpoint import load_model
from mmm4rec.training.evaluate import evaluate
from mmm4rec.training.step import add_gradient, prepare

TRAINED = [name for name in NAMES if KINDS[name].trained]
EVERY_FORM = [
    *((name, {}) for name in NAMES),
    ("mmm4rec", {"ids": False}),
    ("sasrec", {"content": "text"}),
    ("sasrec", {"content": "both", "ids": False}),
    ("unisrec", {"ids": False}),
    ("unisrec", {"modalities": "both"}),
    ("missrec", {"ids": False}),
    ("missrec", {"modalities": "image"}),
    ("hm4sr", {"modalities": "text"}),
    ("item_knn", {"both_ways": False, "recency": 0.0}),
    ("mamba4rec", {"layers": 2}),
    ("bsarec", {"heads": 2}),
    ("tim4rec", {"layers": 2, "time_encoding": "log", "time_step": "shift"}),
]
FORMS = [pytest.param(name, changes, id="-".join([name, *map(str, changes.values())])) for name, changes in EVERY_FORM]


@pytest.mark.parametrize(("name", "changes"), FORMS)
def test_scores_are_finite_and_know_no_batch(make_domain: Callable[..., Domain], name: str, changes: dict[str, Any]) -> None:
    """One user alone, with others of other lengths, in another order: the same scores. So padding has no effect."""
    assembled = stirred(told(name, make_domain(), changes))
    users, ends = assembled.run.data[0].valid
    users, ends = users[:9], ends[:9]
    assert len(set(ends.tolist())) > 3
    together = scores(assembled, users, ends)
    assert together.shape == (9, 30)
    assert torch.isfinite(together).all()
    order = np.random.default_rng(0).permutation(9)
    torch.testing.assert_close(scores(assembled, users[order], ends[order]), together[order], rtol=1e-4, atol=1e-5)
    for k in range(9):
        torch.testing.assert_close(scores(assembled, users[k : k + 1], ends[k : k + 1]), together[k : k + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "changes"), FORMS)
def test_the_target_and_what_follows_are_not_seen(make_domain: Callable[..., Domain], name: str, changes: dict[str, Any]) -> None:
    """Two shops that differ in the validation and test targets, their times too, give the same scores for validation."""

    def other_ends(offsets: np.ndarray, sequence: np.ndarray, times: np.ndarray) -> None:
        for end in offsets[1:]:
            sequence[end - 2 : end] = sequence[end - 2 : end] % 30 + 1
            times[end - 2 : end] += 10**7

    found = []
    for domain in (make_domain("shop"), make_domain("other", change=other_ends)):
        assembled = stirred(told(name, domain, changes))
        users, ends = assembled.run.data[0].valid
        found.append(scores(assembled, users, ends))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "changes"), FORMS)
def test_the_history_is_read(make_domain: Callable[..., Domain], name: str, changes: dict[str, Any]) -> None:
    """Users with other histories get other scores, and so does a user one item earlier; but of popularity."""
    assembled = stirred(told(name, make_domain(), changes))
    users, ends = (part[:20] for part in assembled.run.data[0].valid)
    found = scores(assembled, users, ends)
    assert (found.std(0).max() > 1e-6) == (name != "popularity")
    before = scores(assembled, users, ends - 1)
    assert torch.equal(before, found) == (name == "popularity")


@pytest.mark.parametrize("name", NAMES)
def test_saved_loaded_and_recommended(make_domain: Callable[..., Domain], tmp_path: Path, name: str) -> None:
    domain = make_domain()
    result = drain(told(name, domain), tmp_path / "run")
    model, data, device = open_model(tmp_path / "run" / "best.safetensors", domain.path)
    assert to_dict(from_dict(RunConfig, result["config"], source="test")) == result["config"]
    ranks = evaluate(model, data, *domain.examples("test").at(np.arange(domain.n_users)), device)
    assert np.mean(ranks <= 10) == pytest.approx(result["test"]["hit@10"])
    best = next(recommend(model, data, device, users=["u3"], top=5))
    assert len(best["items"]) == 5
    assert best["scores"] == sorted(best["scores"], reverse=True)


@pytest.mark.parametrize("name", TRAINED)
def test_a_resumed_run_is_the_uninterrupted_one(make_domain: Callable[..., Domain], tmp_path: Path, name: str) -> None:
    domain = make_domain()
    config = told(name, domain, training={"epochs": 3})
    whole = drain(config, tmp_path / "whole")
    reports = execute(config, tmp_path / "parts")
    list(islice(reports, 1))
    reports.close()
    torch.randn(7)  # whatever else drew in between
    assert drain(config, tmp_path / "parts", resume=True)["test"] == whole["test"]
    first, second = (load_model(tmp_path / part / "best.safetensors")[0] for part in ("whole", "parts"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def in_a_circle(offsets: np.ndarray, sequence: np.ndarray, times: np.ndarray) -> None:
    for first, end in pairwise(offsets):
        sequence[first:end] = (sequence[first] + np.arange(end - first)) % 30 + 1


@pytest.mark.parametrize("name", TRAINED)
def test_training_learns_what_always_follows(make_domain: Callable[..., Domain], tmp_path: Path, name: str) -> None:
    """In a shop where item k + 1 follows item k, every model that is trained finds it for nine users of ten; chance is one of three."""

    domain = make_domain(users=120, change=in_a_circle)
    changes: dict[str, Any] = {"dropout": 0.0} | ({"adaptor_dropout": 0.0} if name == "unisrec" else {})
    config = told(name, domain, changes, training={"epochs": 40, "learning_rate": 1e-2, "batch_size": 64, "accumulation": 1})
    assert drain(config, tmp_path / "run")["test"]["hit@10"] > 0.9


@pytest.mark.parametrize("name", TRAINED)
def test_the_gradient_is_that_of_the_plain_loss(make_domain: Callable[..., Domain], name: str) -> None:
    """However its pieces are cut: cross-entropy of all scores by autograd, without dropout and noise."""
    domain = make_domain()
    changes: dict[str, Any] = {"dropout": 0.0} | ({"adaptor_dropout": 0.0} if name == "unisrec" else {})
    assembled = stirred(told(name, domain, changes))
    run = assembled.run
    run.model.eval()  # no noise in the gates
    plans = [run.sampler.plan(1, 0)]
    with smaller_blocks(3):
        add_gradient(run, prepare(run, plans, 0))
    ours = {key: parameter.grad for key, parameter in run.model.named_parameters()}
    run.model.zero_grad()
    users, ends = (np.concatenate([getattr(share, part) for share in plans[0].shares]) for part in ("users", "ends"))
    batch, catalogue = run.data[0].batch(users, ends), run.model.items(run.data[0].features)
    logits = run.model.scores(run.model.users(batch, catalogue), catalogue)[:, 1:]
    torch.nn.functional.cross_entropy(logits, batch.targets - 1).backward()
    for key, parameter in run.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[key], parameter.grad, rtol=2e-3, atol=2e-6, msg=lambda text, key=key: f"{key}: {text}")


def test_both_passes_over_a_catalogue_of_many_blocks_see_the_same_noise(
    make_domain: Callable[..., Domain], monkeypatch: pytest.MonkeyPatch
) -> None:
    """UniSRec's vectors are random in training: a block is computed twice, for the sum and for the gradient, and comes out alike."""
    monkeypatch.setattr("mmm4rec.data.features.ITEMS_AT_ONCE", 10)
    monkeypatch.setattr("mmm4rec.data.features.BLOCK_ITEMS", {"cpu": 7, "cuda": 7})
    run = assemble(told("unisrec", make_domain())).run
    run.model.train()
    seen: dict[int, list[Tensor]] = {}
    items = run.model.items

    def recorded(features: ItemFeatures, ids: Tensor | slice | None = None) -> Catalogue:
        found = items(features, ids)
        if isinstance(ids, slice):
            seen.setdefault(ids.start, []).append(found.candidates.detach())
        return found

    monkeypatch.setattr(run.model, "items", recorded)
    add_gradient(run, prepare(run, [run.sampler.plan(1, 0)], 0))
    assert len(seen) == 5
    for first, second in seen.values():
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    alone = [part[0] for part in seen.values()]
    run.state.optimizer_steps += 1
    add_gradient(run, prepare(run, [run.sampler.plan(1, 0)], 1))
    assert not torch.equal(seen[1][2], alone[0])  # another step, another noise


@pytest.mark.parametrize(("name", "changes"), FORMS)
def test_half_precision_trains(make_domain: Callable[..., Domain], tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    result = drain(told(name, make_domain(), changes, training={"precision": "bf16", "epochs": 1}), tmp_path / "run")
    assert np.isfinite(result["test"]["mrr"])


@pytest.mark.parametrize(
    ("name", "changes"),
    [("sasrec", {"content": "both", "ids": False}), ("unisrec", {"modalities": "both"}), ("missrec", {}), ("mmm4rec", {})],
)
def test_a_domain_may_lack_what_another_has(make_domain: Callable[..., Domain], tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    """Pre-trained on a shop with both modalities and one with texts alone; ranked, zero-shot, on one with pictures alone."""
    shops = [make_domain("a"), make_domain("b", modalities=("text",))]
    pictures = make_domain("c", modalities=("image",), seed=2)
    training = {"loss": "in_batch", "mixed_batches": True, "epochs": 1}
    drain(told(name, shops, changes, training=training, data={"examples": "all", "zero_shot": [str(pictures.path)]}), tmp_path / "run")
    model, data, device = open_model(tmp_path / "run" / "best.safetensors", pictures.path)
    assert np.isfinite(evaluate(model, data, *pictures.examples("test").at(np.arange(60)), device)).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_leak_check_finds_nothing(make_domain: Callable[..., Domain], name: str) -> None:
    run = stirred(told(name, make_domain())).run
    report = check_leaks(run.model, run.data[0])
    assert report.verdict == "clean"


@pytest.mark.parametrize("name", ["popularity", "item_knn", "gru4rec", "sasrec", "bsarec", "mamba4rec", "tim4rec", "hm4sr"])
def test_a_model_of_single_items_takes_one_domain(make_domain: Callable[..., Domain], name: str) -> None:
    with pytest.raises(BadInput, match="belongs to the items of one domain"):
        assemble(told(name, [make_domain("a"), make_domain("b", seed=1)]))


@pytest.mark.parametrize("name", ["last_item", "unisrec", "missrec"])
def test_a_model_of_content_needs_features(make_domain: Callable[..., Domain], name: str) -> None:
    with pytest.raises(BadInput, match=r"no domain has text( or image)? features"):
        assemble(told(name, make_domain(modalities=())))


@pytest.mark.parametrize("name", ["unisrec", "missrec"])
def test_pre_trained_on_two_domains_and_moved_to_a_third(make_domain: Callable[..., Domain], tmp_path: Path, name: str) -> None:
    """The weights of content go along, zero-shot ranking works, item ids are new; the encoder may stay as it is."""
    sources = [make_domain("a", seed=1), make_domain("b", seed=2)]
    target = make_domain("c", seed=3)
    training = {"loss": "in_batch", "mixed_batches": True, "accumulation": 1}
    data = {"examples": "all", "zero_shot": [str(target.path)]}
    drain(told(name, sources, training=training, data=data), tmp_path / "source")
    file = tmp_path / "source" / "best.safetensors"
    model, unseen, device = open_model(file, target.path)
    assert len(evaluate(model, unseen, *target.examples("valid").at(np.arange(60)), device)) == 60
    changes = {"freeze_encoder": True}
    assembled = assemble(told(name, target, changes, init=str(file)))
    assert assembled.transfer is not None
    assert assembled.transfer.new == ["ids.item"]
    assert not assembled.transfer.skipped
    drain(told(name, target, changes, init=str(file)), tmp_path / "target")
    before, after = load_model(file)[0], load_model(tmp_path / "target" / "best.safetensors")[0]
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    frozen = {"unisrec": ("encoder.encoder.", "encoder.positions."), "missrec": ("encoder.", "decoder.", "positions.")}[name]
    assert not [key for key in moved if key.startswith(frozen)]
    assert {"unisrec": {"adaptor.gate", "encoder.norm.weight"}, "missrec": {"adapters.text.weight", "norm.weight"}}[name] <= moved


def test_without_timestamps_time_is_off(make_domain: Callable[..., Domain]) -> None:
    domain = make_domain(timestamps=False)
    for name in ("tim4rec", "hm4sr"):
        assert not assemble(told(name, domain)).config.model.time


def test_a_config_of_another_model_is_refused(make_domain: Callable[..., Domain]) -> None:
    domain = make_domain()
    with pytest.raises(BadInput, match="unknown key filter_size"):
        told("sasrec", domain, {"filter_size": 3})
    with pytest.raises(ValueError, match="sasrec needs a SASRecConfig"):
        replace(told("gru4rec", domain), recommender="sasrec")
    assert RunConfig(told("gru4rec", domain).data, recommender="bsarec").model == KINDS["bsarec"].config()


@pytest.mark.parametrize(
    ("name", "changes", "rule"),
    [
        ("sasrec", {"heads": 3}, "multiple of heads"),
        ("sasrec", {"ids": False}, "nothing to learn from"),
        ("missrec", {"layers": 3}, "must be even"),
        ("missrec", {"interest_ratio": 0.0}, "interest_ratio"),
        ("missrec", {"temperature": -1.0}, "temperature"),
        ("unisrec", {"adaptor_dropout": 1.0}, "adaptor_dropout"),
        ("bsarec", {"alpha": 1.5}, "alpha"),
        ("bsarec", {"cutoff": 99}, "cutoff"),
        ("item_knn", {"recency": -1.0}, "recency"),
        ("gru4rec", {"dropout": 1.0}, "dropout"),
        ("item_knn", {"neighbours": 0}, "neighbours"),
        ("tim4rec", {"head_width": 7}, "head_width"),
    ],
)
def test_sizes_that_do_not_fit(make_domain: Callable[..., Domain], name: str, changes: dict[str, Any], rule: str) -> None:
    with pytest.raises(BadInput, match=rule):
        told(name, make_domain(), changes)


@pytest.mark.parametrize(("loss", "optimizer"), [("gbce", "adam"), ("sampled", "adam"), ("gbce", "nadam")])
def test_sasrec_learns_by_other_losses(make_domain: Callable[..., Domain], tmp_path: Path, loss: str, optimizer: str) -> None:
    training = {
        "epochs": 40,
        "learning_rate": 1e-2,
        "batch_size": 64,
        "accumulation": 1,
        "patience": 40,
        "loss": loss,
        "negatives": 20,
        "optimizer": optimizer,
    }
    config = told("sasrec", make_domain(users=120, change=in_a_circle), {"dropout": 0.0}, training=training)
    assert drain(config, tmp_path / "run")["test"]["hit@10"] > 0.9


def test_a_catalogue_of_many_blocks_ranks_alike(make_domain: Callable[..., Domain], monkeypatch: pytest.MonkeyPatch) -> None:
    domain = make_domain()
    for name in ("item_knn", "sasrec", "missrec"):
        assembled = stirred(told(name, domain))
        run = assembled.run
        users, ends = run.data[0].valid
        whole = evaluate(run.model, run.data[0], users, ends, run.device)
        with monkeypatch.context() as patch:
            patch.setattr("mmm4rec.data.features.ITEMS_AT_ONCE", 10)
            patch.setattr("mmm4rec.data.features.BLOCK_ITEMS", {"cpu": 7, "cuda": 7})
            np.testing.assert_array_equal(evaluate(run.model, run.data[0], users, ends, run.device), whole)
        assert joined([run.model.items(run.data[0].features)]).candidates.shape[0] == 31
