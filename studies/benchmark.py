"""The speed and the memory of one run, beside the targets that the project has set itself.

CPU: a training step against a plain padded implementation of the same maths (tests/reference.py: it pads every history to
max_len, keeps every array, and is nowhere slowed down on purpose) and against the matrix products that the step cannot do
without; evaluation; the loader; memory. Then large catalogues from memory-mapped features, and long histories. On a machine
with a CUDA GPU, epochs of the published sizes as well. Ratios are taken within one process, in turns; figures are medians.
With --engine, in place of all these: what a study costs beside its trials (benchmark_engine.py). With --pretrain: what
pre-training costs (benchmark_pretrain.py). With --tables: what the tables of a large study cost (benchmark_tables.py). With
--prepare: what preparing raw reviews costs (benchmark_prepare.py). With --models: how fast every recommender is (benchmark_models.py).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the repository's root, not studies/, belongs on the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import matplotlib as mpl

mpl.use("agg")

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from tqdm import tqdm

from mmm4rec.data.domain import write_atomically
from mmm4rec.doctor import memory_bytes
from mmm4rec.execute import code_version
from studies import benchmark_cases as cases
from studies.benchmark_cases import Case

PARTS = ("step", "large", "long", "gpu")
TUNED = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_TOP_PAD_": str(2**28)}  # of glibc
SIZES = (62_500, 250_000, 1_000_000)
LENGTHS = (20, 50, 200, 1000)
LONG_POSITIONS = 16_384
BLUE, RED, GREEN = "#0072B2", "#D55E00", "#009E73"  # of Okabe and Ito; the marks tell the lines apart in black and white


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input."""
    told = parser()
    options = told.parse_args(arguments)
    if options.threads < 1 or options.repeats < 1:
        told.error("threads and repeats are at least 1")
    torch.set_num_threads(options.threads)
    if options.only_step:  # the same in a process with other allocator settings: see `measure_step`
        print(json.dumps(cases.cpu_step(Case(), options.repeats)))
        return 0
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    if options.engine:
        from studies import benchmark_engine  # alone in its need of Ray, Optuna and MLflow

        if options.trials < benchmark_engine.FEWEST_TRIALS:
            told.error(f"trials is at least {benchmark_engine.FEWEST_TRIALS}")
        print(benchmark_engine.measure(out, options.trials, machine("engine")))
        return 0
    if options.pretrain:
        from studies import benchmark_pretrain

        print(benchmark_pretrain.measure(out, options.sizes, machine("pretrain")))
        return 0
    if options.models:
        from studies import benchmark_models

        print(benchmark_models.measure(out, options.repeats, machine("models")))
        return 0
    if options.prepare:
        from studies import benchmark_prepare

        print(benchmark_prepare.measure(out, options.ratings, machine("prepare")))
        return 0
    if options.tables:
        from studies import benchmark_tables

        print(benchmark_tables.measure(out, options.runs, machine("tables")))
        return 0
    file = out / "benchmark.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    measures = {"step": measure_step, "large": measure_large, "long": measure_long, "gpu": measure_gpu}
    for part in tqdm([part for part in PARTS if part in options.parts], unit="part"):
        if part == "gpu" and not torch.cuda.is_available():
            tqdm.write("gpu: torch sees no CUDA device here; not measured")
            continue
        found[part] = {"machine": machine(part), **measures[part](options.repeats)}
        write_atomically(file, (json.dumps(found, indent=2) + "\n").encode())
    text = table(found)
    write_atomically(out / "benchmark.md", text.encode())
    draw(found, out)
    print(text)
    return 0


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python studies/benchmark.py",
        description=__doc__,
        epilog="example: python studies/benchmark.py --parts step long --repeats 3 --out /tmp/speed",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("--out", default="results", metavar="DIR", help="writes DIR/benchmark.json, .md and figures (default: results)")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure; the rest stays as it is in the file (default: all)")
    add("--repeats", type=int, default=5, metavar="N", help="timed rounds, after one that is not timed (default: 5)")
    add("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="CPU threads (default: the machine's)")
    add("--engine", action="store_true", help="measure the study engine instead: DIR/benchmark_engine.json and .md")
    add("--trials", type=int, default=1000, metavar="N", help="trials that sleep a second, with --engine (default: 1,000)")
    add("--pretrain", action="store_true", help="measure pre-training instead: DIR/benchmark_pretrain.json and .md")
    add("--sizes", type=int, default=3, choices=(1, 2, 3), help="of the data, with --pretrain; the third needs 25 GB of disk (default: 3)")
    add("--tables", action="store_true", help="measure a large study's tables instead: DIR/benchmark_tables.json and .md")
    add("--runs", type=int, default=2000, metavar="N", help="trials in the store, with --tables (default: 2,000)")
    add("--models", action="store_true", help="measure every recommender instead: DIR/benchmark_models.json and .md")
    add("--prepare", action="store_true", help="measure the preparation of raw reviews instead: DIR/benchmark_prepare.json and .md")
    add("--ratings", type=int, default=20_000_000, metavar="N", help="in the largest file, with --prepare (default: 20,000,000)")
    add("--only-step", action="store_true", help=argparse.SUPPRESS)
    return result


def machine(part: str) -> dict[str, Any]:
    cpu = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpu.read_text(encoding="utf-8")) if cpu.exists() else None
    return {
        "name": torch.cuda.get_device_name() if part == "gpu" else model[1].strip() if model else platform.machine(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory_bytes(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "system": platform.system(),
        "code_version": code_version(),
    }


def measure_step(repeats: int) -> dict[str, Any]:
    """Training step, evaluation, loader and memory of the paper's fine-tuning, with the allocator as it comes and tuned."""
    case = Case()
    command = [sys.executable, __file__, "--only-step", "--repeats", str(repeats), "--threads", str(torch.get_num_threads())]
    tuned = subprocess.run(command, env=os.environ | TUNED, capture_output=True, text=True, check=True)
    return {
        "step": cases.in_fresh_process(cases.cpu_step, case, repeats),
        "step_with_tuned_allocator": json.loads(tuned.stdout),
        "evaluation": cases.in_fresh_process(cases.cpu_evaluation, case, repeats),
        "operations": cases.in_fresh_process(cases.operations, replace(case, batch=256)),
        "memory": cases.in_fresh_process(cases.steady_memory, case, 3),
    }


def measure_large(repeats: int) -> dict[str, Any]:
    """One optimizer step on catalogues of many blocks, each in a fresh process."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases.write_features(folder, max(SIZES), 768)
        large = Case(batch=512, accumulation=1, folder=name)
        variants = {"exact, no ids": {"ids": False}, "exact, ids": {"ids": True}, "sampled, no ids": {"ids": False, "loss": "sampled"}}
        plans = [(label, replace(large, items=items, **told)) for label, told in variants.items() for items in SIZES]  # type: ignore[arg-type]
        for label, case in tqdm(plans, desc="large", unit="run", leave=False):
            users = 512 if case.items == max(SIZES) and label == "exact, no ids" else 0
            rows.append({"variant": label, "items": case.items, **cases.in_fresh_process(cases.one_step, case, None, users)})
    with tempfile.TemporaryDirectory() as name:
        cases.write_features(Path(name), 10_000_000, 32)
        case = Case(items=10_000_000, feature_width=32, batch=256, accumulation=1, ids=False, folder=name)
        rows.append({"variant": "exact, no ids, 32 features", "items": case.items, **cases.in_fresh_process(cases.one_step, case)})
    return {"features": 768, "batch": 512, "width": 256, "rows": rows}


def measure_long(repeats: int) -> dict[str, Any]:
    case = Case(items=5_000, feature_width=64)
    return {"items": case.items, "rows": cases.long_histories(case, LENGTHS, LONG_POSITIONS, repeats)}


def measure_gpu(repeats: int) -> dict[str, Any]:
    """Epochs of the published sizes, in the three precisions."""
    rows = []
    for name, items, micro_batches in (("Office", 26_000, 413), ("Scientific", 4_400, 34)):
        for precision in ("float32", "tf32", "bf16"):
            case = Case(items=items, device="cuda", precision=precision)
            rows.append({"domain": name, "items": items, **cases.gpu_epoch(case, micro_batches, repeats)})
    return {"rows": rows}


def table(found: dict[str, Any]) -> str:
    """What was measured beside the targets, as Markdown."""
    lines = ["# What one run costs", "", "Made by `python studies/benchmark.py`; every figure is in `benchmark.json`.", ""]
    writers = {"step": step_lines, "large": large_lines, "long": long_lines, "gpu": gpu_lines}
    for part, write in writers.items():
        if part in found:
            where = found[part]["machine"]
            threads = f", {where['threads']} threads" if part != "gpu" else ""
            lines += [*write(found[part]), f"({where['name']}{threads}; torch {where['torch']}; code {where['code_version']})", ""]
    if "gpu" not in found:
        lines += ["No GPU part: it was not run on a machine with a CUDA device.", ""]
    return "\n".join(lines)


def step_lines(found: dict[str, Any]) -> list[str]:
    step, tuned, evaluation = found["step"], found["step_with_tuned_allocator"], found["evaluation"]
    rows = [
        ("a micro-batch of 1,024 (of 8 accumulated), ours", _seconds(step["step_seconds"]), "about 1 s"),
        ("the same, plain padded implementation", _seconds(step["plain_seconds"]), ""),
        ("times faster", _ratio(step["times_faster"]), "at least 8"),
        ("times faster with a tuned allocator (both)", _ratio(tuned["times_faster"]), ""),
        ("the matrix products alone (the floor)", _seconds(step["floor_seconds"]), ""),
        ("floor / ours", _percent(step["share_of_floor"]), "at least 55 %"),
        ("loader / ours", _percent(step["loader_share"]), "under 2 %"),
        (
            "ranking 1,024 users (prefixes as in training), catalogue at hand",
            _seconds(evaluation["training"]["batch_seconds"]),
            "at most 0.25 s",
        ),
        ("ranking 1,024 users (test histories), catalogue at hand", _seconds(evaluation["test"]["batch_seconds"]), ""),
        ("the catalogue's vectors, once an evaluation", _seconds(evaluation["catalogue_seconds"]), ""),
        ("memory of a run", f"{found['memory']['peak_bytes'] / 1e9:.2f} GB", "under 2.5 GB"),
        ("tensor operations an optimizer step, blocks of a GPU: plain, ours", "{plain:,}, {ours:,}".format(**found["operations"]), ""),
    ]
    told = "Paper's fine-tuning: width 256, one layer, max_len 20, two 768-dim modalities, 25,000 items, float32, mean prefix"
    head = [f"{told} {step['positions'] / step['examples']:.1f}; matmul rate {step['matmul_gflop_a_second']['median']:.0f} GFLOP/s.", ""]
    return [
        "## One step on the CPU",
        "",
        *head,
        "| what | measured | target |",
        "| --- | --- | --- |",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]


def large_lines(found: dict[str, Any]) -> list[str]:
    lines = [
        "## Large catalogues",
        "",
        "One optimizer step of a fresh process, features memory-mapped as float16; memory without the mapped files.",
        "",
    ]
    lines += [
        "| loss | items | examples | seconds | peak memory | of it parameters, gradients, moments |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["rows"]:
        cells = (row["variant"], f"{row['items']:,}", f"{row['examples']:,}", f"{row['step_seconds']:.1f}")
        lines.append(f"| {' | '.join(cells)} | {row['peak_bytes'] / 1e9:.2f} GB | {4 * row['parameter_bytes'] / 1e9:.2f} GB |")
        if "evaluation_seconds" in row:
            lines.append(f"| ranking | {row['items']:,} | {row['examples']:,} | {row['evaluation_seconds']:.1f} | (the same process) | |")
    return [*lines, "", "![memory](benchmark_memory.png)", ""]


def long_lines(found: dict[str, Any]) -> list[str]:
    lines = ["## Long histories", "", "A step over prefixes of every length of histories up to 1.2 max_len long, 5,000 items.", ""]
    lines += ["| max_len | examples | positions | ms a 1,000 positions | peak memory |", "| --- | --- | --- | --- | --- |"]
    for row in found["rows"]:
        cost = row["milliseconds_a_1000_positions"]
        shown = f"{cost['median']:.0f} ({cost['low']:.0f} to {cost['high']:.0f})"
        lines.append(f"| {row['max_len']:,} | {row['examples']:,} | {row['positions']:,} | {shown} | {row['peak_bytes'] / 1e9:.2f} GB |")
    return [*lines, "", "![long histories](benchmark_length.png)", ""]


def gpu_lines(found: dict[str, Any]) -> list[str]:
    lines = ["## Epochs on a GPU", "", "| domain | precision | epoch | plain epoch | first epoch | kernels a step, plain | peak memory |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for row in found["rows"]:
        cells = (row["domain"], row["precision"], _seconds(row["epoch_seconds"]), _seconds(row["plain_epoch_seconds"]))
        kernels = f"{row['kernels_an_optimizer_step']:,}, {row['plain_kernels_an_optimizer_step']:,}"
        lines.append(f"| {' | '.join(cells)} | {row['first_epoch_seconds']:.2f} s | {kernels} | {row['peak_bytes'] / 1e9:.2f} GB |")
    return [*lines, "", "Targets on one H200-class GPU: Office 0.6 s, Scientific 0.06 s.", ""]


def _seconds(value: dict[str, float]) -> str:
    return f"{value['median']:.3f} s ({value['low']:.3f} to {value['high']:.3f})"


def _ratio(value: dict[str, float]) -> str:
    return f"{value['median']:.1f} ({value['low']:.1f} to {value['high']:.1f})"


def _percent(value: dict[str, float]) -> str:
    return f"{100 * value['median']:.1f} % ({100 * value['low']:.1f} to {100 * value['high']:.1f})"


def draw(found: dict[str, Any], out: Path) -> None:
    """Memory against the number of items, and the cost of a step against max_len, as PNG and SVG."""
    with mpl.rc_context({"svg.hashsalt": "mmm4rec", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        if "large" in found:
            figure, axis = plt.subplots(figsize=(5.6, 3.6), layout="constrained")
            _draw_memory(axis, found["large"])
            _save(figure, out / "benchmark_memory")
        if "long" in found:
            figure, axis = plt.subplots(figsize=(5.6, 3.6), layout="constrained")
            _draw_length(axis, found["long"]["rows"])
            _save(figure, out / "benchmark_length")


def _draw_memory(axis: Axes, large: dict[str, Any]) -> None:
    looks = {"exact, ids": (RED, "s"), "exact, no ids": (BLUE, "o"), "sampled, no ids": (GREEN, "^")}
    for label, (colour, mark) in looks.items():
        rows = [row for row in large["rows"] if row["variant"] == label]
        axis.plot([row["items"] for row in rows], [row["peak_bytes"] / 1e9 for row in rows], color=colour, marker=mark, label=label)
    items = sorted({row["items"] for row in large["rows"] if row["variant"] in looks})
    scores = [8 * large["batch"] * n / 1e9 for n in items]  # the scores and their gradient, float32
    axis.plot(items, scores, color="0.5", linestyle=":", label=f"[{large['batch']}, items] scores and gradient, never held")
    axis.set(xscale="log", yscale="log", xlabel="items", ylabel="peak memory of a step (GB), mapped files apart")
    axis.set_xticks(items, [f"{n:,}" for n in items])
    axis.minorticks_off()
    axis.grid(color="0.92", linewidth=0.6)
    axis.legend(frameon=False, fontsize=8)


def _draw_length(axis: Axes, rows: list[dict[str, Any]]) -> None:
    lengths = [row["max_len"] for row in rows]
    costs = [row["milliseconds_a_1000_positions"] for row in rows]
    axis.plot(lengths, [cost["median"] for cost in costs], color=BLUE, marker="o")
    axis.fill_between(lengths, [c["low"] for c in costs], [c["high"] for c in costs], color=BLUE, alpha=0.15, linewidth=0)
    axis.set(xscale="log", xlabel="max_len", ylabel="training step, ms a 1,000 positions", ylim=(0, 1.25 * max(c["high"] for c in costs)))
    axis.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axis.minorticks_off()
    axis.grid(color="0.92", linewidth=0.6)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path.with_suffix(".png"), dpi=160, metadata={"Software": None})
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
