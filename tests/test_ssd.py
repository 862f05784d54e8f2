"""The scan: every implementation is the recurrence, in numbers and in gradients, for each of the histories of a row.

And `auto` takes the one that it says.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmm4rec.data.batches import pack
from mmm4rec.models import ssd
from mmm4rec.models.ssd import CHUNK, KERNEL_FROM, QUADRATIC_UP_TO, choose, chunked, quadratic, recurrence, scan, summands_at_end

H, P, N = 4, 5, 6
Q = 8  # a small chunk, and the lengths around it
SMALL = (1, 2, 7, Q - 1, Q, Q + 1, 2 * Q + 3)
REAL = (1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3)
FAST: list[tuple[Callable[..., Tensor], int]] = [
    *((quadratic, length) for length in sorted({*SMALL, CHUNK + 1})),
    *((partial(chunked, chunk=Q), length) for length in sorted(set(SMALL))),
    *((chunked, length) for length in REAL),
]
NAMES = ("x", "delta", "a", "B", "C", "skip")
Layout = tuple[int, ...]  # the lengths of what stands in a row, one behind the other: a history, or, below 0, nothing
PACKED: list[tuple[Callable[..., Tensor], tuple[Layout, ...]]] = [  # three rows of one length each
    *(
        (function, rows)
        for function in (recurrence, quadratic, partial(chunked, chunk=Q))
        for rows in (
            ((24,), (8, 8, 8), (-24,)),  # with chunks of Q: one history across all borders, one between each two, none
            ((3, 5, 16), (16, 8), (-8, 16)),  # a history over two whole chunks, and one that ends before it
            ((5, -2, 10, 7), (-3, 1, 1, 13, -6), (9, 15)),  # histories end before and after borders, and begin in the first position
            ((7, 1, -7, 1, 8), (-7, 1, 8, -8), (17, -7)),  # a history's last position before a border; its first one behind it
            ((-1, 18), (1,) * 19, (12, 4, 3)),  # a chunk that is filled up
        )
    ),
    (chunked, ((3 * CHUNK - 5,), (CHUNK - 9, 2 * CHUNK + 4), (-7, CHUNK, 20, -CHUNK, 32))),
]


def make(length: int, groups: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """x, delta, a, B, C, skip of three examples; every one of them asks for a gradient."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    delta = F.softplus(draw(3, length, H))
    a = -torch.rand(H, generator=generator, dtype=torch.float64) - 0.01
    parts = (draw(3, length, H, P), delta, a, draw(3, length, groups, N), draw(3, length, groups, N), draw(3, length, H))
    return tuple(part.to(dtype).requires_grad_() for part in parts)


def lay_out(rows: tuple[Layout, ...]) -> Tensor:
    """The positions [b, L] of these rows."""
    return torch.stack([torch.cat([torch.arange(n) if n > 0 else torch.full((-n,), -1) for n in row]) for row in rows])


def of_one(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """x, delta, a, B, C, skip, and the positions of rows of one history each."""
    return *parts, lay_out(((parts[0].shape[1],),) * len(parts[0]))


def each_alone(parts: tuple[Tensor, ...], rows: tuple[Layout, ...]) -> Tensor:
    """The recurrence over each history of the rows for itself; 0 where nothing stands."""
    x, delta, a, B, C, skip = parts
    outputs = []
    for number, row in enumerate(rows):
        for first, n in zip(np.cumsum([0, *map(abs, row)]), row, strict=False):
            own = tuple(part[number, None, first : first + abs(n)] for part in (x, delta, B, C, skip))
            outputs.append(recurrence(*of_one((*own[:2], a, *own[2:])))[0] if n > 0 else torch.zeros_like(own[0][0]))
    return torch.cat(outputs).view_as(x)


def assert_same(ours: Tensor, reference: Tensor, parts: tuple[Tensor, ...], rtol: float, atol: float) -> None:
    """The same outputs, and the same gradients of all of `parts`."""
    assert ours.dtype == parts[0].dtype
    torch.testing.assert_close(ours, reference, rtol=rtol, atol=atol)
    weight = torch.randn(reference.shape, generator=torch.Generator().manual_seed(1), dtype=reference.dtype)
    gradients = (torch.autograd.grad((y * weight).sum(), parts) for y in (ours, reference))
    torch.testing.assert_close(*(dict(zip(NAMES, gradient, strict=True)) for gradient in gradients), rtol=rtol, atol=atol)


def by_hand(x: Tensor, delta: Tensor, a: Tensor, B: Tensor, C: Tensor, skip: Tensor) -> Tensor:
    """One example, one head, P = N = 1, written as the sum over earlier positions and what the position itself skips."""
    rows = []
    for t in range(x.shape[1]):
        terms = [torch.exp(a[0] * delta[0, s + 1 : t + 1, 0].sum()) * delta[0, s, 0] * x[0, s, 0, 0] * B[0, s, 0, 0] for s in range(t + 1)]
        rows.append(C[0, t, 0, 0] * torch.stack(terms).sum() + skip[0, t, 0] * x[0, t, 0, 0])
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("function", [recurrence, quadratic, partial(chunked, chunk=2)], ids=["recurrence", "quadratic", "chunked"])
def test_scan_is_the_decayed_sum_over_the_past(function: Callable[..., Tensor]) -> None:
    x, delta, a, B, C, skip = make(5, 1)
    parts = (x[:1, :, :1, :1], delta[:1, :, :1], a[:1], B[:1, :, :, :1], C[:1, :, :, :1], skip[:1, :, :1])
    torch.testing.assert_close(function(*of_one(parts)), by_hand(*parts), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2, H])
