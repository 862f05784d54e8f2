"""A study's tables, figures and page, from its tracked runs alone.

    python studies/tables.py results/demo
    python studies/tables.py results/demo --export      # from results/demo/export/, which studies/runs.py writes

Confirm trials only, mean and sample standard deviation over their seeds; as CSV, Markdown, LaTeX (booktabs) and HTML:

    tables/main            test metrics of every cell, best and second marked, with the budgets in its caption
    tables/overview        NDCG@10 of every arm in every domain, where there are several
    tables/transfer        pre-trained arms beside their scratch controls, at equal steps and to scratch's best
    tables/matrix          the gain of each checkpoint over its control: domain × modality × ids
    tables/convergence     epochs, steps, seconds and GPU hours to the best epoch and to the end; tables/quality: to other scores
    tables/effects         each arm minus the spec's baseline, paired over users and seeds; effects_ndcg, effects_hit: arm × domain;
                           tables/overall: over domains
    tables/sensitivity     what the searches saw of each parameter; tables/marginals
    tables/literature      published numbers beside ours, where users, items and split agree
    tables/ledger          what each arm was given and used
    figures/               convergence, effects, transfer_matrix, sensitivity: PNG and SVG
    index.html             all of it on one page

A table that a study has no rows for is not written. The same runs give the same bytes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

if __package__ in (None, ""):  # run as a file: the repository's root, not studies/, belongs on the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from mmm4rec.config import from_dict, load_yaml
from mmm4rec.errors import BadInput
from studies import figures
from studies.audit import convergence_table, cost_to_best, quality_table
from studies.effects import Effect, Lead, by_domain, mean_of, over_domains, study_effects, study_leads
from studies.ledger import unequal
from studies.literature import literature_table
from studies.page import write_page
from studies.runs import open_runs
from studies.sensitivity import marginal_table, sensitivity_table
from studies.significance import MARK_SEEDS
from studies.spec import Stores
from studies.table import FORMS, Entry, Sample, Table
from studies.tracked import METRICS, ReadRanks, TrackedCell, TrackedStudy, ranks_reader, read_study
from studies.transfer import Gain, pretraining_note, transfer_gains, transfer_matrix, transfer_table

MAIN = "ndcg@10"  # whose improvement the main table tells
NAMES = (  # of all tables
    *("main", "overview", "transfer", "matrix", "effects", "effects_ndcg", "effects_hit", "overall", "convergence", "quality"),
    *("sensitivity", "marginals", "literature", "ledger"),
)


def main_table(cells: Sequence[TrackedCell], leads: Sequence[Lead] = ()) -> Table:
    """Domain × arm: test metrics, epochs and optimizer steps to the best epoch, budget. Best and second of a domain are marked."""
    columns = ("domain", "arm", "seeds", *METRICS, "improvement %", "epochs to best", "steps to best", "search trials", "epoch budget")
    sure = {(lead.domain, lead.metric, lead.arm) for lead in leads if lead.marked}
    rows: list[tuple[Entry, ...]] = []
    for here in by_domain(cells):
        order = {name: sorted({mean_of(cell, name) for cell in here if cell.trials}, reverse=True) for name in METRICS}
        for cell in here:
            scores = []
            for name in METRICS:
                place = order[name].index(mean_of(cell, name)) if cell.trials else len(order[name])
                values = tuple(trial.test[name] for trial in cell.trials)
                marked = place == 0 and (cell.domain, name, cell.arm) in sure
                scores.append(Sample(values, best=place == 0, second=place == 1, marked=marked))
            costs = [cost_to_best(trial) for trial in cell.trials if trial.epochs]
            epochs, steps = Sample(tuple(c.epochs for c in costs), digits=1), Sample(tuple(c.steps for c in costs), digits=0)
            budget = (cell.search_trials, cell.epochs)
            rows.append((cell.domain, cell.arm, len(cell.trials), *scores, _improvement(cell, here), epochs, steps, *budget))
    return Table(columns, tuple(rows), _main_caption(cells, leads), _main_notes(cells, leads))


def overview_table(cells: Sequence[TrackedCell], leads: Sequence[Lead] = ()) -> Table:
    """Arm × domain: test NDCG@10, best and second of each domain marked; no rows for one domain."""
    domains, found = by_domain(cells), {(cell.domain, cell.arm): cell for cell in cells if cell.trials}
    sure = {(lead.domain, lead.arm) for lead in leads if lead.marked and lead.metric == MAIN}
    order = {here[0].domain: sorted({mean_of(cell, MAIN) for cell in here if cell.trials}, reverse=True) for here in domains}

    def score(domain: str, arm: str) -> Entry:
        if (domain, arm) not in found:
            return "-"
        cell = found[domain, arm]
        place = order[domain].index(mean_of(cell, MAIN))
        values = tuple(trial.test[MAIN] for trial in cell.trials)
        return Sample(values, best=place == 0, second=place == 1, marked=place == 0 and (domain, arm) in sure)

    arms = dict.fromkeys(cell.arm for cell in cells) if len(domains) > 1 else ()
    rows = tuple((arm, *(score(domain, arm) for domain in order)) for arm in arms)
    return Table((f"test {MAIN}", *order), rows, "Test NDCG@10 by domain, mean ± sd over seeds. Bold: best; underlined: second.")


def _improvement(cell: TrackedCell, here: Sequence[TrackedCell]) -> str:
    """NDCG@10 over the best other arm of the domain, in percent."""
    others = [mean_of(other, MAIN) for other in here if other is not cell and other.trials]
    return f"{100 * (mean_of(cell, MAIN) / max(others) - 1):+.1f}" if cell.trials and others and max(others) > 0 else "-"


def _main_caption(cells: Sequence[TrackedCell], leads: Sequence[Lead]) -> str:
    told = ["Test metrics, chosen on validation, confirm trials only; mean ± sd over seeds. Bold: best of the domain; underlined: second."]
    told.append("Improvement: NDCG@10 over the best other arm.")
    if any(lead.marked for lead in leads):
        told.append("*: ahead of the second, by a bootstrap crossed over users and seeds, Holm over all leads, p < .05.")
    budgets = [_budget(cells, arm) for arm in dict.fromkeys(cell.arm for cell in cells if cell.ledger)]
    return " ".join([*told, *([f"Used (search and confirm trials; epochs; GPU hours): {'; '.join(budgets)}."] if budgets else [])])


def _budget(cells: Sequence[TrackedCell], arm: str) -> str:
    own = [cell.ledger for cell in cells if cell.arm == arm and cell.ledger]
    search, confirm, epochs = (
        sum(ledger.get(name, 0) for ledger in own) for name in ("search_trials_used", "confirm_trials_used", "epochs_used")
    )
    return f"{arm} {search:.0f} + {confirm:.0f}, {epochs:.0f}, {sum(ledger.get('gpu_hours', 0.0) for ledger in own):.2f}"


def _main_notes(cells: Sequence[TrackedCell], leads: Sequence[Lead]) -> tuple[str, ...]:
    notes = [warning] if (warning := budget_warning(cells)) else []
    led = [lead for lead in leads if lead.metric == MAIN]
    if few := [lead.domain for lead in led if 0 < lead.seeds < MARK_SEEDS]:
        notes.append(f"Fewer than {MARK_SEEDS} seeds: no mark of significance is given in {', '.join(few)}.")
    if without := [lead.domain for lead in led if lead.seeds == 0]:
        notes.append(f"Best and second have no common seed whose ranks were kept: no mark is given in {', '.join(without)}.")
    found = [(lead, lead.difference.detectable) for lead in led]
    if shown := [f"{lead.domain} {least:.4f}" for lead, least in found if least is not None]:
        notes.append(f"What could have shown: a true lead of so much NDCG@10 would be found 4 times in 5, uncorrected: {', '.join(shown)}.")
    return tuple(notes)


def effects_table(effects: Sequence[Effect]) -> Table:
    """Domain × arm: test gains minus those of the baseline arm, paired over users and seeds, mean and 95 % interval.

    What the interval means stands in studies/significance.py. It is bold where it excludes 0.
    """
    names = ("domain", "arm", "baseline", "seeds", "users", "baseline ndcg@10", "Δ ndcg@10", "Δ hit@10")
    columns = (*names, "p (Holm)", "effect size", "could have shown")
    rows = []
    for e in effects:
        numbers = (e.corrected, e.ndcg.size, e.ndcg.detectable)
        p, size, least = ("-" if value is None else f"{value:.{digits}f}" for value, digits in zip(numbers, (4, 3, 4), strict=True))
        told = (e.domain, e.arm, e.baseline, e.seeds, e.users, Sample(e.baseline_ndcg), e.ndcg, e.hit)
        rows.append((*told, p + ("*" if e.marked else ""), size, least))
    caption = (
        "Test gains minus the baseline's, paired over users and seeds, with 95 % intervals (bootstrap crossed over both)."
        f" p of NDCG@10, Holm over the table; *: p < .05 and {MARK_SEEDS} seeds or more. Effect size: the mean over the sd of users'"
        " differences. Could have shown: the true NDCG@10 difference that would be found 4 times in 5."
    )
    return Table(columns, tuple(rows), caption)


def effects_matrix(effects: Sequence[Effect], metric: Literal["ndcg", "hit"]) -> Table:
    """The differences of one metric, arm × domain; `-` where a domain has no such arm."""
    domains, arms = dict.fromkeys(effect.domain for effect in effects), dict.fromkeys(effect.arm for effect in effects)
    found = {(effect.arm, effect.domain): getattr(effect, metric) for effect in effects}
    rows = [(arm, *(found.get((arm, domain), "-") for domain in domains)) for arm in arms]
    return Table((f"Δ {metric}@10", *domains), tuple(rows))


def overall_table(effects: Sequence[Effect]) -> Table:
    """Arm: its difference from the baseline, averaged over the domains."""
    rows = tuple((one.arm, one.domains, f"{one.won}/{one.domains}", one.ndcg) for one in over_domains(effects))
    caption = "Mean over domains of the NDCG@10 difference from the baseline: these domains, other users and seeds."
    return Table(("arm", "domains", "above the baseline", "Δ ndcg@10"), rows, caption)


def ledger_table(study: TrackedStudy) -> Table:
    """What each arm was given and used, over its domains. An arm that got other budgets than the first searched one is marked."""
    told = [cell for cell in study.cells if cell.ledger]
    names = list(dict.fromkeys(name for cell in told for name in cell.ledger))
    rows: list[tuple[Entry, ...]] = []
    for arm in dict.fromkeys(cell.arm for cell in told):
        own = [cell.ledger for cell in told if cell.arm == arm]
        sums = [sum(ledger.get(name, 0.0) for ledger in own) for name in names]
        rows.append((arm, len(own), *(f"{value:.3f}".rstrip("0").rstrip(".") for value in sums)))
    notes = (pretraining_note(study.pretraining), budget_warning(study.cells))
    columns = ("arm", "domains", *(name.replace("_", " ") for name in names))
    return Table(columns, tuple(rows), "The budget ledger.", tuple(note for note in notes if note))


def budget_warning(cells: Sequence[TrackedCell]) -> str:
    """Names the domains whose searched arms were not given the same; empty where all were."""
    told = []
    for here in by_domain(cells):
        names = unequal(dict(cell.ledger) for cell in here if cell.ledger)
        told += [f"{here[0].domain} ({', '.join(name.replace('_', ' ') for name in names)})"] if names else []
    return f"Unequal budgets, arms cannot be compared fairly: {', '.join(told)}." if told else ""


@dataclass(frozen=True)
class Results:
    """What is computed from the users' ranks."""

    effects: list[Effect]
    leads: list[Lead]
    gains: list[Gain]


