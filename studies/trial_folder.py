"""Where a trial works on its node, and how its files come to outlive the node."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from studies.state import locked
from studies.storage import Storage, files_below

PUSH_FIRST, PUSH_LAST = ("last.ckpt", "best.safetensors"), ("curve.jsonl", "result.json")


@dataclass
class TrialFolder:
    """Where a trial works: `path` on this node; `keep()` makes what stands there outlive it."""

    path: Path
    _storage: Storage | None = None  # None: every node sees `path`
    _pushed: dict[str, tuple[int, int]] = field(default_factory=dict)

    def keep(self) -> None:
        """Push the files that changed since the last time; result.json last, for it says that the run is whole.

        last.ckpt alone is enough to go on: whatever a kill leaves of the others is written anew from it.
        Raises RuntimeError where another process has finished the trial meanwhile.
        """
        if self._storage is None:
            return
        now = _states(self.path)
        if "result.json" not in self._pushed and self._storage.exists("result.json"):
            raise RuntimeError(f"{self._storage.uri}: another process has finished this trial")
        for name in sorted((name for name in now if now[name] != self._pushed.get(name)), key=_push_order):
            self._storage.push(self.path, [name])
            self._pushed[name] = now[name]


@contextmanager
def trial_folder(place: str, scratch: Path) -> Iterator[TrialFolder]:
    """Where a trial works, held by one process at a time; another one waits until the holder ends.

    Args: place: the trial's place on the storage; scratch: a folder on this node's disk, of this study alone.

    In a folder the trial works in place, under a lock that all nodes see: on NFSv4, and NFSv3 with its lock service.
    Where locks do not reach other nodes (`nolock`, `local_lock`, most FUSE mounts) a worker that outlives its driver
    on another node may work beside the new one. Both write the same run, file by file and whole, so that work is done
    twice and nothing is lost; `check_writable` finds a mount that refuses locks, not one that keeps them to itself.

    In an object store the lock holds on this node only, with the same consequence. The trial works in
    scratch/<last part of place>, filled with what the storage holds, which is the truth: what an earlier attempt left
    there and did not push is dropped and computed again. A block that ends well is kept; scratch goes however it ends.
    """
    storage = Storage(place)
    if storage.path is not None:
        storage.path.mkdir(parents=True, exist_ok=True)
        with locked(storage.path / ".lock", wait=True):
            yield TrialFolder(storage.path)
        return
    name = PurePosixPath(urlsplit(storage.uri).path).name
    path = scratch / name
    scratch.mkdir(parents=True, exist_ok=True)
    with locked(scratch / f".{name}.lock", wait=True):  # beside the folder: a lock that is removed while others wait for it holds nobody
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        storage.pull(path)
        folder = TrialFolder(path, storage, _states(path))
        try:
            yield folder
            folder.keep()
        finally:
            shutil.rmtree(path, ignore_errors=True)


def _states(folder: Path) -> dict[str, tuple[int, int]]:
    """The time (ns) and size of each file below `folder`: what tells that it changed."""
    states = {}
    for name in files_below(folder):
        with suppress(FileNotFoundError):
            state = (folder / name).stat()
            states[name] = (state.st_mtime_ns, state.st_size)
    return states


def _push_order(name: str) -> tuple[int, int, str]:
    if name in PUSH_FIRST:
        return 0, PUSH_FIRST.index(name), name
    return (2, PUSH_LAST.index(name), name) if name in PUSH_LAST else (1, 0, name)
