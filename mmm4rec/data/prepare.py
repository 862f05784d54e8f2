"""Tables to a domain: k-core, order, ties, split, features.

Raw reviews: repeated (user, item, time) rows are dropped, the k-core is cut to its fixed point, and each user's rows are
ordered by time, equal times by item id (without times, as in the source). UniSRec's own script also drops items without
metadata and leaves ties to the order of a hash set; here such items stay, with the text '', and ties have a rule.

UniSRec / MISSRec: each user's sequence is rebuilt from its test row and checked against the train and valid rows.

Users and items are numbered by their source ids in ascending order (raw reviews) or by the source's indices (UniSRec), so
the order of the rows in a raw file changes nothing.

Two splits. Leave-one-out: a user's last interaction is the test, the one before the validation. Global time: validation
and test are what happened from two moments on, the same for all users, so that no training target is later than an
evaluated one; of each user the last target before the test's moment is validated and the last of all is tested.

Legend: U users, I items, N interactions, R rows of a raw file, F feature width.
"""

from __future__ import annotations

import logging
import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa

from mmm4rec.data import reviews
from mmm4rec.data.domain import LEAVE_ONE_OUT, Domain, write_domain
from mmm4rec.data.features import save_table
from mmm4rec.data.reviews.downstream import FEATURE_FILES, Downstream, DownstreamSource, Rows, read_downstream
from mmm4rec.data.reviews.items import best_items
from mmm4rec.data.reviews.source import RawSource
from mmm4rec.data.reviews.table import Columns
from mmm4rec.data.stage import Staged, blocks, count_ties, counted, earliest_from, k_core_mask, ranks, stage
from mmm4rec.data.strict import FIX_ROW, Faults, rows_at_most
from mmm4rec.errors import BadInput

log = logging.getLogger(__name__)
TIE_BREAK_BY_ITEM = "equal times: by the source's item id, ascending"
TIE_BREAK_OF_SOURCE = "as in the source, which has no times"
DAY_SECONDS = 86_400
ENGINE_SHARE = 0.6  # of the memory limit, for DuckDB; the rest is for the arrays of users and items


@dataclass(frozen=True)
class PrepareConfig:
    """How raw reviews become a domain. UniSRec / MISSRec folders are cut and split already: only the defaults fit them."""

    k_core: int = 5  # every user and item keeps at least so many interactions
    split: Literal["leave-one-out", "global-time"] = "leave-one-out"
    valid_share: float = 0.1  # global-time: of the interactions, just before the test's
    test_share: float = 0.1  # global-time: the latest interactions
    malformed: float = 0.001  # the share of malformed rows above which preparation stops; 0: at the first one
    memory_gb: float = 4.0  # for rows; what does not fit is sorted on disk
    columns: Columns = field(default_factory=Columns)  # of a plain table

    def __post_init__(self) -> None:
        if self.k_core < 1:
            raise ValueError(f"k_core is {self.k_core}; it must be at least 1.")
        if not (min(self.valid_share, self.test_share) > 0 and self.valid_share + self.test_share < 1):
            raise ValueError(f"valid_share and test_share are {self.valid_share} and {self.test_share}; above 0, below 1 together.")
        if not 0 <= self.malformed <= 1:
            raise ValueError(f"malformed is {self.malformed}; it must be from 0 to 1.")
        if not 0 < self.memory_gb < math.inf:
            raise ValueError(f"memory_gb is {self.memory_gb}; it must be a size.")


def prepare(
    src: Path,
    out: Path,
    config: PrepareConfig = PrepareConfig(),
    *,
    name: str | None = None,
    force: bool = False,
) -> Domain:
    """Prepare raw files as a domain, whole or not at all.

    Args:
        src: a folder or file of a known format (reviews/).
        out: the domain's folder; it must not exist unless `force` is on.
        name: the domain's name; by default the name in the raw files.
    Raises BadInput for input that breaks a rule; nothing is written then.
    """
    if out.exists() and not force:
        raise BadInput("exists already.", file=out, remedy="Choose another folder, or replace it with --force.")
    if src.resolve() == out.resolve() or out.resolve() in src.resolve().parents:
        raise BadInput("holds the source, which would be replaced.", file=out, remedy="Choose another folder.")
    source = reviews.find_source(src, config.columns)
    if isinstance(source, DownstreamSource):
        if config.split != LEAVE_ONE_OUT:
            raise BadInput("has no times, which a global-time split needs.", file=src, remedy="Leave --split out.")
        return _prepare_downstream(source, out, name or source.name, force)
    place = next(parent for parent in out.resolve().parents if parent.is_dir())
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.rows.", dir=place) as folder:
        return _prepare_reviews(source, Path(folder), out, name or source.name, config, force)


