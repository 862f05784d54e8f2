"""What a scan costs: time and memory of each implementation of `mmm4rec.models.ssd.scan` against sequence length.

Dimensions: b examples, L positions, H heads, P head width, G groups, N state size.

Time: forward and backward, the median over rounds in which all points take turns in one process; on one CPU thread it
is the process's own CPU time, which is the time on an idle machine even where other work waits for the same cores.
Memory: what forward and backward add to the peak of a fresh process (on CUDA: to its allocated bytes), over the inputs
and the imports; short sequences run many at once and the peak is divided by their number, so that it stands clear of
page-sized noise.
The constants of ssd.py rest on this script: QUADRATIC_UP_TO on cost.csv and constants.csv, CHUNK on constants.csv.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the repository's root, not studies/, belongs on the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import matplotlib as mpl

mpl.use("agg")

import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from mmm4rec.models.ssd import CHUNK, KERNEL_CHUNK, KERNEL_FROM, QUADRATIC_UP_TO, Implementation, choose, chunked, scan

HEADS, HEAD_WIDTH, STATE, GROUPS = 8, 64, 64, 8  # the paper's
LENGTHS = (20, 64, 128, 256, 512, 1024, 2048, 4096)
BATCH = 1  # quadratic at 4096 positions then takes about 2.6 GiB
FITTED = (512, 4096)  # lengths between which growth is fitted
TIMED_POSITIONS = 512  # a timed run repeats a shorter call until about so many positions have passed
MEMORY_POSITIONS = 4096  # a memory point holds about so many positions at least
CONSTANT_BATCHES, CONSTANT_LENGTHS, CONSTANT_CHUNKS = (1, 16), (64, 96, 128, 192, 256, 512), (16, 32, 64, 128)
LOOKS = {  # colours of Okabe and Ito; the marks tell the lines apart in black and white
    "recurrence": ("#009E73", "^", ":"),
    "quadratic": ("#D55E00", "s", "--"),
    "chunked": ("#0072B2", "o", "-"),
    "triton": ("#CC79A7", "D", "-."),
}
Scan = Callable[..., Tensor]
Point = tuple[str, int, int]  # function, b, L


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input."""
    told = parser()
    options = told.parse_args(arguments)
    if min(options.lengths) < 1 or options.repeats < 1 or options.threads < 1:
        told.error("lengths, repeats and threads are at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        told.error("torch sees no CUDA device here; leave --device out")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    folder = Path(options.out) / "scan_cost"
    folder.mkdir(parents=True, exist_ok=True)
    table = measure(options.lengths, options.repeats, device)
    table.to_csv(folder / "cost.csv", index=False)
    draw(table, folder)
    print(table.pivot(index="length", columns="implementation", values=["milliseconds", "memory_mib"]).round(2).to_string())
    print(growth(table))
    if options.constants:
        measure_constants(options.repeats, device).to_csv(folder / "constants.csv", index=False)
    print(f"wrote {', '.join(str(path) for path in sorted(folder.iterdir()))}")
    return 0


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python studies/scan_cost.py",
        description=__doc__,
        epilog="example: python studies/scan_cost.py --lengths 20 64 512 --repeats 3 --out results",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("--out", default="results", metavar="DIR", help="writes DIR/scan_cost/cost.csv, cost.png and cost.svg (default: results)")
    standard = " ".join(map(str, LENGTHS))
    add("--lengths", type=int, nargs="+", default=LENGTHS, metavar="L", help=f"positions a sequence (default: {standard})")
    add("--repeats", type=int, default=7, metavar="N", help="timed rounds, after one that is not timed (default: 7)")
    add("--threads", type=int, default=1, metavar="N", help="CPU threads; 1 is the steadiest (default: 1)")
    add("--device", default="cpu", choices=("cpu", "cuda"), help="cuda adds the mamba-ssm kernel where it is installed (default: cpu)")
    add("--constants", action="store_true", help="also writes constants.csv: chunk sizes and the crossover at two batch sizes")
    return result


def inputs(b: int, L: int, device: torch.device) -> tuple[Tensor, ...]:
    """x, delta, a, B, C in float32, the same on every call; steps and decays as a fresh Mamba-2 block has them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(b, L, HEADS, HEAD_WIDTH, generator=generator)
    delta = F.softplus(torch.randn(b, L, HEADS, generator=generator) - 4)
    B, C = (torch.randn(b, L, GROUPS, STATE, generator=generator) for _ in range(2))
    return tuple(part.to(device).requires_grad_() for part in (x, delta, -torch.linspace(1, 16, HEADS), B, C))


def forward_backward(function: Scan, parts: tuple[Tensor, ...]) -> None:
    torch.autograd.grad(function(*parts).sum(), parts)


def in_chunks(chunk: int, x: Tensor, delta: Tensor, a: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """`scan` by `chunked` with chunks of this size: each row is one history, and nothing is skipped."""
    positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    return chunked(x, delta, a, B, C, torch.zeros_like(delta), positions, chunk=chunk)


def seconds(functions: dict[str, Scan], cases: Sequence[tuple[int, int]], repeats: int, device: torch.device) -> dict[Point, list[float]]:
    """Seconds of forward and backward of every function at every case (b, L).

    Each round visits every point once, so that a busy minute of the machine falls on all of them; the first of the
    repeats + 1 rounds is not counted.
    """
    clock = time.process_time if _clock(device) == "cpu time" else time.perf_counter
    taken: dict[Point, list[float]] = {(name, b, L): [] for b, L in cases for name in functions}
    with tqdm(total=(repeats + 1) * len(taken), unit="point", desc="time") as bar:
        for round_ in range(repeats + 1):
            for b, L in cases:
                parts, calls = inputs(b, L, device), max(1, TIMED_POSITIONS // (b * L))
                for name, function in functions.items():
                    _wait(device)
                    start = clock()
                    for _ in range(calls):
                        forward_backward(function, parts)
                    _wait(device)
                    if round_:
                        taken[name, b, L].append((clock() - start) / calls)
                    bar.update()
    return taken


def _clock(device: torch.device) -> str:
    return "cpu time" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall time"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def extra_memory(name: Implementation, L: int, threads: int, device_name: str) -> float:
    """MiB that forward and backward of one example add to the peak. Runs in a process of its own: the peak never falls."""
    torch.set_num_threads(threads)
    device, b = torch.device(device_name), max(1, MEMORY_POSITIONS // L)
    function = partial(scan, implementation=name)
    forward_backward(function, inputs(1, 8, device))  # code and buffers that any call needs
    parts = inputs(b, L, device)
    before = _peak_bytes(device, reset=True)
    forward_backward(function, parts)
    return (_peak_bytes(device) - before) / b / 2**20


def _peak_bytes(device: torch.device, *, reset: bool = False) -> int:
    """The peak so far; with `reset` from now on. Linux: VmHWM, since ru_maxrss of a child begins at its parent's size."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def measure(lengths: Sequence[int], repeats: int, device: torch.device) -> pd.DataFrame:
    """A row a length and implementation."""
    names: list[Implementation] = ["recurrence", "quadratic", "chunked"]
    if choose(KERNEL_FROM, device) == "triton":
        names.append("triton")
    memory = {}
    for name, L in tqdm([(name, L) for L in lengths for name in names], unit="point", desc="memory"):
        memory[name, L] = _in_fresh_process(name, L, device)
    functions: dict[str, Scan] = {name: partial(scan, implementation=name) for name in names}
    taken = seconds(functions, [(BATCH, L) for L in lengths], repeats, device)
    chunks = {"chunked": CHUNK, "triton": KERNEL_CHUNK}
    rows = [
        {"implementation": name, "length": L, "batch": BATCH, "chunk": chunks.get(name, "")}
        | _times(taken[name, BATCH, L])
        | {"memory_mib": round(extra, 3)}
        for (name, L), extra in memory.items()
    ]
    return _tabled(rows, repeats, device)


def _in_fresh_process(name: Implementation, L: int, device: torch.device) -> float:
    """`extra_memory` in a child where a freed tensor leaves at once (glibc), so that the peak is of tensors, not of the heap."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(extra_memory, name, L, torch.get_num_threads(), device.type).result()


def _times(taken: list[float]) -> dict[str, float]:
    """Median and quartiles in milliseconds."""
    low, middle, high = np.quantile(taken, (0.25, 0.5, 0.75)) * 1e3
    return {"milliseconds": round(middle, 4), "milliseconds_low": round(low, 4), "milliseconds_high": round(high, 4)}


def _tabled(rows: list[dict], repeats: int, device: torch.device) -> pd.DataFrame:
    """The rows, each with the sizes, the machine and the software that they were measured with."""
    cpu = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpu.read_text()) if cpu.exists() else None
    machine = model[1].strip() if model else platform.processor() or platform.machine()
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    sizes = {"heads": HEADS, "head_width": HEAD_WIDTH, "state": STATE, "groups": GROUPS, "dtype": "float32", "repeats": repeats}
    sizes["clock"] = _clock(device)
    software = {"threads": torch.get_num_threads(), "torch": str(torch.__version__)}
    return pd.DataFrame([row | sizes | {"device": device.type, "machine": machine} | software for row in rows])


def measure_constants(repeats: int, device: torch.device) -> pd.DataFrame:
    """Time of quadratic and of chunked at several chunk sizes: a row a batch size, length and function."""
    functions: dict[str, Scan] = {str(chunk): partial(in_chunks, chunk) for chunk in CONSTANT_CHUNKS}
    cases = [(b, L) for b in CONSTANT_BATCHES for L in CONSTANT_LENGTHS]
    taken = seconds({"": partial(scan, implementation="quadratic")} | functions, cases, repeats, device)
    rows = [
        {"implementation": "chunked" if chunk else "quadratic", "length": L, "batch": b, "chunk": chunk} | _times(times)
        for (chunk, b, L), times in taken.items()
    ]
    return _tabled(rows, repeats, device)


def growth(table: pd.DataFrame) -> str:
    """The exponents p of cost ~ L^p, least squares on logarithms between the lengths FITTED."""
    inside = table[table.length.between(*FITTED)]
    lines = [f"growth exponent between {FITTED[0]} and {FITTED[1]} positions"]
    for name, rows in inside.groupby("implementation", sort=False):
        if len(rows) > 1:
            fits = (np.polyfit(np.log(rows.length), np.log(rows[column]), 1)[0] for column in ("milliseconds", "memory_mib"))
            lines.append("  {:<11} time {:.2f}   memory {:.2f}".format(name, *fits))
    return "\n".join(lines)


def draw(table: pd.DataFrame, folder: Path) -> None:
    """Write cost.png and cost.svg: time and memory against length, a line an implementation."""
    with mpl.rc_context({"svg.hashsalt": "mmm4rec", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(1, 2, figsize=(7.4, 3.9), layout="constrained")
        _panel(axes[0], table, "milliseconds", "time of forward + backward (ms)")
        _panel(axes[1], table, "memory_mib", "peak extra memory (MiB)")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        first = {str(name): value for name, value in table.iloc[0].items()}
        sizes = "batch {batch}, H = {heads}, P = {head_width}, N = {state}, G = {groups}, {dtype}".format(**first)
        where = "{machine} ({device}), threads: {threads}, torch {torch}; {clock}, median and quartiles of {repeats}".format(**first)
        figure.suptitle(f"Cost of the scan, one call: {sizes}\n{where}", fontsize=9)
        figure.savefig(folder / "cost.png", dpi=200, metadata={"Software": None})
        figure.savefig(folder / "cost.svg", metadata={"Date": None})
        plt.close(figure)


def _panel(axis: Axes, table: pd.DataFrame, column: str, label: str) -> None:
    for name, rows in table.groupby("implementation", sort=False):
        colour, mark, line = LOOKS[str(name)]
        axis.plot(rows.length, rows[column], line, marker=mark, markersize=4, color=colour, linewidth=1.5, label=name)
        if column == "milliseconds":
            axis.fill_between(rows.length, rows.milliseconds_low, rows.milliseconds_high, color=colour, alpha=0.15, linewidth=0)
    axis.set(xscale="log", yscale="log", xlabel="length (positions)", ylabel=label)
    lengths = sorted(set(table.length))
    axis.set_xticks(lengths, [f"{L}" for L in lengths])
    axis.minorticks_off()
    axis.grid(color="0.92", linewidth=0.6)
    axis.axvline(QUADRATIC_UP_TO, color="0.6", linewidth=0.8)
    across = axis.get_xaxis_transform()  # x in positions, y in parts of the panel
    axis.text(QUADRATIC_UP_TO * 0.9, 0.95, "auto: quadratic", transform=across, ha="right", color="0.35", fontsize=8)
    axis.text(QUADRATIC_UP_TO * 1.1, 0.95, "chunked", transform=across, ha="left", color="0.35", fontsize=8)
    _slopes(axis, table, column)


def _slopes(axis: Axes, table: pd.DataFrame, column: str) -> None:
    """Grey guides of growth L and L squared over the last factor 4 of length, below the lines."""
    end = float(table.length.max())
    floor = table[table.length >= end / 4][column].min() * 0.12
    for power, label in ((1, "$L$"), (2, "$L^2$")):
        axis.plot((end / 4, end), (floor, floor * 4**power), color="0.45", linewidth=0.8)
        axis.annotate(label, (end, floor * 4**power), xytext=(3, -3), textcoords="offset points", color="0.35")


if __name__ == "__main__":
    raise SystemExit(main())
