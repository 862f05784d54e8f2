"""Raw files to tables: the only place that knows a raw format. Each has a reader of its own in this folder."""

from __future__ import annotations

from pathlib import Path

from mmm4rec.data.reviews import amazon, recbole, table
from mmm4rec.data.reviews.downstream import INTER_SUFFIXES, DownstreamSource
from mmm4rec.data.reviews.source import RawSource
from mmm4rec.data.reviews.table import Columns
from mmm4rec.errors import BadInput

PLAIN = Columns()
SOURCES = (
    "Give a folder or file of one of these: UniSRec / MISSRec, Amazon 2014, 2018 or 2023 (one category), RecBole (.inter, .item),"
    " or a table (.parquet, .csv, .tsv) with the columns user, item and time, or others that --columns names."
)


def find_source(path: Path, columns: Columns = PLAIN) -> RawSource | DownstreamSource:
    """Recognise the format of a folder or file by names and headers. Raises BadInput when it is of none, or of several domains."""
    if not path.exists():
        raise BadInput("does not exist.", file=path, remedy=SOURCES)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    beside = files if path.is_dir() else sorted(path.parent.iterdir())  # where metadata may stand
    names = {file.name.removesuffix(suffix) for file in files for suffix in INTER_SUFFIXES if file.name.endswith(suffix)}
    if names and path.is_dir():
        return DownstreamSource(_the_only(names, path), path)
    found = table.find(files, beside, columns, path.name) or recbole.find(files, beside)
    if not found and columns.named:
        raise BadInput("holds no table, whose columns --columns could name.", file=path, remedy=SOURCES)
    found = found or [source for find in amazon.FINDERS for source in find(files, beside)]
    _the_only({source.name for source in found}, path)
    if len(editions := sorted({source.format for source in found})) > 1:
        rule = f"holds one category in several editions: {', '.join(editions)}."
        raise BadInput(rule, file=path, remedy="Give each a folder of its own.")
    if not found[0].metadata and (missing := found[0].metadata_due) is not None:
        beside_what = found[0].interactions[0].name
        raise BadInput("is missing: it holds the items' texts.", file=missing, remedy=f"Put it beside {beside_what}.")
    return found[0]


def _the_only(names: set[str], place: Path) -> str:
    if not names:
        raise BadInput("is of an unknown format.", file=place, remedy=SOURCES)
    if len(names) > 1:
        raise BadInput(f"holds several domains: {', '.join(sorted(names))}.", file=place, remedy="Give each a folder of its own.")
    return next(iter(names))