def _prepare_reviews(source: RawSource, folder: Path, out: Path, name: str, config: PrepareConfig, force: bool) -> Domain:
    faults = Faults(config.malformed, rows_at_most(source.interactions))
    rows = stage(source.read_rows(faults), folder, memory_bytes=int(config.memory_gb * ENGINE_SHARE * 1e9))
    faults.check()
    if not len(rows):
        raise BadInput("holds no rows.", file=source.interactions[0], remedy="Download the file again.")
    log.info("%s: %s rows of %s users and %s items; cutting to the %d-core.", name, *_thousands(rows), config.k_core)
    kept = k_core_mask(rows.user, rows.item, config.k_core)
    if not kept.any():
        rule = f"has no {config.k_core}-core: none of its {faults.rows:,} rows is left."
        raise BadInput(rule, file=source.interactions[0], remedy="Give more rows, or a smaller k-core.")
    core = _core(rows, kept, folder, timed=source.timed)
    split, cuts = _split(source, core, config)
    wanted = Faults(config.malformed, rows_at_most(source.metadata))
    items = _item_table(source, core.item_ids, wanted)
    wanted.check()
    provenance = {
        "format": source.format,
        "sources": [file.name for file in (*source.interactions, *source.metadata)],
        "sources_passed_over": [file.name for file in source.unread],
        "source_rule": "full dump before 5-core; ratings before reviews",
        "user_order": "source id, ascending",
        "item_order": "source id, ascending",
        "k_core": config.k_core,
        "rows_read": faults.rows,
        "interactions_read": faults.report(),
        "metadata_read": wanted.report(),
        "duplicates_dropped": rows.duplicates,
        "k_core_dropped": {
            "interactions": len(rows) - len(core.items),
            "users": len(rows.user_ids) - len(core.user_ids),
            "items": len(rows.item_ids) - len(core.item_ids),
        },
        **core.ties(rows),
        "items_without_metadata": int(items["text"].isna().sum()),
        "items_without_text": int((items["text"].fillna("") == "").sum()),
        "items_with_image_url": int(items["image_url"].notna().sum()),
    }
    return write_domain(
        out,
        name=name,
        offsets=core.offsets,
        items=core.items,
        timestamps=core.timestamps,
        item_table=items.assign(text=items["text"].fillna("")),
        user_ids=core.user_ids,
        tie_break=TIE_BREAK_BY_ITEM if source.timed else TIE_BREAK_OF_SOURCE,
        provenance=provenance,
        split=split,
        cuts=cuts,
        force=force,
    )


def _thousands(rows: Staged) -> tuple[str, ...]:
    return tuple(f"{count:,}" for count in (len(rows), len(rows.user_ids), len(rows.item_ids)))


@dataclass(frozen=True)
class Core:
    """What the k-core leaves, users and items numbered anew; the arrays of interactions are memory-mapped."""

    offsets: np.ndarray  # [U + 1] int64
    items: np.ndarray  # [N] int32, from 1
    timestamps: np.ndarray | None  # [N] int64 unix seconds
    time_ms: np.ndarray  # [N] int64
    user_ids: list[str]
    item_ids: list[str]

    def ties(self, rows: Staged) -> dict[str, Any]:
        """For the provenance; a source without times has none."""
        if self.timestamps is None:
            return {}
        user = np.repeat(np.arange(len(self.user_ids), dtype=np.int32), np.diff(self.offsets))
        whole_days = sum(int((self.timestamps[part] % DAY_SECONDS == 0).sum()) for part in blocks(len(self.timestamps)))
        before, after = count_ties(rows.user, rows.time_ms), count_ties(user, self.time_ms)
        return {"ties_before_k_core": before, "ties": after, "whole_day_times": whole_days}


def _core(rows: Staged, kept: np.ndarray, folder: Path, *, timed: bool) -> Core:
    users, items = counted(rows.user, kept), counted(rows.item, kept)
    renumbered, total = ranks(items > 0) + 1, int(kept.sum())
    columns = {name: np.memmap(folder / f"core_{name}", dtype=dtype, mode="w+", shape=total) for name, dtype in CORE.items()}
    done = 0
    for part in blocks(len(rows)):
        here = kept[part]
        place = slice(done, done := done + int(here.sum()))
        columns["items"][place] = renumbered[rows.item[part][here]]
        columns["time_ms"][place] = rows.time_ms[part][here]
        columns["timestamps"][place] = columns["time_ms"][place] // 1000
    return Core(
        offsets=_offsets(users[users > 0]),
        items=columns["items"],
        timestamps=columns["timestamps"] if timed else None,
        time_ms=columns["time_ms"],
        user_ids=rows.user_ids.filter(pa.array(users > 0)).to_pylist(),
        item_ids=rows.item_ids.filter(pa.array(items > 0)).to_pylist(),
    )


