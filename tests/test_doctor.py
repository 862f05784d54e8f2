"""The doctor: what it finds of a machine, and a leak check that passes what is clean and catches what is not."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_MODEL

from mmm4rec import doctor, leak
from mmm4rec.__main__ import main
from mmm4rec.data.batches import Batch, DomainData
from mmm4rec.data.domain import Domain
from mmm4rec.errors import BadInput
from mmm4rec.inference import open_model
from mmm4rec.leak import AFTER, BATCH, ITEM, PADDING, SMALL, TIME, check_leaks, generated_model
from mmm4rec.models import ssd
from mmm4rec.models.mmm4rec import MMM4Rec, ModelConfig
from mmm4rec.models.quirks import Quirks
from mmm4rec.models.recommender import Catalogue, Recommender

HARMLESS = ("raw_gap_dropout", "scaled_skip", "tiny_epsilon", "padding_class", "summed_accumulation")
CLEAN: list[dict[str, Any]] = [
    {},
    {"modalities": "text"},
    {"modalities": "image", "time": False},
    {"ids": False},
    {"time_encoding": "layer_norm", "time_step": "scale"},
    {"time_encoding": "masked_norm", "filter": False},
    {"max_len": 2},
    {"scan": "triton"},
    *({"quirks": Quirks(**{name: True})} for name in HARMLESS),
]


def small(**switches: Any) -> tuple[Recommender, DomainData]:
    return generated_model(ModelConfig(**{**SMALL, "layers": 1, **switches}), users=30)


def published(**switches: Any) -> tuple[Recommender, DomainData]:
    return generated_model(ModelConfig.published(**{**SMALL, "layers": 1, **switches}), users=30)


@pytest.mark.parametrize("switches", CLEAN, ids=str)
def test_what_reads_no_more_than_the_history_is_clean(switches: dict[str, Any]) -> None:
    """What the domain holds beyond the history changes no bit; another order of sums is far below the tolerance."""
    report = check_leaks(*small(**switches))
    assert report.verdict == "clean"
    changes = {finding.alteration: finding.change for finding in report.findings}
    assert (changes[ITEM], changes[TIME], changes[AFTER]) == (0, 0, 0)
    assert max(changes[PADDING] or 0, changes[BATCH] or 0) < 1e-12


@pytest.mark.parametrize(
    ("quirks", "leaks"),
    [
        (Quirks(label_time=True), (TIME,)),
        (Quirks(zero_stamps=True), (PADDING,)),
        (Quirks(label_time=True, zero_stamps=True), (TIME, PADDING)),
    ],
    ids=["label_time", "zero_stamps", "both"],
)
@pytest.mark.parametrize("base", [small, published])
def test_each_time_quirk_is_named_by_what_it_lets_in(
    base: Callable[..., tuple[Recommender, DomainData]], quirks: Quirks, leaks: tuple[str, ...]
) -> None:
    assert check_leaks(*base(quirks=quirks)).leaks == leaks


def test_the_release_leaks_where_the_history_leaves_room() -> None:
    """A history of max_len items leaves no position for the target's time; padding begins one position later still."""
    report = check_leaks(*generated_model(ModelConfig.published(**SMALL)))
    assert report.verdict == "LEAKS: the target's time, padding"
    lengths = {finding.alteration: finding.lengths for finding in report.findings}
    assert lengths[TIME] == tuple(range(1, report.max_len))
    assert lengths[PADDING] == tuple(range(1, report.max_len - 1))
    assert report.longest > report.max_len
    assert check_leaks(*published(time=False)).leaks == ()


class ReadsTargets(MMM4Rec):
    def users(self, batch: Batch, catalogue: Catalogue) -> torch.Tensor:
        return super().users(batch, catalogue) + 1e-6 * catalogue.candidates[batch.targets]


