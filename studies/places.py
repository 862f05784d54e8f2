"""Where a study's parts lie: on the driver's disk alone, or on shared storage that every node reaches.

Without storage, trials, domains and checkpoints are read and written in the study's folder, where one machine finds them.
With storage, trials write to `STORAGE/<study>/trials/<trial_key>/`, and the driver puts the domains and the pre-trained
weights there, which each node copies to its own disk once.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from studies.cells import Source
from studies.storage import Storage, local_copy

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
        return place.sub(WEIGHTS).uri if place.path is None else str(place.path / WEIGHTS)


def domain_here(place: str, fingerprint: str) -> str:
    """The path of a domain on this node: where it is, or a copy that this node makes once."""
    return str(local_copy(place, fingerprint, scratch("domains")))


def weights_here(place: str) -> str:
    """The path of weights on this node: where they are, or a copy that this node makes once."""
    if (path := Storage(place).path) is not None:
        return str(path)
    parent, _, digest = place.rpartition(f"/{WEIGHTS}")[0].rpartition("/")
    here = scratch("checkpoints") / digest
    if not (here / WEIGHTS).is_file():
        Storage(f"{parent}/{digest}").pull(here, [WEIGHTS])
    return str(here / WEIGHTS)
