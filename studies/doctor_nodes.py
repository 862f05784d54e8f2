"""The doctor on every node of Ray: what it asks there (probe.py), and what the answers mean."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mmm4rec.errors import BadInput
from studies import probe
from studies.cells import Source
from studies.findings import Finding, Level
from studies.spec import Resources
from studies.storage import Storage

NODE_SECONDS = 120.0  # a node may take so long: it imports torch, and compiles a kernel
CLOCK_SECONDS = 10.0
CLOCK_WARNING_SECONDS, CLOCK_ERROR_SECONDS = 1.0, 30.0
FULL = 0.95  # of the disk for temporary files: above it Ray writes no object there
LITTLE_BYTES = 5 * 10**9  # of free disk
SAME_CODE = "Install the same on every node: cluster/constraints.txt, and the driver's code."
SAME_PLACE = "Mount the same place on every node, or use s3:// or gs://."
COMPARED = ("python", "torch", "numpy", "ray", "code_version", "studies")


@dataclass(frozen=True)
class Node:
    """A node of Ray that is alive."""

    key: str
    name: str
    gpus: float  # that Ray hands out
    ports: tuple[int, ...]  # that Ray listens on


@dataclass(frozen=True)
class Expected:
    """What every node should find."""

    machine: Mapping[str, Any]  # the driver's `probe.machine()`
    resources: Resources
    trials: Path | None  # the folder that trials are written to; None: that for temporary files
    storage: str | None
    domains: Mapping[str, Source]  # those that are prepared
    disk_bytes: int | None  # what trials' files may need


def alive_nodes() -> list[Node]:
    """The head first."""
    head_port = int(ray.get_runtime_context().gcs_address.rpartition(":")[2])
    nodes = []
    for row in sorted((row for row in ray.nodes() if row["Alive"]), key=lambda row: "node:__internal_head__" not in row["Resources"]):
        ports = [row["NodeManagerPort"], row["ObjectManagerPort"], row["MetricsExportPort"]]
        ports += [head_port] if "node:__internal_head__" in row["Resources"] else []
        name = f"{row['NodeManagerHostname']} {row['NodeManagerAddress']} ({row['NodeID'][:8]})"
        nodes.append(Node(row["NodeID"], name, row["Resources"].get("GPU", 0.0), tuple(ports)))
    return nodes


def check_nodes(expected: Expected) -> list[Finding]:
    """Ask every node at once, and say what its answers mean. Needs Ray started."""
    nodes = alive_nodes()
    findings = [Finding("nodes", "ok", f"{len(nodes)} in Ray")]
    findings += [] if expected.storage else _without_storage(nodes)
    cloudpickle.register_pickle_by_value(probe)
    try:
        with Note(expected.storage) as note:
            answers = _ask_all(nodes, expected, note)
            note.look_for([node for node in nodes if node.key in answers and answers[node.key].get("storage", {}).get("answer")])
        findings += note.findings
        findings += [finding for node in nodes for finding in judge(node, answers.get(node.key), expected, alone=len(nodes) == 1)]
        findings += [_clock(node) for node in nodes if node.key in answers]
    finally:
        cloudpickle.unregister_pickle_by_value(probe)
    return findings


def _without_storage(nodes: Sequence[Node]) -> list[Finding]:
    if len(nodes) == 1:
        return []
    remedy = "Give one that every node reaches: --storage, or stores.storage in the spec (a mounted folder, s3://, gs://)."
    return [Finding("storage", "error", f"none is given, and Ray has {len(nodes)} nodes: no other one would see a trial's files", remedy)]


class Note:
    """What the driver leaves in the storage for the nodes to read, and they for the driver; gone when the block ends."""

    def __init__(self, uri: str | None) -> None:
        self.uri, self.name, self.content = uri, f"doctor-{secrets.token_hex(8)}", secrets.token_hex(16)
        self.findings: list[Finding] = []
        self._storage = None if uri is None else Storage(uri)
        self._names: list[str] = []

    def __enter__(self) -> Note:
        with self._reporting():
            if self._storage is not None:
                self._storage.check_writable()
                self._storage.write(self.name, self.content.encode())
                self._names.append(self.name)
        return self

    @property
    def written(self) -> bool:
        return bool(self._names)

    def answer(self, node: Node) -> str:
        """The name of what a node leaves, and its content."""
        return f"{self.name}-{node.key}"

    def look_for(self, nodes: Sequence[Node]) -> None:
        """Whether the driver reads what these nodes wrote."""
        if self._storage is None or not self.written:
            return
        self._names += [self.answer(node) for node in nodes]
        with self._reporting():
            lost = [node.name for node in nodes if self._storage.read(self.answer(node)) != self.answer(node).encode()]
            if lost:
                what = f"{self.uri}: the driver does not see what {', '.join(lost)} wrote there"
                self.findings.append(Finding("storage", "error", what, SAME_PLACE))
            else:
                self.findings.append(Finding("storage", "ok", f"{self.uri} takes files, and gives them back"))

    def __exit__(self, *error: object) -> None:
        with self._reporting():
            if self._storage is not None:
                self._storage.delete(self._names)

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """What the storage raises becomes a finding."""
        try:
            yield
        except (BadInput, OSError) as error:  # pyarrow's errors of object stores are OSErrors
            remedy = error.remedy if isinstance(error, BadInput) else "Check the place, its rights and its credentials."
            what = error.rule if isinstance(error, BadInput) else f"cannot be used: {error}"
            self.findings.append(Finding("storage", "error", f"{self.uri} {what}", remedy))


def _ask_all(nodes: Sequence[Node], expected: Expected, note: Note) -> dict[str, dict[str, probe.Answer]]:
    """The answers of the nodes that answer at all, by the node's key."""
    asked = {node.key: _on(node, probe.ask).remote(_questions(node, expected, note), NODE_SECONDS) for node in nodes}
    until, answers = time.monotonic() + NODE_SECONDS + CLOCK_SECONDS, {}
    for key, reference in asked.items():
        try:
            answers[key] = ray.get(reference, timeout=max(0.0, until - time.monotonic()))
        except (GetTimeoutError, RayError):
            ray.cancel(reference, force=True)
    return answers


