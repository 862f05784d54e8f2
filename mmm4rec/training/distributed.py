"""What training needs of torch.distributed; without a process group there is one worker, number 0."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import distributed
from torch.nn import Parameter


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def sum_gradients(parameters: Iterable[Parameter]) -> None:
    """Replace each gradient by its sum over the workers, in one message; one that no worker has stays absent."""
    if world_size() == 1:
        return
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    exists = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=parameters[0].device)
    distributed.all_reduce(exists, op=distributed.ReduceOp.MAX)
    used = [parameter for parameter, flag in zip(parameters, exists.tolist(), strict=True) if flag]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in used]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    for parameter, part in zip(used, flat.split([p.numel() for p in used]), strict=True):
        parameter.grad = part.view_as(parameter)


def wait_for_all() -> None:
    """Return when every worker has come here."""
    if world_size() > 1:
        distributed.barrier()


def sum_number(value: float) -> float:
    """The sum of a number over the workers."""
    return sum(_gather(value))


def gather_ordered(values: np.ndarray, total: int) -> np.ndarray:
    """Join what each worker computed for rows rank, rank + W, rank + 2W, ... into all `total` rows."""
    result = np.empty(total, dtype=values.dtype)
    for worker, part in enumerate(_gather(values)):
        result[worker :: world_size()] = part
    return result


def _gather(value: object) -> list:
    if world_size() == 1:
        return [value]
    parts: list = [None] * world_size()
    distributed.all_gather_object(parts, value)
    return parts
