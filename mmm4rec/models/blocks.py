"""The parts of MMM4Rec (arXiv 2506.02916): time-aware SSD, Cross-SSD, Fourier filter, feed-forward.

Dimensions: B examples, W windows and Q positions of items (`Packing`), T = max_len positions of time, D width,
E = expand * D, H heads, P head width (E = H * P), G groups, N state size, K kernel width, F frequencies.

A time signal `tau` is [B, H, T]: one row a head, all T positions, since its layers mix positions.

A user is read off the last item: with `at_last` a block computes its outputs there alone, and of what it reads only what
they need.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmm4rec.data.batches import Packing
from mmm4rec.models.blockwise import blockwise
from mmm4rec.models.dropout import Dropout
from mmm4rec.models.ssd import Implementation, scan, summands_at_end

TimeStep = Literal["shift", "scale"]
Activation = Literal["silu", "hardswish"]
ACTIVATIONS = {"silu": F.silu, "hardswish": F.hardswish}
DERIVATIVES = {"silu": torch.ops.aten.silu_backward, "hardswish": torch.ops.aten.hardswish_backward}  # (gradient, input)
CONV_BLOCK = 2**19  # elements that the convolution works on at once on a CPU: they stay in its cache
SHIFT_SPAN = 6.0  # the heads' weights start at -6 ... 6: a step of softplus(6 * tau) against softplus(-6 * tau)


@dataclass(frozen=True)
class SSDConfig:
    """Sizes shared by the SSD blocks of a model."""

    width: int  # D
    inner: int  # E
    head_width: int  # P
    groups: int  # G
    state: int  # N
    conv_width: int  # K
    max_len: int  # T
    dropout: float
    time_step: TimeStep | None  # how a time signal acts on the steps; None: there is none
    time_gate: Literal["head", "position"]
    cross_activation: Activation
    scan: Implementation
    scaled_skip: bool
    norm_eps: float

    @property
    def heads(self) -> int:
        return self.inner // self.head_width


class CausalConv(nn.Module):
    """Depthwise convolution over time that sees the K - 1 positions before; zeros stand before the first."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(kernel)  # the default of torch's Conv1d with one input channel a group
        self.weight = nn.Parameter(torch.empty(channels, kernel).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, activation: Activation) -> Tensor:
    """The convolution of x [W, Q, c] with weight [c, K] and bias [c], then an activation; positions [W, Q] in the histories."""
    return _CausalConv.apply(x, weight, bias, positions, activation)


def causal_conv_at_last(recent: Tensor, exists: Tensor, weight: Tensor, bias: Tensor, activation: Activation) -> Tensor:
    """Its outputs at the last positions alone: [B, c] of the K positions up to there, latest first, [B, K, c] and [B, K]."""
    taps = weight.flip(1).T * exists[..., None]  # [B, K, c]
    return ACTIVATIONS[activation]((recent * taps).sum(1) + bias)