def _questions(node: Node, expected: Expected, note: Note) -> dict[str, probe.Question]:
    places = {"trials": expected.trials and str(expected.trials), "temporary files": None}
    questions: dict[str, probe.Question] = {
        "machine": ("machine", {}),
        "disks": ("disks", {"places": places}),
        "network": ("network", {"ports": list(node.ports)}),
        "domains": ("domains", {"places": {name: source.path for name, source in expected.domains.items()}}),
    }
    if note.uri is not None and note.written:
        told = {"uri": note.uri, "note": note.name, "content": note.content, "answer": note.answer(node)}
        questions["storage"] = ("storage", told)
    return questions


def _on(node: Node, function: Any) -> Any:
    remote: Any = ray.remote  # its types do not know this strategy
    return remote(num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node.key, soft=False))(function)


def judge(node: Node, answers: Mapping[str, probe.Answer] | None, expected: Expected, *, alone: bool) -> list[Finding]:
    """What a node's answers mean; None: it gave none."""
    if answers is None:
        what = f"did not answer within {NODE_SECONDS + CLOCK_SECONDS:g} seconds, or its process died"
        return [Finding("answer", "error", what, "Look at the node, and at its Ray logs; or take it out.", node.name)]
    judges = {
        "machine": lambda told: [*judge_versions(node, told, expected.machine), *judge_gpus(node, told, expected.resources)],
        "disks": lambda told: judge_disks(node, told, expected.disk_bytes),
        "network": lambda told: [] if alone else [judge_network(node, told)],
        "domains": lambda told: judge_domains(node, told, expected.domains, expected.storage),
        "storage": lambda told: [judge_storage(node, told, expected.storage)],
    }
    findings = []
    for name, answer in answers.items():
        if "problem" in answer:
            remedy = SAME_CODE if "Error: No module" in answer["problem"] else "Correct this on the node."
            findings.append(Finding(name, "error", answer["problem"], remedy, node.name))
        else:
            findings += judges[name](answer["answer"])
    return findings


def judge_versions(node: Node, told: Mapping[str, Any], driver: Mapping[str, Any]) -> list[Finding]:
    """Python and packages must be the driver's."""
    other = [f"{name} {told[name]}, the driver's is {driver[name]}" for name in COMPARED if told[name] != driver[name]]
    if other:
        return [Finding("versions", "error", "; ".join(other), SAME_CODE, node.name)]
    return [Finding("versions", "ok", ", ".join(f"{name} {told[name]}" for name in COMPARED[:-1]), node=node.name)]


def judge_gpus(node: Node, told: Mapping[str, Any], resources: Resources) -> list[Finding]:
    """What torch sees, against what Ray hands out and trials ask for; and whether the scan's kernel works."""
    seen = told["cuda_devices"]
    names = ", ".join(f"{part['name']} {part['memory_bytes'] / 2**30:.0f} GiB" for part in seen) or "none"
    if len(seen) < node.gpus:
        what = f"Ray hands out {node.gpus:g}, and torch sees {len(seen)} ({names})"
        remedy = "Install a CUDA build of torch that fits the driver (nvidia-smi), or start Ray with the right --num-gpus."
        return [Finding("GPUs", "error", what, remedy, node.name)]
    if not seen:
        return [Finding("GPUs", "ok", "none", node=node.name)]
    if not resources.gpus or not node.gpus:
        what = f"{names}, of which Ray hands out {node.gpus:g} and a trial takes {resources.gpus:g}"
        remedy = "Set resources.gpus in the spec, and start Ray with --num-gpus, unless they are meant to idle."
        return [Finding("GPUs", "warning", what, remedy, node.name)]
    found = [Finding("GPUs", "ok", names, node=node.name)]
    if told["kernel_problem"] is not None:
        remedy = "Run: pip install mamba-ssm (built for this torch and CUDA). Until then long sequences are scanned in torch, more slowly."
        found.append(Finding("kernel", "warning", f"the mamba-ssm kernel cannot be used: {told['kernel_problem']}", remedy, node.name))
    return found


