"""Numbers from the literature: beside a study's own, and the published training logs read with our own audit.

    python studies/literature.py          # results/published/: tables and a page from the logs of MMM4Rec and MISSRec

`results/published/` holds figures read off the authors' logs and papers; nothing there is ours. The logs are read as a study's
runs are: each by the validation metric that chose its epoch, patience counted in, runs that their epoch cap ended censored.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import geometric_mean, mean
from typing import Any

if __package__ in (None, ""):  # run as a file: the repository's root, not studies/, belongs on the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import pandas as pd

from mmm4rec.errors import BadInput
from studies.audit import cost_to_best, cost_to_end, is_censored
from studies.effects import mean_of
from studies.page import Section, write_html
from studies.table import Entry, Table
from studies.tracked import TrackedCell, TrackedTrial

PUBLISHED = Path(__file__).resolve().parent.parent / "results" / "published"
FILES = ("mmm4rec_curves", "mmm4rec_test", "missrec_curves", "missrec_test")
OURS, THEIRS = "MMM4Rec", "MISSRec"
CAPS = {OURS: 100}  # epochs a run may have; MISSRec's logs end by patience, all of them
VARIANTS = {"with_id": "on", "without_id": "off"}
DOMAINS = ("scientific", "pantry", "instruments", "arts", "office")
METRICS = ("hit@10", "ndcg@10")


def literature_table(cells: Sequence[TrackedCell], file: Path = PUBLISHED / "literature.csv") -> Table:
    """Published test metrics of the domains that a study has, and why they are not shown where the data are others.

    No rows where no domain of the study is in the literature, or the file is missing (the package alone is installed).
    """
    rows: list[tuple[Entry, ...]] = []
    published = pd.read_csv(file) if file.is_file() else pd.DataFrame({"domain": []})
    for domain in dict.fromkeys(cell.domain for cell in cells):
        told = published[published["domain"] == domain.lower()]
        own = [cell for cell in cells if cell.domain == domain and cell.trials]
        if told.empty or not own:
            continue
        if problem := _disagreement(told.iloc[0], own[0]):
            rows.append((domain, "all published", "-", "-", "-", "-", f"not shown: {problem}"))
            continue
        for row in told.to_dict("records"):
            rows.append(
                (
                    domain,
                    str(row["model"]),
                    row["init"],
                    row["ids"],
                    *(f"{row[name]:.4f}" for name in METRICS),
                    f"published: {row['source']}",
                )
            )
        rows += [
            (cell.domain, cell.arm, cell.init, cell.ids, *(f"{mean_of(cell, name):.4f}" for name in METRICS), "this study") for cell in own
        ]
    caption = "Published numbers, where users, items and split agree. They were searched under other budgets, most with one seed."
    return Table(("domain", "model or arm", "init", "ids", *METRICS, "source"), tuple(rows), caption)


def _disagreement(published: pd.Series, cell: TrackedCell) -> str:
    """What differs between the data there and here; empty where nothing does."""
    here, there = (cell.users, cell.items), (int(published["users"]), int(published["items"]))
    if None in here:
        return "this study's runs do not say how many users and items they had"
    if here != there:
        return f"{there[0]:,} users and {there[1]:,} items there, {here[0]:,} and {here[1]:,} here"
    split = cell.split or "unknown"
    return "" if split == published["split"] else f"split {published['split']} there, {split} here"


@cache
def published_cells(folder: Path = PUBLISHED) -> tuple[TrackedCell, ...]:
    """The published logs as cells: domain × (model, ids, init). Their steps are epochs: optimizer steps are not in the logs.

    Raises BadInput where a file is missing.
    """
    if missing := [name for name in FILES if not (folder / f"{name}.csv").is_file()]:
        raise BadInput(f"lacks {missing[0]}.csv.", file=folder, remedy="Give the folder results/published of the repository.")
    ours_curves, ours_test, their_curves, their_test = (pd.read_csv(folder / f"{name}.csv") for name in FILES)
    found = []
    for test in ours_test.to_dict("records"):
        curve = ours_curves[(ours_curves["domain"] == test["domain"]) & (ours_curves["variant"] == test["variant"])]
        found.append(_published(folder, OURS, "pretrained", test, curve, f"valid_{test['valid_metric'].lower()}"))
    for test in their_test.to_dict("records"):
        same = (their_curves["domain"] == test["domain"]) & (their_curves["variant"] == test["variant"])
        found.append(
            _published(folder, THEIRS, test["init"], test, their_curves[same & (their_curves["init"] == test["init"])], "valid_score")
        )
    return tuple(sorted(found, key=lambda cell: (cell.arm, DOMAINS.index(cell.domain))))


def _published(folder: Path, model: str, init: str, test: Mapping[Any, Any], curve: pd.DataFrame, column: str) -> TrackedCell:
    curve = curve.sort_values("epoch")
    epochs, values = tuple(map(int, curve["epoch"])), tuple(map(float, curve[column]))
    seconds = tuple(float(total) for total in (curve["train_seconds"] + curve["valid_seconds"]).cumsum())
    best = epochs.index(int(str(test["best_epoch"])))  # the logs say which of equal scores, rounded as they are, it was
    if values[best] != max(values):
        rule = f"{model}, {test['domain']}, {test['variant']}: epoch {epochs[best]} is called the best, and another scores higher."
        raise BadInput(rule, file=folder, remedy="Correct best_epoch, or the curve.")
    metrics = {name.removeprefix("test_"): float(str(value)) for name, value in test.items() if name.startswith("test_")}
    trial = TrackedTrial(
        run_id=f"{model}, {test['domain']}, {test['variant']}, {init}",
        seed=0,
        fingerprint="published",
        test=metrics,
        best_valid=values[best],
        best_steps=epochs[best],
        best_epoch=epochs[best],
        curve=tuple(zip(epochs, values, strict=True)),
        epochs=epochs,
        seconds=seconds,
        params={"training.patience": "10"},
    )
    arm = arm_name(model, VARIANTS[str(test["variant"])], init)
    cap = CAPS.get(model, epochs[-1] + 1)
    return TrackedCell(str(test["domain"]), arm, init, arm, 1, cap, None, (trial,), metric=str(test["valid_metric"]).lower())


def arm_name(model: str, ids: str, init: str) -> str:
    return f"{model}, ids {ids}, {init}"


def epochs_table(cells: Sequence[TrackedCell]) -> Table:
    """Every published run: its best epoch by its own validation metric, its end, and whether its cap ended it."""
    rows: list[tuple[Entry, ...]] = []
    for cell in cells:
        (trial,) = cell.trials
        best, end = cost_to_best(trial), cost_to_end(trial)
        numbers = (best.epochs, end.epochs, "yes" if is_censored(trial, cell) else "no", f"{best.seconds:.0f}", f"{end.seconds:.0f}")
        rows.append((cell.domain, cell.arm, cell.metric, *numbers, *(f"{trial.test[name]:.4f}" for name in METRICS)))
    columns = ("domain", "run", "chosen by", "best epoch", "epochs run", "censored", "seconds to best", "seconds run", *METRICS)
    caption = "Published runs, one each. Seconds of the two models are of other machines, batches and lengths: never compare them."
    return Table(columns, tuple(rows), caption)


def ratio_table(cells: Sequence[TrackedCell]) -> Table:
    """MISSRec's best epoch over MMM4Rec's, by domain, with arithmetic and geometric mean."""
    found = {(cell.domain, cell.arm): cell.trials[0].best_epoch for cell in cells}
    rows = []
    for ids in VARIANTS.values():
        for init in ("pretrained", "scratch"):
            told = [found[d, arm_name(THEIRS, ids, init)] / found[d, arm_name(OURS, ids, "pretrained")] for d in DOMAINS]
            shown = (*(f"{ratio:.1f}" for ratio in told), f"{mean(told):.1f}", f"{geometric_mean(told):.1f}")
            rows.append((f"{THEIRS}, {init}", ids, *shown))
    caption = f"Best epoch of {THEIRS} over the best epoch of {OURS} (pre-trained): ratios of epochs, of unlike batches and lengths."
    return Table(("against", "ids", *DOMAINS, "mean", "geometric mean"), tuple(rows), caption)


def gain_table(cells: Sequence[TrackedCell]) -> Table:
    """MMM4Rec's test NDCG@10 over MISSRec's pre-trained, in percent."""
    rows = []
    for ids in VARIANTS.values():
        told = gains_percent(cells, ids)
        rows.append((ids, *(f"{gain:+.1f}" for gain in told), f"{mean(told):+.1f}"))
    caption = f"Test NDCG@10 of {OURS} against {THEIRS} pre-trained, percent."
    return Table(("ids", *DOMAINS, "mean"), tuple(rows), caption)


def gains_percent(cells: Sequence[TrackedCell], ids: str) -> list[float]:
    found = {(cell.domain, cell.arm): cell.trials[0].test["ndcg@10"] for cell in cells}
    ours, theirs = (arm_name(model, ids, "pretrained") for model in (OURS, THEIRS))
    return [100 * (found[domain, ours] / found[domain, theirs] - 1) for domain in DOMAINS]


def verdict(cells: Sequence[TrackedCell]) -> list[str]:
    """What the logs support of the paper's two claims, in sentences made from the numbers."""
    best = {(cell.domain, cell.arm): cell.trials[0].best_epoch for cell in cells}
    ran = {(cell.domain, cell.arm): cell.trials[0].epochs[-1] for cell in cells}

    def ratios(source: dict[tuple[str, str], int], ids: str, init: str) -> list[float]:
        return [source[d, arm_name(THEIRS, ids, init)] / source[d, arm_name(OURS, ids, "pretrained")] for d in DOMAINS]

    on, off, scratch = ratios(best, "on", "pretrained"), ratios(best, "off", "pretrained"), ratios(best, "on", "scratch")
    whole, gains = ratios(ran, "on", "pretrained"), gains_percent(cells, "on")
    top = max(range(len(DOMAINS)), key=lambda place: gains[place])
    leading = {
        model: next(cell for cell in cells if (cell.domain, cell.arm) == (DOMAINS[top], arm_name(model, "on", "pretrained")))
        for model in (OURS, THEIRS)
    }
    levels, chosen = ({m: read(cell) for m, cell in leading.items()} for read in (_rounded_ndcg, lambda cell: cell.metric))
    rounded = 100 * (levels[OURS] / levels[THEIRS] - 1)
    rest = [gain for place, gain in enumerate(gains) if place != top]
    cut = [f"{cell.domain} ({cell.arm})" for cell in cells if cell.arm.startswith(OURS) and is_censored(cell.trials[0], cell)]
    return [
        f"'10x faster convergence': with ids the best epoch came {mean(on):.1f} times earlier in the mean ({geometric_mean(on):.1f} in"
        f" the geometric mean, {min(on):.1f} to {max(on):.1f}) than in {THEIRS}'s pre-trained runs, and {mean(scratch):.1f} times"
        f" ({geometric_mean(scratch):.1f}) earlier than in its scratch runs; without ids {mean(off):.1f} times ({geometric_mean(off):.1f})."
        f" With patience counted in, a run with ids took {geometric_mean(whole):.1f} times fewer epochs in the geometric mean. These are"
        " epochs of unlike batches (1,024 against mostly 512) and lengths, one seed each: optimizer steps, seconds and spread cannot be"
        " compared from these logs.",
        f"'+31.78 %': one domain of {len(gains)} ({DOMAINS[top]}: {rounded:+.2f} % from the rounded numbers, {gains[top]:+.2f} % from the"
        f" log), whose epoch was chosen by {chosen[OURS]} there and by {chosen[THEIRS]} in {THEIRS}. In the others NDCG@10 with ids differs"
        f" by {min(rest):+.1f} to {max(rest):+.1f} %, below 0 in {sum(gain < 0 for gain in rest)}; over all of them by {mean(gains):+.1f} %"
        " in the mean. One seed a run: what seeds would move is not in the logs.",
        f"Cut off by the cap of {CAPS[OURS]} epochs, so that the best epoch is a bound: {', '.join(cut) or 'none'}.",
    ]


