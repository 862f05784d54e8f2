"""Dropout as torch's, on a CPU several times as fast: 16 random bits a number instead of a draw from a distribution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STEPS = 2**16  # on a CPU the rate is a multiple of 1 / STEPS, and what stays is scaled by exactly that rate


class Dropout(nn.Module):
    """In training, each number becomes 0 with probability `rate`; the others are scaled so that the mean stays."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        return _Dropout.apply(x, self.rate) if x.device.type == "cpu" else F.dropout(x, self.rate)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rate: float) -> Tensor:
        dropped = min(round(rate * STEPS), STEPS - 1)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = words.view(torch.int16)[: x.numel()].view(x.shape)  # uniform over STEPS values, from -STEPS / 2
        factor = (bits >= dropped - STEPS // 2).to(x.dtype).mul_(STEPS / (STEPS - dropped))
        ctx.save_for_backward(factor)
        return x * factor

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.saved_tensors[0], None
