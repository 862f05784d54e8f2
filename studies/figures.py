"""The convergence figure: validation NDCG@10 against optimizer steps. The same runs give the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from studies.tracked import TrackedCell

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#B3A000")  # Okabe and Ito, yellow darkened
STYLES = ("-", "--", ":", "-.")


def convergence(cells: Sequence[TrackedCell], folder: Path) -> None:
    """Write `convergence.png` and `.svg`: a panel a domain, a line an arm (mean over seeds), a band of ± 1 sd.

    A line ends where the first of its seeds stopped. Cells without a curve (baselines) are left out.
    """
    drawn = [cell for cell in cells if any(len(trial.curve) > 1 for trial in cell.trials)]
    if not drawn:
        return
    domains, arms = list(dict.fromkeys(cell.domain for cell in drawn)), list(dict.fromkeys(cell.arm for cell in drawn))
    with mpl.rc_context({"svg.hashsalt": "mmm4rec", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(1, len(domains), figsize=(1 + 3.4 * len(domains), 3.4), squeeze=False, layout="constrained")
        for axis, domain in zip(axes[0], domains, strict=True):
            for cell in drawn:
                if cell.domain == domain:
                    _draw(axis, cell, arms.index(cell.arm))
            axis.set_title(domain)
            axis.set_xlabel("optimizer steps")
        axes[0][0].set_ylabel("validation NDCG@10")
        handles = {label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        ordered = [arm for arm in arms if arm in handles]
        figure.legend([handles[arm] for arm in ordered], ordered, loc="outside lower center", ncols=min(4, len(ordered)), frameon=False)
        folder.mkdir(exist_ok=True)
        figure.savefig(folder / "convergence.png", dpi=150, metadata={"Software": None})
        figure.savefig(folder / "convergence.svg", metadata={"Date": None})
        plt.close(figure)


def _draw(axis: Axes, cell: TrackedCell, place: int) -> None:
    curves = [dict(trial.curve) for trial in cell.trials]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    values = np.array([[curve[step] for step in steps] for curve in curves])  # [seeds, steps]
    middle, spread = values.mean(axis=0), values.std(axis=0, ddof=1) if len(curves) > 1 else np.zeros(len(steps))
    colour, style = COLOURS[place % len(COLOURS)], STYLES[place // len(COLOURS) % len(STYLES)]
    axis.plot(steps, middle, style, color=colour, linewidth=1.4, label=cell.arm)
    axis.fill_between(steps, middle - spread, middle + spread, color=colour, alpha=0.15, linewidth=0)
