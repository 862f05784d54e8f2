"""What training needs of torch.distributed; without a process group there is one worker, number 0."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import distributed
from torch.nn import Parameter


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def sum_gradients(parameters: Iterable[Parameter], numbers: Sequence[float] = ()) -> list[float]:
    """Replace each gradient by its sum over the workers, and sum these numbers too, all in one message.

    A gradient that no worker has stays absent. Returns the numbers' sums.
    """
    if world_size() == 1:
        return list(numbers)
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    first = parameters[0]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    told = [*(float(parameter.grad is not None) for parameter in parameters), *numbers]
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), torch.tensor(told, dtype=first.dtype, device=first.device)])
    distributed.all_reduce(flat)
    *parts, told_sums = flat.split([*(p.numel() for p in parameters), len(told)])
    exists, sums = told_sums[: len(parameters)].tolist(), told_sums[len(parameters) :].tolist()
    for parameter, part, holders in zip(parameters, parts, exists, strict=True):
        parameter.grad = part.view_as(parameter) if holders else None
    return sums


def wait_for_all() -> None:
    """Return when every worker has come here."""
    if world_size() > 1:
        distributed.barrier()


def gather_ordered(values: np.ndarray, total: int) -> np.ndarray:
    """Join what each worker computed for rows rank, rank + W, rank + 2W, ... into all `total` rows."""
    result = np.empty(total, dtype=values.dtype)
    for worker, part in enumerate(gather(values)):
        result[worker :: world_size()] = part
    return result


def gather(value: object) -> list:
    """What each worker gave, by its number."""
    if world_size() == 1:
        return [value]
    parts: list = [None] * world_size()
    distributed.all_gather_object(parts, value)
    return parts
