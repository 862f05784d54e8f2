"""The loss and its gradient by hand against autograd, a double loop, and what a sample must mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmm4rec.training.losses import cross_entropy, in_batch_weights, sampled_weights, scores_workspace, streamed_cross_entropy

EXACT = {"rtol": 1e-10, "atol": 1e-10}
B, N, D = 9, 13, 4
AT_ONCE = (1, 2 * N, 5 * N + 3, 10**6)  # rows: one, two, five, all
SCALES = [1.0, torch.linspace(0.1, 2, B, dtype=torch.float64)]


def problem(seed: int = 0, users: int = B, items: int = N) -> tuple[Tensor, Tensor, Tensor]:
    """Users [B, D] and candidates [N, D], ready for autograd, and targets [B] with repetitions."""
    random = torch.Generator().manual_seed(seed)
    vectors = [torch.randn(n, D, dtype=torch.float64, generator=random).requires_grad_() for n in (users, items)]
    return *vectors, torch.randint(items, (users,), generator=random)  # type: ignore[return-value]


def ours(users: Tensor, candidates: Tensor, targets: Tensor, **told: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, and its gradients by users and candidates, the latter beside what was there."""
    there = torch.arange(candidates.numel(), dtype=users.dtype).view_as(candidates)
    gradient = there.clone()
    loss, d_users = cross_entropy(users.detach(), candidates.detach(), targets, gradient=gradient, **told)
    return loss, d_users, gradient - there


def assert_is(found: tuple[Tensor, ...], losses: Tensor, users: Tensor, candidates: Tensor, scale: Tensor | float = 1.0) -> None:
    """`found` is the sum of these losses [B], each gradient multiplied with `scale`."""
    torch.testing.assert_close(found[0], losses.sum().detach(), **EXACT)
    torch.testing.assert_close(found[1:], torch.autograd.grad((losses * scale).sum(), (users, candidates), retain_graph=True), **EXACT)


@pytest.fixture(params=AT_ONCE, ids="{} at once".format)
def scores_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmm4rec.training.losses.SCORES_AT_ONCE", {"cpu": request.param})


@pytest.mark.usefixtures("scores_at_once")
@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("scale", SCALES, ids=["alike", "scaled"])
def test_the_dense_loss_is_torchs(temperature: float, scale: Tensor | float) -> None:
    users, candidates, targets = problem()
    assert len(targets.unique()) < B
    losses = F.cross_entropy(users @ candidates.T / temperature, targets, reduction="none")
    for workspace in (None, scores_workspace(users.detach()), torch.full((3,), torch.nan, dtype=torch.float64)):
        found = ours(users, candidates, targets, temperature=temperature, scale=scale, workspace=workspace)
        assert_is(found, losses, users, candidates, scale)


def by_double_loop(
    users: Tensor, candidates: Tensor, targets: Tensor, weights: Sequence[float], temperature: float, *, target_weighs_one: bool
) -> Tensor:
    """The formula in the module's text, example by example and candidate by candidate: losses [B]."""
    losses = []
    for user, target in zip(users, targets.tolist(), strict=True):
        of_target = (user @ candidates[target] / temperature).exp()
        total = of_target * (1.0 if target_weighs_one else weights[target])
        for j, candidate in enumerate(candidates):
            if j != target:
                total = total + weights[j] * (user @ candidate / temperature).exp()
        losses.append(-(of_target / total).log())
    return torch.stack(losses)


@pytest.mark.usefixtures("scores_at_once")
@pytest.mark.parametrize("target_weighs_one", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("scale", SCALES, ids=["alike", "scaled"])
def test_weighted_candidates_by_a_double_loop(temperature: float, scale: Tensor | float, target_weighs_one: bool) -> None:
    users, candidates, targets = problem(1)
    weights = torch.linspace(0.2, 3, N, dtype=torch.float64)
    told = {"temperature": temperature, "target_weighs_one": target_weighs_one}
    losses = by_double_loop(users, candidates, targets, weights.tolist(), **told)
    assert_is(ours(users, candidates, targets, log_weights=weights.log(), scale=scale, **told), losses, users, candidates, scale)


@pytest.mark.usefixtures("scores_at_once")
def test_a_candidate_of_no_weight_counts_for_its_own_examples_alone() -> None:
    """Targets that were never drawn: log_weights -inf."""
    users, candidates, targets = problem(2)
    weights = torch.ones(N, dtype=torch.float64)
    weights[targets[:4]] = 0
    losses = by_double_loop(users, candidates, targets, weights.tolist(), 1.0, target_weighs_one=True)
    assert_is(ours(users, candidates, targets, log_weights=weights.log()), losses, users, candidates)
    nothing_else = torch.full((N,), -torch.inf, dtype=torch.float64)
    loss, d_users, gradient = ours(users, candidates, targets, log_weights=nothing_else)
    assert float(loss) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(d_users, torch.zeros_like(d_users), **EXACT)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), **EXACT)