CORE = {"items": np.int32, "time_ms": np.int64, "timestamps": np.int64}


def _split(source: RawSource, core: Core, config: PrepareConfig) -> tuple[str, np.ndarray | None]:
    """The split's rule, and with global time how many of a user's interactions come before each moment, [U, 2]."""
    if config.split == LEAVE_ONE_OUT:
        return LEAVE_ONE_OUT, None
    if core.timestamps is None:
        raise BadInput("has no times, which a global-time split needs.", file=source.interactions[0], remedy="Leave --split out.")
    moments = [earliest_from(core.timestamps, share) for share in (config.valid_share + config.test_share, config.test_share)]
    cuts = np.stack([_counts_before(core, moment) for moment in moments], axis=1)
    before_valid, before_test, lengths = cuts[:, 0], cuts[:, 1], np.diff(core.offsets)
    targets = {
        "training": before_valid > 1,
        "validation": (before_test > before_valid) & (before_test > 1),
        "test": (lengths > before_test) & (lengths > 1),
    }
    if none := [name for name, users in targets.items() if not users.any()]:
        rule = f"leaves no {' and no '.join(none)} targets with a global-time split at {moments[0]} and {moments[1]} (unix seconds)."
        raise BadInput(rule, file=source.interactions[0], remedy="Choose other shares, or leave --split out.")
    return f"global-time: validation from {moments[0]}, test from {moments[1]} (unix seconds), each user's last target of either", cuts


def _counts_before(core: Core, moment: int) -> np.ndarray:
    """How many interactions of each user come before a moment, [U]: times ascend within a user."""
    assert core.timestamps is not None
    early = np.concatenate([core.timestamps[part] < moment for part in blocks(len(core.timestamps))])
    return np.add.reduceat(early, core.offsets[:-1], dtype=np.int64)


def _item_table(source: RawSource, item_ids: list[str], faults: Faults) -> pd.DataFrame:
    """`item`, `text` (null without metadata), `image`, `image_url`, in item order."""
    found = best_items(source.read_items(faults), set(item_ids)).set_index("item").reindex(item_ids)
    return pd.DataFrame(
        {"item": item_ids, "text": found["text"].to_numpy(), "image": None, "image_url": found["image_url"].to_numpy()}, dtype=object
    )


def _prepare_downstream(source: DownstreamSource, out: Path, name: str, force: bool) -> Domain:
    tables = read_downstream(source)
    sequences = rebuild_sequences(tables)
    provenance = {
        "format": "unisrec",
        "sources": tables.files,
        "user_order": "the source's index",
        "item_order": "the source's index",
        "k_core": "as in the source",
        "rows_read": sum(len(rows.user) for rows in (tables.train, tables.valid, tables.test)),
        "longest_history": sequences.longest_history,
        "users_with_cut_histories": sequences.users_cut,
        "items_without_text": tables.texts.count(""),
        "items_without_interactions": len(tables.items) - len(np.unique(sequences.items)),
        "feature_rows_absent": {each: int((~_present(vectors)).sum()) for each, vectors in tables.features.items()},
        "feature_absence_rule": "a row of zeros is absent",
    }

    def save_features(folder: Path, fingerprint: str) -> None:
        for modality, vectors in tables.features.items():
            suffix = FEATURE_FILES[modality]
            encoder = f"unisrec:{suffix}:{vectors.shape[1]}"
            origin = source.file(suffix)
            save_table(folder, modality, vectors, _present(vectors), encoder=encoder, domain_fingerprint=fingerprint, source=origin)

    return write_domain(
        out,
        name=name,
        offsets=sequences.offsets,
        items=sequences.items + 1,
        timestamps=None,
        item_table=pd.DataFrame({"item": tables.items, "text": tables.texts, "image": None}),
        user_ids=tables.users,
        tie_break=TIE_BREAK_OF_SOURCE,
        provenance=provenance,
        extra=save_features,
        force=force,
    )


