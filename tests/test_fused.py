"""The operations with gradients by hand, against a loop, autograd, and what dropout promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmm4rec.data.batches import Packing, pack
from mmm4rec.models.dropout import STEPS, Dropout
from mmm4rec.models.fused import ACTIVATIONS, Activation, causal_conv, causal_conv_at_last, gated_norm

EXACT = {"rtol": 1e-10, "atol": 1e-10}
LENGTHS = np.array([3, 1, 8, 5, 5, 1, 2, 8, 4])  # in six windows of 8
C = 6


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def packing_of(lengths: np.ndarray) -> Packing:
    return pack(np.ones(lengths.sum(), dtype=np.int64), lengths)[1]


def loop(x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, activation: Activation, heads: int = 1) -> Tensor:
    """`causal_conv` position by position, 0 where nothing stands."""
    kernel, y = weight.shape[1], torch.zeros_like(x)
    for w, q in np.ndindex(*positions.shape):
        if (position := int(positions[w, q])) >= 0:
            reached = range(min(kernel, position + 1))
            total = bias + sum(weight[:, kernel - 1 - back] * x[w, q - back] for back in reached)
            y = torch.index_put(y, (torch.tensor(w), torch.tensor(q)), ACTIVATIONS[activation](total))
    return y.unflatten(-1, (heads, -1))


def assert_same(ours: Tensor, plain: Tensor, leaves: list[Tensor], upstream: Tensor) -> None:
    """Values, and the gradient of every leaf under this one of the values."""
    torch.testing.assert_close(ours, plain, **EXACT)
    found, expected = torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(plain, leaves, upstream)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.fixture(params=[2**19, 100, 1], ids="{} at once".format)
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All windows at once, two at a time, one at a time."""
    monkeypatch.setattr("mmm4rec.models.fused.ELEMENTS_AT_ONCE", request.param)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("kernel", [1, 4, 7, 11])
