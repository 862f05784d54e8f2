"""What priors carried on are worth: a cold search against one that begins where searches in other domains ended.

    python studies/priors.py                    # writes results/priors.json, .md, .png and .svg

On the demo's three target domains each is left out once: its search begins with the blend and the bests of the searches in
the other two, as `warm_start_from` does it, and is compared with the cold search of the same sampler and seeds. Asked is
how many trials pass until the best so far is within 1 % of the optimum, which is the best of the whole cold search.
Nothing is pruned. A trial's value is the validation metric of its best epoch, the untrained one included, as in the demo. It
depends on the trial's seed too: how much is measured by running chosen configs again with other seeds. What has run is kept
under --work, and not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

if __package__ in (None, ""):  # run as a file: the repository's root, not studies/, belongs on the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import matplotlib as mpl

mpl.use("agg")

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from mmm4rec.config import to_dict
from mmm4rec.errors import BadInput
from mmm4rec.execute import execute
from mmm4rec.run import assemble
from mmm4rec.training.loop import EpochReport, fit
from studies.benchmark import machine
from studies.cells import Cell, Source, build_cells
from studies.domains import make_domains
from studies.engine import run_config
from studies.figures import COLOURS, RC
from studies.plan import Plan
from studies.pretrain import pretrain_config
from studies.spec import Spec, WarmStart, load_spec
from studies.state import Journal, Trial, locked
from studies.suggestions import Suggestions, sqlite_url

PLANNED = 50  # trials of every search, be it run to its end or not: a sampler begins at random by this number
AIM = 3  # trials until near the optimum
NEAR = 0.99  # of the optimum: what "within 1 %" asks for
COLD, WARM = COLOURS[1], COLOURS[0]
AGAIN_FROM = 1_000_000  # seeds of configs that are run again: no search has them


@dataclass(frozen=True)
class Bench:
    """What all searches of the measurement share."""

    spec: Spec
    cells: dict[tuple[str, str], Cell]  # by domain and arm
    checkpoint: Path
    work: Path
    trials: int  # of a cold search


@dataclass(frozen=True)
class Pair:
    """The cold and the warm search of a cell and seed: their trials' values in order, and the configs that are looked at again."""

    domain: str
    arm: str
    seed: int
    cold: list[float]
    warm: list[float]
    origins: list[str]  # of the configs that the warm search began with
    configs: dict[str, dict[str, Any]]  # the best of the cold search, and what the warm one began with first

    @property
    def cell(self) -> str:
        return f"{self.domain}/{self.arm}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input."""
    told = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    try:
        told.work.mkdir(parents=True, exist_ok=True)
        with locked(told.work / ".lock", wait=False):
            bench = make_bench(load_spec("demo"), told.work, told.arms, told.trials)
            for seed in range(told.seeds):
                measure(bench, seed, told.warm_trials)
            pairs = [read(bench, key, seed, told.warm_trials) for seed in range(told.seeds) for key in bench.cells]
            again = {pair.cell: run_again(bench, pair, told.again) for pair in pairs if pair.seed == 0}
            settings = {name: value for name, value in vars(told).items() if name not in ("out", "work")}
            write(
                told.out,
                pairs,
                {"machine": machine("cpu"), "settings": settings, "searches": [vars(pair) for pair in pairs], "again": again},
            )
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python studies/priors.py",
        description=__doc__,
        epilog="example: python studies/priors.py --trials 20 --seeds 1 --out results/priors",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add(
        "--out",
        type=Path,
        default=Path("results/priors"),
        metavar="STEM",
        help="writes STEM.json, .md, .png, .svg (default: results/priors)",
    )
    add(
        "--work",
        type=Path,
        default=Path("build/priors"),
        metavar="DIR",
        help="keeps what has run, for a run that was cut (default: build/priors)",
    )
    add(
        "--trials",
        type=int,
        default=PLANNED,
        metavar="N",
        choices=range(3, PLANNED + 1),
        help=f"of a cold search (default: {PLANNED}, the most)",
    )
    add("--warm-trials", type=int, default=10, metavar="N", help="of a warm one (default: 10)")
    add("--seeds", type=int, default=1, metavar="N", help="searches of each kind (default: 1)")
    add("--again", type=int, default=3, metavar="N", help="runs of a chosen config with other seeds, for the noise (default: 3; 0: none)")
    add("--arms", nargs="+", default=["pretrained", "scratch"], metavar="ARM", help="default: pretrained scratch")
    return result


