"""The engine's benchmark: its overheads are those worked by hand, and a small one runs through Ray."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from studies import benchmark, benchmark_engine
from studies.benchmark_engine import disk_bytes, gaps, neighbours, overheads, table, timed
from studies.cells import Source, build_cells


def note(process: int, began: float, ended: float, *, epochs: float = 0.0, disk: int = 0) -> dict[str, Any]:
    return {"process": process, "began": began, "ended": ended, "epochs_seconds": epochs, "disk_bytes": disk}


def test_overheads_of_two_slots_by_hand() -> None:
    """Slot 1: 0 to 2, then 2.5 to 4.5; slot 2: 0 to 3, then 3.25 to 5.25; of each second trial 1.5 s are its epochs."""
    times = [note(1, 0, 2), note(2, 0, 3), note(1, 2.5, 4.5, epochs=1.5), note(2, 3.25, 5.25, epochs=1.5)]
    assert gaps(times) == [0.5, 0.25]
    assert overheads(times) == [1.0, 0.75]


def test_a_process_keeps_its_slot_and_the_start_of_a_new_one_is_overhead() -> None:
    times = [note(1, 0, 10), note(2, 0, 11), note(1, 12, 20), note(3, 15, 21)]
    assert [(before["process"], after["process"]) for before, after in neighbours(times)] == [(1, 1), (2, 3)]
    assert gaps(times) == [2, 4]


def test_what_is_read_from_the_disk_counts_from_a_process_first_trial() -> None:
    times = [note(1, 0, 1, disk=100), note(2, 0, 1, disk=120), note(1, 1, 2, disk=100), note(2, 1, 2, disk=125)]
    assert disk_bytes(times) == {"first_trials": 220, "later_trials": 5}


def test_functions_are_timed_inside_only_also_those_that_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0, 10.0, 11.0])
    monkeypatch.setattr(benchmark_engine.time, "perf_counter", lambda: next(clock))

    def broken() -> None:
        raise ValueError("broken")

    module = SimpleNamespace(double=lambda x: 2 * x, broken=broken)
    before = vars(module).copy()
    with timed(module, ["double", "broken"]) as seconds:
        assert module.double(3) == 6
        with pytest.raises(ValueError, match="broken"):
            module.broken()
    assert seconds == {"double": 2.0, "broken": 1.0}
    assert vars(module) == before


def test_the_study_has_as_many_trials_as_asked_for() -> None:
    cells, _ = build_cells(benchmark_engine.spec(1000, epochs=1), {"attic": Source("", "", True)})
    assert sum(cell.search_trials + cell.confirm_seeds for cell in cells) == 1000


def test_too_few_trials_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        benchmark.main(["--engine", "--trials", "8", "--out", str(tmp_path)])
    assert error.value.code == 2
    assert "at least 24" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the driver's memory from /proc, which Linux has")
def test_a_small_one_runs_in_reused_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_engine, "REAL_TRIALS", 24)
    text = benchmark_engine.measure(tmp_path, 24, benchmark.machine("engine"))
    assert text == (tmp_path / "benchmark_engine.md").read_text(encoding="utf-8")
    found = json.loads((tmp_path / "benchmark_engine.json").read_text(encoding="utf-8"))
    assert text == table(found)
    for part in ("sleeping", "real"):
        assert found[part]["trials"] == 24
        assert 1 <= found[part]["processes"] <= 2  # on a busy machine one may do them all before the other is up
        assert found[part]["overhead_seconds"]["median"] > 0
    assert found["sleeping"]["times_the_ideal"] > 1
    inside = found["real"]["inside_seconds"]
    assert all(0 < inside[name]["median"] < inside["whole"]["median"] for name in benchmark_engine.PARTS)