def _rounded_ndcg(cell: TrackedCell) -> float:
    """As papers print it."""
    return round(cell.trials[0].test["ndcg@10"], 4)


def write_published(folder: Path) -> None:
    """Write the tables and the page of the published logs."""
    cells = published_cells(folder)
    tables = {"epochs": epochs_table(cells), "ratios": ratio_table(cells), "gains": gain_table(cells)}
    for name, table in tables.items():
        table.write(folder / "tables", name)
    said = verdict(cells)
    (folder / "verdict.md").write_text("".join(f"- {line}\n" for line in said), encoding="utf-8")
    titles = {"epochs": "Every run", "ratios": "Best epochs, as ratios", "gains": "Test NDCG@10"}
    sections = [Section("What the logs support", paragraphs=tuple(said))]
    sections += [Section(titles[name], tables=(tables[name],)) for name in ("ratios", "gains", "epochs")]
    write_html(folder / "index.html", "The published logs of MMM4Rec and MISSRec", "Read with this project's convergence audit.", sections)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(
        description="Tables and a page from the published training logs.", epilog="Example: python studies/literature.py"
    )
    parser.add_argument("--folder", type=Path, default=PUBLISHED, help="holds the logs' numbers; default: results/published")
    told = parser.parse_args(arguments)
    try:
        write_published(told.folder)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print((told.folder / "verdict.md").read_text(encoding="utf-8"))
    print(f"Page: {told.folder / 'index.html'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
