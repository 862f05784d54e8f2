"""Our baselines beside other people's code: the same split, the same settings, several seeds each.

    python studies/parity.py --data DIR       # DIR holds scientific_small; adds what is missing to results/parity/ours.csv
    python studies/parity.py --tables         # results/parity/table.* from the committed figures alone

Theirs are in results/parity/theirs.csv, one row a run, with where each comes from: RecBole 1.2.1 (`parity_recbole.py` runs it) and
the models of UniSRec's and MISSRec's releases, trained through RecBole from scratch on the same files with their own settings, but for
histories of 20 items and metrics of six digits. (MISSRec's k-means, as it is coded, puts every item into one interest.) None of their
code is here. A difference comes with Welch's 95 % interval over seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the repository's root, not studies/, belongs on the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import pandas as pd
import torch
from scipy.stats import ttest_ind
from tqdm import tqdm

from mmm4rec.config import from_dict, merge
from mmm4rec.data.domain import write_atomically
from mmm4rec.data.prepare import prepare
from mmm4rec.errors import BadInput
from mmm4rec.execute import execute
from mmm4rec.run import RunConfig
from studies.significance import Interval
from studies.table import Entry, Sample, Table

METRICS = ("valid ndcg@10", "test hit@10", "test ndcg@10")
TRAINING = {
    "optimizer": "adam",
    "weight_decay": 0.0,
    "learning_rate": 1e-3,
    "accumulation": 1,
    "epochs": 300,
    "patience": 11,  # RecBole's stopping_step 10 waits for an eleventh epoch
}
CASES: dict[str, dict[str, Any]] = {  # the settings of theirs; histories of 20 items
    "sasrec": {"recommender": "sasrec", "training": {"batch_size": 1024}},
    "gru4rec": {"recommender": "gru4rec", "training": {"batch_size": 1024}},
    "unisrec": {"recommender": "unisrec", "training": {"batch_size": 2048}},
    "unisrec_content": {"recommender": "unisrec", "model": {"ids": False}, "training": {"batch_size": 2048}},
    "missrec": {"recommender": "missrec", "training": {"batch_size": 512}},
    "missrec_content": {"recommender": "missrec", "model": {"ids": False}, "training": {"batch_size": 512}},
}
DOMAIN = "scientific_small"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input."""
    told = parser()
    options = told.parse_args(arguments)
    folder = Path(options.out) / "parity"
    if not options.tables:
        if options.data is None:
            told.error(f"--data is missing: the folder that holds {DOMAIN}; or give --tables")
        torch.set_num_threads(options.threads)
        try:
            measure(folder / "ours.csv", Path(options.data), options.models, options.seeds)
        except BadInput as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    table(pd.read_csv(folder / "ours.csv"), pd.read_csv(folder / "theirs.csv")).write(folder, "table")
    print((folder / "table.md").read_text(encoding="utf-8"))
    return 0


def parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    result = argparse.ArgumentParser(prog="python studies/parity.py", description=__doc__, formatter_class=form)
    add = result.add_argument
    add("--data", metavar="DIR", help=f"holds {DOMAIN}, as MISSRec's release has it")
    add("--models", nargs="+", choices=CASES, default=list(CASES), help="default: all")
    add("--seeds", type=int, default=5, metavar="N", help="0 to N - 1 (default: 5)")
    add("--threads", type=int, default=1, metavar="N", help="CPU threads (default: 1, as theirs had)")
    add("--out", default="results", metavar="DIR", help="writes DIR/parity (default: results)")
    add("--tables", action="store_true", help="make the tables alone")
    return result


def measure(file: Path, data: Path, models: Sequence[str], seeds: int) -> None:
    """Run what the file lacks, seed by seed, and add it row by row."""
    rows: list[Any] = pd.read_csv(file).to_dict("records") if file.exists() else []
    done = {(row["model"], row["seed"]) for row in rows}
    file.parent.mkdir(parents=True, exist_ok=True)
    missing = [(model, seed) for seed in range(seeds) for model in models if (model, seed) not in done]
    with tempfile.TemporaryDirectory() as name:
        domain = Path(name) / DOMAIN
        prepare(data / DOMAIN, domain, name=DOMAIN)
        for model, seed in tqdm(missing, unit="run"):
            rows.append({"model": model, "seed": seed} | _run(model, seed, domain, Path(name) / f"{model}-{seed}"))
            ordered = pd.DataFrame(rows).sort_values(["model", "seed"])
            write_atomically(file, ordered.to_csv(index=False, lineterminator="\n").encode())


def _run(model: str, seed: int, domain: Path, out: Path) -> dict[str, Any]:
    plain = {"data": {"domains": [str(domain)]}, "model": {"max_len": 20}, "training": TRAINING, "seed": seed, "device": "cpu"}
    config, started = from_dict(RunConfig, merge(plain, CASES[model]), source=model), time.perf_counter()
    for _ in execute(config, out):
        pass
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    parts = (name.split() for name in METRICS)
    scores = {f"{split} {metric}": round(result[split][metric], 6) for split, metric in parts}
    return scores | {"best epoch": result["best_epoch"], "seconds": round(time.perf_counter() - started, 1)}


def table(ours: pd.DataFrame, theirs: pd.DataFrame) -> Table:
    """A row a model and metric: ours, theirs, and the difference. A model that one of them lacks is left out."""
    rows: list[tuple[Entry, ...]] = []
    for model in CASES:
        own, other = ours[ours["model"] == model], theirs[theirs["model"] == model]
        if not len(own) or not len(other):
            continue
        seeds, source = f"{len(own)}, {len(other)}", str(other["source"].iloc[0])
        for metric in METRICS:
            first, second = (tuple(map(float, part[metric])) for part in (own, other))
            rows.append((model, metric, Sample(first), Sample(second), difference(first, second), seeds, source))
    columns = ("model", "metric", "ours", "theirs", "ours - theirs", "seeds", "theirs are of")
    notes = ("mean ± sd over seeds; the difference with Welch's 95 % interval (none for a single seed); bold where it excludes 0.",)
    return Table(columns, tuple(rows), caption=f"Ours beside other code on {DOMAIN}, full ranking.", notes=notes)


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """The difference of the means with Welch's interval; without one where a side has a single seed."""
    mean = sum(ours) / len(ours) - sum(theirs) / len(theirs)
    if min(len(ours), len(theirs)) < 2:
        return Interval(mean)
    found = ttest_ind(ours, theirs, equal_var=False)
    low, high = found.confidence_interval(0.95)
    return Interval(mean, float(low), float(high), p=float(found.pvalue))


if __name__ == "__main__":
    sys.exit(main())