@pytest.mark.parametrize("activation", ["silu", "hardswish"])
def test_causal_conv_is_the_loop_over_each_history(activation: Activation, kernel: int, heads: int) -> None:
    torch.manual_seed(0)
    positions = packing_of(LENGTHS).positions
    assert ((positions == 0).sum(1) > 1).any(), "several histories share a window"
    stands = (positions >= 0)[..., None, None]
    x, weight, bias = leaf(*positions.shape, C), leaf(C, kernel), leaf(C)
    ours = causal_conv(x * 3, weight, bias, positions, activation, heads=heads)
    plain = loop(x * 3, weight, bias, positions, activation, heads)
    assert ours.shape == (*positions.shape, heads, C // heads)
    assert ours.transpose(1, 2).is_contiguous(), "heads are outermost in memory"
    assert_same(torch.where(stands, ours, 0.0), plain, [x, weight, bias], torch.randn_like(plain))


def test_causal_conv_of_strided_arrays() -> None:
    torch.manual_seed(0)
    positions = packing_of(LENGTHS).positions
    W, Q = positions.shape
    x, weight, bias = leaf(C, Q, W), leaf(4, C), leaf(2 * C)
    turned = (x.permute(2, 1, 0), weight.T, bias[::2], positions, "silu")
    stands = (positions >= 0)[..., None, None]
    upstream = torch.randn(3, Q, C // 3, W, dtype=torch.float64).permute(3, 1, 0, 2)
    assert not upstream.is_contiguous()
    ours, plain = causal_conv(*turned, heads=3), loop(*turned, heads=3)  # type: ignore[arg-type]
    assert_same(ours * stands, plain, [x, weight, bias], upstream)
    one_for_all = torch.ones((), dtype=torch.float64).expand_as(plain)
    assert_same(causal_conv(*turned, heads=3) * stands, loop(*turned, heads=3), [x, weight, bias], one_for_all)  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", ["silu", "hardswish"])
@pytest.mark.parametrize("kernel", [1, 4, 11])
def test_causal_conv_at_the_last_positions_alone(activation: Activation, kernel: int) -> None:
    torch.manual_seed(0)
    packing = packing_of(LENGTHS)
    x, weight, bias = leaf(*packing.positions.shape, C), leaf(C, kernel), leaf(C)
    whole = causal_conv(x, weight, bias, packing.positions, activation).flatten(2)
    places, exists = packing.recent(kernel)
    alone = causal_conv_at_last(x.flatten(0, 1)[places], exists, weight, bias, activation)
    assert_same(alone, packing.at_last(whole), [x, weight, bias], torch.randn_like(alone))


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("shape", [(6, 8, 3, 4), (9, 3, 4), (5, 1, 1)], ids=str)
@pytest.mark.parametrize("eps", [1e-5, 1e-12])
def test_gated_norm_is_rms_norm_of_the_gated(shape: tuple[int, ...], eps: float) -> None:
    torch.manual_seed(0)
    width = shape[-1] * shape[-2]
    y, gate, weight = leaf(*shape), leaf(*shape[:-2], width), leaf(width)
    plain = F.rms_norm(y.flatten(-2) * F.silu(gate), (width,), weight, eps)
    assert_same(gated_norm(y, gate, weight, eps), plain, [y, gate, weight], torch.randn_like(plain))
    one_for_all = torch.ones((), dtype=torch.float64).expand_as(plain)
    plain = F.rms_norm(y.flatten(-2) * F.silu(gate), (width,), weight, eps)
    assert_same(gated_norm(y, gate, weight, eps), plain, [y, gate, weight], one_for_all)


@pytest.mark.usefixtures("block")
def test_gated_norm_of_heads_outermost_and_strided_gates() -> None:
    """As the scan leaves them; and an epsilon that is felt."""
    torch.manual_seed(0)
    y, gate, weight = leaf(6, 3, 8, 4), leaf(12, 6, 8), leaf(12)
    inputs = y.transpose(1, 2), gate.permute(1, 2, 0)
    plain = F.rms_norm(inputs[0].flatten(-2) * F.silu(inputs[1]), (12,), weight, 0.5)
    upstream = torch.randn(12, 8, 6, dtype=torch.float64).permute(2, 1, 0)
    assert_same(gated_norm(*inputs, weight, 0.5), plain, [y, gate, weight], upstream)


def test_gated_norm_of_lower_precision_comes_in_the_weights() -> None:
    torch.manual_seed(0)
    y, gate, weight = torch.randn(5, 3, 4).bfloat16().requires_grad_(), torch.randn(5, 12).bfloat16().requires_grad_(), torch.randn(12)
    result = gated_norm(y, gate, weight, 1e-5)
    torch.testing.assert_close(result, F.rms_norm(y.float().flatten(-2) * F.silu(gate.float()), (12,), weight, 1e-5))
    found = torch.autograd.grad(result.sum(), (y, gate))
    assert [part.dtype for part in found] == [torch.bfloat16] * 2


def test_gated_norm_keeps_its_precision_where_products_are_rounded() -> None:
    """Under autocast, which rounds matrix products, the norm's sums stay in float32, backward too."""
    torch.manual_seed(0)
    y, gate, weight = torch.randn(5, 3, 4, requires_grad=True), torch.randn(5, 12, requires_grad=True), torch.randn(12, requires_grad=True)
    upstream = torch.randn(5, 12)
    expected = torch.autograd.grad(gated_norm(y, gate, weight, 1e-5), (y, gate, weight), upstream)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(gated_norm(y, gate, weight, 1e-5), (y, gate, weight), upstream)
    torch.testing.assert_close(found, expected)


def training_dropout(rate: float) -> Dropout:
    return Dropout(rate).train()


def test_no_dropout_is_the_identity() -> None:
    x = torch.randn(5)
    assert training_dropout(0.0)(x) is x
    assert Dropout(0.4).eval()(x) is x


@pytest.mark.parametrize("rate", [0.1, 0.4, 0.9, 1 / 3])
def test_dropout_zeroes_its_rate_and_keeps_the_mean(rate: float) -> None:
    torch.manual_seed(0)
    x, dropped = torch.rand(200, 501, dtype=torch.float64) + 0.5, round(rate * STEPS)
    found = training_dropout(rate)(x)
    zeros = float((found == 0).double().mean())
    assert abs(zeros - dropped / STEPS) < 4 * np.sqrt(rate * (1 - rate) / x.numel())
    kept = found != 0
    torch.testing.assert_close(found[kept], x[kept] * STEPS / (STEPS - dropped), rtol=1e-14, atol=0)


def test_dropout_drops_exactly_the_lowest_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over every value that 16 bits take, the mean is kept to the last digit."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.int64)
    monkeypatch.setattr(torch.Tensor, "random_", lambda self, *bounds: self.copy_(every))
    for rate in (1e-9, 0.1, 0.4, 0.9, 1 - 1e-9):
        found = training_dropout(rate)(torch.ones(STEPS, dtype=torch.float64))
        assert int((found == 0).sum()) == min(round(rate * STEPS), STEPS - 1)
        assert float(found.mean()) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5, 11), (0, 4)], ids=str)
def test_dropouts_gradient_is_its_mask(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(shape, dtype=dtype, requires_grad=True)
    found = training_dropout(0.4)(x)
    upstream = torch.randn(shape).to(dtype)
    assert found.dtype == dtype
    assert found.shape == shape
    assert torch.equal(torch.autograd.grad(found, x, upstream)[0], upstream * found)


def test_dropout_of_a_transposed_array_is_that_of_its_copy() -> None:
    x = torch.rand(6, 9).T
    torch.manual_seed(0)
    strided = training_dropout(0.4)(x)
    torch.manual_seed(0)
    assert torch.equal(strided, training_dropout(0.4)(x.contiguous()))


def test_a_seed_repeats_dropout_and_the_next_call_differs() -> None:
    x, dropout = torch.ones(1000), training_dropout(0.4)
    torch.manual_seed(3)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(3)
    again = dropout(x)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    torch.manual_seed(4)
    assert not torch.equal(first, dropout(x))


def test_neighbours_are_dropped_independently() -> None:
    """All sixteen bits of a number, whether from one word of 64 or the next."""
    torch.manual_seed(0)
    n = 100_000
    zero = (training_dropout(0.4)(torch.ones(n)) == 0).double() - 0.4
    for back in (1, 2, 3, 4, 5, 8):
        assert abs(float((zero[back:] * zero[:-back]).mean())) / 0.24 < 4 / np.sqrt(n)
    lane = zero.view(-1, 4).mean(0)  # the four numbers of a word
    assert float(lane.abs().max()) < 4 * np.sqrt(0.24 / (n / 4))
