"""How much is computed at once: it decides memory and speed, and no number but for the order of sums and dropout's draws."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_halvings = 0  # of a whole process: what a step prepares in another thread is cut alike


def at_once(sizes: Mapping[str, int], device: str) -> int:
    """The size for a device's type, as often halved as `smaller_blocks` says."""
    return max(1, sizes.get(device, sizes["cpu"]) >> _halvings)


@contextmanager
def smaller_blocks(halvings: int) -> Iterator[None]:
    """Inside, everything is computed in blocks of 1 / 2^halvings of their size: for a run that met the end of memory."""
    global _halvings  # noqa: PLW0603
    before, _halvings = _halvings, halvings
    try:
        yield
    finally:
        _halvings = before
