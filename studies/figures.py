"""The figures: convergence (validation score against optimizer steps), effects, the transfer matrix, searched parameters.

The same runs give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from studies import sensitivity
from studies.effects import Effect
from studies.significance import Interval
from studies.tracked import TrackedCell
from studies.transfer import Gain

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#B3A000")  # Okabe and Ito, yellow darkened
STYLES = ("-", "--", ":", "-.")
RC: dict[Any, Any] = {"svg.hashsalt": "mmm4rec", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
MOST_ROWS = 6  # domains that the figure of searched parameters shows one by one
NAMES, FORMS = ("convergence", "effects", "transfer_matrix", "sensitivity"), ("png", "svg")
ABOVE, BELOW, UNCLEAR = COLOURS[0], COLOURS[1], "#555555"


def convergence(cells: Sequence[TrackedCell], folder: Path) -> None:
    """Write `convergence.png` and `.svg`: a panel a domain, a line an arm (mean over seeds), a band of ± 1 sd.

    A line ends where the first of its seeds stopped. Cells without a curve (baselines) are left out.
    """
    drawn = [cell for cell in cells if any(len(trial.curve) > 1 for trial in cell.trials)]
    if not drawn:
        return
    domains, arms = list(dict.fromkeys(cell.domain for cell in drawn)), list(dict.fromkeys(cell.arm for cell in drawn))
    with mpl.rc_context(RC):
        columns = min(4, len(domains))
        lines = -(-len(domains) // columns)
        size = (1 + 3.4 * columns, 0.6 + 2.8 * lines)
        figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
        for axis in axes.flat[len(domains) :]:
            axis.remove()
        for axis, domain in zip(axes.flat, domains, strict=False):
            for cell in drawn:
                if cell.domain == domain:
                    _draw(axis, cell, arms.index(cell.arm))
            axis.set_title(domain)
            axis.set_xlabel("optimizer steps")
        for line in axes:
            line[0].set_ylabel(f"validation {drawn[0].metric.upper()}")
        handles = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        ordered = [arm for arm in arms if arm in handles]
        figure.legend(
            [handles[arm] for arm in ordered],
            ordered,
            loc="outside lower center",
            ncols=min(2 if columns == 1 else 4, len(ordered)),
            frameon=False,
        )
        save_figure(figure, folder, "convergence")


def forest(effects: Sequence[Effect], folder: Path) -> None:
    """Write `effects.png` and `.svg`: a panel a domain, a row an arm, its NDCG@10 minus the baseline's and the 95 % interval.

    Filled: the interval excludes 0; hollow: it does not; a cross: one seed, no interval. A row stays empty where the
    domain has no such arm. Without effects nothing is written.
    """
    if not effects:
        return
    domains, arms = list(dict.fromkeys(effect.domain for effect in effects)), list(dict.fromkeys(effect.arm for effect in effects))
    columns = 2 if len(domains) == 4 else min(3, len(domains))
    lines = -(-len(domains) // columns)
    with mpl.rc_context(RC):
        size = (max(4.8, 1.5 + 2.3 * columns), 0.8 + lines * (1.0 + 0.25 * len(arms)))
        figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, sharey=True, layout="constrained")
        for axis, domain in zip(axes.flat, domains, strict=False):
            _draw_effects(axis, [effect for effect in effects if effect.domain == domain], arms)
        for axis in axes.flat[len(domains) :]:
            axis.remove()
        title = f"test NDCG@10 minus that of {effects[0].baseline}: mean and 95 % interval"
        figure.legend(handles=_marks(effects), title=title, loc="outside lower center", ncols=4 if columns > 1 else 2, frameon=False)
        save_figure(figure, folder, "effects")


def matrix(gains: Sequence[Gain], folder: Path) -> None:
    """Write `transfer_matrix.png` and `.svg`: arm (with its checkpoint, modalities and ids) × domain, the gain over scratch in percent.

    Bold: its interval excludes 0. Grey: the domain has no such arm, or the arm no control.
    """
    if not gains:
        return
    domains = list(dict.fromkeys(gain.domain for gain in gains))
    rows = list(dict.fromkeys((gain.arm, _treatment(gain)) for gain in gains))
    values = np.full((len(rows), len(domains)), np.nan)
    for gain in gains:
        values[rows.index((gain.arm, _treatment(gain))), domains.index(gain.domain)] = gain.percent
    most = max(10.0, float(np.nanmax(np.abs(values))))  # percent: no loud colours for little
    with mpl.rc_context(RC):
        size = (3.4 + 1.15 * len(domains), 1.4 + 0.55 * len(rows))
        figure, axis = plt.subplots(figsize=size, layout="constrained")
        colours = mpl.colormaps["PuOr"].with_extremes(bad="#e6e6e6")  # colour-blind safe
        image = axis.imshow(np.ma.masked_invalid(values), cmap=colours, vmin=-most, vmax=most, aspect="auto")
        for gain in gains:
            place = rows.index((gain.arm, _treatment(gain))), domains.index(gain.domain)
            dark = abs(gain.percent) > 0.6 * most
            text = f"{gain.percent:+.1f} %" + ("\nnegative" if gain.difference.excludes_zero and gain.percent < 0 else "")
            weight = "bold" if gain.difference.excludes_zero else "normal"
            axis.text(place[1], place[0], text, ha="center", va="center", weight=weight, color="white" if dark else "black")
        axis.set_xticks(range(len(domains)), domains)
        axis.set_yticks(range(len(rows)), [f"{arm}\n{treatment}" for arm, treatment in rows])
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.set_title("test NDCG@10 over scratch", fontsize=9)
        figure.colorbar(image, label="gain, %")
        save_figure(figure, folder, "transfer_matrix")


def _treatment(gain: Gain) -> str:
    return f"{gain.modalities}, ids {gain.ids}"


def searched(cells: Sequence[TrackedCell], folder: Path) -> None:
    """Write `sensitivity.png` and `.svg`: a row a domain, a column a searched parameter, a point a search trial, a line an arm.

    Of more than MOST_ROWS domains there is one row, of scores over the best of their cell.

    Hollow points were pruned. Lines join the means of three bins or more, equally filled, as those of tables/marginals.
    """
    told = [cell for cell in cells if sensitivity.scored(cell) and cell.space]
    names = sensitivity.parameters(told)
    if not told or not names:
        return
    domains, arms = list(dict.fromkeys(cell.domain for cell in told)), list(dict.fromkeys(cell.arm for cell in told))
    pooled = len(domains) > MOST_ROWS
    rows = [("all domains", told)] if pooled else [(domain, [cell for cell in told if cell.domain == domain]) for domain in domains]
    with mpl.rc_context(RC):
        size = (1 + 2.9 * len(names), 0.9 + 2.1 * len(rows))
        figure, axes = plt.subplots(len(rows), len(names), figsize=size, squeeze=False, sharey="row", layout="constrained")
        for line, (label, here) in zip(axes, rows, strict=True):
            for axis, name in zip(line, names, strict=True):
                order = _choices(told, name)
                for arm in arms:
                    if own := [cell for cell in here if cell.arm == arm and name in cell.space]:
                        _draw_searched(axis, own, name, COLOURS[arms.index(arm) % len(COLOURS)], order, pooled=pooled)
                axis.set_xlabel(name.removeprefix("training.").removeprefix("model.").replace("_", " "))
            what = "share of the cell's best" if pooled else f"best valid {told[0].metric.upper()}"
            line[0].set_ylabel(f"{label}\n{what}")
        handles = [Line2D([], [], color=COLOURS[n % len(COLOURS)], marker="o", markersize=4, label=arm) for n, arm in enumerate(arms)]
        handles.append(Line2D([], [], color=UNCLEAR, marker="o", markersize=4, markerfacecolor="white", linestyle="", label="pruned"))
        figure.legend(handles=handles, loc="outside lower center", ncols=min(2 if len(names) == 1 else 4, len(handles)), frameon=False)
        save_figure(figure, folder, "sensitivity")


def _choices(cells: Sequence[TrackedCell], name: str) -> list[str]:
    """All choices of a parameter, in one order for all arms; none where it is a range."""
    return list(dict.fromkeys(str(choice) for cell in cells if name in cell.space for choice in cell.space[name][3] or ()))


def _draw_searched(axis: Axes, cells: Sequence[TrackedCell], name: str, colour: str, order: Sequence[str], *, pooled: bool) -> None:
    low, _, log, choices = cells[0].space[name]
    found = sensitivity.points(cells, name)
    if choices is not None:
        axis.set_xticks(range(len(order)), order)
    elif log and low > 0:
        axis.set_xscale("log")

    def place(value: float | str) -> float:
        return order.index(value) if isinstance(value, str) else value

    for pruned, face in ((True, "white"), (False, colour)):
        shown = [point for point in found if point.pruned == pruned]
        heights = [point.share if pooled else point.score for point in shown]
        axis.scatter([place(point.value) for point in shown], heights, s=16, facecolors=face, edgecolors=colour, alpha=0.8)
    parts = [part for _, part in sensitivity.bins(found) if part]
    middles = [(np.mean([place(p.value) for p in part]), np.mean([p.share if pooled else p.score for p in part])) for part in parts]
    if len(middles) >= 3:
        axis.plot(*zip(*middles, strict=True), color=colour, linewidth=1.0, alpha=0.7)


def _colour(value: Interval) -> str:
    return UNCLEAR if not value.excludes_zero else ABOVE if value.mean > 0 else BELOW


def _marks(effects: Sequence[Effect]) -> list[Line2D]:
    """The legend: what stands in the figure, and no more."""
    values = [effect.ndcg for effect in effects]
    bounded = [value for value in values if value.low is not None]
    labels = {ABOVE: "above 0", BELOW: "below 0", UNCLEAR: "interval holds 0"}
    marks = []
    for colour in (shown for shown in labels if shown in map(_colour, bounded)):
        filled = "white" if colour == UNCLEAR else colour
        marks.append(Line2D([], [], color=colour, marker="o", markerfacecolor=filled, linewidth=1.6, markersize=6, label=labels[colour]))
    if len(bounded) < len(values):
        marks.append(Line2D([], [], color=UNCLEAR, marker="x", linestyle="", markersize=6, label="one seed: no interval"))
    return marks


def _draw_effects(axis: Axes, effects: Sequence[Effect], arms: Sequence[str]) -> None:
    """One domain: a row for each of `arms`."""
    axis.axvline(0, color="black", linewidth=0.8)
    for effect in effects:
        value, place = effect.ndcg, arms.index(effect.arm)
        colour = _colour(value)
        if value.low is None or value.high is None:
            axis.plot(value.mean, place, "x", color=colour, markersize=6)
            continue
        axis.plot((value.low, value.high), (place, place), color=colour, linewidth=1.6, solid_capstyle="butt")
        axis.plot(value.mean, place, "o", color=colour, markersize=6, markerfacecolor=colour if value.excludes_zero else "white")
    axis.set_ylim(len(arms) - 0.5, -0.5)
    axis.set_yticks(range(len(arms)), arms)
    axis.tick_params(axis="y", length=0)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=4, steps=(1, 2, 5, 10)))
    axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines["left"].set_visible(False)
    axis.set_xlabel("Δ NDCG@10")
    axis.set_title(f"{effects[0].domain}\n{effects[0].baseline} {np.mean(effects[0].baseline_ndcg):.4f}", fontsize=9)


def save_figure(figure: Figure, folder: Path, name: str) -> None:
    folder.mkdir(exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=150, metadata={"Software": None})
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def _draw(axis: Axes, cell: TrackedCell, place: int) -> None:
    curves = [dict(trial.curve) for trial in cell.trials]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    values = np.array([[curve[step] for step in steps] for curve in curves])  # [seeds, steps]
    middle, spread = values.mean(axis=0), values.std(axis=0, ddof=1) if len(curves) > 1 else np.zeros(len(steps))
    colour, style = COLOURS[place % len(COLOURS)], STYLES[place // len(COLOURS) % len(STYLES)]
    axis.plot(steps, middle, style, color=colour, linewidth=1.4, label=cell.arm)
    axis.fill_between(steps, middle - spread, middle + spread, color=colour, alpha=0.15, linewidth=0)