def study_results(cells: Sequence[TrackedCell], read_ranks: ReadRanks) -> Results:
    return Results(study_effects(cells, read_ranks), study_leads(cells, read_ranks), transfer_gains(cells, read_ranks))


def study_tables(study: TrackedStudy, found: Results) -> dict[str, Table]:
    """All tables that the study has rows for, by name."""
    cells, effects = study.cells, found.effects
    tables = (
        main_table(cells, found.leads),
        overview_table(cells, found.leads),
        transfer_table(cells, study.pretraining),
        transfer_matrix(found.gains, cells),
        effects_table(effects),
        effects_matrix(effects, "ndcg"),
        effects_matrix(effects, "hit"),
        overall_table(effects),
        convergence_table(cells),
        quality_table(cells),
        sensitivity_table(cells),
        marginal_table(cells),
        literature_table(cells),
        ledger_table(study),
    )
    return {name: table for name, table in zip(NAMES, tables, strict=True) if table.rows}


def write_tables(folder: Path, *, baseline: str | None = None, uri: str | None = None, exported: bool = False) -> Table:
    """Write the study's tables, figures and page, and give the main table.

    `baseline`: the arm of the effects table; None: the spec's. `uri`: of the MLflow store; None: the one in the folder;
    `exported`: from the folder's export instead. Raises BadInput as `read_study` and `study_effects`, and where no cell is
    of the baseline.
    """
    source = open_runs(folder, uri=uri, exported=exported)
    study, read_ranks = read_study(source), ranks_reader(source)
    if baseline is not None:
        if all(cell.arm != baseline for cell in study.cells):
            arms = ", ".join(dict.fromkeys(cell.arm for cell in study.cells))
            raise BadInput(f"has no arm '{baseline}'.", file=folder, remedy=f"Give one of {arms}.")
        study = replace(study, cells=tuple(replace(cell, baseline=baseline) for cell in study.cells))
    found = study_results(study.cells, read_ranks)
    tables = study_tables(study, found)
    with tempfile.TemporaryDirectory(prefix=".results", dir=folder) as room:  # whole, or not at all
        part = Path(room)
        for name, table in tables.items():
            table.write(part / "tables", name)
        (part / "figures").mkdir()
        figures.convergence(study.cells, part / "figures")
        figures.forest(found.effects, part / "figures")
        figures.matrix(found.gains, part / "figures")
        figures.searched(study.cells, part / "figures")
        write_page(study, tables, part)
        _put(part, folder)
    return tables["main"]


