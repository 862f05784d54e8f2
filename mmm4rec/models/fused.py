"""Chains of elementwise steps as one operation, a few windows at a time on a CPU, with their gradients by hand.

Dimensions: W windows, Q positions, c channels, K kernel width, n heads, p channels a head (c = n * p).

Autograd's own would keep, and walk through, every array between the steps: on a CPU that waits for memory longer than the
projections before and after take to compute. Here only the arguments are kept, and a block's arrays stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Activation = Literal["silu", "hardswish"]
ACTIVATIONS = {"silu": F.silu, "hardswish": F.hardswish}
_INTO = {"silu": torch.ops.aten.silu.out, "hardswish": torch.ops.aten.hardswish.out}
_DERIVATIVES = {"silu": torch.ops.aten.silu_backward, "hardswish": torch.ops.aten.hardswish_backward}  # (gradient, input)
ELEMENTS_AT_ONCE = 2**19  # of an array of a block on a CPU


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, activation: Activation, *, heads: int = 1) -> Tensor:
    """A depthwise convolution that sees the K - 1 positions before in the same history, then an activation.

    x [W, Q, c], weight [c, K], bias [c], positions [W, Q] int: the place in its own history -> [W, Q, n, p], heads
    outermost in memory, as the scan multiplies them.
    """
    return _CausalConv.apply(x, weight, bias, positions, activation, heads)


def causal_conv_at_last(recent: Tensor, exists: Tensor, weight: Tensor, bias: Tensor, activation: Activation) -> Tensor:
    """Its outputs at the last positions alone: [B, c] of the K positions up to there, latest first, [B, K, c] and [B, K]."""
    taps = weight.flip(1).T * exists[..., None]  # [B, K, c]
    return ACTIVATIONS[activation]((recent * taps).sum(1) + bias)


def gated_norm(y: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of y * silu(gate): y [..., n, p], gate [..., c] and weight [c] -> [..., c]."""
    return _GatedNorm.apply(y.to(weight.dtype), gate.to(weight.dtype), weight, eps)


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, activation: Activation, heads: int) -> Tensor:
        W, Q, c = x.shape
        taps = weight.flip(1).T.to(x.dtype, memory_format=torch.contiguous_format)  # [K, c], latest first
        bias = bias.to(x.dtype)
        exists = (positions[..., None] >= torch.arange(len(taps), device=x.device)).to(x.dtype)  # [W, Q, K]: so far back it reaches
        ctx.activation, ctx.dtype = activation, weight.dtype
        ctx.save_for_backward(x, taps, bias, exists)
        y = x.new_empty(W, heads, Q, c // heads)
        for block in _blocks(x):
            z = _convolve(x[block], taps, bias, exists[block])  # [w, Q, c]
            _INTO[activation](z.unflatten(-1, (heads, -1)).transpose(1, 2), out=y[block])
        return y.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (x, taps, bias, exists) = gradients, ctx.saved_tensors
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        dtaps, dbias = torch.zeros_like(taps, dtype=ctx.dtype), torch.zeros_like(bias, dtype=ctx.dtype)
        for block in _blocks(x):
            dz = _DERIVATIVES[ctx.activation](dy[block].flatten(2), _convolve(x[block], taps, bias, exists[block]))  # [w, Q, c]
            torch.mul(dz, taps[0], out=dx[block])
            dbias += dz.sum((0, 1))
            dtaps[0] += (dz * x[block]).sum((0, 1))
            for back in range(1, min(len(taps), x.shape[1])):
                reached = dz[:, back:] * exists[block][:, back:, back, None]
                dx[block][:, :-back].addcmul_(reached, taps[back])
                dtaps[back] += (reached * x[block][:, :-back]).sum((0, 1))
        return dx, dtaps.T.flip(1), dbias, None, None, None


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.eps = eps
        ctx.save_for_backward(y, gate, weight)
        result = torch.empty_like(gate, memory_format=torch.contiguous_format)
        for block in _blocks(gate):
            v = y[block].flatten(-2) * F.silu(gate[block])
            torch.mul(v.mul_(_inverse_rms(v, eps)), weight, out=result[block])
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """With v = y * silu(gate), r = 1 / rms(v) and u = v * r: dv = r * (dn - u * mean(dn * u)), where dn is the norm's gradient."""
        (dresult,), (y, gate, weight) = gradients, ctx.saved_tensors
        dy, dgate = torch.empty_like(y), torch.empty_like(gate, memory_format=torch.contiguous_format)
        dweight = torch.zeros_like(weight)
        for block in _blocks(gate):
            opened, inner = F.silu(gate[block]), y[block].flatten(-2)
            u = inner * opened
            r = _inverse_rms(u, ctx.eps)
            u.mul_(r)
            scaled = dresult[block] * u
            dweight += scaled.flatten(0, -2).sum(0)
            dn = dresult[block] * weight
            dv = dn.sub_(u.mul_(scaled.mul_(weight).mean(-1, keepdim=True))).mul_(r)  # no product that autocast would round
            dy[block] = (dv * opened).view_as(dy[block])
            dgate[block] = _DERIVATIVES["silu"](dv.mul_(inner), gate[block])
        return dy, dgate, dweight, None


def _inverse_rms(v: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean of squares + eps) over the last dimension, [..., 1]."""
    return torch.linalg.vector_norm(v, dim=-1, keepdim=True).square_().div_(v.shape[-1]).add_(eps).rsqrt_()


def _blocks(x: Tensor) -> Iterator[slice]:
    """Rows of x, a few at a time on a CPU, all at once elsewhere."""
    step = max(1, ELEMENTS_AT_ONCE * len(x) // max(1, x.numel())) if x.device.type == "cpu" else len(x)
    return (slice(first, first + step) for first in range(0, len(x), max(1, step)))


def _convolve(x: Tensor, taps: Tensor, bias: Tensor, exists: Tensor) -> Tensor:
    """x [w, Q, c], taps [K, c] latest first, bias [c], exists [w, Q, K] -> [w, Q, c], before the activation."""
    y = torch.addcmul(bias, x, taps[0])
    for back in range(1, min(len(taps), x.shape[1])):
        y[:, back:].addcmul_(x[:, :-back] * exists[:, back:, back, None], taps[back])
    return y
