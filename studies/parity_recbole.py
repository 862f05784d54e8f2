"""RecBole's SASRec and GRU4Rec on the files of scientific_small: theirs in results/parity/theirs.csv, as parity.py reads them.

    python -m venv theirs && theirs/bin/pip install torch recbole==1.2.1        # an environment of its own: it needs nothing of ours
    # with torch 2.6 and newer: weights_only=False where recbole/trainer/trainer.py loads its own checkpoint (two lines)
    theirs/bin/python studies/parity_recbole.py --data DIR --seeds 3 --csv results/parity/theirs.csv

RecBole keeps the first items of a history that is too long; the files are cut to the last 20 beforehand. It ranks all items, seen
ones too, stops after an eleventh epoch without a better validation NDCG@10, and keeps the later of equals, as we do.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from pathlib import Path
from typing import Any

DOMAIN, LONGEST = "scientific_small", 20
SOURCE = "RecBole 1.2.1"
COMMON: dict[str, Any] = {
    "use_gpu": False,
    "show_progress": False,
    "state": "ERROR",
    "reproducibility": True,
    "benchmark_filename": ["train", "valid", "test"],
    "alias_of_item_id": ["item_id_list"],
    "load_col": {"inter": ["user_id", "item_id_list", "item_id"]},
    "MAX_ITEM_LIST_LENGTH": LONGEST,
    "seq_len": {"item_id_list": LONGEST},
    "train_neg_sample_args": None,
    "loss_type": "CE",
    "eval_args": {"mode": {"valid": "full", "test": "full"}, "order": "TO", "group_by": "user", "split": {"LS": "valid_and_test"}},
    "metrics": ["Hit", "NDCG"],
    "topk": [10],
    "valid_metric": "NDCG@10",
    "metric_decimal_place": 6,
    "learner": "adam",
    "learning_rate": 1e-3,
    "weight_decay": 0.0,
    "train_batch_size": 1024,
    "eval_batch_size": 2048,
    "epochs": 300,
    "stopping_step": 10,
}
MODELS: dict[str, dict[str, Any]] = {
    "SASRec": {
        "hidden_size": 64,
        "n_layers": 2,
        "n_heads": 2,
        "inner_size": 256,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.5,
        "attn_dropout_prob": 0.5,
        "layer_norm_eps": 1e-12,
        "initializer_range": 0.02,
    },
    "GRU4Rec": {"embedding_size": 64, "hidden_size": 128, "num_layers": 1, "dropout_prob": 0.3},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help=f"holds {DOMAIN}")
    parser.add_argument("--csv", type=Path, required=True, metavar="FILE", help="gets a row a run")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="0 to N - 1 (default: 3)")
    told = parser.parse_args()
    sys.argv = sys.argv[:1]  # RecBole reads it too
    with tempfile.TemporaryDirectory() as name:
        cut(told.data / DOMAIN, Path(name) / DOMAIN)
        for seed in range(told.seeds):
            for model in told.models:
                if (model.lower(), seed) not in done(told.csv):
                    add(told.csv, {"model": model.lower(), "seed": seed, **run(model, seed, Path(name)), "source": SOURCE})
    return 0


def cut(raw: Path, folder: Path) -> None:
    """The interaction files with histories of the last 20 items, under the names that RecBole expects."""
    folder.mkdir()
    for file in raw.glob("*.inter"):
        head, *lines = file.read_text(encoding="utf-8").splitlines()
        rows = (line.split("\t") for line in lines)
        kept = [f"{user}\t{' '.join(items.split()[-LONGEST:])}\t{item}" for user, items, item in rows]
        (folder / f"{DOMAIN}.{file.name.split('.', 1)[1]}").write_text("\n".join([head, *kept]) + "\n", encoding="utf-8")


def run(model: str, seed: int, folder: Path) -> dict[str, Any]:
    """One training to its end, by RecBole alone."""
    from recbole.config import Config  # type: ignore[import-not-found]
    from recbole.data import create_dataset, data_preparation  # type: ignore[import-not-found]
    from recbole.utils import get_model, get_trainer, init_seed  # type: ignore[import-not-found]

    places = {"data_path": str(folder), "checkpoint_dir": str(folder / "saved"), "seed": seed}
    config = Config(model=model, dataset=DOMAIN, config_dict={**COMMON, **MODELS[model], **places})
    init_seed(seed, reproducibility=True)
    train, valid, test = data_preparation(config, create_dataset(config))
    init_seed(seed, reproducibility=True)
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, get_model(model)(config, train.dataset).to(config["device"]))
    best, _ = trainer.fit(train, valid, verbose=False, saved=True)
    found = trainer.evaluate(test, load_best_model=True)
    return {"valid ndcg@10": float(best), "test hit@10": float(found["hit@10"]), "test ndcg@10": float(found["ndcg@10"])}


def done(file: Path) -> set[tuple[str, int]]:
    """Which (model, seed) the file has."""
    if not file.exists():
        return set()
    with file.open(newline="", encoding="utf-8") as rows:
        return {(row["model"], int(row["seed"])) for row in csv.DictReader(rows)}


def add(file: Path, row: dict[str, Any]) -> None:
    new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    sys.exit(main())
