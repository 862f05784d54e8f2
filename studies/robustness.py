"""Modality stress: what a model loses as texts and pictures go missing or are mixed up, at test time and in training too.

    python studies/robustness.py                                    # the demo: pre-train, fine-tune, damage; results/robustness
    python studies/robustness.py --model runs/a/best.safetensors --domain domains/A      # a model of yours, at test time
    python studies/robustness.py --choices                          # what stands for a missing modality, three ways

Dropped: an item has no such feature any more, and is what an item without one is to the model. Corrupted: items have each
other's. At test time a model that never saw the damage ranks the damaged domain; in training it was fine-tuned on it, from
the same checkpoint. NDCG@10 of the test split, over seeds of the damage (and of the training), and apart by how often the
target was a target in training: 0 is a cold item. What has run is kept under --work, and not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the repository's root, not studies/, belongs on the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from mmm4rec.config import from_dict, merge, to_dict
from mmm4rec.data.demo import DemoConfig
from mmm4rec.data.domain import write_atomically
from mmm4rec.data.features import MODALITIES, Damage, load_features
from mmm4rec.errors import BadInput
from mmm4rec.execute import execute
from mmm4rec.inference import open_model
from mmm4rec.run import RunConfig
from mmm4rec.training.evaluate import evaluate
from mmm4rec.training.metrics import metrics
from studies.benchmark import machine
from studies.cells import Source
from studies.domains import make_domains
from studies.pretrain import pretrain_config
from studies.spec import Spec, load_spec

RATES = (0.0, 0.25, 0.5, 0.75, 1.0)
TRAINED_RATES = (0.5, 1.0)  # of damage that is there in training too, a fine-tuning each
KINDS = ("drop", "corrupt")
BUCKETS = {"0": (0, 0), "1-4": (1, 4), "5-19": (5, 19), "20+": (20, 2**62)}  # training interactions of the target
FINE_TUNING = {"training": {"learning_rate": 5e-3, "epochs": 6, "patience": 2}, "model": {"dropout": 0.2}}
SPARSE: dict[str, tuple[int, ...]] = {"attic": (400, 1000)}  # users and items of a target whose items are cold more often
CHOICES = ("learned", "zero", "other")  # ModelConfig.missing
CHOSEN_DAMAGE = {"drop_image": 0.5, "drop_text": 0.2}  # of all domains, where the three are compared
PICTURELESS = ("warehouse", "harbour")  # a source and a target that have no pictures at all there


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, help="best.safetensors of a run (default: the demo's)")
    add("--domain", type=Path, nargs="+", help="with --model: the domains to rank")
    add("--choices", action="store_true", help="compare what stands for a missing modality, on the demo")
    add("--out", type=Path, default=Path("results/robustness"), help="folder of tables and figures (default: results/robustness)")
    add("--work", type=Path, default=Path("build/robustness"), help="folder of what has run (default: build/robustness)")
    add("--rates", type=float, nargs="+", default=RATES, help="shares of the items (default: 0 .25 .5 .75 1)")
    add("--seeds", type=int, default=3, help="default: 3")
    add("--processes", type=int, default=2, help="fine-tunings at once (default: 2)")
    told = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        if (told.model is None) != (told.domain is None):
            raise BadInput("only one of --model and --domain is given.", remedy="Give both, or neither for the demo.")
        if min(told.seeds, told.processes) < 1 or not all(0 <= rate <= 1 for rate in told.rates):
            raise BadInput("--seeds and --processes are at least 1 and rates are from 0 to 1.", remedy="Correct the flags.")
        if told.choices:
            print(compare_choices(told.out, told.work, told.seeds, told.processes))
        elif told.model is not None:
            works = [(str(told.model), str(domain), damage) for domain in told.domain for damage in damages(told.rates, told.seeds)]
            print(write(told.out, [row for work in tqdm(works, unit="ranking") for row in ranked("test time", *work)]))
        else:
            print(write(told.out, stress_demo(told.work, told.rates, told.seeds, told.processes)))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def damages(rates: Sequence[float], seeds: int) -> list[Damage]:
    """None at all, then every modality, kind and rate above 0, once a seed."""
    hurt = [(f"{kind}_{modality}", rate) for modality in MODALITIES for kind in KINDS for rate in rates if rate > 0]
    return [Damage(seed=seed, **{name: rate}) for seed in range(seeds) for name, rate in [("drop_text", 0.0), *hurt]]


def told_of(damage: Damage) -> list[tuple[str, str, float]]:
    """Modality, kind and rate; an undamaged domain is the rate 0 of all of them."""
    pairs = [(str(modality), kind, damage.of(modality)[KINDS.index(kind)]) for modality in MODALITIES for kind in KINDS]
    return [pair for pair in pairs if pair[2]] or pairs


def ranked(when: str, model_file: str, domain: str, damage: Damage) -> list[dict[str, Any]]:
    """NDCG@10 on the test split of a damaged domain: of all users, and of those whose target is in each bucket."""
    model, data, device = open_model(model_file, domain, device="cpu", unseen=True)
    config = getattr(model, "config", None)
    data = replace(data, features=load_features(data.domain, config.streams if config else MODALITIES, damage=damage).to(device))
    users, ends = data.domain.examples("test")
    rank = evaluate(model, data, users, ends, device)
    counts = replace(data, train=data.domain.examples("train")).target_counts[data.domain.items[data.domain.offsets[users] + ends]]
    chosen = {"all": np.ones(len(rank), dtype=bool)} | {name: (counts >= low) & (counts <= high) for name, (low, high) in BUCKETS.items()}
    return [
        {"when": when, "domain": data.domain.name, "seed": damage.seed, "modality": modality, "kind": kind, "rate": rate}
        | {"target": name, "users": int(mask.sum()), "ndcg": metrics(rank[mask])["ndcg@10"] if mask.any() else None}
        for modality, kind, rate in told_of(damage)
        for name, mask in chosen.items()
    ]


def stress_demo(work: Path, rates: Sequence[float], seeds: int, processes: int) -> list[dict[str, Any]]:
    """The demo's targets: fine-tuned whole and damaged when ranked, and damaged already when fine-tuned."""
    spec, sources = demo(work)
    checkpoint = trained(pretrain_config(spec, sources), work / "pretrained")
    targets = list(dict.fromkeys(name for group in spec.cells for name in group.domains))
    tasks = [(name, damage) for name in targets for damage in damages([rate for rate in rates if rate in TRAINED_RATES], seeds)]
    configs = [fine_tuning(spec, sources[name], checkpoint, damage) for name, damage in tasks]
    files = in_processes(configs, work, processes)
    rows = []
    for (name, damage), file in zip(tasks, files, strict=True):
        rows += ranked("training", file, sources[name].path, damage)
        if damage == Damage(seed=damage.seed):  # this one was fine-tuned whole
            hurt = [each for each in damages(rates, seeds) if each.seed == damage.seed]
            rows += [row for each in tqdm(hurt, name, unit="ranking") for row in ranked("test time", file, sources[name].path, each)]
    return rows


