"""Small domains that tests share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from mmm4rec.data.demo import DemoConfig, write_demo
from mmm4rec.data.domain import Domain, open_domain, write_domain
from mmm4rec.data.features import add_features

torch.set_num_threads(1)


@pytest.fixture
def make_domain(tmp_path: Path) -> Callable[..., Domain]:
    """Writes a random domain: users with 4 to 12 interactions, times, text and image features."""

    def make(
        name: str = "shop",
        *,
        users: int = 60,
        items: int = 30,
        seed: int = 0,
        timestamps: bool = True,
        modalities: tuple[str, ...] = ("text", "image"),
        change: Callable[[np.ndarray, np.ndarray, np.ndarray], None] | None = None,
    ) -> Domain:
        random = np.random.default_rng(seed)
        counts = random.integers(4, 13, users)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        sequence = random.integers(1, items + 1, offsets[-1])
        times = np.concatenate([1_500_000_000 + np.cumsum(random.integers(60, 10**6, n)) for n in counts])
        if change is not None:
            change(offsets, sequence, times)
        table = pd.DataFrame({"item": [f"i{k}" for k in range(items)], "text": [f"thing {k}" for k in range(items)], "image": None})
        write_domain(
            tmp_path / name,
            name=name,
            offsets=offsets,
            items=sequence,
            timestamps=times if timestamps else None,
            item_table=table,
            user_ids=[f"u{k}" for k in range(users)],
            tie_break="none",
            provenance={},
            force=True,
        )
        domain = open_domain(tmp_path / name)
        for modality in modalities:
            vectors = random.standard_normal((items, 12 if modality == "text" else 10)).astype(np.float32)
            add_features(domain, modality, vectors, np.ones(items, dtype=bool), encoder=f"random-{modality}")  # type: ignore[arg-type]
        return domain

    return make


TINY_MODEL = {"width": 16, "ffn_width": 16, "head_width": 8, "state": 8, "max_len": 8}
TINY_SHOPS = DemoConfig(
    sources=("bazaar",), targets=("attic",), source_users=80, source_items=40, target_users=60, target_items=40, dimensions=8
)
TINY_STUDY = {
    "study": "tiny",
    "domains": {"demo": True},
    "model": {"width": 16, "ffn_width": 16, "head_width": 8, "state": 8},
    "training": {"batch_size": 64, "accumulation": 1},
    "pretrain": {"sources": ["bazaar"], "training": {"epochs": 2, "batch_size": 64, "accumulation": 1}, "workers": 2},
    "space": {
        "training.learning_rate": {"low": 1e-3, "high": 1e-1, "log": True},
        "model.filter_size": {"choices": [2, 4]},
        "model.dropout": {"low": 0.0, "high": 0.5},
    },
    "arms": {
        "pretrained": {"init": "pretrained"},
        "scratch": {},
        "no_time": {"init": "pretrained", "model": {"time": False}},
        "popularity": {"recommender": "popularity"},
    },
    "cells": [{"domains": ["attic"], "arms": ["pretrained", "scratch", "no_time", "popularity"]}],
    "baseline": "scratch",
    "budget": {"search_trials": 3, "epochs": 4, "grace_epochs": 1, "reduction": 2, "confirm_seeds": 2},
}


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An mlflow.db with its tables: making them takes seconds."""
    pytest.importorskip("mlflow")
    from studies.mlflow_store import fold_wal, open_store, store_uri

    folder = tmp_path_factory.mktemp("store")
    open_store(store_uri(folder))
    fold_wal(store_uri(folder))
    return folder / "mlflow.db"


@pytest.fixture(scope="session")
def tiny_begun(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Path:
    """The folder of the tiny study with its domains and an empty store, to be copied."""
    folder = tmp_path_factory.mktemp("begun") / "tiny"
    write_demo(folder / "domains", config=TINY_SHOPS)
    shutil.copy(empty_store, folder)
    return folder