def make_bench(demo: Spec, work: Path, arms: Sequence[str], trials: int) -> Bench:
    """The demo's domains, one pre-training, and a cell a domain and arm, without confirm trials."""
    sources = make_domains(demo.domains, work / "domains", data=None, seed=demo.seed)
    spec = replace(demo, budget=replace(demo.budget, search_trials=PLANNED, grace_epochs=demo.budget.epochs))  # no rung
    cells = [replace(cell, confirm_seeds=0) for cell in build_cells(spec, sources)[0] if cell.arm in arms]
    return Bench(spec, {(cell.domain, cell.arm): cell for cell in cells}, _pretrained(spec, sources, work / "pretrain"), work, trials)


def _pretrained(spec: Spec, sources: dict[str, Source], out: Path) -> Path:
    if not (out / "result.json").exists():
        for report in execute(pretrain_config(spec, sources), out, resume=True):
            assert isinstance(report, EpochReport)
            print(f"pre-training: epoch {report.epoch}, validation NDCG@10 {report.valid['ndcg@10']:.4f}", flush=True)
    return out / "best.safetensors"


def measure(bench: Bench, seed: int, warm_trials: int) -> None:
    """The cold search of every cell, and then the warm ones, which begin from the cold ones in the other domains."""
    for key in bench.cells:
        with searching(bench, "cold", key, seed) as (plan, suggestions):
            carry_on(bench, plan, suggestions, bench.trials)
    for domain, arm in bench.cells:
        with searching(bench, "warm", (domain, arm), seed) as (plan, suggestions):
            carry_on(bench, plan, suggestions, warm_trials)


@contextmanager
def searching(bench: Bench, kind: str, key: tuple[str, str], seed: int) -> Iterator[tuple[Plan, Suggestions]]:
    """A search's plan, as a study has it; a cold one and a warm one of the same seed have the same sampler and trial seeds."""
    domain, arm = key
    folder, others = _folder(bench, kind, key, seed), [other for other, of in bench.cells if of == arm and other != domain]
    folder.mkdir(parents=True, exist_ok=True)
    warm = WarmStart(studies=tuple(str(_folder(bench, "cold", (other, arm), seed)) for other in others)) if kind == "warm" else None
    with closing(Journal(folder / "study.sqlite3")) as journal:
        journal.add_cells([bench.cells[key].name])
        plan = Plan(journal, [bench.cells[key]], bench.spec.budget, seed, warm=warm)
        yield plan, Suggestions(journal, sqlite_url(folder / "optuna.sqlite3"), study="priors", seed=seed)


def _folder(bench: Bench, kind: str, key: tuple[str, str], seed: int) -> Path:
    after = bench.trials if kind == "warm" else ""  # it begins where cold searches of so many trials ended
    return bench.work / f"{kind}{after}_{key[0]}_{key[1]}_{seed}"


def carry_on(bench: Bench, plan: Plan, suggestions: Suggestions, trials: int) -> None:
    """Run the plan's one cell until it has so many trials."""
    (cell,) = plan.cells.values()
    while len(plan.journal.trials(cell.name, outcome="finished")) < trials and (trial := plan.next_trial(suggestions.suggest)):
        for report in fit(assemble(run_config(cell, trial, bench.checkpoint)).run):
            plan.report(trial.trial_key, to_dict(report))
        plan.journal.end(trial.trial_key, "finished", result={})
        suggestions.tell(cell, plan.journal.trial(trial.trial_key))
        print(f"{plan.journal.path.parent.name} {trial.number}: {plan.journal.best_value(trial.trial_key):.4f}", flush=True)


def read(bench: Bench, key: tuple[str, str], seed: int, warm_trials: int) -> Pair:
    """What a cell's two searches have found."""
    found: dict[str, tuple[list[Trial], list[float]]] = {}
    for kind, count in (("cold", bench.trials), ("warm", warm_trials)):
        with closing(Journal(_folder(bench, kind, key, seed) / "study.sqlite3")) as journal:
            trials = journal.trials(outcome="finished")[:count]
            found[kind] = trials, [journal.best_value(trial.trial_key) or 0.0 for trial in trials]
    (cold, cold_values), (warm, warm_values) = found["cold"], found["warm"]
    configs = {"optimum": cold[cold_values.index(max(cold_values))].config, "beginning": warm[0].config}
    return Pair(*key, seed, cold_values, warm_values, [trial.origin for trial in warm if trial.origin], configs)