@pytest.mark.parametrize("log_weights", [None, torch.zeros(N), torch.full((N,), -torch.inf)], ids=["dense", "weighed", "nothing"])
def test_extreme_scores_stay_finite(log_weights: Tensor | None) -> None:
    """Scores of +-1e4 in float32: a target far below costs what it is below."""
    users, candidates = torch.eye(2, D) * 1e4, torch.zeros(N, D)
    candidates[0, 0], candidates[1, 0], candidates[2, 1] = 1.0, -1.0, 1.0
    loss, d_users, gradient = ours(users, candidates, torch.tensor([1, 2]), log_weights=log_weights)
    alone = log_weights is not None and bool(log_weights.isinf().all())
    assert float(loss) == (0.0 if alone else 2e4)
    assert d_users.isfinite().all()
    assert gradient.isfinite().all()
    assert d_users[0, 0] == (0.0 if alone else 2.0)


@pytest.mark.usefixtures("scores_at_once")
@pytest.mark.parametrize("duplicates", [True, False], ids=["with duplicates", "without"])
def test_the_in_batch_loss_written_out(duplicates: bool) -> None:
    """A column an example; columns of an example's own item are masked but its own, or all kept (the release)."""
    users, items, _ = problem(3)
    of_examples = torch.tensor([4, 0, 4, 2, 0, 4, 11, 2, 7])
    columns = users @ items[of_examples].T
    if not duplicates:
        same = of_examples[:, None] == of_examples
        columns = columns.masked_fill(same & ~torch.eye(B, dtype=torch.bool), -torch.inf)
    losses = F.cross_entropy(columns, torch.arange(B), reduction="none")
    candidates, targets, counts = of_examples.unique(return_inverse=True, return_counts=True)
    log_weights = torch.from_numpy(in_batch_weights(counts.numpy()))
    vectors = items[candidates]
    loss, d_users, gradient = ours(users, vectors, targets, log_weights=log_weights, target_weighs_one=not duplicates)
    assert_is((loss, d_users, torch.zeros_like(items).index_add(0, candidates, gradient)), losses, users, items)


BLOCKS = {"one": (0, N), "unequal": (0, 1, 3, 10, N), "single items": tuple(range(N + 1))}


