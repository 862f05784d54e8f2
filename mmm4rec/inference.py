"""A trained model put to use: open it on a domain, recommend the next items of its users."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from mmm4rec.config import from_dict
from mmm4rec.data.batches import DomainData, in_order
from mmm4rec.errors import BadInput
from mmm4rec.models.recommender import Recommender
from mmm4rec.run import DataConfig, RunConfig, assemble
from mmm4rec.training.checkpoint import load_model
from mmm4rec.training.evaluate import EVALUATION_BATCH


def open_model(model_file: str | Path, domain: str | Path, *, device: str = "auto") -> tuple[Recommender, DomainData, torch.device]:
    """The model of a `best.safetensors` on a domain, ready to rank.

    A model with ids ranks the domain that it was trained on; one without ids ranks any domain that has
    features of its encoder (zero-shot). Raises BadInput when model and domain do not fit.
    """
    weights, metadata = load_model(model_file)
    config = from_dict(RunConfig, metadata["config"], source=str(model_file))
    data = DataConfig(domains=(str(domain),), shuffle_features=config.data.shuffle_features)
    assembled = assemble(replace(config, data=data, init=str(model_file), device=device, training=replace(config.training, epochs=0)))
    fingerprint = assembled.domains[0].fingerprint
    if config.model.ids and fingerprint not in metadata["fingerprints"].values():
        rule = f"has item ids of another domain ({metadata['fingerprints']}); this one is {fingerprint}."
        raise BadInput(rule, file=model_file, remedy="Fine-tune it here: mmm4rec train --init")
    model = assembled.run.model
    if config.model.ids or config.recommender != "mmm4rec":
        model.load_state_dict(weights)
    return model.eval(), assembled.run.data[0], assembled.run.device


@torch.inference_mode()
def recommend(
    model: Recommender, data: DomainData, device: torch.device, *, users: Sequence[str] | None = None, top: int = 10
) -> Iterator[dict[str, Any]]:
    """For each user (by the source's id) the `top` items after the whole history: `user`, `items`, `scores`.

    Items of the history stay candidates: people buy some things again. Raises BadInput on an unknown user.
    """
    domain = data.domain
    user_ids = pd.Index(pd.read_parquet(domain.path / "users.parquet")["user"])
    numbers = np.arange(domain.n_users) if users is None else user_ids.get_indexer(pd.Index(users))
    if (numbers < 0).any():
        rule = f"domain '{domain.name}' has no user '{users[int(np.argmin(numbers))]}'." if users else ""
        raise BadInput(rule, file=domain.path / "users.parquet", remedy="Use ids of the source, as in users.parquet.")
    item_ids = domain.item_table()["item"].to_numpy()
    catalogue = model.items(data.features)
    for block, ends in in_order(numbers, np.diff(domain.offsets)[numbers], EVALUATION_BATCH):
        batch = data.inputs(block, ends).to(device)
        scores = model.scores(model.users(batch, catalogue), catalogue)
        scores[:, 0] = -torch.inf
        best = scores.topk(min(top, domain.n_items), dim=1)
        for user, items, values in zip(batch.users, best.indices.cpu().numpy(), best.values.tolist(), strict=True):
            yield {"user": str(user_ids[user]), "items": item_ids[items - 1].tolist(), "scores": values}
