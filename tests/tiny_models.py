"""Every recommender in a size for tests, and what tests do with one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import TINY_MODEL
from torch import Tensor

from mmm4rec.config import from_dict
from mmm4rec.data.domain import Domain
from mmm4rec.execute import execute
from mmm4rec.run import Assembled, RunConfig, assemble
from mmm4rec.training.evaluate import Ranking

TINY: dict[str, dict[str, Any]] = {
    "mmm4rec": TINY_MODEL,
    "popularity": {},
    "last_item": {},
    "item_knn": {"max_len": 8, "neighbours": 5},
    "gru4rec": {"width": 16, "recurrent_width": 16, "max_len": 8},
    "sasrec": {"width": 16, "ffn_width": 16, "max_len": 8},
    "bsarec": {"width": 16, "ffn_width": 16, "max_len": 8},
    "mamba4rec": {"width": 16, "state": 4, "max_len": 8},
    "tim4rec": {"width": 16, "ffn_width": 16, "head_width": 8, "state": 8, "max_len": 8},
    "unisrec": {"width": 16, "ffn_width": 16, "experts": 3, "max_len": 8},
    "missrec": {"width": 16, "ffn_width": 16, "max_len": 8},
    "hm4sr": {"width": 16, "ffn_width": 16, "experts": 2, "time_experts": 2, "interval_scale": 2, "max_len": 8},
}


def told(name: str, domains: Domain | list[Domain], model: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    folders = [str(domain.path) for domain in (domains if isinstance(domains, list) else [domains])]
    training = {"epochs": 2, "batch_size": 32, "accumulation": 2, "learning_rate": 3e-3, **sections.pop("training", {})}
    data = {"domains": folders, **sections.pop("data", {})}
    plain = {"recommender": name, "model": {**TINY[name], **(model or {})}, "data": data, "training": training, "device": "cpu"}
    return from_dict(RunConfig, {**plain, **sections}, source="test")


def drain(config: RunConfig, out: Path, **options: bool) -> dict[str, Any]:
    reports = execute(config, out, **options)
    while True:
        try:
            next(reports)
        except StopIteration as stop:
            return stop.value


def scores(assembled: Assembled, users: np.ndarray, ends: np.ndarray) -> Tensor:
    """Of all real items for the examples (users[k], ends[k]), encoded as one batch: [U, I]."""
    run = assembled.run
    run.model.eval()
    with torch.inference_mode():
        ranking = Ranking(run.model, run.data[0], run.device)
        encoded = ranking.encode(run.data[0].inputs(users, ends))
        return torch.cat([part.clone() for _, _, part in ranking.scores(encoded, users, ends)])


def stirred(config: RunConfig) -> Assembled:
    """A run whose weights are not those of its start, where some parts are zero."""
    assembled = assemble(config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in assembled.run.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return assembled
