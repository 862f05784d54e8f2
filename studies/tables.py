"""A study's tables, from its tracked runs alone.

    python studies/tables.py results/demo

Writes `tables/main.*` (test metrics of every cell), `tables/transfer.*` (pre-trained against scratch), `tables/ledger.*`
(what each arm was given and used) and, where the spec names a baseline, `tables/effects.*` (each arm minus the baseline;
`effects_ndcg.*` and `effects_hit.*` hold the same as arm × domain) as CSV, Markdown and LaTeX; and `figures/convergence.*`
and `figures/effects.*`. Only confirm trials are read: mean and sample standard deviation over their seeds.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Literal

if __package__ in (None, ""):  # run as a file: the repository's root, not studies/, belongs on the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from mmm4rec.config import from_dict, load_yaml
from mmm4rec.errors import BadInput
from studies.effects import Effect, Interval, study_effects
from studies.figures import convergence, forest
from studies.ledger import unequal
from studies.spec import Stores
from studies.tracked import METRICS, Pretraining, TrackedCell, TrackedTrial, read_pretraining, read_ranks, read_study

SHARES = (0.25, 0.5, 1.0)  # of scratch's steps to its best: where both are compared at equal steps


@dataclass(frozen=True)
class Sample:
    """A number over seeds."""

    values: tuple[float, ...]
    digits: int = 4
    at_least: bool = False  # a bound: in some seed the event did not come
    best: bool = False

    def text(self) -> str:
        """`0.1234 ± 0.0056`; without seeds `-`, with one no spread."""
        if not self.values:
            return "-"
        spread = f" ± {stdev(self.values):.{self.digits}f}" if len(self.values) > 1 else ""
        return f"{'≥ ' if self.at_least else ''}{mean(self.values):.{self.digits}f}{spread}"


Entry = str | int | Sample | Interval


@dataclass(frozen=True)
class Table:
    """Column names and rows; written three ways."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]

    def to_csv(self) -> str:
        """A sample as two columns, its mean and its sd, an interval as three, mean, low and high; at full precision."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        kinds = [{type(row[i]) for row in self.rows} for i in range(len(self.columns))]
        writer.writerow([name for column, kind in zip(self.columns, kinds, strict=True) for name in _csv_names(column, kind)])
        for row in self.rows:
            writer.writerow([value for entry in row for value in _csv_values(entry)])
        return out.getvalue()

    def to_markdown(self) -> str:
        texts = [[_marked(entry, "**{}**") for entry in row] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(self.columns, *texts, strict=True)]
        lines = [self.columns, ["-" * width for width in widths], *texts]
        return "".join(f"| {' | '.join(text.ljust(width) for text, width in zip(line, widths, strict=True))} |\n" for line in lines)

    def to_latex(self) -> str:
        """A booktabs tabular; a rule stands between domains."""
        lines = [rf"\begin{{tabular}}{{{'l' * len(self.columns)}}}", r"\toprule", _latex_row(map(_latex, self.columns)), r"\midrule"]
        grouped = len({row[0] for row in self.rows}) < len(self.rows)
        for before, row in zip([None, *self.rows], self.rows, strict=False):
            lines += [r"\midrule"] * (grouped and before is not None and before[0] != row[0])
            lines.append(_latex_row(_marked(entry, r"\textbf{{{}}}", escape=_latex) for entry in row))
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def main_table(cells: Sequence[TrackedCell]) -> Table:
    """Domain × arm: test metrics, epochs and optimizer steps to the best epoch, budget. The best mean of a domain is marked."""
    columns = ("domain", "arm", "seeds", *METRICS, "epochs to best", "steps to best", "search trials", "epoch budget")
    means = {(cell.name, name): mean(t.test[name] for t in cell.trials) for cell in cells for name in METRICS if cell.trials}
    rows: list[tuple[Entry, ...]] = []
    for cell in cells:
        rivals = [other.name for other in cells if other.domain == cell.domain and other.trials]
        scores = []
        for name in METRICS:
            best = bool(cell.trials) and means[cell.name, name] == max(means[rival, name] for rival in rivals)
            scores.append(Sample(tuple(trial.test[name] for trial in cell.trials), best=best))
        epochs = Sample(tuple(trial.best_epoch for trial in cell.trials), digits=1)
        steps = Sample(tuple(trial.best_steps for trial in cell.trials), digits=0)
        rows.append((cell.domain, cell.arm, len(cell.trials), *scores, epochs, steps, cell.search_trials, cell.epochs))
    return Table(columns, tuple(rows))


def transfer_table(cells: Sequence[TrackedCell]) -> Table:
    """Pairs of arms that differ in nothing but init, seed by seed.

    Validation NDCG@10 "at equal steps" is the best until then (what early stopping would keep), at shares of the
    steps that scratch of the same seed took to its best. "Steps to scratch's best" counts the optimizer steps until
    an arm's validation NDCG@10 is no lower than scratch's best; where a seed never gets there its last step stands
    in, the mean is a bound (≥), and `reached` says how many seeds did.
    """
    at_steps = tuple(f"valid ndcg@10 at {share:.0%} of steps" for share in SHARES)
    columns = ("domain", "arm", "seeds", "test ndcg@10", "best valid ndcg@10", *at_steps, "steps to scratch's best", "reached")
    rows: list[tuple[Entry, ...]] = []
    for scratch in cells:
        for pretrained in cells:
            same = (scratch.domain, scratch.besides_init) == (pretrained.domain, pretrained.besides_init)
            if same and (scratch.init, pretrained.init) == ("scratch", "pretrained"):
                rows += [_transfer_row(scratch, scratch), _transfer_row(pretrained, scratch)]
    return Table(columns, tuple(rows))


def _transfer_row(cell: TrackedCell, scratch: TrackedCell) -> tuple[Entry, ...]:
    by_seed = {trial.seed: trial for trial in cell.trials}
    pairs = [(by_seed[rival.seed], rival) for rival in scratch.trials if rival.seed in by_seed]
    at_steps = [_at_steps(pairs, share) for share in SHARES]
    arrivals = [_arrival(trial, rival.best_valid) for trial, rival in pairs]
    last = [trial.curve[-1][0] for trial, _ in pairs]
    steps = tuple(end if steps is None else steps for steps, end in zip(arrivals, last, strict=True))
    reached = sum(arrival is not None for arrival in arrivals)
    return (
        cell.domain,
        cell.arm,
        len(pairs),
        Sample(tuple(trial.test["ndcg@10"] for trial, _ in pairs)),
        Sample(tuple(trial.best_valid for trial, _ in pairs)),
        *at_steps,
        Sample(steps, digits=0, at_least=reached < len(pairs)),
        f"{reached}/{len(pairs)}",
    )


def _at_steps(pairs: Sequence[tuple[TrackedTrial, TrackedTrial]], share: float) -> Sample:
    """The best values at a share of the rivals' steps; none where some seed has no report so early."""
    values = [_best_until(trial, share * rival.best_steps) for trial, rival in pairs]
    return Sample(tuple(value for value in values if value is not None) if None not in values else ())