def _put(part: Path, folder: Path) -> None:
    """Bring new results into the study's folder; what they no longer have goes, a user's own files stay."""
    for place, names, forms in (("tables", NAMES, FORMS), ("figures", figures.NAMES, figures.FORMS)):
        fresh = {file.name: file for file in (part / place).iterdir()}
        (folder / place).mkdir(exist_ok=True)
        for name, file in fresh.items():
            file.replace(folder / place / name)
        for stale in {f"{name}.{form}" for name in names for form in forms} - set(fresh):
            (folder / place / stale).unlink(missing_ok=True)
    (part / "index.html").replace(folder / "index.html")


def told_store(folder: Path) -> str | None:
    """The store that the study's spec names; None where it has its own."""
    file = folder / "spec.yaml"
    stores = load_yaml(file).get("stores") if file.is_file() else None
    return from_dict(Stores, stores or {}, source=str(file)).filled().mlflow


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(
        description="Write a study's tables, figures and page from its tracked runs.",
        epilog="Example: python studies/tables.py results/demo",
    )
    parser.add_argument("folder", type=Path, help="the study's folder, with its mlflow.db")
    parser.add_argument("--baseline", metavar="ARM", help="the arm that tables/effects compares the others with (default: the spec's)")
    parser.add_argument("--store", metavar="URI", help="the MLflow store (default: the spec's stores.mlflow, or the folder's mlflow.db)")
    parser.add_argument("--export", action="store_true", help="read the folder's export/ (studies/runs.py writes it) rather than MLflow")
    try:
        told = parser.parse_args(arguments)
        folder = told.folder
        uri = None if told.export else told.store or told_store(folder)
        print(write_tables(folder, baseline=told.baseline, uri=uri, exported=told.export).to_markdown())
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Tables: {folder / 'tables'}. Figures: {folder / 'figures'}. All on one page: {folder / 'index.html'}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
