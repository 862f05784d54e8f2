"""The parts of MMM4Rec (arXiv 2506.02916): time-aware SSD, Cross-SSD, Fourier filter, feed-forward.

Dimensions: B examples, W windows and Q positions of items (`Packing`), T = max_len positions of time, D width,
E = expand * D, H heads, P head width (E = H * P), G groups, N state size, K kernel width, F frequencies.

A time signal `tau` is [B, H, T]: one row a head, all T positions, since its layers mix positions.

A user is read off the last item: with `at_last` a block computes its outputs there alone, and of what it reads only what
they need.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmm4rec.data.batches import Packing
from mmm4rec.models.dropout import Dropout
from mmm4rec.models.ssd import Implementation, scan, scan_at_last

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
    """Depthwise convolution over time that sees the K - 1 positions before, then an activation; zeros stand before the first."""

    def __init__(self, channels: int, kernel: int, activation: Activation) -> None:
        super().__init__()
        bound = 1 / math.sqrt(kernel)  # the default of torch's Conv1d with one input channel a group
        self.weight = nn.Parameter(torch.empty(channels, kernel).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))
        self.activation = activation

    def forward(self, x: Tensor, positions: Tensor, channels: slice = slice(None)) -> Tensor:
        """x [W, Q, c] of some of the channels, and each position's place in its own history [W, Q] -> the shape of x."""
        return _CausalConv.apply(x, self.weight[channels], self.bias[channels], positions, self.activation)

    def at_last(self, recent: Tensor, exists: Tensor, channels: slice = slice(None)) -> Tensor:
        """The outputs at the last positions alone: [B, c] of the K positions up to there, latest first, [B, K, c] and [B, K]."""
        taps = self.weight[channels].flip(1).T * exists[..., None]  # [B, K, c]
        return ACTIVATIONS[self.activation]((recent * taps).sum(1) + self.bias[channels])


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
        self.dropout = Dropout(config.dropout)
        self.first, self.second = nn.Linear(T, T), nn.Linear(T, T)
        self.conv_first, self.conv_second = CausalConv(H, K, activation), CausalConv(H, K, activation)

    def forward(self, step: Tensor, tau: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
        """step [W, Q, H] before softplus and tau [B, H, T] -> the scaled steps and the factors [B, H, T]."""
        scale = F.tanhshrink(self.second(F.silu(self.first(self.dropout(tau)))))
        signal = (tau * scale).transpose(1, 2)  # [B, T, H]
        positions = torch.arange(signal.shape[1], device=signal.device).expand(signal.shape[:2])
        factor = self.conv_second(self.conv_first(signal, positions), positions).transpose(1, 2)  # [B, H, T]
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

    def forward(self, x: Tensor, B: Tensor, step: Tensor, C: Tensor, gate: Tensor, packing: Packing, *, at_last: bool) -> Tensor:
        """What is written, x [W, Q, E], B [W, Q, G * N], step [W, Q, H]; what reads, C [W, Q, G * N] and gate [W, Q, E].

        Returns [W, Q, D]. `at_last`: C, gate and the result are [B, ...].
        """
        config = self.config
        x = x.unflatten(-1, (config.heads, config.head_width))  # [W, Q, H, P]
        B, C = (part.unflatten(-1, (config.groups, config.state)) for part in (B, C))  # [..., G, N]
        delta, a = F.softplus(step + self.step_bias), -torch.exp(self.log_a)
        if at_last:
            y = scan_at_last(x, delta, a, B, C, packing)  # [B, H, P]
            x, delta = packing.at_last(x), packing.at_last(delta)
        else:
            y = scan(x, delta, a, B, C, packing.positions, implementation=config.scan)
        skipped = x * delta[..., None] if config.scaled_skip else x
        y = (y + self.skip[:, None] * skipped).flatten(-2) * F.silu(gate)  # [..., E]
        return self.out(F.rms_norm(y, y.shape[-1:], self.norm_weight, config.norm_eps))


class TimeSSD(nn.Module):
    """The time-aware SSD block (paper section 3.3; published code: TiSSD)."""

    def __init__(self, config: SSDConfig) -> None:
        super().__init__()
        self.config = config
        E, GN, T = config.inner, config.groups * config.state, config.max_len
        self.sizes = (E, E, GN, GN, config.heads)  # gate, x, B, C, step
        self.proj = nn.Linear(config.width, sum(self.sizes))
        self.conv = CausalConv(E + 2 * GN, config.conv_width, "silu")  # of x, B and C
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
        config, (E, _, GN, _, _) = self.config, self.sizes
        gate, x, B, C, step = zip(self.proj.weight.split(self.sizes), self.proj.bias.split(self.sizes), strict=True)  # a part each: cheaper
        read_from = packing.at_last(u) if at_last else u
        delta = F.linear(u, *step)  # [W, Q, H]
        if tau is not None and config.time_step == "shift":
            delta, tau = self.time_shift(delta, tau, packing)
        elif tau is not None:
            delta, factor = self.time_scale(delta, tau, packing)
            keep = torch.sigmoid(self.time_gate(self.time_dropout(tau)))  # [B, H, 1 or T]
            tau = self.time_norm(keep * tau + (1 - keep) * factor)
        y = self.scan(
            x=self.conv(F.linear(u, *x), packing.positions, slice(E)),
            B=self.conv(F.linear(u, *B), packing.positions, slice(E, E + GN)),
            step=delta,
            C=read(self.conv, partial(F.linear, weight=C[0], bias=C[1]), u, packing, slice(E + GN, None), at_last=at_last),
            gate=F.linear(read_from, *gate),
            packing=packing,
            at_last=at_last,
        )
        return y, tau


def read(
    conv: CausalConv, project: Callable[[Tensor], Tensor], u: Tensor, packing: Packing, channels: slice = slice(None), *, at_last: bool
) -> Tensor:
    """The convolved projection of u [W, Q, D] at every position, [W, Q, c], or at the last ones alone, [B, c]."""
    if not at_last:
        return conv(project(u), packing.positions, channels)
    places, exists = packing.recent(conv.weight.shape[1])
    return conv.at_last(project(u.flatten(0, 1)[places]), exists, channels)


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
        self.context_conv = CausalConv(E + GN, K, config.cross_activation)  # of x and B
        self.query_conv = CausalConv(GN, K, config.cross_activation)
        self.scan = Scan(config)
        if config.time_step == "shift":
            self.time_shift = TimeShift(config)
        elif config.time_step == "scale":
            self.time_scale = TimeScale(config, config.cross_activation)

    def forward(self, query: Tensor, context: Tensor, tau: Tensor | None, packing: Packing, *, at_last: bool) -> Tensor:
        """query and context [W, Q, D], tau [B, H, T] or None -> [W, Q, D], or [B, D] `at_last`."""
        config, E = self.config, self.config.inner
        x, B, step = zip(self.context_proj.weight.split(self.sizes), self.context_proj.bias.split(self.sizes), strict=True)
        delta = F.linear(context, *step)  # [W, Q, H]
        if tau is not None:
            delta, _ = (self.time_shift if config.time_step == "shift" else self.time_scale)(delta, tau, packing)
        both = packing.at_last(query) + packing.at_last(context) if at_last else query + context
        return self.scan(
            x=self.context_conv(F.linear(context, *x), packing.positions, slice(E)),
            B=self.context_conv(F.linear(context, *B), packing.positions, slice(E, None)),
            step=delta,
            C=read(self.query_conv, self.query_proj, query, packing, at_last=at_last),
            gate=self.gate_proj(both),
            packing=packing,
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
