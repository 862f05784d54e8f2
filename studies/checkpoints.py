"""The last few states of a long run on the storage, written beside the training."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from mmm4rec.errors import BadInput
from mmm4rec.training import distributed
from mmm4rec.training.checkpoint import BrokenCheckpoint, content_of, load_last, write_content
from mmm4rec.training.loop import Run
from studies.storage import Storage

log = logging.getLogger(__name__)


class RecentCheckpoints:
    """Keeps a run every so many optimizer steps, or seconds, and after each epoch: `<optimizer steps>.ckpt`, the last `keep`.

    Worker 0 copies the run's state, which is the same on every worker, and a thread writes the copy while training goes on;
    one that is not written yet when the next is due is waited for. So what a kill takes away is at most the steps since the
    last but one that was due, and since the last one where it was written in time. All workers go on from the same file.
    """

    def __init__(
        self,
        place: Storage,
        scratch: Path,
        *,
        keep: int = 3,
        every_steps: int | None = None,
        every_seconds: float | None = None,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        """Args: place: of these files alone; scratch: a folder on this node's disk, for a place in an object store; before:
        called by the thread before a checkpoint counts, to put what belongs to it where it outlives this node.
        """
        self._before = before
        self._place, self._scratch, self._keep = place, scratch, keep
        self._every_steps, self._every_seconds = every_steps, every_seconds
        self._writer, self._pending = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints"), Future[None]()
        self._pending.set_result(None)
        self._saved = time.monotonic()

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None:
        """The last one is written, or its error raised."""
        self._writer.shutdown()
        self._pending.result()

    def exists(self) -> bool:
        return bool(checkpoints_in(self._place))

    def load(self, run: Run, description: dict[str, Any]) -> bool:
        """Go on from the newest that is whole on every worker; newer ones are deleted.

        Raises BadInput where it is of another run, and where there are some and none is whole; OSError as the storage does.
        """
        found = distributed.gather(checkpoints_in(self._place))[0]
        for place, name in reversed(list(enumerate(found))):
            if all(distributed.gather(self._loaded(name, run, description))):
                log.warning("the run goes on from %s", name)
                if distributed.rank() == 0:
                    self._place.delete(found[place + 1 :])
                return True
        if found:
            raise BadInput("holds checkpoints, and none is whole.", file=self._place.uri, remedy="Delete them to begin anew.")
        return False

    def _loaded(self, name: str, run: Run, description: dict[str, Any]) -> bool:
        file = self._here(name)
        try:
            load_last(file, run, description)
        except (BrokenCheckpoint, FileNotFoundError) as error:
            log.warning("%s; the one before it is tried.", error)
            return False
        finally:
            if self._place.path is None:
                file.unlink(missing_ok=True)
        return True

    def _here(self, name: str) -> Path:
        """The file on this node."""
        if self._place.path is not None:
            return self._place.path / name
        self._place.pull(self._scratch, [name])
        return self._scratch / name

    def save(self, run: Run, description: dict[str, Any], *, epoch_over: bool) -> None:
        """Keep the run as it stands, if it is time. Raises what the writing of an earlier one raised."""
        steps = run.state.optimizer_steps
        by_steps = self._every_steps is not None and steps % self._every_steps == 0
        by_seconds = self._every_seconds is not None and time.monotonic() - self._saved >= self._every_seconds
        if epoch_over or by_steps or by_seconds:
            self._pending.result()
            self._pending = self._writer.submit(self._write, f"{steps:010d}.ckpt", _copied(content_of(run, description)))
            self._saved = time.monotonic()

    def _write(self, name: str, content: dict[str, Any]) -> None:
        folder = self._place.path or self._scratch
        folder.mkdir(parents=True, exist_ok=True)
        self._before()
        write_content(folder / name, content)
        if self._place.path is None:
            self._place.push(folder, [name])
            (folder / name).unlink()
        self._place.delete(checkpoints_in(self._place)[: -self._keep])


def checkpoints_in(place: Storage) -> list[str]:
    """The names of the checkpoints, oldest first."""
    return [name for name in place.names() if name.endswith(".ckpt")]


def newest_steps(place: Storage) -> int:
    """The optimizer steps that a kill now would leave; 0 where there is no checkpoint."""
    return max((int(name.removesuffix(".ckpt")) for name in checkpoints_in(place)), default=0)


def _copied(value: Any) -> Any:
    """The same with its tensors copied to the CPU: training goes on with the originals."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    return [_copied(part) for part in value] if isinstance(value, list) else value
