"""The parts of MMM4Rec (arXiv 2506.02916): time-aware SSD, Cross-SSD, Fourier filter, feed-forward.

Dimensions: B examples, W windows and Q positions of items (`Packing`), T = max_len positions of time, D width,
E = expand * D, H heads, P head width (E = H * P), G groups, N state size, K kernel width, F frequencies.

A time signal `tau` is [B, H, T]: one row a head, all T positions, since its layers mix positions.

A user is read off the last item: with `at_last` a block computes its outputs there alone, and of what it reads only what
they need.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmm4rec.data.batches import Packing
from mmm4rec.models.dropout import Dropout
from mmm4rec.models.fused import Activation, causal_conv, causal_conv_at_last, gated_norm
from mmm4rec.models.ssd import Implementation, scan, summands_at_end

TimeStep = Literal["shift", "scale"]
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
    """Weights of a depthwise causal convolution (`causal_conv`)."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(kernel)  # the default of torch's Conv1d with one input channel a group
        self.weight = nn.Parameter(torch.empty(channels, kernel).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))

    def split(self, sizes: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Weight and bias of these many channels each."""
        return zip(self.weight.split(sizes), self.bias.split(sizes), strict=True)


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
            signal = causal_conv(signal, conv.weight, conv.bias, positions, self.activation).flatten(2)
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

    def forward(self, x: Tensor, B: Tensor, step: Tensor, C: Tensor, gate: Tensor, packing: Packing, *, at_last: bool) -> Tensor:
        """What is written, x [W, Q, H, P], B [W, Q, G, N], step [W, Q, H]; what reads, C [W, Q, G, N] and gate [W, Q, E].

        Returns [W, Q, D]. `at_last`: C, gate and the result are [B, ...].
        """
        config, delta, a = self.config, F.softplus(step + self.step_bias), -torch.exp(self.log_a)
        skip = self.skip * delta if config.scaled_skip else self.skip.expand_as(delta)  # [W, Q, H]
        if at_last:
            y = packing.sum_up(summands_at_end(x, delta, a, B, packing.at_tokens(C), skip, packing))  # [B, H, P]
        else:
            y = scan(x, delta, a, B, C, skip, packing.positions, implementation=config.scan)
        return self.out(gated_norm(y, gate, self.norm_weight, config.norm_eps))


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
        activation: Activation = "silu"
        gate, x, B, C, step = zip(self.proj.weight.split(self.sizes), self.proj.bias.split(self.sizes), strict=True)  # a part each: cheaper
        x_conv, B_conv, C_conv = self.conv.split(self.sizes[1:4])
        delta = F.linear(u, *step)  # [W, Q, H]
        if tau is not None and config.time_step == "shift":
            delta, tau = self.time_shift(delta, tau, packing)
        elif tau is not None:
            delta, factor = self.time_scale(delta, tau, packing)
            keep = torch.sigmoid(self.time_gate(self.time_dropout(tau)))  # [B, H, 1 or T]
            tau = self.time_norm(keep * tau + (1 - keep) * factor)
        y = self.scan(
            x=causal_conv(F.linear(u, *x), *x_conv, packing.positions, activation, heads=config.heads),
            B=causal_conv(F.linear(u, *B), *B_conv, packing.positions, activation, heads=config.groups),
            step=delta,
            C=_queries(u, C, C_conv, config, packing, activation, at_last=at_last),
            gate=F.linear(packing.at_last(u) if at_last else u, *gate),
            packing=packing,
            at_last=at_last,
        )
        return y, tau


def _queries(
    u: Tensor,
    proj: tuple[Tensor, Tensor],
    conv: tuple[Tensor, Tensor],
    config: SSDConfig,
    packing: Packing,
    activation: Activation,
    *,
    at_last: bool,
) -> Tensor:
    """C of u [W, Q, D], projected and convolved with these weights and biases: [W, Q, G, N], or [B, G, N] `at_last`."""
    if not at_last:
        return causal_conv(F.linear(u, *proj), *conv, packing.positions, activation, heads=config.groups)
    places, exists = packing.recent(config.conv_width)
    recent = F.linear(u.flatten(0, 1)[places], *proj)  # [B, K, G * N]
    return causal_conv_at_last(recent, exists, *conv, activation).unflatten(-1, (config.groups, config.state))


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
        x_conv, B_conv = self.context_conv.split(self.sizes[:2])
        C, C_conv = ((part.weight, part.bias) for part in (self.query_proj, self.query_conv))
        delta = F.linear(context, *step)  # [W, Q, H]
        if tau is not None:
            delta, _ = (self.time_shift if config.time_step == "shift" else self.time_scale)(delta, tau, packing)
        both = packing.at_last(query) + packing.at_last(context) if at_last else query + context
        return self.scan(
            x=causal_conv(F.linear(context, *x), *x_conv, packing.positions, activation, heads=config.heads),
            B=causal_conv(F.linear(context, *B), *B_conv, packing.positions, activation, heads=config.groups),
            step=delta,
            C=_queries(query, C, C_conv, config, packing, activation, at_last=at_last),
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
        real, imag = self.real(x.real) - self.imag(x.imag), self.imag(x.real) + self.real(x.imag)
        return torch.complex(real.to(x.real.dtype), imag.to(x.real.dtype))  # there is no complex number of autocast's bfloat16


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
