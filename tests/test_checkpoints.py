"""Facts about the checkpoints of a long run: when they are written, which are kept, which one is gone on from."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from test_storage import moto, place, s3  # noqa: F401 (fixtures)
from test_training import tiny

from mmm4rec.data.domain import Domain
from mmm4rec.errors import BadInput
from mmm4rec.run import RunConfig, assemble
from mmm4rec.training.checkpoint import _packed, _unpacked
from mmm4rec.training.loop import EpochReport, Run, fit
from studies import checkpoints as module
from studies.checkpoints import RecentCheckpoints, checkpoints_in, newest_steps
from studies.storage import Storage

MakeDomain = Callable[..., Domain]
WHICH = {"run": "this one", "config": {"data": {}}, "fingerprints": {}, "features": {}, "init": None}


def config(domain: Domain, **training: Any) -> RunConfig:
    return tiny(domain, model={"dropout": 0.0}, training={"accumulation": 1, "steps_between_reports": 1, **training})


def go_on(run: Run, kept: RecentCheckpoints, reports: int) -> None:
    with kept:
        for report in islice(fit(run), reports):
            kept.save(run, WHICH, epoch_over=isinstance(report, EpochReport))


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def test_the_last_ones_are_kept_and_a_run_goes_on_from_the_newest(make_domain: MakeDomain, place: Storage, tmp_path: Path) -> None:  # noqa: F811
    """Every 2 steps and 3 of them: after 9 steps those of 4, 6 and 8; a new run is then where the first was after 8."""
    domain = make_domain()
    run, after_8 = assemble(config(domain)).run, assemble(config(domain)).run
    list(islice(fit(after_8), 8))
    go_on(run, RecentCheckpoints(place, tmp_path / "scratch", keep=3, every_steps=2), 9)
    assert checkpoints_in(place) == ["0000000004.ckpt", "0000000006.ckpt", "0000000008.ckpt"]
    assert newest_steps(place) == 8
    again = assemble(config(domain)).run
    assert RecentCheckpoints(place, tmp_path / "other").load(again, WHICH)
    assert (again.state.optimizer_steps, again.state.epoch_steps) == (8, 8)
    assert all(torch.equal(value, weights(after_8)[name]) for name, value in weights(again).items())
    next(iter(fit(again)))
    next(iter(fit(after_8)))
    assert all(torch.equal(value, weights(after_8)[name]) for name, value in weights(again).items())


def test_a_broken_one_is_passed_over_and_one_of_another_run_is_refused(make_domain: MakeDomain, tmp_path: Path) -> None:
    place = Storage(str(tmp_path / "kept"))  # noqa: F811
    domain = make_domain()
    go_on(assemble(config(domain)).run, RecentCheckpoints(place, tmp_path, every_steps=3), 7)
    newest = tmp_path / "kept" / "0000000006.ckpt"
    newest.write_bytes(newest.read_bytes()[:1000])
    again = assemble(config(domain)).run
    assert RecentCheckpoints(place, tmp_path).load(again, WHICH)
    assert again.state.optimizer_steps == 3
    assert not newest.exists(), "what comes anew has lower numbers, and must stay"
    with pytest.raises(BadInput, match="another run"):
        RecentCheckpoints(place, tmp_path).load(again, {**WHICH, "init": "other weights"})
    for file in (tmp_path / "kept").iterdir():
        file.write_bytes(b"")
    with pytest.raises(BadInput, match="none is whole"):
        RecentCheckpoints(place, tmp_path).load(again, WHICH)


def test_they_come_by_seconds_too_and_after_each_epoch(make_domain: MakeDomain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    place, run = Storage(str(tmp_path / "kept")), assemble(config(make_domain(), batch_size=50, epochs=1)).run  # noqa: F811
    steps = len(run.sampler)
    with (kept := RecentCheckpoints(place, tmp_path, keep=99, every_seconds=10.0)):
        for report in fit(run):
            now[0] += 4.0
            kept.save(run, WHICH, epoch_over=isinstance(report, EpochReport))
    assert checkpoints_in(place) == [f"{step:010d}.ckpt" for step in sorted({*range(3, steps + 1, 3), steps})]


def test_training_goes_on_while_one_is_written_and_its_state_is_that_of_its_step(
    make_domain: MakeDomain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go, write = threading.Event(), threading.Event(), module.write_content

    def slowly(path: Path, content: dict[str, Any]) -> None:
        begun.set()
        assert go.wait(20)
        write(path, content)

    monkeypatch.setattr(module, "write_content", slowly)
    monkeypatch.setattr("mmm4rec.training.checkpoint.PACKED_NUMBERS", 0)  # large tensors are the run's own until they are copied
    place, domain = Storage(str(tmp_path / "kept")), make_domain()  # noqa: F811
    run = assemble(config(domain)).run
    with (kept := RecentCheckpoints(place, tmp_path, every_steps=2)):
        reports = fit(run)
        list(islice(reports, 2))
        at_2 = weights(run)
        kept.save(run, WHICH, epoch_over=False)
        assert begun.wait(20)
        next(reports)
        kept.save(run, WHICH, epoch_over=False)  # not due: does not wait
        assert checkpoints_in(place) == []
        go.set()
    again = assemble(config(domain)).run
    assert RecentCheckpoints(place, tmp_path).load(again, WHICH)
    assert all(torch.equal(value, at_2[name]) for name, value in weights(again).items())


def test_a_storage_that_takes_nothing_ends_the_run(make_domain: MakeDomain, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("a file")
    run = assemble(config(make_domain())).run
    with pytest.raises(OSError, match="kept"):
        go_on(run, RecentCheckpoints(Storage(str(tmp_path / "kept")), tmp_path, every_steps=1), 4)


def test_small_tensors_are_packed_by_device_too() -> None:
    """On a GPU NAdam's counts are on the CPU, and its moments are not; `meta` stands for the GPU."""
    tensors = {"count": torch.ones(()), "moment": torch.ones(3, device="meta"), "other": torch.arange(2.0)}
    packed = _packed(tensors)
    assert [list(piece["shapes"]) for piece in packed["pieces"]] == [["count", "other"], ["moment"]]
    assert {name: value.shape for name, value in _unpacked(packed).items()} == {name: value.shape for name, value in tensors.items()}