class _CausalConv(torch.autograd.Function):
    """The convolution as shifted multiply-adds, a few windows at a time, and its gradient from its input alone.

    Autograd's own would keep, and walk through, a dozen arrays of x's size: on a CPU that costs more than the
    projections before and after.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, activation: Activation) -> Tensor:
        K = weight.shape[1]
        exists = positions[..., None] >= torch.arange(K, device=x.device)  # [W, Q, K]: so far back the history reaches
        taps = (weight.flip(1).T.contiguous().to(x.dtype), bias.to(x.dtype), exists.to(x.dtype))  # taps[0] is [K, c], latest first
        ctx.activation = activation
        ctx.save_for_backward(x, *taps)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        for block in _blocks(x):
            _convolve(x[block], taps[0], taps[1], taps[2][block], out=y[block])
            ACTIVATIONS[activation](y[block], inplace=True)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (x, weight, bias, exists) = gradients, ctx.saved_tensors
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        dweight, dbias = torch.zeros_like(weight), torch.zeros_like(bias)
        for block in _blocks(x):
            z = _convolve(x[block], weight, bias, exists[block], out=torch.empty_like(dx[block]))
            dz = DERIVATIVES[ctx.activation](dy[block], z)  # [w, Q, c]
            torch.mul(dz, weight[0], out=dx[block])
            dbias += dz.sum((0, 1))
            dweight[0] += (dz * x[block]).sum((0, 1))
            for back in range(1, min(len(weight), x.shape[1])):
                reached = dz[:, back:] * exists[block][:, back:, back, None]
                dx[block][:, :-back].addcmul_(reached, weight[back])
                dweight[back] += (reached * x[block][:, :-back]).sum((0, 1))
        return dx, dweight.T.flip(1), dbias, None, None


def _blocks(x: Tensor) -> list[slice]:
    """The windows of x [W, Q, c], a few at a time on a CPU, all at once elsewhere."""
    step = max(1, CONV_BLOCK // (x.shape[1] * x.shape[2])) if x.device.type == "cpu" else len(x)
    return [slice(first, first + step) for first in range(0, len(x), step)]


def _convolve(x: Tensor, weight: Tensor, bias: Tensor, exists: Tensor, *, out: Tensor) -> Tensor:
    """x [w, Q, c], weight [K, c] latest first, bias [c], exists [w, Q, K] -> [w, Q, c], before the activation."""
    torch.addcmul(bias, x, weight[0], out=out)
    for back in range(1, min(len(weight), x.shape[1])):
        out[:, back:].addcmul_(x[:, :-back] * exists[:, back:, back, None], weight[back])
    return out


class TimeShift(nn.Module):
    """A time signal moves the steps: after a long pause some heads write more and forget more, others less.

    A departure from the paper, which scales the steps (`TimeScale`): a shift acts from the first training step on.
    """

    def __init__(self, config: SSDConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-SHIFT_SPAN, SHIFT_SPAN, config.heads))

    def forward(self, step: Tensor, tau: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
        """step [W, Q, H] before softplus and tau [B, H, T] -> the moved steps and tau as it came."""
        return step + packing.spread(tau) * self.weight, tau


class TimeScale(nn.Module):
    """A time signal scales the steps (published code: mlp4time_scale and two convolutions)."""

    def __init__(self, config: SSDConfig, activation: Activation = "silu") -> None:
        super().__init__()
        T, H, K = config.max_len, config.heads, config.conv_width
        self.activation = activation
        self.dropout = Dropout(config.dropout)
        self.first, self.second = nn.Linear(T, T), nn.Linear(T, T)
        self.conv_first, self.conv_second = CausalConv(H, K), CausalConv(H, K)

    def forward(self, step: Tensor, tau: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
        """step [W, Q, H] before softplus and tau [B, H, T] -> the scaled steps and the factors [B, H, T]."""
        scale = F.tanhshrink(self.second(F.silu(self.first(self.dropout(tau)))))
        signal = (tau * scale).transpose(1, 2)  # [B, T, H]
        positions = torch.arange(signal.shape[1], device=signal.device).expand(signal.shape[:2])
        for conv in (self.conv_first, self.conv_second):
            signal = causal_conv(signal, conv.weight, conv.bias, positions, self.activation)
        factor = signal.transpose(1, 2)  # [B, H, T]
        return step * packing.spread(factor), factor


class Scan(nn.Module):
    """What both SSD blocks end with: steps, scan, skip, gated RMS norm, output projection."""

    def __init__(self, config: SSDConfig) -> None:
        super().__init__()
        self.config = config
        H, E = config.heads, config.inner
        steps = torch.exp(torch.empty(H).uniform_(math.log(1e-3), math.log(0.1))).clamp(min=1e-4)
        self.step_bias = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))  # inverse of softplus
        self.log_a = nn.Parameter(torch.log(torch.empty(H).uniform_(1, 16)))
        self.skip = nn.Parameter(torch.ones(H))
        self.norm_weight = nn.Parameter(torch.ones(E))
        self.out = nn.Linear(E, config.width)

    def forward(
        self, x: Tensor, B: Tensor, C: Tensor, step: Tensor, gate: Tensor, packing: Packing, convs: Convs, *, at_last: bool
    ) -> Tensor:
        """What is projected: x [W, Q, E], B and C [W, Q, G * N], step [W, Q, H], gate [W, Q, E] -> [W, Q, D].

        `at_last`: C and gate are [B, ...], C convolved already, and the result is [B, D].
        """
        config, weights = self.config, (self.step_bias, self.log_a, self.skip)
        if at_last:
            arrays = (x, B, packing.at_tokens(C), step, packing.positions, packing.to_end)
            written = blockwise(partial(_write_to_end, config, convs.activation), arrays, (*convs.parameters, *weights))
            y = _gated_norm(packing.sum_up(written), gate, self.norm_weight, config.norm_eps)
        else:
            arrays = (x, B, C, step, gate, packing.positions)
            y = blockwise(partial(_mix, config, convs.activation), arrays, (*convs.parameters, *weights, self.norm_weight))
        return self.out(y)


@dataclass(frozen=True)
class Convs:
    """The convolutions of x, B and C: weight [E + 2 * G * N, K] and bias; without C's where that is convolved already."""

    weight: Tensor
    bias: Tensor
    activation: Activation

    @property
    def parameters(self) -> tuple[Tensor, Tensor]:
        return self.weight, self.bias


