"""One suite over all recommenders: what each must do, whatever it is made of. Then what each one is, worked by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_MODEL
from torch import Tensor

from mmm4rec.config import from_dict, to_dict
from mmm4rec.data.at_once import smaller_blocks
from mmm4rec.data.batches import DomainData, pack
from mmm4rec.data.domain import Domain
from mmm4rec.data.features import ItemFeatures
from mmm4rec.errors import BadInput
from mmm4rec.execute import execute
from mmm4rec.inference import open_model, recommend
from mmm4rec.leak import check_leaks
from mmm4rec.models.baselines.blocks import NORM_EPS
from mmm4rec.models.baselines.bsarec import BSARecConfig, FrequencyLayer
from mmm4rec.models.baselines.hm4sr import HM4SRConfig, InteractiveMixture, TemporalMixture
from mmm4rec.models.baselines.item_knn import ItemKNN, ItemKNNConfig
from mmm4rec.models.baselines.mamba4rec import Mamba4RecConfig, MambaBlock
from mmm4rec.models.baselines.missrec import _repeated, find_interests
from mmm4rec.models.baselines.unisrec import Adaptor, UniSRecConfig
from mmm4rec.models.kinds import KINDS, NAMES
from mmm4rec.models.recommender import Catalogue, joined
from mmm4rec.run import Assembled, RunConfig, assemble
from mmm4rec.training.checkpoint import load_model
from mmm4rec.training.evaluate import Ranking, evaluate
from mmm4rec.training.losses import gbce, gbce_beta
from mmm4rec.training.step import add_gradient, prepare

TINY: dict[str, dict[str, Any]] = {
    "mmm4rec": TINY_MODEL,
    "popularity": {},
    "last_item": {},
    "item_knn": {"max_len": 8, "neighbours": 5},
    "gru4rec": {"width": 16, "recurrent_width": 16, "max_len": 8},
    "sasrec": {"width": 16, "ffn_width": 16, "max_len": 8},
    "bsarec": {"width": 16, "ffn_width": 16, "max_len": 8},
    "mamba4rec": {"width": 16, "state": 4, "max_len": 8},
    "tim4rec": {"width": 16, "ffn_width": 16, "head_width": 8, "state": 8, "max_len": 8},
    "unisrec": {"width": 16, "ffn_width": 16, "experts": 3, "max_len": 8},
    "missrec": {"width": 16, "ffn_width": 16, "max_len": 8},
    "hm4sr": {"width": 16, "ffn_width": 16, "experts": 2, "time_experts": 2, "interval_scale": 2, "max_len": 8},
}
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


def told(name: str, domains: Domain | list[Domain], model: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    folders = [str(domain.path) for domain in (domains if isinstance(domains, list) else [domains])]
    training = {"epochs": 2, "batch_size": 32, "accumulation": 2, "learning_rate": 3e-3, **sections.pop("training", {})}
    data = {"domains": folders, **sections.pop("data", {})}
    plain = {"recommender": name, "model": {**TINY[name], **(model or {})}, "data": data, "training": training, "device": "cpu"}
    return from_dict(RunConfig, {**plain, **sections}, source="test")


def drain(config: RunConfig, out: Path, **options: bool) -> dict[str, Any]:
    reports = execute(config, out, **options)
    while True:
        try:
            next(reports)
        except StopIteration as stop:
            return stop.value


def scores(assembled: Assembled, users: np.ndarray, ends: np.ndarray) -> Tensor:
    """Of all real items for the examples (users[k], ends[k]), encoded as one batch: [U, I]."""
    run = assembled.run
    run.model.eval()
    with torch.inference_mode():
        ranking = Ranking(run.model, run.data[0], run.device)
        encoded = ranking.encode(run.data[0].inputs(users, ends))
        return torch.cat([part.clone() for _, _, part in ranking.scores(encoded, users, ends)])


def stirred(config: RunConfig) -> Assembled:
    """A run whose weights are not those of its start, where some parts are zero."""
    assembled = assemble(config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in assembled.run.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return assembled


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


def test_item_knn_worked_by_hand(make_domain: Callable[..., Domain]) -> None:
    """Histories 1 2 3, 1 3 and 1 2 before validation: item 1 counts 3, items 2 and 3 count 2. Neighbours up to two steps on."""
    histories = [[1, 2, 3, 9, 9], [1, 3, 9, 9], [1, 2, 9, 9]]
    offsets = np.concatenate([[0], np.cumsum([len(history) for history in histories])])
    shop = make_domain(users=3, items=9)
    domain = replace(shop, offsets=offsets, items=np.concatenate(histories).astype(shop.items.dtype), timestamps=None)
    model = ItemKNN(ItemKNNConfig(max_len=8, neighbours=2, window=2, both_ways=False), domain)
    near, alike = model.get_buffer("neighbours"), model.get_buffer("likeness")
    # 1 -> 2: twice at one step, 2 / sqrt(3 * 2); 1 -> 3: once at two, once at one, 1.5 / sqrt(3 * 2); 2 -> 3: once, 1 / 2
    assert near[1].tolist() == [2, 3]
    torch.testing.assert_close(alike[1], torch.tensor([2.0, 1.5]) / 6**0.5)
    assert near[2].tolist() == [3, 0]
    torch.testing.assert_close(alike[2], torch.tensor([0.5, 0.0]))
    # user 0 before validation, 1 2 3: item 1 is the third from the end and weighs 1 / 3, item 2 weighs 1 / 2, item 3 leads nowhere
    data = DomainData(domain, ItemFeatures(9, {}, {}, {}), *[domain.examples("valid")] * 2, max_len=8, time=False)
    ranking = Ranking(model, data, torch.device("cpu"))
    users, ends = np.array([0]), np.array([3])
    ((_, _, found),) = ranking.scores(ranking.encode(data.inputs(users, ends)), users, ends)
    expected = torch.zeros(9)
    expected[1], expected[2] = 2 / 6**0.5 / 3, 1.5 / 6**0.5 / 3 + 0.5 / 2
    torch.testing.assert_close(found[0], expected)


@pytest.mark.parametrize("at_last", [False, True])
def test_the_mamba_block_is_that_of_transformers(at_last: bool) -> None:
    """The same weights, packed histories of 3, 7, 1 and 5 items against padded ones."""
    transformers = pytest.importorskip("transformers", reason="the reference is transformers' Mamba block")
    from transformers.models.mamba.modeling_mamba import MambaMixer

    ours = MambaBlock(Mamba4RecConfig(width=16, state=4))
    sizes = transformers.MambaConfig(hidden_size=16, state_size=4, conv_kernel=4, expand=2, use_bias=False, num_hidden_layers=1)
    theirs = MambaMixer(sizes, 0).eval()
    names = {"in_proj.weight": ours.into.weight, "conv1d.weight": ours.conv.weight[:, None], "conv1d.bias": ours.conv.bias}
    names |= {"x_proj.weight": ours.select.weight, "dt_proj.weight": ours.step.weight, "dt_proj.bias": ours.step.bias}
    theirs.load_state_dict(names | {"A_log": ours.log_a, "D": ours.skip, "out_proj.weight": ours.out.weight})
    items, packing = pack(np.arange(16), np.array([3, 7, 1, 5]))
    x = torch.randn(16, 16)[items]
    with torch.no_grad():
        found, expected = ours(x, packing, at_last=at_last), theirs(packing.padded(x))
    if at_last:
        torch.testing.assert_close(found, expected[torch.arange(4), packing.lengths - 1])
    else:
        real = packing.padded(torch.ones(*items.shape)) > 0
        torch.testing.assert_close(packing.padded(found)[real], expected[real])


def test_padding_and_groups_by_hand() -> None:
    """Histories 1 2 3 | 4 | 5 6 7 8 9: padded behind, padded before, and in groups of alike lengths."""
    items, packing = pack(np.arange(1, 10), np.array([3, 1, 5]))
    assert packing.padded(items).tolist() == [[1, 2, 3, 0, 0], [4, 0, 0, 0, 0], [5, 6, 7, 8, 9]]
    assert packing.padded_before(items, 6, torch.arange(3)).tolist() == [[0, 0, 0, 1, 2, 3], [0, 0, 0, 0, 0, 4], [0, 5, 6, 7, 8, 9]]
    assert [(group.examples.tolist(), packing.padded(items, group).tolist()) for group in packing.groups()] == [
        ([1], [[4]]),
        ([0], [[1, 2, 3, 0]]),
        ([2], [[5, 6, 7, 8, 9]]),
    ]


def test_interests_are_the_clusters_that_the_features_have() -> None:
    """Three heaps far apart, k = 3: every heap is one interest, whose centre is its mean; an item without a feature has none."""
    random = np.random.default_rng(0)
    heaps = np.repeat(np.eye(3, 4) * 50, 4, axis=0) + random.standard_normal((12, 4))
    table = torch.from_numpy(np.concatenate([np.zeros((2, 4)), heaps]).astype(np.float32))  # padding, item 1 without a feature
    present = torch.tensor([False, False] + [True] * 12)
    features = ItemFeatures(13, {"text": table}, {"text": present}, {"text": "x"})
    found = find_interests(features, "text", 0.25)
    assert found.of_item[:2].tolist() == [0, 0]
    assert [len(set(found.of_item[2 + 4 * h : 6 + 4 * h].tolist())) for h in range(3)] == [1, 1, 1]
    assert len(set(found.of_item.tolist())) == 4
    for h in range(3):
        centre = found.centres[found.of_item[2 + 4 * h]]
        torch.testing.assert_close(centre, table[2 + 4 * h : 6 + 4 * h].mean(0))


def test_the_filter_of_bsarec_by_an_explicit_fourier_sum() -> None:
    """Cutoff 3 keeps the mean and the first harmonic; the rest is scaled by the square; then residual and layer norm."""
    layer = FrequencyLayer(BSARecConfig(width=4, max_len=8, cutoff=3, dropout=0.0)).eval()
    x, T = torch.randn(2, 8, 4, dtype=torch.float64), 8
    place = torch.arange(T, dtype=torch.float64)
    low = x.mean(1, keepdim=True).expand_as(x).clone()
    for wave in (torch.cos(2 * torch.pi * place / T), torch.sin(2 * torch.pi * place / T)):
        low += 2 / T * torch.einsum("t,btd->bd", wave, x)[:, None] * wave[:, None]
    scaled = low + layer.scale.double() ** 2 * (x - low) + x
    expected = torch.nn.functional.layer_norm(scaled, (4,), eps=NORM_EPS)
    torch.testing.assert_close(layer.double()(x), expected, rtol=1e-6, atol=1e-6)


def test_the_adaptor_of_unisrec_by_its_formula() -> None:
    """A softmax over the gates times W_e (x - b_e); in training with noise of deviation softplus(x V) + .01 on the gates."""
    adaptor = Adaptor(5, UniSRecConfig(width=4, heads=2, experts=3, adaptor_dropout=0.0)).eval()
    with torch.no_grad():
        for parameter in adaptor.parameters():
            parameter.copy_(torch.randn_like(parameter))
    x, weights = torch.randn(6, 5), adaptor.experts.weight.view(3, 4, 5)

    def weighed(gates: Tensor) -> Tensor:
        experts = [(x - adaptor.shifts[e]) @ weights[e].T for e in range(3)]
        return sum(gates.softmax(-1)[:, e, None] * said for e, said in enumerate(experts))  # type: ignore[return-value]

    torch.testing.assert_close(adaptor(x), weighed(x @ adaptor.gate))
    torch.manual_seed(0)
    noise = torch.randn(6, 3) * (torch.log1p(torch.exp(x @ adaptor.noise)) + 0.01)
    torch.manual_seed(0)
    torch.testing.assert_close(adaptor.train()(x), weighed(x @ adaptor.gate + noise))


def test_interests_count_once_and_candidates_weigh_their_modalities_alike(make_domain: Callable[..., Domain]) -> None:
    """MISSRec: a number that stood before is masked; a candidate is a third of each of its three unit vectors."""
    assert _repeated(torch.tensor([[3.0, 5, 3, 0, 5]])).tolist() == [[False, False, True, False, True]]
    run = stirred(told("missrec", make_domain())).run
    run.model.eval()
    features = run.data[0].features
    parts = [adapter(features.vectors[name]) for name, adapter in run.model.adapters.items()]  # type: ignore[operator, union-attr, index]
    expected = sum(torch.nn.functional.normalize(part, dim=-1) for part in (*parts, run.model.ids["item"])) / 3  # type: ignore[index, misc]
    catalogue = run.model.items(features)
    torch.testing.assert_close(catalogue.candidates[1:], expected[1:])
    torch.testing.assert_close(catalogue.inputs["item"][1:], (parts[0] + parts[1] + run.model.ids["item"])[1:])  # type: ignore[index]


@pytest.mark.parametrize("ids", [True, False])
def test_what_an_item_lacks_has_no_weight_among_candidates(make_domain: Callable[..., Domain], ids: bool) -> None:
    """MISSRec: item 1 without a picture, item 2 without either; an item of both keeps what it had."""
    run = stirred(told("missrec", make_domain(), {"ids": ids})).run
    run.model.eval()
    features = run.data[0].features
    whole = run.model.items(features).candidates
    for modality, items in (("image", [1, 2]), ("text", [2])):
        features.present[modality][items] = False  # type: ignore[index]
        features.vectors[modality][items] = 0.0  # type: ignore[index]
    found = run.model.items(features).candidates
    text = run.model.adapters["text"](features.vectors["text"][1])  # type: ignore[operator, index]
    parts = [2 * text / text.norm()]
    if ids:
        own = run.model.ids["item"]  # type: ignore[index]
        parts.append(own[1] / own[1].norm())
        torch.testing.assert_close(found[2], own[2] / own[2].norm())
    else:
        assert not found[2].any()
    torch.testing.assert_close(found[1], torch.stack(parts).sum(0) / (3 if ids else 2))
    torch.testing.assert_close(found[3:], whole[3:])


def test_a_single_modality_and_the_ids_are_one_candidate(make_domain: Callable[..., Domain]) -> None:
    """MISSRec with texts alone: the unit vector of their sum."""
    run = stirred(told("missrec", make_domain(), {"modalities": "text"})).run
    run.model.eval()
    features = run.data[0].features
    both = run.model.adapters["text"](features.vectors["text"]) + run.model.ids["item"]  # type: ignore[operator, index]
    torch.testing.assert_close(run.model.items(features).candidates[1:], torch.nn.functional.normalize(both, dim=-1)[1:])


def test_the_mixtures_of_hm4sr_by_their_formulas() -> None:
    """Streams gain gate-weighed words of experts that read them all; time scales them by gate-weighed vectors."""
    config = HM4SRConfig(width=4, heads=2, experts=2, time_experts=3, interval_scale=2)
    streams = [torch.randn(1, 2, 4) for _ in range(2)]
    mixture = InteractiveMixture(config, 2)
    with torch.no_grad():
        mixture.weights.copy_(torch.tensor([0.5, 2.0]))
    joined_, weight, bias = torch.cat(streams, -1), mixture.experts.weight.view(2, 8, 8), mixture.experts.bias.view(2, 8)
    for s, (x, found) in enumerate(zip(streams, mixture(streams), strict=True)):
        gate = mixture.gates[s](x).softmax(-1)
        said = sum(gate[..., e, None] * (joined_ @ weight[e].T + bias[e])[..., 4 * s : 4 * s + 4] for e in range(2))
        torch.testing.assert_close(found, x + mixture.weights[s] * said)
    temporal = TemporalMixture(config, 2)
    gaps, days = torch.tensor([[0.0, 7.0]]), torch.tensor([[0.0, 3.0]])  # log2(7 + 1) is 3: interval 6 of two a doubling
    frequencies = 10_000 ** -(torch.arange(4) / 4)
    when = torch.cos((days[..., None] * temporal.time.weight[:, 0] + temporal.time.bias) * frequencies)
    route = temporal.gate(torch.cat([temporal.intervals(torch.tensor([[0, 6]])), when], -1)).softmax(-1)
    for s, (x, found) in enumerate(zip(streams, temporal(streams, gaps, days), strict=True)):
        torch.testing.assert_close(found, x * (route @ temporal.experts[:, s]))


def test_gbce_against_its_definition() -> None:
    """-beta log sigmoid(target) - sum of log(1 - sigmoid) over the draws, by autograd; with t = 0 beta is 1, with t = 1 the rate."""
    torch.manual_seed(0)
    users, candidates = (
        torch.randn(5, 3, dtype=torch.float64, requires_grad=True),
        torch.randn(7, 3, dtype=torch.float64, requires_grad=True),
    )
    targets, draws = torch.tensor([0, 3, 3, 6, 1]), torch.tensor([0.0, 2, 1, 4, 0, 1, 1], dtype=torch.float64)
    beta, gradient, scale = gbce_beta(9, 31, 0.75), torch.zeros(7, 3, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    logits = users @ candidates.T / 0.5
    expected = torch.zeros(5, dtype=torch.float64)
    for k, target in enumerate(targets):
        expected[k] = -beta * torch.log(torch.sigmoid(logits[k, target]))
        for j in range(7):
            if j != target:
                expected[k] = expected[k] - draws[j] * torch.log(1 - torch.sigmoid(logits[k, j]))
    loss, d_users = gbce(
        users.detach(), candidates.detach(), targets, draws=draws, beta=beta, temperature=0.5, scale=scale, gradient=gradient
    )
    torch.testing.assert_close(loss, expected.sum())
    (expected * scale).sum().backward()
    torch.testing.assert_close(d_users, users.grad)
    torch.testing.assert_close(gradient, candidates.grad)
    assert gbce_beta(9, 31, 0.0) == pytest.approx(1.0)
    assert gbce_beta(9, 31, 1.0) == pytest.approx(9 / 30)


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
