"""The state-space-duality scan (Mamba-2, arXiv 2405.21060): one meaning, two ways to compute it.

Dimensions: b examples, L positions, H heads, P head width, G groups (divides H), N state size.

A head keeps a state S [P, N]. At position t, with step delta_t and decay exp(delta_t * a), a < 0:

    S_t = exp(delta_t * a) S_{t-1} + delta_t * x_t B_t^T        y_t = S_t C_t

`recurrence` says it in that order and is the reference in tests; `quadratic` is its dual form, a masked
attention whose weights decay with the steps between, and is what short sequences run on.
"""

from __future__ import annotations

import torch
from torch import Tensor


def recurrence(x: Tensor, delta: Tensor, a: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The scan step by step. x [b, L, H, P], delta [b, L, H], a [H], B and C [b, L, G, N] -> [b, L, H, P]."""
    heads_per_group = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(heads_per_group, dim=2), C.repeat_interleave(heads_per_group, dim=2)  # [b, L, H, N]
    state = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[-1])  # [b, H, P, N]
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(delta[:, t] * a)[..., None, None]  # [b, H, 1, 1]
        inflow = (delta[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]  # [b, H, P, N]
        state = decay * state + inflow
        outputs.append((state * C[:, t, :, None, :]).sum(-1))  # [b, H, P]
    return torch.stack(outputs, dim=1)


def quadratic(x: Tensor, delta: Tensor, a: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The dual form; cost and memory grow with L squared. Shapes as in `recurrence`."""
    b, L, H = delta.shape
    G = B.shape[2]
    log_decay = torch.cumsum(delta * a, dim=1).transpose(1, 2)  # [b, H, L]
    between = log_decay[..., :, None] - log_decay[..., None, :]  # [b, H, L, L], to row i from column j
    future = torch.ones(L, L, dtype=torch.bool, device=x.device).triu(1)
    decay = torch.exp(between.masked_fill(future, -torch.inf))
    affinity = torch.einsum("blgn,bsgn->bgls", C, B)  # [b, G, L, L]
    weights = decay.view(b, G, H // G, L, L) * affinity[:, :, None]  # [b, G, H/G, L, L]
    return torch.einsum("bhls,bshp->blhp", weights.view(b, H, L, L), x * delta[..., None])