@pytest.mark.parametrize(("function", "length"), FAST)
def test_is_the_recurrence(function: Callable[..., Tensor], length: int, groups: int) -> None:
    parts = make(length, groups)
    assert_same(function(*of_one(parts)), recurrence(*of_one(parts)), parts, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("groups", [1, H])
@pytest.mark.parametrize(("function", "length"), [(quadratic, CHUNK + 1), (partial(chunked, chunk=Q), 2 * Q + 3), (chunked, 2 * CHUNK + 3)])
def test_is_the_recurrence_in_float32(function: Callable[..., Tensor], length: int, groups: int) -> None:
    """To 1e-4: sums over a hundred positions, in another order, of numbers around ten."""
    parts = make(length, groups, torch.float32)
    assert_same(function(*of_one(parts)), recurrence(*of_one(parts)), parts, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2, H])
@pytest.mark.parametrize(("function", "rows"), PACKED)
def test_histories_of_one_row_know_nothing_of_each_other(function: Callable[..., Tensor], rows: tuple[Layout, ...], groups: int) -> None:
    """What stands where nothing should, too, reaches no output and gets no gradient."""
    positions = lay_out(rows)
    parts = make(positions.shape[1], groups)
    ours = function(*parts, positions)
    assert ours.isfinite().all()
    assert_same(ours.where((positions >= 0)[..., None, None], 0), each_alone(parts, rows), parts, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("function", [quadratic, partial(chunked, chunk=Q)], ids=["quadratic", "chunked"])
def test_a_history_behind_long_steps_keeps_its_precision(function: Callable[..., Tensor]) -> None:
    """In float32, 60 positions whose decays sum to 48,000 before a history of steps of 1e-3: to 1e-5, as if it stood alone."""
    rows = ((60, 20), (59, 1, 20), (-60, 20))
    x, delta, a, B, C, skip = make(80, 2, torch.float32)
    steps = torch.where(torch.arange(80) < 60, 50.0, 1e-3)[None, :, None].expand_as(delta).contiguous().requires_grad_()
    parts = (x, steps, torch.full_like(a, -16).requires_grad_(), B, C, skip)
    ours, alone = (y[:, 60:] for y in (function(*parts, lay_out(rows)), each_alone(parts, rows)))
    assert_same(ours, alone, parts, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["recurrence", "quadratic", "chunked", "auto"])
def test_without_skip_and_positions_a_row_is_one_history_that_skips_nothing(implementation: ssd.Implementation) -> None:
    *parts, skip = make(2 * CHUNK + 3, 2)
    plain = scan(*parts, implementation=implementation)
    torch.testing.assert_close(plain, recurrence(*of_one((*parts, torch.zeros_like(skip)))), rtol=1e-10, atol=1e-10)
    skipped = scan(*parts, skip, implementation=implementation)
    torch.testing.assert_close(skipped, plain + skip[..., None] * parts[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2, H])
@pytest.mark.parametrize("longest", [1, 2, 12, QUADRATIC_UP_TO + 7])
def test_summands_at_the_end_sum_to_the_scan_there(longest: int, groups: int) -> None:
    """Outputs and gradients at the last position of every history, whose C reads; 0 and no gradient where none stands."""
    lengths = np.random.default_rng(0).integers(1, longest + 1, 11)
    lengths[5] = longest
    _, packing = pack(np.ones(lengths.sum(), dtype=np.int64), lengths)
    (W, L), generator = packing.positions.shape, torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    _, _, a, _, C, _ = make(11, groups)
    C = C.detach()[0].requires_grad_()  # [11, G, N]
    delta = F.softplus(draw(W, L, H)).requires_grad_()
    x, B, skip = (draw(W, L, *rest).requires_grad_() for rest in ((H, P), (groups, N), (H,)))
    summands = summands_at_end(x, delta, a, B, packing.at_tokens(C), skip, packing)
    assert not summands[packing.positions < 0].any()
    whole = recurrence(x, delta, a, B, packing.at_tokens(C), skip, packing.positions)
    assert_same(packing.sum_up(summands), packing.at_last(whole), (x, delta, a, B, C, skip), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chunk", [1, 3, Q, 1000])
def test_the_chunk_size_changes_no_number(chunk: int) -> None:
    parts = of_one(make(2 * Q + 3, 2))
    torch.testing.assert_close(chunked(*parts, chunk=chunk), recurrence(*parts), rtol=1e-12, atol=1e-12)


def test_chunked_takes_its_default_from_the_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def noted(x: Tensor, *rest: Tensor) -> Tensor:
        lengths.append(x.shape[1])
        return quadratic(x, *rest)

    monkeypatch.setattr(ssd, "quadratic", noted)
    chunked(*of_one(make(2 * CHUNK, 1)))
    monkeypatch.setattr(ssd, "CHUNK", Q)
    chunked(*of_one(make(2 * Q, 1)))
    assert lengths == [CHUNK, Q]


def test_autocast_gives_one_dtype_at_every_length() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        short, long = (scan(*make(length, 2, torch.float32)) for length in (QUADRATIC_UP_TO, QUADRATIC_UP_TO + 1))
    assert short.dtype == long.dtype == torch.bfloat16


def test_chunked_never_sees_ahead_and_never_forgets() -> None:
    """A change at a position in the second chunk leaves every output before it, and moves all from it on."""
    x, delta, a, B, C, skip = make(4 * Q, 2)
    delta, place = delta * 0.01, Q + 3  # slow decay: the change is still there at the end
    changed = x.detach().clone()
    changed[:, place] += 1
    before, after = (chunked(*of_one((part, delta, a, B, C, skip)), chunk=Q) for part in (x, changed))
    torch.testing.assert_close(before[:, :place], after[:, :place], rtol=0, atol=0)
    assert ((before - after)[:, place:].abs().amax((0, 2, 3)) > 1e-6).all()


@pytest.mark.parametrize(
    ("function", "dtype", "tolerance"),
    [
        (quadratic, torch.float64, 1e-10),
        (chunked, torch.float64, 1e-10),
        (partial(chunked, chunk=Q), torch.float64, 1e-10),
        (quadratic, torch.float32, 1e-2),  # its sums reach 300,000 and lose the steps of 1e-5; chunks keep them small
        (chunked, torch.float32, 1e-3),
        (partial(chunked, chunk=Q), torch.float32, 1e-3),
    ],
)
def test_extreme_decays_stay_finite_and_right(function: Callable[..., Tensor], dtype: torch.dtype, tolerance: float) -> None:
    """exp(+sum of 600 steps of 50 * 16) would be infinite in any format; steps of 1e-6 stand among them."""
    x, delta, a, B, C, skip = make(600, 2, dtype)
    large = torch.rand(delta.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    steps = torch.where(large, 50.0, 1e-6).to(dtype).requires_grad_()
    parts = (x, steps, torch.full_like(a, -16).requires_grad_(), B, C, torch.zeros_like(skip).requires_grad_())
    ours, reference = function(*of_one(parts)), recurrence(*of_one(parts))
    assert ours.isfinite().all()
    torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)
    for name, gradient in zip(NAMES, torch.autograd.grad(ours.sum(), parts), strict=True):
        assert gradient.isfinite().all(), name


def test_choose_goes_by_length_and_device() -> None:
    cpu = torch.device("cpu")
    assert [choose(length, cpu) for length in (1, QUADRATIC_UP_TO, QUADRATIC_UP_TO + 1, 10**6)] == ["quadratic"] * 2 + ["chunked"] * 2
    assert choose(10**6, torch.device("mps")) == "chunked"


@pytest.mark.parametrize("length", [1, QUADRATIC_UP_TO, QUADRATIC_UP_TO + 1])
def test_auto_takes_what_choose_says(length: int) -> None:
    parts = make(length, 2)
    named = scan(*parts, implementation=choose(length, parts[0].device))
    other = scan(*parts, implementation="recurrence")
    torch.testing.assert_close(scan(*parts), named, rtol=0, atol=0)
    assert length == 1 or not torch.equal(named, other)  # so bits tell the implementations apart


def test_unknown_implementation_is_named() -> None:
    with pytest.raises(ValueError, match=r"'cubic'.*auto, recurrence, quadratic, chunked, triton"):
        scan(*make(2, 1), implementation="cubic")  # type: ignore[arg-type]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A mamba-ssm whose kernel checks its arguments as the real one does and runs on the CPU; the chunk sizes of its calls."""
    calls: list[int] = []

    def mamba_chunk_scan_combined(  # the real one's parameters, in its order
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = None, z: Tensor | None = None,
        dt_bias: Tensor | None = None, initial_states: Tensor | None = None, seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None, dt_softplus: bool = False, dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False, return_varlen_states: bool = False,
    ) -> Tensor:  # fmt: skip
        batch, length, heads, _ = x.shape
        assert dt.shape == (batch, length, heads)
        assert A.shape == (heads,)
        assert B.shape == C.shape == (batch, length, *B.shape[2:])
        assert B.dim() == 4
        assert heads % B.shape[2] == 0
        assert chunk_size >= 16
        assert chunk_size & (chunk_size - 1) == 0  # a power of two
        assert D is z is dt_bias is initial_states is cu_seqlens is None
        assert not any((dt_softplus, return_final_states, return_varlen_states))
        calls.append(chunk_size)
        assert seq_idx is not None
        assert (seq_idx.shape, seq_idx.dtype) == ((batch, length), torch.int32)
        change = seq_idx.diff(dim=1, prepend=seq_idx[:, :1] - 1)
        assert (change >= 0).all()  # so that no number comes again: the real one compares them all within a chunk
        place = torch.arange(length)
        positions = place - torch.where(change > 0, place, 0).cummax(dim=1).values
        return recurrence(x, dt, A, B, C, torch.zeros_like(dt), positions)

    module = ModuleType(ssd.KERNEL_MODULE)
    vars(module)["mamba_chunk_scan_combined"] = mamba_chunk_scan_combined
    monkeypatch.setitem(sys.modules, ssd.KERNEL_MODULE, module)
    for parent in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    monkeypatch.setattr(ssd, "KERNEL_DEVICE", "cpu")
    ssd._kernel.cache_clear()
    yield calls
    ssd._kernel.cache_clear()


@pytest.mark.parametrize("groups", [1, 2, H])
def test_triton_hands_the_kernel_what_it_expects(kernel: list[int], groups: int) -> None:
    parts = make(9, groups, torch.float32)
    assert_same(scan(*parts, implementation="triton"), recurrence(*of_one(parts)), parts, rtol=0, atol=0)
    assert kernel == [ssd.KERNEL_CHUNK]


@pytest.mark.parametrize("groups", [1, 2, H])
def test_triton_tells_the_kernel_where_histories_begin(kernel: list[int], groups: int) -> None:
    rows = ((5, -2, 10, 7), (-3, 1, 1, 13, -6), (9, 15))
    positions, parts = lay_out(rows), make(24, groups, torch.float32)
    ours = scan(*parts, positions, implementation="triton").where((positions >= 0)[..., None, None], 0)
    assert_same(ours, each_alone(parts, rows), parts, rtol=1e-5, atol=1e-5)
    assert len(kernel) == 1


def test_auto_takes_the_kernel_for_long_sequences_that_it_can_hold(kernel: list[int]) -> None:
    cpu = torch.device("cpu")
    assert choose(KERNEL_FROM, cpu) == "triton"
    assert choose(20, cpu) == "quadratic"
    assert choose(KERNEL_FROM, torch.device("mps")) == choose(KERNEL_FROM, cpu, torch.float64) == "chunked"
    scan(*make(KERNEL_FROM, 1, torch.float32))
    assert len(kernel) == 1
    scan(*make(KERNEL_FROM, 1, torch.float64))
    assert len(kernel) == 1


def test_triton_refuses_float64(kernel: list[int]) -> None:
    with pytest.raises(RuntimeError, match=r"float32 or less; x is torch\.float64"):
        scan(*make(9, 1), implementation="triton")
    assert not kernel


def test_triton_on_a_cpu_says_why_not() -> None:
    with pytest.raises(RuntimeError, match=r"needs tensors on cuda; these are on cpu.*implementation='auto'"):
        scan(*make(9, 1, torch.float32), implementation="triton")


def test_triton_without_the_package_names_the_remedy(kernel: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, ssd.KERNEL_MODULE, None)  # import of it raises ImportError
    ssd._kernel.cache_clear()
    with pytest.raises(RuntimeError, match="pip install mamba-ssm"):
        scan(*make(9, 1, torch.float32), implementation="triton")
    assert choose(KERNEL_FROM, torch.device("cpu")) == "chunked"
