"""What a reader found: files of one format, and how their interactions and items are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mmm4rec.data.reviews.items import Item
from mmm4rec.data.reviews.rows import Batches
from mmm4rec.data.strict import Faults


@dataclass(frozen=True)
class RawSource:
    """The files of one domain in one format."""

    format: str
    name: str
    interactions: tuple[Path, ...]
    metadata: tuple[Path, ...]  # where there is none, and `metadata_due` neither, the format can do without
    read_rows: Callable[[Faults], Batches]
    read_items: Callable[[Faults], Iterator[Item]]
    timed: bool = True
    metadata_due: Path | None = None  # a name under which it is looked for
    unread: tuple[Path, ...] = ()  # passed over for `interactions`