def judge_disks(node: Node, told: Mapping[str, Mapping[str, Any]], needed_bytes: int | None) -> list[Finding]:
    """Room for trials' files where they are written, and for Ray's temporary ones."""
    findings = []
    for name, disk in told.items():
        free, what = disk["free_bytes"], f"{name}: {disk['free_bytes'] / 1e9:,.1f} GB free in {disk['place']}"
        needed = needed_bytes or 0 if name == "trials" else 0
        if not disk["writable"]:
            remedy = "Give a folder that may be written there, with --out or TMPDIR."
            findings.append(Finding("disk", "error", f"{name}: {disk['place']} may not be written", remedy, node.name))
        elif free < needed:
            remedy = "Make room, or limit trials' files with resources.disk_gb in the spec."
            findings.append(Finding("disk", "error", f"{what}; the study may need {needed / 1e9:,.1f} GB", remedy, node.name))
        elif free < needed + LITTLE_BYTES or free < (1 - FULL) * disk["total_bytes"]:
            findings.append(Finding("disk", "warning", what, "Make room: a full disk stops the study.", node.name))
        else:
            findings.append(Finding("disk", "ok", what, node=node.name))
    return findings


def judge_network(node: Node, told: Mapping[str, Any]) -> Finding:
    """Whoever reaches a Ray port without a token may run anything there."""
    if told["token"]:
        return Finding("network", "ok", "Ray asks for a token", node=node.name)
    ports = ", ".join(map(str, told["open_ports"]))
    what = "Ray asks for no token" + (f", and listens on every address at port {ports}" if ports else "")
    remedy = "ray get-auth-token --generate, the file ~/.ray/auth_token to every node, RAY_AUTH_MODE=token, and ray start again."
    return Finding("network", "warning", what, remedy, node.name)


def judge_domains(node: Node, told: Mapping[str, Mapping[str, Any]], sources: Mapping[str, Source], storage: str | None) -> list[Finding]:
    """Prepared domains must be here what they are for the driver."""
    findings = []
    for name, source in sources.items():
        found, place = told[name], f"domain '{name}' in {source.path}"
        again = f"Copy {source.path} to the node again; if the driver's is the broken one, prepare and encode it anew."
        if not found and storage is not None:
            findings.append(Finding("domain", "ok", f"{place} is not there yet: it comes by way of the storage", node=node.name))
        elif not found:
            findings.append(Finding("domain", "error", f"{place} is not there", "Copy it there, or put it on shared storage.", node.name))
        elif "problem" in found:
            findings.append(Finding("domain", "error", found["problem"], again, node.name))
        elif found["fingerprint"] != source.fingerprint:
            what = f"{place} has the fingerprint {found['fingerprint']} by its files, and {source.fingerprint} by the driver's domain.json"
            findings.append(Finding("domain", "error", what, again, node.name))
        elif found["features"] != dict(source.features or {}) or not all(found["features_whole"].values()):
            what = f"{place} has other features: {found['features']}, the driver's are {dict(source.features or {})}"
            broken = ", ".join(modality for modality, whole in found["features_whole"].items() if not whole)
            what = f"{place} has {broken} features that differ from their digest" if broken else what
            findings.append(Finding("domain", "error", what, again, node.name))
        else:
            features = " and ".join(found["features"]) or "no"
            findings.append(Finding("domain", "ok", f"'{name}' is {source.fingerprint}, {features} features", node=node.name))
    return findings


def judge_storage(node: Node, told: bool, storage: str | None) -> Finding:
    if told:
        return Finding("storage", "ok", "reads what the driver wrote", node=node.name)
    return Finding("storage", "error", f"{storage} is another place here: what the driver wrote is not in it", SAME_PLACE, node.name)


def _clock(node: Node) -> Finding:
    """Ask the node's clock three times; the quickest answer says most."""
    asked, quickest = _on(node, probe.clock), None
    for _ in range(3):
        before = time.time()
        try:
            there = ray.get(asked.remote(), timeout=CLOCK_SECONDS)
        except (GetTimeoutError, RayError) as error:
            return Finding("clock", "error", f"cannot be asked ({type(error).__name__})", "Look at the node's Ray logs.", node.name)
        after = time.time()
        if quickest is None or after - before < quickest[1]:
            quickest = (there - (before + after) / 2, after - before)
    assert quickest is not None
    return judge_clock(node, quickest[0], quickest[1] / 2)


def judge_clock(node: Node, offset_seconds: float, uncertainty_seconds: float) -> Finding:
    """How far a node's clock is ahead of the driver's; half the round trip is what the answer may be off by."""
    what = f"{offset_seconds:+.2f} s against the driver's, ± {uncertainty_seconds:.2f} s"
    certain = abs(offset_seconds) - uncertainty_seconds
    if certain <= CLOCK_WARNING_SECONDS:
        return Finding("clock", "ok", what, node=node.name)
    level: Level = "error" if certain > CLOCK_ERROR_SECONDS else "warning"
    return Finding("clock", level, what, "Set the clocks by NTP on every node (timedatectl set-ntp true).", node.name)
