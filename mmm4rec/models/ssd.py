"""The state-space-duality scan (Mamba-2, arXiv 2405.21060): one meaning, four ways to compute it.

Dimensions: b examples, L positions, H heads, P head width, G groups (divides H), R = H / G heads a group, N state size,
K chunks, Q positions a chunk.

A head keeps a state S [P, N]. At position t, with step delta_t >= 0 and decay exp(delta_t * a), a < 0:

    S_t = exp(delta_t * a) S_{t-1} + delta_t * x_t B_t^T        y_t = S_t C_t

`recurrence` says it in that order and is the reference in tests. `quadratic` is its dual form, a masked attention
whose weights decay with the steps between: the fastest on short sequences. `chunked` is the dual form inside chunks and
the recurrence from chunk to chunk: time and memory grow with L. `triton` is the kernel of the package mamba-ssm.
`scan` takes the one that fits. Every exponential here is of a sum of delta * a, so it is at most 1.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from mmm4rec.data.batches import Packing

Implementation = Literal["auto", "recurrence", "quadratic", "chunked", "triton"]

# Measured by `python studies/scan_cost.py --constants` (one thread of an AMD EPYC, results/scan_cost/): at 128 positions
# quadratic and chunked cost the same to a tenth, at batch 1 and 16, in time and in memory. Chunks of 64 are as fast as any
# up to 192 positions; beyond, 32 saves 5 to 12 % and doubles the steps from chunk to chunk.
QUADRATIC_UP_TO = 128
CHUNK = 64
KERNEL_FROM = 256  # not measured: a whole chunk of the kernel
KERNEL_CHUNK = 256  # mamba-ssm's own default; a power of two, at least 16
KERNEL_MODULE = "mamba_ssm.ops.triton.ssd_combined"
KERNEL_DEVICE = "cuda"
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def scan(
    x: Tensor,
    delta: Tensor,
    a: Tensor,
    B: Tensor,
    C: Tensor,
    skip: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    implementation: Implementation = "auto",
) -> Tensor:
    """The scan. x [b, L, H, P], delta [b, L, H] >= 0, a [H] < 0, B and C [b, L, G, N] -> y [b, L, H, P].

    skip [b, L, H]: the weight of x in the output of its own position, beside what the state gives; None: 0.
    positions [b, L] int: each position's place in its own history (`Packing`); a history reads no other. None: a row is
    one history. Where it is -1 nothing stands, and y means nothing. `implementation`: `auto` is what `choose` names.
    Raises ValueError for another name, RuntimeError for `triton` where it cannot run.
    """
    name = choose(x.shape[1], x.device, x.dtype) if implementation == "auto" else implementation
    if name not in _FUNCTIONS:
        raise ValueError(f"implementation is {name!r}; the rule: one of {', '.join(get_args(Implementation))}")
    if positions is None:
        positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    return _FUNCTIONS[name](x, delta, a, B, C, torch.zeros_like(delta) if skip is None else skip, positions)


def choose(length: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Implementation:
    """The implementation that `auto` takes for sequences of `length` positions: the same answer for the same machine."""
    if length >= KERNEL_FROM and why_no_kernel(device, dtype) is None:
        return "triton"
    return "quadratic" if length <= QUADRATIC_UP_TO else "chunked"


def recurrence(x: Tensor, delta: Tensor, a: Tensor, B: Tensor, C: Tensor, skip: Tensor, positions: Tensor) -> Tensor:
    """The scan step by step. Shapes as in `scan`."""
    heads_per_group = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(heads_per_group, dim=2), C.repeat_interleave(heads_per_group, dim=2)  # [b, L, H, N]
    state = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[-1])  # [b, H, P, N]
    outputs = []
    for x_t, delta_t, B_t, C_t, position in zip(*(part.unbind(1) for part in (x, delta, B, C, positions)), strict=True):
        state = torch.where((position > 0)[:, None, None, None], state, 0.0)  # a new history starts with an empty state
        decay = torch.exp(delta_t * a)[..., None, None]  # [b, H, 1, 1]
        inflow = (delta_t[..., None] * x_t)[..., None] * B_t[:, :, None, :]  # [b, H, P, N]
        state = decay * state + inflow
        outputs.append((state * C_t[:, :, None, :]).sum(-1))  # [b, H, P]
    return torch.stack(outputs, dim=1) + skip[..., None] * x


def quadratic(x: Tensor, delta: Tensor, a: Tensor, B: Tensor, C: Tensor, skip: Tensor, positions: Tensor) -> Tensor:
    """The dual form; cost and memory grow with L squared. Shapes as in `scan`."""
    b, L, H = delta.shape
    G, N = B.shape[2:]
    decay = _decay_between(_log_decay(delta, a, positions).transpose(1, 2), positions)  # [b, H, L, L]
    B, C = (part.transpose(1, 2).reshape(b * G, L, N) for part in (B, C))
    affinity = torch.bmm(C, B.transpose(1, 2))  # [b * G, L, L], to row l from column s
    weights = decay.view(b, G, H // G, L, L) * affinity.view(b, G, 1, L, L)
    delta, skip = (part.transpose(1, 2) for part in (delta, skip))  # [b, H, L]
    weights = weights.view(b, H, L, L) * delta[:, :, None] + torch.diag_embed(skip)
    x = x.transpose(1, 2).reshape(b * H, L, -1)  # [b * H, L, P]
    return torch.bmm(weights.view(b * H, L, L).to(x.dtype), x).view(b, H, L, -1).transpose(1, 2)


def _log_decay(delta: Tensor, a: Tensor, positions: Tensor) -> Tensor:
    """Sums of delta * a from the start of each position's history, or of its row, up to the position: [b, L, H].

    Summed in float64: the sums over a row are large beside those over one of its histories.
    """
    steps = (delta * a).double()
    sums = torch.cumsum(steps, dim=1)
    place = torch.arange(positions.shape[1], device=positions.device)
    first = torch.where(positions < 0, place, (place - positions).clamp(min=0))  # [b, L] where the position's history starts
    before = (sums - steps).gather(1, first[..., None].expand_as(sums))
    return (sums - before).to(delta.dtype)


def _decay_between(log_decay: Tensor, positions: Tensor) -> Tensor:
    """The decay to row t from column s, 0 where s is later or of another history: [b, H, L] and [b, L] -> [b, H, L, L]."""
    place = torch.arange(positions.shape[1], device=positions.device)
    first = (place - positions)[:, :, None]  # [b, L, 1] where the history of row t starts
    past = (place >= first) & (place <= place[:, None])  # [b, L, L]
    between = log_decay[..., :, None] - log_decay[..., None, :]  # [b, H, L, L]
    return torch.exp(between.masked_fill(~past[:, None], -torch.inf))


def chunked(
    x: Tensor, delta: Tensor, a: Tensor, B: Tensor, C: Tensor, skip: Tensor, positions: Tensor, *, chunk: int | None = None
) -> Tensor:
    """Linear in L: `quadratic` inside chunks of at most `chunk` (default `CHUNK`) positions, states between them.

    Shapes as in `scan`. The K chunks are as equal as they can be: the last is filled up with fewer than K
    positions where nothing stands and whose outputs are cut off.
    """
    b, L = x.shape[:2]
    K = math.ceil(L / (CHUNK if chunk is None else chunk))
    Q = math.ceil(L / K)
    x, delta, B, C, skip = (_split(part, K, Q) for part in (x, delta, B, C, skip))  # [b, K, Q, ...]
    positions = F.pad(positions, (0, K * Q - L), value=-1).unflatten(1, (K, Q))
    x_, delta_, B_, C_, skip_, positions_ = (part.flatten(0, 1) for part in (x, delta, B, C, skip, positions))
    y = quadratic(x_, delta_, a, B_, C_, skip_, positions_).unflatten(0, (b, K))
    if K > 1:
        log_decay = _log_decay(delta.flatten(0, 1), a, positions.flatten(0, 1)).unflatten(0, (b, K))  # [b, K, Q, H]
        entering = _entering_states(x, delta, log_decay, B, positions)  # [b, K - 1, H, P, N]
        began_before = positions > torch.arange(Q, device=positions.device)  # [b, K, Q]: reads what entered the chunk
        read = _read(entering, log_decay[:, 1:], C[:, 1:], began_before[:, 1:])  # [b, K - 1, Q, H, P]
        y = torch.cat((y[:, :1], y[:, 1:] + read.to(y.dtype)), dim=1)  # no state enters the first; autocast's dtype as quadratic's
    return y.flatten(1, 2)[:, :L]


def _split(part: Tensor, K: int, Q: int) -> Tensor:
    """[b, L, ...] -> [b, K, Q, ...], zeros behind the end."""
    missing = K * Q - part.shape[1]
    if missing:
        part = F.pad(part, (0, 0) * (part.dim() - 2) + (0, missing))
    return part.unflatten(1, (K, Q))


def _entering_states(x: Tensor, delta: Tensor, log_decay: Tensor, B: Tensor, positions: Tensor) -> Tensor:
    """The states at the start of every chunk but the first, [b, K - 1, H, P, N]. Arguments over all K chunks.

    A state is of the history that crosses the chunk's end: its positions alone write, and only where it began before the
    chunk does what had entered live on.
    """
    x, delta, log_decay, B, positions = (part[:, :-1] for part in (x, delta, log_decay, B, positions))  # nobody reads the last chunk's
    G, H, Q = B.shape[3], x.shape[3], x.shape[2]
    total = log_decay[:, :, -1]  # [b, K - 1, H], over a whole chunk
    place = torch.arange(Q, device=x.device)
    first = Q - 1 - positions[:, :, -1:]  # [b, K - 1, 1] where the history at the chunk's end starts; negative: before the chunk
    writes = (place >= first)[..., None]  # [b, K - 1, Q, 1]
    to_end = torch.exp((total[:, :, None] - log_decay).masked_fill(~writes, -torch.inf)).to(delta.dtype)  # [b, K - 1, Q, H]
    inflow = (x * (delta * to_end)[..., None]).unflatten(3, (G, H // G))  # [b, K - 1, Q, G, R, P]
    written = torch.einsum("bksgrp,bksgn->bkgrpn", inflow, B).flatten(2, 3)  # [b, K - 1, H, P, N]
    decay = torch.exp(total.masked_fill(first >= 0, -torch.inf)).to(delta.dtype)[..., None, None]  # [b, K - 1, H, 1, 1]
    states: list[Tensor] = []
    for decay_k, written_k in zip(decay.unbind(1), written.unbind(1), strict=True):
        states.append(decay_k * states[-1] + written_k if states else written_k)
    return torch.stack(states, dim=1)


def _read(entering: Tensor, log_decay: Tensor, C: Tensor, began_before: Tensor) -> Tensor:
    """What the positions of a chunk read from the state [b, K, H, P, N] that entered it: [b, K, Q, H, P]."""
    G, H = C.shape[3], entering.shape[2]
    read = torch.einsum("bklgn,bkgrpn->bklgrp", C, entering.unflatten(2, (G, H // G))).flatten(3, 4)  # [b, K, Q, H, P]
    decay = torch.exp(log_decay.masked_fill(~began_before[..., None], -torch.inf)).to(read.dtype)
    return decay[..., None] * read


def summands_at_end(x: Tensor, delta: Tensor, a: Tensor, B: Tensor, C: Tensor, skip: Tensor, packing: Packing) -> Tensor:
    """What each position adds to the scan's output at the end of its history; linear in the length, whatever it is.

    Shapes as in `scan`, but C is that of the history's end at all its positions; skip [W, Q, H] is the weight of x in the
    output of its own position. Where nothing stands the result is 0.
    """
    positions, to_end = packing.positions, packing.to_end  # [W, Q]
    place = torch.arange(positions.shape[1], device=positions.device)
    end = torch.where(positions < 0, place, place + to_end)
    log_decay = _log_decay(delta, a, positions)  # [W, Q, H]
    remaining = log_decay.gather(1, end[..., None].expand_as(log_decay)) - log_decay
    affinity = (B * C).sum(-1).repeat_interleave(x.shape[2] // B.shape[2], dim=-1)  # [W, Q, H]
    weight = delta * torch.exp(remaining) * affinity + skip * (to_end == 0)[..., None]
    return x * (weight * (positions >= 0)[..., None])[..., None]


def triton(x: Tensor, delta: Tensor, a: Tensor, B: Tensor, C: Tensor, skip: Tensor, positions: Tensor) -> Tensor:
    """The scan by the GPU kernel of mamba-ssm. Shapes as in `scan`; RuntimeError where it cannot run.

    The kernel sums in float32 whatever comes in, and may multiply float32 as TF32: expect three digits, not seven.
    """
    problem = why_no_kernel(x.device, x.dtype)
    kernel = _kernel()
    if problem or kernel is None:
        raise RuntimeError(f"scan(implementation='triton') {problem}, or use implementation='auto'")
    history = torch.cumsum(positions <= 0, dim=1, dtype=torch.int32)  # [b, L], another number for another history
    return kernel(x, delta, a, B, C, chunk_size=KERNEL_CHUNK, seq_idx=history) + skip[..., None] * x


def why_no_kernel(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where the kernel can run, otherwise the rule, the value and the remedy."""
    if device.type != KERNEL_DEVICE:
        return f"needs tensors on {KERNEL_DEVICE}; these are on {device.type}. Move them there"
    if dtype not in KERNEL_DTYPES:
        return f"computes in float32 or less; x is {dtype}. Cast it"
    if _kernel() is None:
        return f"needs the package mamba-ssm, whose {KERNEL_MODULE} does not import here. Run: pip install mamba-ssm"
    return None


@cache
def _kernel() -> Callable[..., Tensor] | None:
    """mamba-ssm's chunk scan, or None where the package is missing or was built for another torch."""
    try:
        return importlib.import_module(KERNEL_MODULE).mamba_chunk_scan_combined
    except (ImportError, AttributeError):
        return None


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "recurrence": recurrence,
    "quadratic": quadratic,
    "chunked": chunked,
    "triton": triton,
}