def _mix(
    config: SSDConfig,
    activation: Activation,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    step: Tensor,
    gate: Tensor,
    positions: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    step_bias: Tensor,
    log_a: Tensor,
    skip: Tensor,
    norm_weight: Tensor,
) -> Tensor:
    """From the projections to what the output projection reads, [W, Q, E]. Arguments as in `Scan.forward`."""
    x, B, C = _convolve_parts(config, activation, (x, B, C), positions, conv_weight, conv_bias)
    delta = F.softplus(step + step_bias)
    y = scan(x, delta, -torch.exp(log_a), B, C, positions, implementation=config.scan)  # [W, Q, H, P]
    skipped = x * delta[..., None] if config.scaled_skip else x
    return _gated_norm((y + skip[:, None] * skipped).flatten(-2), gate, norm_weight, config.norm_eps)


def _write_to_end(
    config: SSDConfig,
    activation: Activation,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    step: Tensor,
    positions: Tensor,
    to_end: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    step_bias: Tensor,
    log_a: Tensor,
    skip: Tensor,
) -> Tensor:
    """What each position adds to the scan's output, and skip, at the end of its history: [W, Q, E]."""
    x, B = _convolve_parts(config, activation, (x, B), positions, conv_weight, conv_bias)
    delta = F.softplus(step + step_bias)
    C = C.unflatten(-1, (config.groups, config.state))
    return summands_at_end(x, delta, -torch.exp(log_a), B, C, positions, to_end, skip * delta if config.scaled_skip else skip).flatten(-2)


def _convolve_parts(
    config: SSDConfig, activation: Activation, parts: Sequence[Tensor], positions: Tensor, weight: Tensor, bias: Tensor
) -> list[Tensor]:
    """x [W, Q, E], then B and C [W, Q, G * N], each through its channels of the convolution -> [W, Q, H, P], then [W, Q, G, N]."""
    sizes = [part.shape[-1] for part in parts]
    shapes = ((config.heads, config.head_width), (config.groups, config.state), (config.groups, config.state))
    taps = zip(parts, weight.split(sizes), bias.split(sizes), shapes, strict=False)
    return [causal_conv(part, w, b, positions, activation).unflatten(-1, shape) for part, w, b, shape in taps]