def demo(work: Path) -> tuple[Spec, dict[str, Source]]:
    """The demo study, with more items than its shoppers come to know in one target."""
    spec = load_spec("demo")
    spec = replace(spec, domains=replace(spec.domains, demo=DemoConfig(sizes=SPARSE)))
    return spec, make_domains(spec.domains, work / "domains", data=None, seed=spec.seed)


def fine_tuning(spec: Spec, source: Source, checkpoint: str | None, damage: Damage, **model: Any) -> RunConfig:
    """From a checkpoint, or from scratch; the damage's seed is the training's too."""
    plain = {"data": {"domains": [source.path], "damage": to_dict(damage)}, "model": spec.model, "training": spec.training}
    changes = {"model": model, "seed": damage.seed, "init": checkpoint, "device": "cpu"}
    return from_dict(RunConfig, merge(merge(plain, FINE_TUNING), changes), source="robustness")


def in_processes(configs: Sequence[RunConfig], work: Path, processes: int) -> list[str]:
    """Train each that has not been trained, so many at once; their best.safetensors."""
    places = [work / "runs" / hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()[:16] for config in configs]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(tqdm(pool.map(trained, configs, places), total=len(configs), unit="run"))


def trained(config: RunConfig, out: Path) -> str:
    """The best.safetensors of this run, which is trained unless it is there."""
    torch.set_num_threads(1)
    for _ in execute(replace(config, test=False), out, resume=True):
        pass
    return str(out / "best.safetensors")


