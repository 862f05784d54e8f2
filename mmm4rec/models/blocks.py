"""The parts of MMM4Rec (arXiv 2506.02916): time-aware SSD, Cross-SSD, Fourier filter, feed-forward.

Dimensions: b examples, L positions of items, T = max_len positions of time, D width, E = expand * D,
H heads, P head width (E = H * P), G groups, N state size, K kernel width, F frequencies.

A time signal `tau` is [b, H, T]: one row a head, all T positions, since its layers mix positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmm4rec.models.ssd import Implementation, scan

TimeStep = Literal["shift", "scale"]
Activation = Literal["silu", "hardswish"]
ACTIVATIONS = {"silu": F.silu, "hardswish": F.hardswish}
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

    def forward(self, x: Tensor) -> Tensor:
        """x [b, L, channels] -> the same shape. Shifted multiply-adds: faster than conv1d on short sequences."""
        y = x * self.weight[:, -1] + self.bias
        for shift in range(1, min(self.weight.shape[1], x.shape[1])):
            y[:, shift:] += x[:, :-shift] * self.weight[:, -1 - shift]
        return y


class TimeShift(nn.Module):
    """A time signal moves the steps: after a long pause some heads write more and forget more, others less.

    A departure from the paper, which scales the steps (`TimeScale`): a shift acts from the first training step on.
    """

    def __init__(self, config: SSDConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-SHIFT_SPAN, SHIFT_SPAN, config.heads))

    def forward(self, step: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        """step [b, L, H] before softplus and tau [b, H, T] -> the moved steps and tau as it came."""
        return step + tau.transpose(1, 2)[:, : step.shape[1]] * self.weight, tau


class TimeScale(nn.Module):
    """A time signal scales the steps (published code: mlp4time_scale and two convolutions)."""

    def __init__(self, config: SSDConfig, activation: Activation = "silu") -> None:
        super().__init__()
        T, H, K = config.max_len, config.heads, config.conv_width
        self.dropout = nn.Dropout(config.dropout)
        self.activation = ACTIVATIONS[activation]
        self.first, self.second = nn.Linear(T, T), nn.Linear(T, T)
        self.conv_first, self.conv_second = CausalConv(H, K), CausalConv(H, K)

    def forward(self, step: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        """step [b, L, H] before softplus and tau [b, H, T] -> the scaled steps and the factors [b, H, T]."""
        scale = F.tanhshrink(self.second(F.silu(self.first(self.dropout(tau)))))
        signal = (tau * scale).transpose(1, 2)  # [b, T, H]
        factor = self.activation(self.conv_second(self.activation(self.conv_first(signal))))
        return step * factor[:, : step.shape[1]], factor.transpose(1, 2)


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

    def forward(self, x: Tensor, B: Tensor, C: Tensor, step: Tensor, gate: Tensor) -> Tensor:
        """x [b, L, E], B and C [b, L, G * N], step [b, L, H], gate [b, L, E] -> [b, L, D]."""
        config = self.config
        x = x.unflatten(-1, (config.heads, config.head_width))  # [b, L, H, P]
        B, C = (part.unflatten(-1, (config.groups, config.state)) for part in (B, C))  # [b, L, G, N]
        delta = F.softplus(step + self.step_bias)
        y = scan(x, delta, -torch.exp(self.log_a), B, C, implementation=config.scan)
        skipped = x * delta[..., None] if config.scaled_skip else x
        y = (y + self.skip[:, None] * skipped).flatten(-2) * F.silu(gate)  # [b, L, E]
        return self.out(F.rms_norm(y, y.shape[-1:], self.norm_weight, config.norm_eps))


class TimeSSD(nn.Module):
    """The time-aware SSD block (paper section 3.3; published code: TiSSD)."""

    def __init__(self, config: SSDConfig) -> None:
        super().__init__()
        self.config = config
        E, GN, T = config.inner, config.groups * config.state, config.max_len
        self.sizes = (E, E + 2 * GN, config.heads)
        self.proj = nn.Linear(config.width, sum(self.sizes))
        self.conv = CausalConv(E + 2 * GN, config.conv_width)
        self.scan = Scan(config)
        if config.time_step == "shift":
            self.time_shift = TimeShift(config)
        elif config.time_step == "scale":
            self.time_scale = TimeScale(config)
            self.time_dropout = nn.Dropout(config.dropout)
            self.time_gate = nn.Linear(T, 1 if config.time_gate == "head" else T)
            self.time_norm = nn.LayerNorm(T, eps=config.norm_eps)

    def forward(self, u: Tensor, tau: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """u [b, L, D], tau [b, H, T] or None -> output [b, L, D] and the next layer's tau."""
        config = self.config
        gate, xBC, step = self.proj(u).split(self.sizes, dim=-1)
        GN = config.groups * config.state
        x, B, C = F.silu(self.conv(xBC)).split((config.inner, GN, GN), dim=-1)
        if tau is not None and config.time_step == "shift":
            step, tau = self.time_shift(step, tau)
        elif tau is not None:
            step, factor = self.time_scale(step, tau)
            keep = torch.sigmoid(self.time_gate(self.time_dropout(tau)))  # [b, H, 1 or T]
            tau = self.time_norm(keep * tau + (1 - keep) * factor)
        return self.scan(x, B, C, step, gate), tau


class CrossSSD(nn.Module):
    """The Cross-SSD block (paper section 3.4; published code: CoTiSSD): `query` reads what `context` wrote."""

    def __init__(self, config: SSDConfig) -> None:
        super().__init__()
        self.config = config
        D, E, GN = config.width, config.inner, config.groups * config.state
        self.sizes = (E + GN, config.heads)
        self.context_proj = nn.Linear(D, sum(self.sizes))
        self.gate_proj = nn.Linear(D, E)
        self.query_proj = nn.Linear(D, GN)
        self.context_conv = CausalConv(E + GN, config.conv_width)
        self.query_conv = CausalConv(GN, config.conv_width)
        self.scan = Scan(config)
        self.activation = ACTIVATIONS[config.cross_activation]
        if config.time_step == "shift":
            self.time_shift = TimeShift(config)
        elif config.time_step == "scale":
            self.time_scale = TimeScale(config, config.cross_activation)

    def forward(self, query: Tensor, context: Tensor, tau: Tensor | None) -> Tensor:
        """query and context [b, L, D], tau [b, H, T] or None -> [b, L, D]."""
        config = self.config
        xB, step = self.context_proj(context).split(self.sizes, dim=-1)
        x, B = self.activation(self.context_conv(xB)).split((config.inner, config.groups * config.state), dim=-1)
        C = self.activation(self.query_conv(self.query_proj(query)))
        if tau is not None:
            step, _ = (self.time_shift if config.time_step == "shift" else self.time_scale)(step, tau)
        return self.scan(x, B, C, step, self.gate_proj(query + context))


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
        """Two signals [b, H, T] -> one [b, H, T]."""
        image, text = (torch.fft.rfft(tau, norm="ortho")[..., : self.size] for tau in (image_tau, text_tau))  # [b, H, F]
        joined = self.joint(image * self.image(image) + text * self.text(text))
        return torch.fft.irfft(joined, n=self.max_len, norm="ortho")


class FeedForward(nn.Module):
    """Two linear layers with Hardswish, a residual and a layer norm."""

    def __init__(self, width: int, inner: int, dropout: float, norm_eps: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, inner), nn.Linear(inner, width)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width, eps=norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """x [b, L, D] -> [b, L, D]."""
        inner = self.dropout(F.hardswish(self.first(x)))
        return self.norm(self.dropout(self.second(inner)) + x)
