"""Facts about the modality stress test: what it counts, and what its damage does to a model of pictures alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("ray", reason="studies need Ray")

from conftest import TINY_MODEL

from mmm4rec.config import from_dict
from mmm4rec.data.domain import Domain
from mmm4rec.data.features import Damage
from mmm4rec.execute import execute
from mmm4rec.run import RunConfig
from studies import robustness


def trained(domain: Domain, out: Path, **model: object) -> str:
    plain = {"data": {"domains": [str(domain.path)]}, "model": {**TINY_MODEL, **model}, "training": {"epochs": 1}, "device": "cpu"}
    for _ in execute(from_dict(RunConfig, plain, source="test"), out):
        pass
    return str(out / "best.safetensors")


def test_damage_is_none_once_and_then_every_modality_kind_and_rate() -> None:
    found = robustness.damages((0.0, 0.5, 1.0), seeds=2)
    assert len(found) == len(set(found)) == 2 * (1 + 2 * 2 * 2)
    assert robustness.told_of(Damage(seed=1)) == [(m, k, 0.0) for m in ("text", "image") for k in ("drop", "corrupt")]
    assert robustness.told_of(Damage(corrupt_image=0.5)) == [("image", "corrupt", 0.5)]


@pytest.mark.slow
def test_buckets_split_the_users_and_what_a_model_does_not_read_does_not_hurt_it(
    make_domain: Callable[..., Domain], tmp_path: Path
) -> None:
    domain = make_domain(users=80, items=300)
    model = trained(domain, tmp_path / "run", modalities="image", ids=False)
    rows = pd.DataFrame(
        [row for damage in robustness.damages((0.0, 1.0), 1) for row in robustness.ranked("test time", model, str(domain.path), damage)]
    )
    whole = rows[(rows["rate"] == 0) & (rows["modality"] == "image") & (rows["kind"] == "drop")].set_index("target")
    assert whole.loc["all", "users"] == whole.drop("all")["users"].sum() == len(domain.examples("test").users)
    weighted = (whole.drop("all")["ndcg"].fillna(0.0) * whole.drop("all")["users"]).sum() / whole.loc["all", "users"]
    assert weighted == pytest.approx(whole.loc["all", "ndcg"])
    users, ends = domain.examples("train")
    counts = np.bincount(domain.items[domain.offsets[users] + ends], minlength=301)
    users, ends = domain.examples("test")
    cold = (counts[domain.items[domain.offsets[users] + ends]] == 0).sum()
    assert whole.loc["0", "users"] == cold > 0
    everyone = rows[rows["target"] == "all"].set_index(["modality", "kind", "rate"])["ndcg"]
    assert everyone["text", "drop", 1.0] == everyone["text", "corrupt", 1.0] == everyone["text", "drop", 0.0]
    # without a picture all items are alike to it: the target ties with all, rank 150.5 of 300
    assert everyone["image", "drop", 1.0] == 0.0
    text = robustness.write(tmp_path / "out", rows.to_dict("records"))
    assert f"0 ({cold} users)" in text
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {"robustness.csv", "robustness.md", "stress.png", "popularity.svg"}


def test_wrong_flags_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert robustness.main(["--model", str(tmp_path)]) == 2
    assert robustness.main(["--rates", "1.5", "--work", str(tmp_path)]) == 2
    assert "rates are from 0 to 1" in capsys.readouterr().err
