"""A function of windows, computed a few windows at a time on a CPU: what it computes on the way stays in the cache.

Chains of elementwise steps over large arrays wait for memory, and autograd keeps every array between them. Here only the
arguments are kept; the backward pass computes each block again and carries its gradient back before it goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

ELEMENTS_AT_ONCE = 2**19  # of all arguments together, in a block


def blockwise(function: Callable[..., Tensor], arrays: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """function(*arrays, *weights), where row k of the result depends on row k of the arrays [W, ...] alone.

    Elsewhere than on a CPU, and for what is one block, it is just that call.
    """
    rows = len(arrays[0])
    step = max(1, ELEMENTS_AT_ONCE * rows // max(1, sum(array.numel() for array in arrays)))
    if arrays[0].device.type != "cpu" or step >= rows:
        return function(*arrays, *weights)
    return _Blockwise.apply(function, step, len(arrays), *arrays, *weights)


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], step: int, count: int, *arguments: Tensor) -> Tensor:
        ctx.function, ctx.step, ctx.count = function, step, count
        ctx.save_for_backward(*arguments)
        arrays, weights = arguments[:count], arguments[count:]
        return torch.cat([function(*part, *weights) for part in zip(*(array.split(step) for array in arrays), strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        arrays, weights = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        wanted = ctx.needs_input_grad[3:]
        weights = [_leaf(weight, needs) for weight, needs in zip(weights, wanted[ctx.count :], strict=True)]
        results = [
            torch.empty_like(array, memory_format=torch.contiguous_format) if needs else None for array, needs in zip(arrays, wanted, strict=False)
        ]
        parts = zip(*(array.split(ctx.step) for array in arrays), gradients[0].split(ctx.step), strict=True)
        for number, (*part, gradient) in enumerate(parts):
            leaves = [_leaf(array, needs) for array, needs in zip(part, wanted, strict=False)]
            with torch.enable_grad():
                result = ctx.function(*leaves, *weights)
            result.backward(gradient)
            block = slice(number * ctx.step, number * ctx.step + len(gradient))
            for whole, leaf in zip(results, leaves, strict=True):
                if whole is not None:
                    whole[block] = 0 if leaf.grad is None else leaf.grad
        return None, None, None, *results, *(weight.grad for weight in weights)


def _leaf(value: Tensor, learns: bool) -> Tensor:
    return value.detach().requires_grad_(learns)
