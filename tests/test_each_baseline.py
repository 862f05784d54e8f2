"""What each recommender is, worked by hand, by its formulas, or against a library's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import stirred, told
from torch import Tensor

from mmm4rec.data.batches import DomainData, pack
from mmm4rec.data.domain import Domain
from mmm4rec.data.features import ItemFeatures
from mmm4rec.models.baselines.blocks import NORM_EPS
from mmm4rec.models.baselines.bsarec import BSARecConfig, FrequencyLayer
from mmm4rec.models.baselines.hm4sr import HM4SR, HM4SRConfig, InteractiveMixture, TemporalMixture
from mmm4rec.models.baselines.item_knn import ItemKNN, ItemKNNConfig
from mmm4rec.models.baselines.mamba4rec import Mamba4RecConfig, MambaBlock
from mmm4rec.models.baselines.missrec import _repeated, find_interests
from mmm4rec.models.baselines.unisrec import Adaptor, UniSRecConfig
from mmm4rec.training.evaluate import Ranking
from mmm4rec.training.losses import gbce, gbce_beta


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


def test_the_interactive_mixture_starts_as_torch_has_it() -> None:
    """Uniform up to 1 / sqrt(3 D), as in the release, where the rest starts with deviation .02."""
    model = HM4SR(HM4SRConfig(), n_items=5, feature_dimensions={"text": 8, "image": 8})
    bound = (3 * HM4SRConfig().width) ** -0.5
    weight, rest = model.interactive.experts.weight, model.positions.weight
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert rest.std().item() == pytest.approx(0.02, rel=0.1)


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