def run_again(bench: Bench, pair: Pair, count: int) -> dict[str, list[float]]:
    """The values of the cell's cold optimum and of its warm beginning with `count` other seeds."""
    file, cell = bench.work / f"again{bench.trials}.json", bench.cells[pair.domain, pair.arm]
    known: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}
    for name, config in pair.configs.items():
        for number in range(count):
            if (key := f"{pair.cell} {name} {number}") not in known:
                trial = Trial("", cell.name, "search", 0, AGAIN_FROM + number, config, "running", None, None, 0, None, False)
                run = assemble(run_config(cell, trial, bench.checkpoint)).run
                known[key] = max(report.valid[cell.metric] for report in fit(run) if isinstance(report, EpochReport))
                file.write_text(json.dumps(known))
                print(f"again {key}: {known[key]:.4f}", flush=True)
    return {name: [known[f"{pair.cell} {name} {number}"] for number in range(count)] for name in pair.configs}


def trials_until(values: Sequence[float], optimum: float) -> int | None:
    """How many trials until one is within 1 % of the optimum; None when none is."""
    return next((number for number, value in enumerate(values, start=1) if value >= NEAR * optimum), None)


def orders(pair: Pair) -> dict[str, list[float]]:
    """The warm search's values, had it begun in another order: its first trials do not depend on each other."""
    count = len(pair.origins)
    first, rest = pair.warm[:count], pair.warm[count:]
    return {"blend, bests": first + rest, "bests, blend": first[1:] + first[:1] + rest, "bests alone": first[1:] + rest}