def write(out: Path, rows: list[dict[str, Any]]) -> str:
    """`robustness.csv`, `robustness.md` and the figures, in `out`; the Markdown."""
    table = pd.DataFrame(rows)
    table["target"] = pd.Categorical(table["target"], ["all", *BUCKETS])
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "robustness.csv", table.to_csv(index=False, float_format="%.6f").encode())
    where, seeds = machine("cpu"), table["seed"].nunique()
    over = f"mean over {table['domain'].nunique()} domains, ± sd over {seeds} seeds" if seeds > 1 else "one seed"
    text = "\n".join(
        [
            "# Modality stress",
            "",
            f"Made by `studies/robustness.py`: NDCG@10 of the test split, {over}; users by the training interactions of their target.",
            f"Domains: {', '.join(sorted(table['domain'].unique()))}. Machine: {where['name']}, torch {where['torch']}, code"
            f" {where['code_version']}.",
            "",
            *markdown(table),
            "",
        ]
    )
    write_atomically(out / "robustness.md", text.encode())
    draw(table, out)
    return text


def spread(table: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Means over the domains, then mean and sd over the seeds, by these columns: `mean`, `std`."""
    domains = table.dropna(subset="ndcg").groupby([*by, "seed"], observed=True)["ndcg"].mean()
    return domains.groupby(list(by), observed=True).agg(["mean", "std"]).fillna(0.0).reset_index()


def markdown(table: pd.DataFrame) -> list[str]:
    found = spread(table, ("when", "modality", "kind", "target", "rate"))
    rates = sorted(found["rate"].unique())
    users = table.drop_duplicates(["domain", "target"]).groupby("target", observed=True)["users"].sum()
    lines = ["| damaged | modality | damage | target's interactions | " + " | ".join(f"{rate:.0%}" for rate in rates) + " |"]
    lines += ["| --- " * (4 + len(rates)) + "|"]
    for (when, modality, kind, target), part in found.groupby(["when", "modality", "kind", "target"], observed=True):
        values = {
            row.rate: f"{row.mean_:.4f} ± {row.std_:.4f}" for row in part.rename(columns={"mean": "mean_", "std": "std_"}).itertuples()
        }
        who = "all" if target == "all" else f"{target} ({users.loc[str(target)]} users)"
        lines.append(f"| {when} | {modality} | {kind} | {who} | " + " | ".join(values.get(rate, "") for rate in rates) + " |")
    return lines


def draw(table: pd.DataFrame, out: Path) -> None:
    """`stress`: both kinds of damage, at test time and in training; `popularity`: dropped at test time, by the target's interactions."""
    from matplotlib import pyplot as plt
    from matplotlib import rc_context

    from studies.figures import COLOURS, RC, save_figure

    everyone = spread(table[table["target"] == "all"], ("modality", "kind", "when", "rate"))
    dropped = table[(table["kind"] == "drop") & (table["when"] == "test time") & (table["target"] != "all")]
    kinds = {"drop": COLOURS[0], "corrupt": COLOURS[1]}
    labels = {"drop": "dropped", "corrupt": "corrupted"}
    lines = {
        "stress": [
            (everyone, {"kind": kind, "when": when}, kinds[kind], style, f"{labels[kind]}, {where}")
            for kind in KINDS
            for when, style, where in (("test time", "-", "at test time"), ("training", "--", "in training too"))
        ],
        "popularity": [
            (spread(dropped, ("modality", "target", "rate")), {"target": name}, COLOURS[place], "-", f"{name} training interactions")
            for place, name in enumerate(BUCKETS)
        ],
    }
    with rc_context(RC):
        for name, told in lines.items():
            figure, axes = plt.subplots(1, len(MODALITIES), figsize=(7.2, 3.0), sharey=True, layout="constrained")
            for axis, modality in zip(axes, MODALITIES, strict=True):
                for found, which, colour, style, label in told:
                    part = found[
                        (found["modality"] == modality) & np.logical_and.reduce([found[key] == value for key, value in which.items()])
                    ]
                    if len(part):
                        part = part.sort_values("rate")
                        axis.plot(part["rate"], part["mean"], style, color=colour, label=label, marker="o", markersize=3)
                        low, high = part["mean"] - part["std"], part["mean"] + part["std"]
                        axis.fill_between(part["rate"], low, high, color=colour, alpha=0.15, linewidth=0)
                axis.set_title(modality)
                axis.set_xlabel("share of the items")
            axes[0].set_ylabel("test NDCG@10")
            axes[0].set_ylim(bottom=0)
            figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
            save_figure(figure, out, name)


def compare_choices(out: Path, work: Path, seeds: int, processes: int) -> str:
    """Pre-trained, scored untuned, trained from scratch and fine-tuned with each choice; writes choices.json and .md into `out`."""
    spec, sources = demo(work)
    sources = dict(sources) | {name: without_pictures(sources[name], work / "pictureless" / name) for name in PICTURELESS}
    targets = list(dict.fromkeys(name for group in spec.cells for name in group.domains))
    damage = [Damage(**CHOSEN_DAMAGE, seed=seed) for seed in range(seeds)]
    runs = [(choice, seed) for choice in CHOICES for seed in range(seeds)]
    pretraining = [
        from_dict(
            RunConfig,
            merge(
                to_dict(pretrain_config(spec, sources)),
                {"data": {"damage": to_dict(damage[seed]), "zero_shot": []}, "model": {"missing": choice}, "seed": seed},
            ),
            source="robustness",
        )
        for choice, seed in runs
    ]
    checkpoints = dict(zip(runs, in_processes(pretraining, work, processes), strict=True))
    tasks = [(choice, seed, name, init) for choice, seed in runs for name in targets for init in ("scratch", "transfer")]
    tuning = [
        fine_tuning(spec, sources[name], checkpoints[choice, seed] if init == "transfer" else None, damage[seed], missing=choice)
        for choice, seed, name, init in tasks
    ]
    files = dict(zip(tasks, in_processes(tuning, work, processes), strict=True))
    files |= {(choice, seed, name, "zero-shot"): checkpoints[choice, seed] for choice, seed in runs for name in targets}
    rows = [
        {"choice": choice, "seed": seed, "domain": name, "how": how, "ndcg": ranked("", file, sources[name].path, damage[seed])[0]["ndcg"]}
        for (choice, seed, name, how), file in files.items()
    ]
    text = choices_table(pd.DataFrame(rows), targets)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(
        out / "choices.json", (json.dumps({"schema_version": 1, "machine": machine("cpu"), "rows": rows}, indent=1) + "\n").encode()
    )
    write_atomically(out / "choices.md", text.encode())
    return text


def without_pictures(source: Source, place: Path) -> Source:
    """A copy of a domain that has no picture features."""
    if not place.exists():
        part = place.with_name(f".{place.name}")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(source.path, part, ignore=shutil.ignore_patterns("image*"))
        part.rename(place)
    features: Mapping[str, str] = {key: value for key, value in (source.features or {}).items() if key != "image"}
    return replace(source, path=str(place), features=features)


def choices_table(rows: pd.DataFrame, targets: Sequence[str]) -> str:
    where, seeds = machine("cpu"), rows["seed"].nunique()
    lines = [
        "| stands for a missing modality | "
        + " | ".join(f"{how}, {name}" for how in ("zero-shot", "scratch", "transfer") for name in targets)
        + " |"
    ]
    lines += ["| --- " * (1 + 3 * len(targets)) + "|"]
    for choice in CHOICES:
        cells = []
        for how in ("zero-shot", "scratch", "transfer"):
            for name in targets:
                values = rows[(rows["choice"] == choice) & (rows["how"] == how) & (rows["domain"] == name)]["ndcg"]
                cells.append(f"{values.mean():.4f} ± {values.std() if seeds > 1 else 0:.4f}")
        lines.append(f"| {choice} | " + " | ".join(cells) + " |")
    names = {"learned": "a learned vector of the modality", "zero": "the zero vector", "other": "the other modality's projection"}
    return "\n".join(
        [
            "# What stands for a missing modality",
            "",
            f"Made by `studies/robustness.py --choices`: test NDCG@10 on the demo's targets, mean ± sd over {seeds} seeds. In all domains"
            f" {CHOSEN_DAMAGE['drop_image']:.0%} of the items have no picture and {CHOSEN_DAMAGE['drop_text']:.0%} no text (drawn anew for"
            f" each seed); {' and '.join(PICTURELESS)} have no pictures at all. Zero-shot: scored by the pre-trained model as it is;",
            "scratch: trained on the target alone; transfer: fine-tuned from the pre-trained model.",
            "; ".join(f"`{choice}`: {name}" for choice, name in names.items()) + ".",
            f"Machine: {where['name']}, torch {where['torch']}, code {where['code_version']}.",
            "",
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
