"""Where a study's parts lie: on the driver's disk alone, or on shared storage that every node reaches.

Without storage, trials, domains and checkpoints are read and written in the study's folder, where one machine finds them.
With storage, trials write to `STORAGE/<study>/trials/<trial_key>/`, and the driver puts the domains and the pre-trained
weights there, which each node copies to its own disk once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from mmm4rec.errors import BadInput
from studies.cells import Source
from studies.mounts import network_filesystem
from studies.state import locked
from studies.storage import Storage

WEIGHTS = "best.safetensors"


def scratch(place: str) -> Path:
    """A folder on this node's disk for what belongs to a place on the storage."""
    name = hashlib.sha256(place.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"mmm4rec-{os.getuid()}" / name


@dataclass(frozen=True)
class Places:
    """A study's folder on the driver's disk, and its own place on the shared storage, if it has one."""

    folder: Path
    storage: Storage | None = None

    @property
    def root(self) -> Storage:
        return self.storage or Storage(str(self.folder.resolve()))

    def trial(self, trial_key: str) -> Storage:
        """Where the trial's files are complete after each epoch."""
        return self.root.sub("trials").sub(trial_key)

    @property
    def trials(self) -> Path | None:
        """The folder of all trials, where they lie in one."""
        return self.root.sub("trials").path

    def bring(self, trial_key: str, names: Iterable[str]) -> None:
        """Copy files of a trial into the study's folder, where MLflow's mirror looks for them."""
        if self.storage is not None:
            self.trial(trial_key).pull(self.folder / "trials" / trial_key, names)

    def publish(self, sources: Mapping[str, Source]) -> dict[str, str]:
        """The places from which nodes get these domains, by the paths they have here; put there unless they are there already."""
        if self.storage is None:
            return {source.path: source.path for source in sources.values()}
        found = {}
        for name, source in sources.items():
            place, folder = self.storage.sub("domains").sub(name), Path(source.path)
            told = ["domain.json", *sorted(str(file.relative_to(folder)) for file in folder.glob("features/*.json"))]
            if any(place.read(file) != (folder / file).read_bytes() for file in told):
                rest = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
                place.push(folder, [*(file for file in rest if file not in told), *reversed(told)])
            found[source.path] = place.uri
        return found

    def publish_weights(self, file: Path | None) -> str | None:
        """The place from which nodes get the pre-trained weights."""
        if file is None or self.storage is None:
            return None if file is None else str(file)
        place = self.storage.sub("checkpoints").sub(hashlib.sha256(file.read_bytes()).hexdigest()[:16])
        if not place.exists(WEIGHTS):
            place.write(WEIGHTS, file.read_bytes())
        return place.uri if place.path is None else str(place.path / WEIGHTS)


def domain_here(place: str, fingerprint: str) -> str:
    """The path of a domain on this node: where it is, or a copy that this node makes once."""
    return str(local_copy(place, fingerprint, scratch("domains")))


def weights_here(place: str) -> str:
    """The path of weights on this node: where they are, or a copy that this node makes once.

    Args: place: the file's path, or the URI of the folder that holds it. Raises FileNotFoundError where it does not.
    """
    storage = Storage(place)
    if storage.path is not None:
        return str(storage.path)
    here = scratch("checkpoints") / PurePosixPath(urlsplit(place).path).name
    if not (here / WEIGHTS).is_file() and not storage.pull(here, [WEIGHTS]):
        raise FileNotFoundError(f"{place} holds no {WEIGHTS}")
    return str(here / WEIGHTS)


def local_copy(source: str, fingerprint: str, cache: Path) -> Path:
    """The domain at `source` as a folder on this node: itself where its disk is local, else a copy, made once a node.

    Args: source: path or URI of a domain folder; fingerprint: the domain's; cache: a folder on this node's disk.

    The copy is cache/<fingerprint>-<digest of its features' descriptions>: features may be encoded anew while the
    fingerprint stays, and a running trial goes on with those that it opened.
    Raises BadInput where there is no domain, or another one.
    """
    storage = Storage(source)
    if storage.path is not None and storage.path.is_dir() and network_filesystem(storage.path) is None:
        _check_domain(storage, fingerprint)
        return storage.path
    key = f"{fingerprint}-{_features_digest(storage)}"
    if not (cache / key).exists():
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / f".{key}.lock", wait=True):
            if not (cache / key).exists():
                _fill(cache / key, storage, fingerprint)
    return cache / key


def _fill(place: Path, storage: Storage, fingerprint: str) -> None:
    """Make `place` a copy of the domain, whole or not at all. Needs its lock."""
    part = place.with_name(f".{place.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        _check_domain(storage, fingerprint)
        names = sorted(storage.names(), key=lambda name: (name == "domain.json", name))
        storage.pull(part, names)
        copy = Storage(str(part))
        _check_domain(copy, fingerprint, shown=storage.uri)
        if f"{fingerprint}-{_features_digest(copy)}" != place.name:
            raise BadInput("changed while it was copied.", file=storage.uri, remedy="Start again when its features are encoded.")
        part.replace(place)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _check_domain(storage: Storage, fingerprint: str, shown: str | None = None) -> None:
    text = storage.read("domain.json")
    if text is None:
        remedy = "Put the domains where every node finds them: on the storage."
        raise BadInput("is no domain that this node can see: there is no domain.json.", file=shown or storage.uri, remedy=remedy)
    found = json.loads(text).get("fingerprint")
    if found != fingerprint:
        rule = f"has the fingerprint {found}; the study was begun with {fingerprint}."
        raise BadInput(rule, file=shown or storage.uri, remedy="Put the domain there that the study began with, or start a new study.")


def _features_digest(storage: Storage) -> str:
    features, digest = storage.sub("features"), hashlib.sha256()
    for name in features.names():
        if name.endswith(".json"):
            digest.update(name.encode() + b"\0" + (features.read(name) or b"") + b"\0")
    return digest.hexdigest()[:8]