class AveragesAllPositions(MMM4Rec):  # of a window
    def users(self, batch: Batch, catalogue: Catalogue) -> torch.Tensor:
        return catalogue.candidates[batch.items].mean(1)[batch.packing.last // batch.items.shape[1]]


class CentresTheBatch(MMM4Rec):
    def users(self, batch: Batch, catalogue: Catalogue) -> torch.Tensor:
        users = super().users(batch, catalogue)
        return users - 1e-6 * users.mean(0)


class ReadsPaddedGaps(MMM4Rec):
    def users(self, batch: Batch, catalogue: Catalogue) -> torch.Tensor:
        assert batch.gap_seconds is not None
        return super().users(batch, catalogue) * (1 + 1e-9 * batch.gap_seconds.double().sum(1)[:, None])


@pytest.mark.parametrize(
    ("broken", "leaks"),
    [
        (ReadsTargets, (ITEM,)),
        (AveragesAllPositions, (PADDING, BATCH)),  # alone, an example fills its window
        (CentresTheBatch, (BATCH,)),
        (ReadsPaddedGaps, (PADDING,)),
    ],
)
def test_a_broken_model_is_caught(broken: type[MMM4Rec], leaks: tuple[str, ...]) -> None:
    model, data = small()
    model.__class__ = broken
    found = check_leaks(model, data).leaks
    assert set(leaks) <= set(found), found
    assert (TIME in found, AFTER in found) == (False, False)


def test_a_batch_that_shows_the_future_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Histories one interaction too long hold the target; two, and what follows it."""
    for more, leaks in ((1, (ITEM, TIME)), (2, (ITEM, TIME, AFTER))):

        def shifted(self: DomainData, users: np.ndarray, ends: np.ndarray, more: int = more) -> Batch:
            return self.inputs(users, np.minimum(ends + more, np.diff(self.domain.offsets)[users]))

        monkeypatch.setattr(DomainData, "batch", shifted)
        assert tuple(name for name in check_leaks(*small()).leaks if name != PADDING) == leaks


def test_the_model_and_its_random_state_stay_as_they_are() -> None:
    state = torch.get_rng_state()
    model, data = small()
    model.train()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    check_leaks(model, data)
    assert model.training
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert model.state_dict()["missing.text"].dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), state)


def test_short_histories_say_what_could_not_be_altered() -> None:
    """Two interactions a user and no times: nothing follows the target, and there is no time to move."""
    model, data = small(time=False)
    firsts = data.domain.offsets[:-1]
    items = data.domain.items[np.stack([firsts, firsts + 1], axis=1).ravel()]
    pairs = replace(data.domain, offsets=np.arange(0, len(items) + 1, 2), items=items, timestamps=None)
    report = check_leaks(model, replace(data, domain=pairs))
    assert (report.shortest, report.longest, report.verdict) == (1, 1, "clean")
    assert [finding.alteration for finding in report.findings if finding.change is None] == [TIME, AFTER]
    singles = replace(pairs, offsets=np.arange(len(items) + 1))
    with pytest.raises(BadInput, match="has no history of 2 interactions"):
        check_leaks(model, replace(data, domain=singles))


def test_masked_items_stay_out_of_the_comparison() -> None:
    model, data = small()
    assert check_leaks(model, replace(data, mask_seen=True)).leaks == ()


def test_scores_that_are_not_finite_are_no_clean_bill() -> None:
    model, data = small()
    assert isinstance(model, MMM4Rec)
    with torch.no_grad():
        model.ids["text"].fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        check_leaks(model, data)


def test_leak_check_of_the_command_line(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["doctor", "--leak"]) == 0
    shown = capsys.readouterr().out
    assert "default: clean\npublished: LEAKS: the target's time, padding\nAs expected" in shown
    table = [line for line in shown.splitlines() if line.startswith(("the ", "what ", "padding"))]
    assert len({len(line) for line in table}) == 1
    assert main(["doctor", "--leak", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["passed"]
    assert [(part["variant"], part["leaks"]) for part in values["models"]] == [("default", []), ("published", [TIME, PADDING])]
    assert [finding["alteration"] for finding in values["models"][1]["findings"]] == [ITEM, TIME, AFTER, PADDING, BATCH]
    monkeypatch.setitem(leak.SMALL, "max_len", 1)  # the release reads no gap of a history of one item
    assert main(["doctor", "--leak"]) == 1
    assert "NOT as expected" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sets", "times", "status"),
    [
        ([], True, 0),
        ([], False, 0),
        (["model.modalities=text", "model.ids=false"], True, 0),
        (["recommender=popularity"], True, 0),
        (["recommender=last_item"], False, 0),
        (["model.quirks.label_time=true", "model.time_step=scale", "model.time_encoding=layer_norm"], True, 1),
        (["model.quirks.zero_stamps=true", "data.mask_seen=true"], True, 1),
    ],
    ids=str,
)
def test_a_trained_model_is_checked_on_its_domain(
    sets: list[str], times: bool, status: int, make_domain: Callable[..., Domain], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    domain = str(make_domain(timestamps=times).path)
    tiny = [] if sets and sets[0].startswith("recommender") else [f"model.{key}={value}" for key, value in TINY_MODEL.items()]
    assert main(["train", "--domain", domain, "--out", str(tmp_path / "run"), "--epochs", "1", "--set", *tiny, *sets]) == 0
    capsys.readouterr()
    arguments = ["doctor", "--leak", "--model", str(tmp_path / "run" / "best.safetensors"), "--domain", domain]
    assert main(arguments) == status
    assert ("LEAKS" in capsys.readouterr().out) == bool(status)
    assert main([*arguments, "--json"]) == status
    values = json.loads(capsys.readouterr().out)
    quirks = {"label_time": TIME, "zero_stamps": PADDING}
    assert values["models"][1]["leaks"] == [leak for quirk, leak in quirks.items() if any(quirk in part for part in sets)]


def test_the_domain_on_disk_stays_as_it_is(make_domain: Callable[..., Domain], tmp_path: Path) -> None:
    domain = make_domain()
    before = {path: path.read_bytes() for path in domain.path.rglob("*") if path.is_file()}
    arguments = ["train", "--domain", str(domain.path), "--out", str(tmp_path / "run"), "--set", "recommender=popularity"]
    assert main(arguments) == 0
    model, data, _ = open_model(tmp_path / "run" / "best.safetensors", domain.path, device="cpu")
    check_leaks(model, data)
    assert {path: path.read_bytes() for path in domain.path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--leak", "--model", "a.safetensors"], "only one of --model and --domain"),
        (["--leak", "--domain", "shop"], "only one of --model and --domain"),
        (["--model", "a.safetensors", "--domain", "shop"], "Add --leak"),
        (["--leak", "--model", "nowhere.safetensors", "--domain", "shop"], "nowhere.safetensors"),
    ],
)
def test_bad_input_exits_with_2(arguments: list[str], fragment: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["doctor", *arguments]) == 2
    assert fragment in capsys.readouterr().err


def test_the_machine_as_lines_and_as_data(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["cpu_threads"] == torch.get_num_threads()
    assert facts["torch"] == torch.__version__
    assert (facts["kernel_problem"] is None) <= bool(facts["cuda_devices"])
    device = torch.device("cuda" if facts["cuda_devices"] else "cpu")
    assert facts["auto_scan"] == {str(length): ssd.choose(length, device) for length in (20, 200, 2000)}
    monkeypatch.setitem(doctor.EXTRAS, "encode", ("scikit-learn", "no-such-package"))
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert facts["code_version"] in shown
    assert "no-such-package missing; install: pip install 'mmm4rec[encode]'" in shown
    names = {name for extra in doctor.EXTRAS.values() for name in extra}
    assert all(name in shown for name in names)


def test_a_package_is_found_however_its_name_is_written() -> None:
    assert doctor.machine()["packages"]["postgresql"]["SQLAlchemy"] == pytest.importorskip("sqlalchemy").__version__


def test_the_extras_are_those_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extra, names in doctor.EXTRAS.items():
        declared = {part.split(">")[0].split("[")[0] for part in project["optional-dependencies"][extra]} - {"mmm4rec"}
        assert set(names) == declared
