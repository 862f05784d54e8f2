"""The study's doctor: what its findings say of facts given by hand, and what it finds on two real raylets."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import TINY_SHOPS, TINY_STUDY

from mmm4rec.config import from_dict
from mmm4rec.data.demo import write_demo
from mmm4rec.data.domain import Domain
from mmm4rec.execute import execute
from studies import cost as costs
from studies import doctor_nodes, probe
from studies.cells import Source, build_cells
from studies.cost import BEST, LAST, PARAMETER_BYTES, Weight, expected_cost, expected_search_epochs, expected_survivors, typical_run, weigh
from studies.doctor import check_domains, check_folder, check_journal, check_stores, fill_stores, joined_since, main
from studies.doctor_nodes import Node, judge, judge_clock, judge_disks, judge_domains, judge_gpus, judge_network, judge_versions
from studies.domains import source_of
from studies.findings import Finding, exit_status, table
from studies.plan import survives
from studies.spec import Budget, Resources, Spec, Stores
from studies.state import Journal

NODE = Node("0123456789abcdef", "gpu7 10.0.0.7 (01234567)", 2.0, (6379, 7000))
MACHINE: dict[str, Any] = {
    "python": "3.11.7",
    "torch": "2.13.0",
    "numpy": "2.4.6",
    "ray": "2.60.0",
    "code_version": "0.1.0+a",
    "studies": "b",
    "cuda_devices": [{"name": "H100", "memory_bytes": 80 * 2**30}] * 2,
    "kernel_problem": None,
}
GPU = Resources(gpus=0.5)


def tiny(**changes: object) -> Spec:
    return from_dict(Spec, {**TINY_STUDY, **changes}, source="test")


def levels(findings: list[Finding]) -> list[str]:
    return [finding.level for finding in findings]


@pytest.mark.parametrize(
    ("offset", "uncertainty", "level"),
    [
        (0.9, 0, "ok"),
        (-1.1, 0, "warning"),
        (1.5, 0.6, "ok"),
        (-2.0, 0.6, "warning"),
        (31, 0.5, "error"),
        (-31, 2, "warning"),
        (-40, 2, "error"),
    ],
)
def test_a_clock_is_wrong_by_what_is_certain(offset: float, uncertainty: float, level: str) -> None:
    assert judge_clock(NODE, offset, uncertainty).level == level


@pytest.mark.parametrize("package", ["python", "torch", "numpy", "ray", "code_version", "studies"])
def test_another_version_is_named_with_the_drivers(package: str) -> None:
    (same,) = judge_versions(NODE, MACHINE, MACHINE)
    (other,) = judge_versions(NODE, {**MACHINE, package: "other"}, MACHINE)
    assert (same.level, other.level, other.node) == ("ok", "error", NODE.name)
    assert other.what == f"{package} other, the driver's is {MACHINE[package]}"


@pytest.mark.parametrize(
    ("machine", "resources", "ray_gpus", "expected"),
    [
        ({}, GPU, 2.0, ["ok"]),
        ({"kernel_problem": "no mamba-ssm"}, GPU, 2.0, ["ok", "warning"]),
        ({"cuda_devices": MACHINE["cuda_devices"][:1]}, GPU, 2.0, ["error"]),
        ({"cuda_devices": [], "kernel_problem": "no CUDA"}, GPU, 0.0, ["ok"]),
        ({}, GPU, 0.0, ["warning"]),
        ({}, Resources(), 2.0, ["warning"]),
    ],
    ids=["all well", "no kernel", "torch sees fewer than Ray", "a head without GPUs", "Ray knows of none", "the spec wants none"],
)
def test_gpus_and_kernel(machine: dict[str, Any], resources: Resources, ray_gpus: float, expected: list[str]) -> None:
    findings = judge_gpus(replace(NODE, gpus=ray_gpus), {**MACHINE, **machine}, resources)
    assert levels(findings) == expected
    assert all(finding.remedy for finding in findings if finding.level != "ok")


@pytest.mark.parametrize(
    ("free_gb", "total_gb", "writable", "level"),
    [
        (100, 200, True, "ok"),
        (32, 200, True, "warning"),
        (29, 200, True, "error"),
        (100, 4000, True, "warning"),
        (100, 200, False, "error"),
    ],
)
def test_a_disk_must_hold_what_the_study_may_need(free_gb: int, total_gb: int, writable: bool, level: str) -> None:
    disk = {"place": "/a", "free_bytes": free_gb * 10**9, "total_bytes": total_gb * 10**9, "writable": writable}
    assert levels(judge_disks(NODE, {"trials": disk}, 30 * 10**9)) == [level]


def test_open_ports_without_a_token_are_a_warning() -> None:
    with socket.socket() as everywhere, socket.socket() as here:
        everywhere.bind(("0.0.0.0", 0))
        here.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in (everywhere, here)]
        everywhere.listen()
        here.listen()
        told = probe.network(ports)
    assert told["open_ports"] == ports[:1]
    assert judge_network(NODE, {**told, "token": True}).level == "ok"
    finding = judge_network(NODE, {**told, "token": False})
    assert (finding.level, f"port {ports[0]}" in finding.what) == ("warning", True)


def test_a_question_that_fails_or_hangs_spoils_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks() -> None:
        raise ModuleNotFoundError("No module named 'mmm4rec'")

    monkeypatch.setitem(probe.FUNCTIONS, "machine", breaks)
    monkeypatch.setitem(probe.FUNCTIONS, "domains", lambda places: time.sleep(30))
    questions: dict[str, probe.Question] = {
        "machine": ("machine", {}),
        "domains": ("domains", {"places": {}}),
        "disks": ("disks", {"places": {"trials": "/nowhere"}}),
    }
    answers = probe.ask(questions, 0.3)
    assert answers["disks"]["answer"]["trials"]["place"] == "/"
    expected = doctor_nodes.Expected(MACHINE, Resources(), None, None, {}, None)
    errors = {finding.name: finding for finding in judge(NODE, answers, expected, alone=True) if finding.level == "error"}
    assert set(errors) == {"machine", "domains"}
    assert "no answer within 0.3 seconds" in errors["domains"].what
    assert errors["machine"].remedy == doctor_nodes.SAME_CODE
    assert levels(judge(NODE, None, expected, alone=True)) == ["error"]


def test_a_missing_environment_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOST", "db")
    monkeypatch.delenv("PGSECRET", raising=False)
    stores = Stores(optuna="postgresql://me:${PGSECRET}@${HOST}/optuna", mlflow="http://${HOST}:5000")
    filled, (finding,) = fill_stores(stores)
    assert (filled.optuna, filled.mlflow) == (None, "http://db:5000")
    assert (finding.name, finding.level, finding.remedy) == ("stores.optuna", "error", "export PGSECRET=...")
    monkeypatch.setenv("PGSECRET", "x")
    assert fill_stores(stores)[0].optuna == "postgresql://me:x@db/optuna"


@pytest.mark.timeout(60)
def test_dead_stores_are_errors_without_their_passwords(tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound and not listening: the connection is refused
        taken.bind(("127.0.0.1", 0))
        uri = f"http://me:geheim@127.0.0.1:{taken.getsockname()[1]}"
        findings = check_stores(Stores(mlflow=uri, optuna=f"sqlite:///{tmp_path / 'missing' / 'optuna.sqlite3'}"))
    assert levels(findings) == ["error", "error"]
    assert "geheim" not in table(findings)
    assert "does not answer" in findings[0].what
    assert levels(check_stores(Stores(optuna=f"sqlite:///{tmp_path / 'optuna.sqlite3'}"))) == ["ok", "ok"]


def test_sqlite_on_a_network_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert levels(check_folder(tmp_path / "a" / "b")) == ["ok"]
    monkeypatch.setattr("studies.mounts.network_filesystem", lambda path: "nfs4")
    (finding,) = check_folder(tmp_path / "a" / "b")
    assert (finding.level, "nfs4" in finding.what) == ("error", True)


def test_a_changed_spec_is_told(tmp_path: Path) -> None:
    from mmm4rec.config import to_dict
    from studies.study import UNPINNED

    spec = tiny()
    assert levels(check_journal(spec, tmp_path)) == ["ok"]
    journal = Journal(tmp_path / "study.sqlite3")
    journal.pin("spec", {key: value for key, value in to_dict(spec).items() if key not in UNPINNED})
    journal.pin("code", {"version": "0.1.0+another"})
    journal.close()
    assert [finding.name for finding in check_journal(spec, tmp_path)] == ["journal", "code"]
    _, changed, _ = check_journal(tiny(budget={**TINY_STUDY["budget"], "epochs": 5}), tmp_path)  # type: ignore[dict-item]
    assert (changed.level, "budget.epochs: 4 then, 5 now" in changed.what) == ("warning", True)


def test_domains_are_what_their_files_say(make_domain: Callable[..., Domain]) -> None:
    """Of each kind of damage one, by whom it is found."""
    domain = make_domain()
    sources = {"shop": source_of(domain)}

    def found(storage: str | None = None) -> Finding:
        (finding,) = judge_domains(NODE, probe.domains({"shop": str(domain.path)}), sources, storage)
        return finding

    assert found().level == "ok"
    for name, change in (("items.npy", lambda array: array[::-1]), ("features/text.npy", lambda array: array + 1)):
        file, before = domain.path / name, (domain.path / name).read_bytes()
        np.save(file, change(np.load(file)))
        assert found().level == "error", name
        file.write_bytes(before)
    assert found().level == "ok"
    (domain.path / "offsets.npy").write_bytes(b"nothing")
    assert "is damaged" in found().what
    shutil.rmtree(domain.path)
    assert (found().level, found("s3://bucket").level) == ("error", "ok")


def test_what_joined_a_study_is_looked_at_too(tmp_path: Path) -> None:
    assert joined_since(tmp_path) == []
    with closing(Journal(tmp_path / "study.sqlite3")) as journal:
        journal.add_addition({"domains": ["shop"], "arms": {}, "demo": []})
    assert joined_since(tmp_path) == [{"domains": ["shop"], "arms": {}, "demo": []}]


def test_domains_that_are_not_there(tmp_path: Path) -> None:
    sources, findings = check_domains(tiny(), tmp_path, None)
    assert (sources, levels(findings)) == ({}, ["ok", "ok"])
    raw = tiny(domains={"prepare": {"attic": "raw_attic", "bazaar": "raw_bazaar"}})
    (tmp_path / "raw_attic").mkdir()
    assert levels(check_domains(raw, tmp_path, tmp_path)[1]) == ["ok", "error"]
    assert "--data" in (check_domains(raw, tmp_path, None)[1][0].remedy or "")


@pytest.mark.parametrize("reduction", [2, 3])
def test_survivors_of_a_rung_by_all_orders_of_arrival(reduction: int) -> None:
    for count in range(1, 7):
        orders = list(permutations(range(count)))
        kept = sum(survives(order[n], list(order[: n + 1]), reduction) for order in orders for n in range(count))
        assert expected_survivors(count, reduction) == pytest.approx(kept / len(orders))


def test_expected_epochs_by_hand() -> None:
    """Four trials, rungs at 2 and 6 of 8 epochs: 1 + 1/2 + 1/3 + 1/4 = 25/12 pass the first, 3/2 + 1/12 * 1/3 the second."""
    budget = Budget(search_trials=4, epochs=8, grace_epochs=2, reduction=3)
    assert expected_search_epochs(4, budget) == pytest.approx(4 * 2 + 25 / 12 * 4 + (3 / 2 + 1 / 36) * 2)
    assert expected_search_epochs(4, Budget(epochs=2, grace_epochs=2)) == 8


def test_cost_by_hand() -> None:
    """Three trained cells of 3 search and 2 confirm trials of 4 epochs; popularity has nothing to train."""
    spec = tiny(resources={"concurrent": 2, "gpus": 0.5})
    cells, _ = build_cells(spec, {name: Source(name, "", True) for name in ("attic", "bazaar")})
    bare = expected_cost(spec, cells)
    assert (bare.epochs_at_most, bare.pretrain_epochs) == (3 * 5 * 4, 2)
    assert bare.hours_at_most is bare.disk_bytes is None
    cost = expected_cost(spec, cells, {cell.name: Weight(1000, 36.0) for cell in cells})
    assert cost.hours_at_most == pytest.approx(60 * 36 / 3600 / 2)
    assert cost.disk_bytes == 3 * 5 * BEST * 4000 + 2 * 2 * LAST * 4000
    assert "of a GPU" in "\n".join(costs.cost_lines(cost))
    capped = expected_cost(tiny(resources={"disk_gb": 1e-5}), cells, {cell.name: Weight(1000) for cell in cells})
    assert capped.disk_bytes == 10_000 + 2 * 2 * LAST * 4000


def test_a_run_weighs_what_its_files_do(make_domain: Callable[..., Domain], tmp_path: Path) -> None:
    source = source_of(make_domain())
    changes: dict[str, Any] = {
        "model": {"width": 64},
        "pretrain": None,
        "arms": {"scratch": {}},
        "cells": [{"domains": ["s"], "arms": ["scratch"]}],
    }
    cells, _ = build_cells(tiny(**changes), {"s": source})
    run = typical_run(cells[0])
    weight = weigh(run)
    assert weight.parameters == costs.measure(run, threads=1).parameters
    for _ in execute(run, tmp_path / "run"):
        pass
    for name, copies in (("best.safetensors", BEST), ("last.ckpt", LAST)):
        assert (tmp_path / "run" / name).stat().st_size == pytest.approx(copies * PARAMETER_BYTES * weight.parameters, rel=0.2)


def test_the_table_begins_with_the_worst_node() -> None:
    findings = [
        Finding("clock", "ok", "well", node="a"),
        Finding("disk", "ok", "well", node="b"),
        Finding("versions", "error", "other\nlines", "Install.", "b"),
        Finding("cost", "warning", "much", "Wait."),
    ]
    lines = [line for line in table(findings).splitlines() if line]
    assert [line.split()[0] for line in lines] == ["The", "warning", "->", "Node", "error", "lines", "->", "ok", "Node", "ok", "1"]
    assert lines[-1] == "1 errors, 1 warnings"
    assert (exit_status(findings), exit_status(findings[3:])) == (1, 0)


def test_bad_input_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--spec", "unknown", "--out", str(tmp_path)]) == 2
    assert main(["--storage", "odd://host/place", "--out", str(tmp_path)]) == 2
    assert "is no storage that is known" in capsys.readouterr().err


@pytest.fixture(scope="module")
def raylets() -> Iterator[Any]:
    """Two nodes of Ray on this machine, which ask for no token, and RAY_ADDRESS at them."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        temporary = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # Ray's socket paths must be short
        for name, value in {"RAY_TMPDIR": temporary, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}.items():
            patch.setenv(name, value)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        try:
            cluster.add_node(num_cpus=1)
            patch.setenv("RAY_ADDRESS", cluster.address)
            yield cluster
        finally:
            cluster.shutdown()
            shutil.rmtree(temporary, ignore_errors=True)


