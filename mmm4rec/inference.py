"""A trained model put to use: open it on a domain, recommend the next items of its users."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from mmm4rec.config import from_dict
from mmm4rec.data.batches import DomainData, cut, in_order
from mmm4rec.data.domain import open_domain
from mmm4rec.data.features import load_features
from mmm4rec.device import choose_device
from mmm4rec.errors import BadInput
from mmm4rec.models.kinds import KINDS, Shop, anywhere
from mmm4rec.models.recommender import Recommender
from mmm4rec.run import RunConfig, check_encoders, check_unseen, domain_data
from mmm4rec.training.checkpoint import load_model
from mmm4rec.training.evaluate import Ranking


def open_model(
    model_file: str | Path, domain_folder: str | Path, *, device: str = "auto", unseen: bool = False, mask_seen: bool | None = None
) -> tuple[Recommender, DomainData, torch.device]:
    """The model of a `best.safetensors` on a domain, ready to rank.

    A model with something learned for single items ranks the domain that it was trained on; another
    ranks any domain that has features of its encoder (zero-shot). With `unseen`, a model that was
    pre-trained on the domain's own test targets is refused. `mask_seen` None: as in the model's own run.
    Raises BadInput when model and domain do not fit.
    """
    weights, metadata = load_model(model_file)
    config = from_dict(RunConfig, metadata["config"], source=str(model_file))
    config = replace(config, model=anywhere(config.model))
    domain, chosen = open_domain(domain_folder), choose_device(device)
    told = config.data
    features = load_features(domain, config.model.streams, shuffle_seed=told.shuffle_features, damage=told.damage)
    if config.model.per_item and domain.fingerprint not in metadata["fingerprints"].values():
        known = ", ".join(f"'{name}' ({mark})" for name, mark in metadata["fingerprints"].items()) or "a domain that it does not name"
        rule = f"has learned single items of {known}; domain '{domain.name}' is {domain.fingerprint}."
        remedy = (
            "Fine-tune it on this domain: mmm4rec train --init; or bind an imported checkpoint to its domain: import-published --domain"
        )
        raise BadInput(rule, file=model_file, remedy=remedy)
    if config.model.time and domain.timestamps is None:
        raise BadInput(f"reads times, and domain '{domain.name}' has none.", file=model_file, remedy="Train with model.time=false.")
    check_encoders(metadata, [features], [domain], model_file)
    if unseen:
        check_unseen(metadata, [domain], model_file)
    shop = Shop(domain, metadata["n_items"], metadata["feature_dimensions"])
    model = KINDS[config.recommender].build(config.model, shop)
    model.load_state_dict(weights)
    if mask_seen is not None:
        config = replace(config, data=replace(config.data, mask_seen=mask_seen))
    return model.to(chosen).eval(), domain_data(config, domain, features.to(chosen)), chosen


@torch.inference_mode()
def recommend(
    model: Recommender, data: DomainData, device: torch.device, *, users: Sequence[str] | None = None, top: int = 10
) -> Iterator[dict[str, Any]]:
    """For each user (by the source's id) the `top` items after the whole history: `user`, `items`, `scores`.

    Items of the history stay candidates, for people buy some things again, unless `data.mask_seen`.
    Raises BadInput on an unknown user.
    """
    domain = data.domain
    user_ids = pd.Index(pd.read_parquet(domain.path / "users.parquet")["user"])
    numbers = np.arange(domain.n_users) if users is None else user_ids.get_indexer(pd.Index(users))
    if (numbers < 0).any():
        rule = f"domain '{domain.name}' has no user '{users[int(np.argmin(numbers))]}'." if users else ""
        raise BadInput(rule, file=domain.path / "users.parquet", remedy="Use ids of the source, as in users.parquet.")
    item_ids = domain.item_table()["item"].to_numpy()
    ranking = Ranking(model, data, device)
    at_once = 1024 if data.features.one_block else 65_536  # users; a larger catalogue is computed again each time
    for block, ends in in_order(numbers, np.diff(domain.offsets)[numbers], at_once):
        parts = cut(np.minimum(ends, data.max_len), device)
        encoded = torch.cat([ranking.encode(data.inputs(block[part], ends[part])) for part in parts])
        values, items = _best(ranking, encoded, block, ends, top)
        for user, best_items, best_values in zip(block, items, values, strict=True):
            kept = np.isfinite(best_values)  # not what is masked
            yield {"user": str(user_ids[user]), "items": item_ids[best_items[kept] - 1].tolist(), "scores": best_values[kept].tolist()}


def _best(ranking: Ranking, encoded: Tensor, users: np.ndarray, ends: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """The highest scores of each encoded user over all blocks, and their items: [U, top], or [U, I] if there are fewer."""
    values, items = encoded.new_empty(len(encoded), 0), torch.empty(len(encoded), 0, dtype=torch.long, device=encoded.device)
    for blocks_first, of_block in groupby(ranking.scores(encoded, users, ends), key=itemgetter(0)):
        best = [scores.topk(min(top, scores.shape[1]), dim=1) for _, _, scores in of_block]
        values = torch.cat([values, torch.cat([part.values for part in best])], dim=1)
        items = torch.cat([items, blocks_first + torch.cat([part.indices for part in best])], dim=1)
        values, order = values.topk(min(top, values.shape[1]), dim=1)
        items = items.gather(1, order)
    return values.cpu().numpy(), items.cpu().numpy()