def _gated_norm(y: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y and gate [..., E] -> [..., E]."""
    y = y * F.silu(gate)
    return F.rms_norm(y, y.shape[-1:], weight, eps)


class TimeSSD(nn.Module):
    """The time-aware SSD block (paper section 3.3; published code: TiSSD)."""

    def __init__(self, config: SSDConfig) -> None:
        super().__init__()
        self.config = config
        E, GN, T = config.inner, config.groups * config.state, config.max_len
        self.sizes = (E, E, GN, GN, config.heads)  # gate, x, B, C, step
        self.proj = nn.Linear(config.width, sum(self.sizes))
        self.conv = CausalConv(E + 2 * GN, config.conv_width)  # of x, B and C
        self.scan = Scan(config)
        if config.time_step == "shift":
            self.time_shift = TimeShift(config)
        elif config.time_step == "scale":
            self.time_scale = TimeScale(config)
            self.time_dropout = Dropout(config.dropout)
            self.time_gate = nn.Linear(T, 1 if config.time_gate == "head" else T)
            self.time_norm = nn.LayerNorm(T, eps=config.norm_eps)

    def forward(self, u: Tensor, tau: Tensor | None, packing: Packing, *, at_last: bool) -> tuple[Tensor, Tensor | None]:
        """u [W, Q, D], tau [B, H, T] or None -> output [W, Q, D], or [B, D] `at_last`, and the next layer's tau."""
        config = self.config
        gate, x, B, C, step = zip(self.proj.weight.split(self.sizes), self.proj.bias.split(self.sizes), strict=True)  # a part each: cheaper
        delta = F.linear(u, *step)  # [W, Q, H]
        if tau is not None and config.time_step == "shift":
            delta, tau = self.time_shift(delta, tau, packing)
        elif tau is not None:
            delta, factor = self.time_scale(delta, tau, packing)
            keep = torch.sigmoid(self.time_gate(self.time_dropout(tau)))  # [B, H, 1 or T]
            tau = self.time_norm(keep * tau + (1 - keep) * factor)
        written = len(self.conv.bias) - config.groups * config.state  # channels of x and B
        weight, bias = self.conv.weight, self.conv.bias
        if at_last:
            places, exists = packing.recent(config.conv_width)
            recent = F.linear(u.flatten(0, 1)[places], *C)  # [B, K, G * N]
            read = causal_conv_at_last(recent, exists, weight[written:], bias[written:], "silu")
            weight, bias = weight[:written], bias[:written]
        y = self.scan(
            x=F.linear(u, *x),
            B=F.linear(u, *B),
            C=read if at_last else F.linear(u, *C),
            step=delta,
            gate=F.linear(packing.at_last(u) if at_last else u, *gate),
            packing=packing,
            convs=Convs(weight, bias, "silu"),
            at_last=at_last,
        )
        return y, tau


class CrossSSD(nn.Module):
    """The Cross-SSD block (paper section 3.4; published code: CoTiSSD): `query` reads what `context` wrote."""

    def __init__(self, config: SSDConfig) -> None:
        super().__init__()
        self.config = config
        D, E, GN, K = config.width, config.inner, config.groups * config.state, config.conv_width
        self.sizes = (E, GN, config.heads)  # x, B, step
        self.context_proj = nn.Linear(D, sum(self.sizes))
        self.gate_proj = nn.Linear(D, E)
        self.query_proj = nn.Linear(D, GN)
        self.context_conv = CausalConv(E + GN, K)  # of x and B
        self.query_conv = CausalConv(GN, K)  # of C
        self.scan = Scan(config)
        if config.time_step == "shift":
            self.time_shift = TimeShift(config)
        elif config.time_step == "scale":
            self.time_scale = TimeScale(config, config.cross_activation)

    def forward(self, query: Tensor, context: Tensor, tau: Tensor | None, packing: Packing, *, at_last: bool) -> Tensor:
        """query and context [W, Q, D], tau [B, H, T] or None -> [W, Q, D], or [B, D] `at_last`."""
        config, activation = self.config, self.config.cross_activation
        x, B, step = zip(self.context_proj.weight.split(self.sizes), self.context_proj.bias.split(self.sizes), strict=True)
        delta = F.linear(context, *step)  # [W, Q, H]
        if tau is not None:
            delta, _ = (self.time_shift if config.time_step == "shift" else self.time_scale)(delta, tau, packing)
        conv, query_conv = self.context_conv, self.query_conv
        if at_last:
            places, exists = packing.recent(config.conv_width)
            recent = self.query_proj(query.flatten(0, 1)[places])  # [B, K, G * N]
            C = causal_conv_at_last(recent, exists, query_conv.weight, query_conv.bias, activation)
            both = packing.at_last(query) + packing.at_last(context)
            convs = Convs(conv.weight, conv.bias, activation)
        else:
            C, both = self.query_proj(query), query + context
            convs = Convs(torch.cat((conv.weight, query_conv.weight)), torch.cat((conv.bias, query_conv.bias)), activation)
        return self.scan(
            x=F.linear(context, *x),
            B=F.linear(context, *B),
            C=C,
            step=delta,
            gate=self.gate_proj(both),
            packing=packing,
            convs=convs,
            at_last=at_last,
        )


class ComplexLinear(nn.Module):
    """A complex matrix over the frequencies, with the two real biases of the published code."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.real, self.imag = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        """x complex [..., F] -> the same shape."""
        return torch.complex(self.real(x.real) - self.imag(x.imag), self.imag(x.real) + self.real(x.imag))


class FourierFilter(nn.Module):
    """The dual-channel Fourier filter (paper section 3.4): joins the time signals of both streams.

    It learns over the lowest `size` of the T // 2 + 1 frequencies; those above are removed (a low-pass).
    The full size is the published form.
    """

    def __init__(self, max_len: int, size: int) -> None:
        super().__init__()
        self.max_len, self.size = max_len, size
        self.image, self.text, self.joint = ComplexLinear(size), ComplexLinear(size), ComplexLinear(size)

    def forward(self, image_tau: Tensor, text_tau: Tensor) -> Tensor:
        """Two signals [B, H, T] -> one [B, H, T]."""
        image, text = (torch.fft.rfft(tau, norm="ortho")[..., : self.size] for tau in (image_tau, text_tau))  # [B, H, F]
        joined = self.joint(image * self.image(image) + text * self.text(text))
        return torch.fft.irfft(joined, n=self.max_len, norm="ortho")


class FeedForward(nn.Module):
    """Two linear layers with Hardswish, a residual and a layer norm."""

    def __init__(self, width: int, inner: int, dropout: float, norm_eps: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, inner), nn.Linear(inner, width)
        self.dropout = Dropout(dropout)
        self.norm = nn.LayerNorm(width, eps=norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        inner = self.dropout(F.hardswish(self.first(x)))
        return self.norm(self.dropout(self.second(inner)) + x)