@pytest.fixture
def shops(tmp_path: Path) -> tuple[Path, list[str]]:
    """The folder of a tiny study whose domains are made, and the doctor's arguments for it."""
    write_demo(tmp_path / "tiny" / "domains", config=TINY_SHOPS)
    spec = tmp_path / "tiny.yaml"
    spec.write_text(yaml.safe_dump({**TINY_STUDY, "pretrain": {**TINY_STUDY["pretrain"], "workers": 1}}))  # type: ignore[dict-item]
    return tmp_path / "tiny", ["--spec", str(spec), "--out", str(tmp_path), "--json"]


def examined(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, list[dict[str, Any]]]:
    capsys.readouterr()
    return main(arguments), json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_two_nodes_that_are_well(raylets: Any, shops: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(shops[0].rglob("*"))
    status, findings = examined([*shops[1], "--storage", str(tmp_path / "shared"), "--measure"], capsys)
    assert (status, [f["what"] for f in findings if f["level"] == "error"]) == (0, [])
    nodes = {f["node"] for f in findings if f["node"]}
    assert len(nodes) == 2
    for node in nodes:
        names = {f["name"] for f in findings if f["node"] == node}
        assert names == {"versions", "GPUs", "disk", "network", "domain", "storage", "clock"}
    assert [f["node"] in nodes for f in findings if f["level"] == "warning" and f["name"] == "network"] == [True, True]
    (cost,) = [f["what"] for f in findings if f["name"] == "cost"]
    assert "minutes" in cost
    assert "GB" in cost
    assert list((tmp_path / "shared").iterdir()) == []
    assert sorted(shops[0].rglob("*")) == before


@pytest.mark.slow
def test_two_nodes_that_are_not(raylets: Any, shops: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No storage, or a broken one, and a domain whose items were altered: each node finds it."""
    items = shops[0] / "domains" / "attic" / "items.npy"
    np.save(items, np.load(items)[::-1])
    status, findings = examined(shops[1], capsys)
    errors = [(f["name"], f["node"] is not None) for f in findings if f["level"] == "error"]
    assert (status, sorted(errors)) == (1, [("domain", True), ("domain", True), ("storage", False)])
    (tmp_path / "file").write_text("no folder")
    status, findings = examined([*shops[1], "--storage", str(tmp_path / "file")], capsys)
    broken = [f for f in findings if f["name"] == "storage"]
    assert (status, [f["level"] for f in broken]) == (1, ["error"])
    assert broken[0]["remedy"]


@pytest.mark.slow
def test_a_node_that_does_not_answer(
    raylets: Any, shops: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_nodes, "NODE_SECONDS", 40.0)  # a busy machine answers late
    monkeypatch.setattr(doctor_nodes, "CLOCK_SECONDS", 3.0)
    (worker,) = raylets.worker_nodes
    raylet = worker.all_processes["raylet"][0].process.pid
    os.kill(raylet, signal.SIGSTOP)
    try:
        status, findings = examined([*shops[1], "--storage", str(tmp_path / "shared")], capsys)
    finally:
        os.kill(raylet, signal.SIGCONT)
    (silent,) = [f for f in findings if f["name"] == "answer"]
    assert (status, silent["level"], silent["node"] is not None) == (1, "error", True)
    assert list((tmp_path / "shared").iterdir()) == []


@pytest.mark.timeout(120)
def test_a_ray_that_is_not_there_is_an_error_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{taken.getsockname()[1]}")
        assert main(["--out", str(tmp_path)]) == 1
    assert "nothing answers there" in capsys.readouterr().out