def _best_until(trial: TrackedTrial, steps: float) -> float | None:
    return max((value for step, value in trial.curve if step <= steps), default=None)


def _arrival(trial: TrackedTrial, value: float) -> int | None:
    return next((step for step, reached in trial.curve if reached >= value), None)


def effects_table(effects: Sequence[Effect]) -> Table:
    """Domain × arm: test gains minus those of the baseline arm, paired over users and seeds, mean and 95 % interval.

    What the interval means stands in studies/effects.py. It is marked where it excludes 0.
    """
    columns = ("domain", "arm", "baseline", "seeds", "users", "baseline ndcg@10", "Δ ndcg@10", "Δ hit@10")
    rows = [(e.domain, e.arm, e.baseline, e.seeds, e.users, Sample(e.baseline_ndcg), e.ndcg, e.hit) for e in effects]
    return Table(columns, tuple(rows))


def effects_matrix(effects: Sequence[Effect], metric: Literal["ndcg", "hit"]) -> Table:
    """The differences of one metric, arm × domain; `-` where a domain has no such arm."""
    domains, arms = dict.fromkeys(effect.domain for effect in effects), dict.fromkeys(effect.arm for effect in effects)
    found = {(effect.arm, effect.domain): getattr(effect, metric) for effect in effects}
    rows = [(arm, *(found.get((arm, domain), "-") for domain in domains)) for arm in arms]
    return Table((f"Δ {metric}@10", *domains), tuple(rows))


def ledger_table(cells: Sequence[TrackedCell]) -> Table:
    """What each arm was given and used, over its domains. An arm that got other budgets than the first searched one is marked."""
    told = [cell for cell in cells if cell.ledger]
    names = list(dict.fromkeys(name for cell in told for name in cell.ledger))
    rows: list[tuple[Entry, ...]] = []
    for arm in dict.fromkeys(cell.arm for cell in told):
        own = [cell.ledger for cell in told if cell.arm == arm]
        sums = [sum(ledger.get(name, 0.0) for ledger in own) for name in names]
        rows.append((arm, len(own), *(f"{value:.3f}".rstrip("0").rstrip(".") for value in sums)))
    return Table(("arm", "domains", *(name.replace("_", " ") for name in names)), tuple(rows))


def budget_warning(cells: Sequence[TrackedCell]) -> str:
    """Names the domains whose searched arms were not given the same; empty where all were."""
    told = []
    for domain in dict.fromkeys(cell.domain for cell in cells):
        names = unequal(cell.ledger for cell in cells if cell.domain == domain and cell.ledger)
        told += [f"{domain} ({', '.join(name.replace('_', ' ') for name in names)})"] if names else []
    return f"Unequal budgets, arms cannot be compared fairly: {', '.join(told)}.\n" if told else ""