@pytest.mark.usefixtures("scores_at_once")
@pytest.mark.parametrize("bounds", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("scale", SCALES, ids=["alike", "scaled"])
def test_the_streamed_loss_is_that_over_the_whole(bounds: tuple[int, ...], first: int, scale: Tensor | float) -> None:
    """Items of a linear model whose weights take the gradient; the first item is 0 or 1; targets in every block."""
    torch.manual_seed(0)
    users, _, _ = problem(4)
    raw = torch.randn(N, 3, dtype=torch.float64)
    weight, bias = torch.randn(3, D, dtype=torch.float64, requires_grad=True), torch.randn(D, dtype=torch.float64, requires_grad=True)
    targets = first + torch.tensor([0, N - 1, 0, 5, 5, 9, 1, 2, 3])
    blocks = [slice(first + a, first + b) for a, b in pairwise(bounds)]

    def candidates(block: slice) -> Tensor:
        return raw[block.start - first : block.stop - first] @ weight + bias

    losses = F.cross_entropy(users @ candidates(slice(first, first + N)).T / 0.7, targets - first, reduction="none")
    expected = torch.autograd.grad((losses * scale).sum(), (users, weight, bias))
    loss, d_users = streamed_cross_entropy(users.detach(), blocks, candidates, targets, temperature=0.7, scale=scale)
    torch.testing.assert_close(loss, losses.detach(), **EXACT)
    torch.testing.assert_close((d_users, weight.grad, bias.grad), expected, **EXACT)


def test_the_streamed_loss_of_extreme_scores_stays_finite() -> None:
    users, candidates = torch.eye(2, D) * 1e4, torch.zeros(N, D)
    candidates[0, 0], candidates[1, 0], candidates[12, 1] = 1.0, -1.0, 1.0
    candidates.requires_grad_()
    blocks = [slice(0, 1), slice(1, 7), slice(7, N)]
    loss, d_users = streamed_cross_entropy(users, blocks, lambda block: candidates[block], torch.tensor([1, 12]))
    assert loss.tolist() == [2e4, 0.0]
    assert d_users[0, 0] == 2.0
    assert candidates.grad is not None
    assert candidates.grad.isfinite().all()


def test_sampled_weights_by_hand() -> None:
    found = sampled_weights(np.array([0, 1, 3]), np.array([0.5, 0.25, 0.1]))
    assert found.tolist() == [-math.inf, math.log(1 / (4 * 0.25)), pytest.approx(math.log(3 / (4 * 0.1)))]


def test_a_sample_of_every_item_once_is_the_dense_loss() -> None:
    users, candidates, targets = problem(5)
    log_weights = torch.from_numpy(sampled_weights(np.ones(N, dtype=int), np.full(N, 1 / N)))
    torch.testing.assert_close(log_weights, torch.zeros(N, dtype=torch.float64), **EXACT)
    losses = F.cross_entropy(users @ candidates.T, targets, reduction="none")
    assert_is(ours(users, candidates, targets, log_weights=log_weights), losses, users, candidates)


POWERS = pytest.mark.parametrize("power", [0.0, 0.75], ids=["uniform", "by popularity"])


def probability(power: float) -> np.ndarray:
    chance = np.random.default_rng(7).integers(1, 40, N) ** power
    return chance / chance.sum()


@POWERS
def test_the_sum_over_a_sample_is_in_the_mean_the_sum_over_all(power: float) -> None:
    """Of exp(log-sum), target aside, over 2000 samples of 10: within 4 standard errors for every example."""
    users, candidates, targets = (part.detach() for part in problem(6, users=5))
    random, p = np.random.default_rng(0), probability(power)
    target_score = (users * candidates[targets]).sum(1)
    dense = (users @ candidates.T).exp().sum(1) - target_score.exp()
    sums = []
    for _ in range(2000):
        drawn = np.bincount(random.choice(N, size=10, p=p), minlength=N)
        log_weights = torch.from_numpy(sampled_weights(drawn, p))
        gradient = torch.zeros_like(candidates)
        of_each = [
            cross_entropy(users[k : k + 1], candidates, targets[k : k + 1], log_weights=log_weights, gradient=gradient)[0] for k in range(5)
        ]
        sums.append((torch.stack(of_each) + target_score).exp() - target_score.exp())
    found = torch.stack(sums)
    error = found.std(0) / math.sqrt(len(found))
    assert (error < 0.05 * dense).all(), "the test can tell"
    assert ((found.mean(0) - dense).abs() < 4 * error).all()


@POWERS
def test_the_mean_gradient_over_large_samples_is_the_dense_one(power: float) -> None:
    """Samples of n = 2000: the bias, of order 1 / n, is below the standard error of 300 of them; each number within 4.5 of these."""
    users, candidates, targets = problem(7, users=5)
    random, p = np.random.default_rng(1), probability(power)
    losses = F.cross_entropy(users @ candidates.T, targets, reduction="none")
    dense = torch.cat([part.flatten() for part in torch.autograd.grad(losses.sum(), (users, candidates))])
    found = []
    for _ in range(300):
        drawn = np.bincount(random.choice(N, size=2000, p=p), minlength=N)
        _, d_users, gradient = ours(users, candidates, targets, log_weights=torch.from_numpy(sampled_weights(drawn, p)))
        found.append(torch.cat([d_users.flatten(), gradient.flatten()]))
    sample = torch.stack(found)
    error = sample.std(0) / math.sqrt(len(sample))
    assert float(error.max()) < 0.01 * float(dense.abs().max()), "the test can tell"
    assert ((sample.mean(0) - dense).abs() < 4.5 * error + 1e-12).all()