def _present(vectors: np.ndarray) -> np.ndarray:
    """Which rows [I] of a feature table exist: UniSRec and MISSRec leave a row of zeros for an item without."""
    return np.asarray((vectors != 0).any(axis=1))


@dataclass(frozen=True)
class Sequences:
    """Users' whole sequences, in index order."""

    offsets: np.ndarray  # [U + 1] int64
    items: np.ndarray  # [N] int64, indices from 0
    longest_history: int  # over all rows; UniSRec cuts histories to their last 50 items
    users_cut: int  # users whose test history is cut, so that their first items come from train rows


def rebuild_sequences(tables: Downstream) -> Sequences:
    """Whole sequences from rows whose histories may be cut to their last items.

    A user of n interactions has n - 3 train rows (targets 2 .. n - 2), so the row counts fix n. The test row gives the
    last items, the targets of train rows give those before its history begins. Then every row is compared: its history
    and target must stand in the sequence, in its place. Train rows whose histories are equally long are read as UniSRec
    writes them, latest first; in any other order they fail the comparison.
    Raises BadInput for a user without its one valid and one test row, or for rows that contradict each other.
    """
    train, valid, test = tables.train, tables.valid, tables.test
    for rows in (test, valid):
        _check_one_row_a_user(rows, len(tables.users))
    n_train = np.bincount(train.user, minlength=len(tables.users))
    offsets = _offsets(n_train + 3)
    longest = int(max(rows.lengths.max() for rows in (train, valid, test)))
    by_place = np.lexsort((-np.arange(len(train.user)), train.lengths, train.user))
    train_place = np.empty(len(by_place), dtype=np.int64)  # [R], a target's place in its user's sequence, from 0
    train_place[by_place] = np.arange(len(by_place)) - np.repeat(_offsets(n_train)[:-1], n_train) + 1
    placed = [(test, n_train[test.user] + 2), (valid, n_train[valid.user] + 1), (train, train_place)]
    for rows, place in placed:
        _check_lengths(rows, np.minimum(place, longest), n_train)

    items = np.full(offsets[-1], -1, dtype=np.int64)
    for rows, place in reversed(placed):  # the test row comes last: it has the last word
        starts_user = place == 1
        items[offsets[rows.user[starts_user]]] = rows.history[(rows.ends - rows.lengths)[starts_user]]
        items[offsets[rows.user] + place] = rows.target
    items[_history_places(test, placed[0][1], offsets)] = test.history
    for rows, place in placed:
        _check_against(items, rows, place, offsets)
    return Sequences(offsets, items, longest, int((test.lengths < placed[0][1]).sum()))


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(counts)))


def _history_places(rows: Rows, place: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Where each item of `rows.history` stands among all users' items: the places just before its row's target."""
    shift = offsets[rows.user] + place - rows.ends
    return np.arange(len(rows.history)) + np.repeat(shift, rows.lengths)


def _check_one_row_a_user(rows: Rows, n_users: int) -> None:
    counts = np.bincount(rows.user, minlength=n_users)
    if (counts > 1).any():
        row = int(np.argmax(pd.Series(rows.user).duplicated()))
        raise _contradiction(rows, row, f"user {rows.user[row]} has a second row; it has one for this split.")
    if (counts == 0).any():
        raise BadInput(f"has no row for user {int(np.argmin(counts))} of user2index.", file=rows.file, remedy=FIX_ROW)


def _check_lengths(rows: Rows, due: np.ndarray, n_train: np.ndarray) -> None:
    if (rows.lengths != due).any():
        row = int(np.argmax(rows.lengths != due))
        user = rows.user[row]
        rule = f"user {user}'s history has {rows.lengths[row]} items where {due[row]} are due: its {n_train[user]} train rows"
        raise _contradiction(rows, row, f"{rule}, one valid and one test row make {n_train[user] + 3} interactions.")


def _check_against(items: np.ndarray, rows: Rows, place: np.ndarray, offsets: np.ndarray) -> None:
    wrong = items[offsets[rows.user] + place] != rows.target
    row_of = np.repeat(np.arange(len(wrong)), rows.lengths)
    wrong[row_of[items[_history_places(rows, place, offsets)] != rows.history]] = True
    if wrong.any():
        row = int(np.argmax(wrong))
        raise _contradiction(rows, row, f"user {rows.user[row]}'s row contradicts its test row or a longer train row.")


def _contradiction(rows: Rows, row: int, rule: str) -> BadInput:
    return BadInput(rule, file=rows.file, line=row + 2, remedy="Download the domain's .inter files again, all from one source.")