def pretraining_note(spent: Pretraining | None) -> str:
    """What came before the pre-trained arms' first step, in a sentence; empty where the study pre-trained nothing."""
    if spent is None:
        return ""
    return (
        f"Pre-training, once for all pre-trained arms and in none of the numbers above: {spent.optimizer_steps:,} optimizer steps"
        f" in {spent.epochs} epochs (the epoch kept: {spent.best_steps:,} steps), {spent.seconds:,.0f} s.\n"
    )


def write_tables(folder: Path, *, baseline: str | None = None, uri: str | None = None) -> Table:
    """Write the study's tables and figures, and give the main table.

    `baseline`: the arm of the effects table; None: the spec's. `uri`: of the MLflow store; None: the one in the folder.
    Raises BadInput as `read_study` and `study_effects`, and where no cell is of the baseline.
    """
    cells = read_study(folder, uri)
    if baseline is not None:
        if all(cell.arm != baseline for cell in cells):
            arms = ", ".join(dict.fromkeys(cell.arm for cell in cells))
            raise BadInput(f"has no arm '{baseline}'.", file=folder, remedy=f"Give one of {arms}.")
        cells = [replace(cell, baseline=baseline) for cell in cells]
    main, effects = main_table(cells), study_effects(cells, partial(read_ranks, folder, uri=uri))
    (folder / "tables").mkdir(exist_ok=True)
    for stale in [*(folder / "tables").glob("effects*"), *(folder / "figures").glob("effects*")]:
        stale.unlink()
    tables = {"main": main, "transfer": transfer_table(cells), "effects": effects_table(effects), "ledger": ledger_table(cells)}
    tables |= {f"effects_{metric}": effects_matrix(effects, metric) for metric in ("ndcg", "hit")}
    for name, table in tables.items():
        if table.rows:
            for suffix, text in (("csv", table.to_csv()), ("md", table.to_markdown()), ("tex", table.to_latex())):
                (folder / "tables" / f"{name}.{suffix}").write_text(text, encoding="utf-8")
    pretraining = pretraining_note(read_pretraining(folder, uri))
    for name, told in (("ledger", pretraining + budget_warning(cells)), ("transfer", pretraining)):
        if tables[name].rows:
            with (folder / "tables" / f"{name}.md").open("a", encoding="utf-8") as file:
                file.write(told)
    convergence(cells, folder / "figures")
    forest(effects, folder / "figures")
    return main


def _csv_names(column: str, kinds: set[type]) -> list[str]:
    if Interval in kinds:
        return [f"{column} mean", f"{column} low", f"{column} high"]
    return [f"{column} mean", f"{column} sd"] if Sample in kinds else [column]


def _csv_values(entry: Entry) -> list[object]:
    if isinstance(entry, Interval):
        return ["" if value is None else value for value in (entry.mean, entry.low, entry.high)]
    if not isinstance(entry, Sample):
        return [entry]
    return [mean(entry.values) if entry.values else "", stdev(entry.values) if len(entry.values) > 1 else ""]


def _marked(entry: Entry, best: str, *, escape: Callable[[str], str] = str) -> str:
    """An entry as text, put into the pattern `best` where it is the best of its domain, or an interval that excludes 0."""
    if isinstance(entry, str | int):
        return escape(str(entry))
    text = escape(entry.text())
    return best.format(text) if (entry.best if isinstance(entry, Sample) else entry.excludes_zero) else text


def _latex(text: str) -> str:
    for sign, command in (("\\", r"\textbackslash{}"), ("%", r"\%"), ("_", r"\_"), ("&", r"\&"), ("#", r"\#")):
        text = text.replace(sign, command)
    text = re.sub(r"(?<!\w)-(?=\d)", "$-$", text)  # a minus sign, not a hyphen
    return text.replace("±", r"$\pm$").replace("≥", r"$\geq$").replace("Δ", r"$\Delta$")


def _latex_row(entries: Iterable[str]) -> str:
    return " & ".join(entries) + r" \\"


def _spec_store(folder: Path) -> str | None:
    """The store that the study's spec names; None where it has its own."""
    file = folder / "spec.yaml"
    stores = load_yaml(file).get("stores") if file.is_file() else None
    return from_dict(Stores, stores or {}, source=str(file)).filled().mlflow


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(
        description="Write a study's tables and figures from its tracked runs.", epilog="Example: python studies/tables.py results/demo"
    )
    parser.add_argument("folder", type=Path, help="the study's folder, with its mlflow.db")
    parser.add_argument("--baseline", metavar="ARM", help="the arm that tables/effects compares the others with (default: the spec's)")
    parser.add_argument("--store", metavar="URI", help="the MLflow store (default: the spec's stores.mlflow, or the folder's mlflow.db)")
    try:
        args = parser.parse_args(arguments)
        folder = args.folder
        print(write_tables(folder, baseline=args.baseline, uri=args.store or _spec_store(folder)).to_markdown())
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Tables: {folder / 'tables'}. Figures: {folder / 'figures'}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