def write(stem: Path, pairs: Sequence[Pair], facts: dict[str, Any]) -> None:
    """Write the facts, what they come to, and the figure."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    rows = [_row(pair) for pair in pairs]
    stem.with_suffix(".json").write_text(json.dumps({"schema_version": 1, **facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    text = "\n".join([*_head(facts), *_table(rows), "", *_orders(pairs), "", *_noise(facts["again"]), "", f"![]({stem.name}.png)", ""])
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    draw(pairs, stem)
    print(text)


def _row(pair: Pair) -> dict[str, Any]:
    optimum = max(pair.cold)
    until = {"cold": trials_until(pair.cold, optimum), "warm": trials_until(pair.warm, optimum)}
    return {
        "cell": pair.cell,
        "seed": pair.seed,
        "optimum": optimum,
        **until,
        "warm_3": max(pair.warm[:3]) / optimum,
        "cold_3": max(pair.cold[:3]) / optimum,
    }


def _head(facts: Mapping[str, Any]) -> list[str]:
    told, where = facts["settings"], facts["machine"]
    cut = f"**Cut short: {told['trials']} of {PLANNED} cold trials. What follows shows the tool, and settles nothing.**"
    return [
        "# Priors carried on, one domain left out",
        "",
        "Written by `studies/priors.py` on the demo domains, nothing pruned.",
        f"Of each cell {told['seeds']} searches (sampler seed): cold, {told['trials']} trials; warm, {told['warm_trials']}",
        f"(both planned for {PLANNED}, by which the sampler takes its random beginning),",
        "begun with the blend and the bests of the cold searches in the two other domains.",
        f"Machine: {where['name']}, {where['threads']} thread, torch {where['torch']}, code {where['code_version']}.",
        "",
        *([cut, ""] if told["trials"] < PLANNED else []),
        f"The optimum is the best validation NDCG@10 of the {told['trials']} cold trials. A search is near it from its first trial that is",
        "within 1 % of it.",
        "",
    ]


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| cell | seed | optimum | trials until near, cold | warm | best of 3 trials / optimum, cold | warm |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        told = [row["cell"], str(row["seed"]), f"{row['optimum']:.4f}", _count(row["cold"]), _count(row["warm"])]
        lines.append(f"| {' | '.join(told)} | {row['cold_3']:.3f} | {row['warm_3']:.3f} |")
    middle = {kind: _count(_median([row[kind] for row in rows])) for kind in ("cold", "warm")}
    beginnings = {kind: f"{mean(row[kind] for row in rows):.3f}" for kind in ("cold_3", "warm_3")}
    lines += [f"| median, mean | | | {middle['cold']} | {middle['warm']} | {beginnings['cold_3']} | {beginnings['warm_3']} |", ""]
    soon = {kind: sum(row[kind] is not None and row[kind] <= AIM for row in rows) for kind in ("cold", "warm")}
    return [
        *lines,
        f"Near the optimum within {AIM} trials, which is the aim: {soon['warm']} of {len(rows)} warm searches, {soon['cold']} cold ones.",
    ]


def _count(trials: float | None) -> str:
    return "never" if trials is None or math.isinf(trials) else f"{trials:g}"


def _median(counts: Sequence[int | None]) -> float:
    """A search that never comes near counts as longer than all others."""
    return median(math.inf if count is None else count for count in counts)


def _orders(pairs: Sequence[Pair]) -> list[str]:
    lines = [
        "What a warm search begins with, in another order (median of trials until near; mean of best / optimum after 1, 2 and 3 trials):",
        "",
    ]
    lines += ["| order | trials until near | 1 trial | 2 | 3 |", "| --- | --- | --- | --- | --- |"]
    for name in orders(pairs[0]):
        values = [(orders(pair)[name], max(pair.cold)) for pair in pairs]
        until = _count(_median([trials_until(warm, optimum) for warm, optimum in values]))
        after = [f"{mean(max(warm[:count]) / optimum for warm, optimum in values):.3f}" for count in (1, 2, 3)]
        lines.append(f"| {name} | {until} | {' | '.join(after)} |")
    return lines


def _noise(again: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
    if any(len(found) < 2 for values in again.values() for found in values.values()):
        return ["How much a value depends on the trial's seed was not measured (`--again`)."]
    lines = [
        "The same configs (of sampler seed 0) run again with other seeds, mean ± sd: an optimum is the best of noisy values, so it falls.",
        "",
    ]
    lines += ["| cell | optimum's config | warm search's first config | sd / mean of the former |", "| --- | --- | --- | --- |"]
    for cell, values in again.items():
        told = [f"{mean(found):.4f} ± {stdev(found):.4f}" for found in values.values()]
        lines.append(f"| {cell} | {' | '.join(told)} | {stdev(values['optimum']) / mean(values['optimum']):.1%} |")
    return lines


def draw(pairs: Sequence[Pair], stem: Path) -> None:
    """The best so far over the optimum: a panel a domain and arm, a line a seed and kind."""
    domains, arms = list(dict.fromkeys(pair.domain for pair in pairs)), list(dict.fromkeys(pair.arm for pair in pairs))
    with mpl.rc_context(RC):
        size = (1 + 2.8 * len(domains), 0.8 + 2.2 * len(arms))
        figure, axes = plt.subplots(len(arms), len(domains), figsize=size, squeeze=False, sharex=True, sharey=True, layout="constrained")
        for pair in pairs:
            _draw(axes[arms.index(pair.arm)][domains.index(pair.domain)], pair)
        for axis in axes[-1]:
            axis.set_xlabel("search trials")
        for line in axes:
            line[0].set_ylabel("best so far / optimum")
        handles, labels = axes[0][0].get_legend_handles_labels()
        named = dict(zip(labels, handles, strict=True))
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(stem.with_suffix(".png"), dpi=150, metadata={"Software": None})
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
        plt.close(figure)


def _draw(axis: Axes, pair: Pair) -> None:
    optimum = max(pair.cold)
    for values, colour, style, label in ((pair.cold, COLD, "--", "cold"), (pair.warm, WARM, "-", "warm")):
        best = [max(values[:count]) / optimum for count in range(1, len(values) + 1)]
        axis.step(range(1, len(best) + 1), best, style, where="post", color=colour, linewidth=1.4, label=label)
    axis.axhline(NEAR, color="black", linewidth=0.8, linestyle=":", label="within 1 %")
    axis.set_title(pair.cell)
    axis.set_xscale("log")
    axis.set_xticks([1, 2, 3, 5, 10, 20, 50], ["1", "2", "3", "5", "10", "20", "50"], minor=False)
    axis.minorticks_off()
    axis.set_xlim(1, max(len(pair.cold), 2))


if __name__ == "__main__":
    raise SystemExit(main())
