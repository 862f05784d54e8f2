"""Tables to a domain: k-core, order, ties, split, features.

Amazon 2018: repeated (user, item, time) rows are dropped, the k-core is cut to its fixed point, and each user's rows are
ordered by time, equal times by item id. UniSRec's own script also drops items without metadata and leaves ties to the
order of a hash set; here such items stay, with the text '', and ties have a rule.

UniSRec / MISSRec: each user's sequence is rebuilt from its test row and checked against the train and valid rows.

Users and items are numbered by their source ids in ascending order (Amazon) or by the source's indices (UniSRec), so
the order of the rows in an Amazon file changes nothing.

Legend: U users, I items, N interactions, R rows of a raw file, F feature width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from mmm4rec.data import reviews
from mmm4rec.data.domain import Domain, write_domain
from mmm4rec.data.features import save_table
from mmm4rec.data.reviews import AmazonSource, Downstream, DownstreamSource, Rows
from mmm4rec.errors import BadInput

TIE_BREAK_BY_ITEM = "equal times: by the source's item id, ascending"
TIE_BREAK_OF_SOURCE = "as in the source, which has no times"
DAY_SECONDS = 86_400


def prepare(src: Path, out: Path, *, name: str | None = None, k_core: int = 5, force: bool = False) -> Domain:
    """Prepare raw files as a domain, whole or not at all.

    Args:
        src: a UniSRec / MISSRec folder, an Amazon 2018 category folder, or a category's ratings or reviews file.
        out: the domain's folder; it must not exist unless `force` is on.
        name: the domain's name; by default the name in the raw files.
        k_core: every user and item keeps at least so many interactions (Amazon only; UniSRec folders are cut already).
    Raises BadInput for input that breaks a rule; nothing is written then.
    """
    if k_core < 1:
        raise BadInput(f"k-core is {k_core}; it is 1 or more.", remedy="Choose a larger one.")
    if out.exists() and not force:
        raise BadInput("exists already.", file=out, remedy="Choose another folder, or replace it with --force.")
    if src.resolve() == out.resolve() or out.resolve() in src.resolve().parents:
        raise BadInput("holds the source, which would be replaced.", file=out, remedy="Choose another folder.")
    source = reviews.find_source(src)
    if isinstance(source, DownstreamSource):
        return _prepare_downstream(source, out, name or source.name, force)
    return _prepare_amazon(source, out, name or source.name, k_core, force)


def _prepare_amazon(source: AmazonSource, out: Path, name: str, k: int, force: bool) -> Domain:
    raw = reviews.read_interactions(source.interactions)
    rows = raw.drop_duplicates()
    kept = rows[k_core_mask(pd.factorize(rows["user"])[0], pd.factorize(rows["item"])[0], k)]
    if kept.empty:
        rule = f"has no {k}-core: none of its {len(raw):,} rows is left."
        raise BadInput(rule, file=source.interactions, remedy="Give more rows, or a smaller k-core.")
    user, user_ids = pd.factorize(kept["user"], sort=True)
    item, item_ids = pd.factorize(kept["item"], sort=True)
    time = kept["time"].to_numpy()
    order = np.lexsort((item, time, user))  # item numbers ascend with the item ids
    user, item, time = user[order], item[order], time[order]
    metadata = reviews.read_metadata(source.metadata, set(item_ids)).set_index("item").reindex(item_ids)
    text = metadata["text"].fillna("")
    provenance = {
        "format": "amazon2018",
        "sources": [source.interactions.name, source.metadata.name],
        "sources_passed_over": [file.name for file in source.unread],
        "source_rule": "full dump before 5-core; ratings CSV before reviews JSON",
        "user_order": "source id, ascending",
        "item_order": "source id, ascending",
        "k_core": k,
        "rows_read": len(raw),
        "duplicates_dropped": len(raw) - len(rows),
        "k_core_dropped": {
            "interactions": len(rows) - len(kept),
            "users": rows["user"].nunique() - len(user_ids),
            "items": rows["item"].nunique() - len(item_ids),
        },
        "ties_before_k_core": count_ties(pd.factorize(rows["user"])[0], rows["time"].to_numpy()),
        "ties": count_ties(user, time),
        "whole_day_times": int((time % DAY_SECONDS == 0).sum()),
        "items_without_metadata": int(metadata["text"].isna().sum()),
        "items_without_text": int((text == "").sum()),
        "items_with_image_url": int(metadata["has_image"].eq(True).sum()),
    }
    return write_domain(
        out,
        name=name,
        offsets=_offsets(np.bincount(user)),
        items=item + 1,
        timestamps=time,
        item_table=pd.DataFrame({"item": list(item_ids), "text": text.tolist(), "image": None}),
        user_ids=list(user_ids),
        tie_break=TIE_BREAK_BY_ITEM,
        provenance=provenance,
        force=force,
    )


def k_core_mask(user: np.ndarray, item: np.ndarray, k: int) -> np.ndarray:
    """The rows [R] bool of the k-core: the largest set in which every user and every item has k rows or more.

    Args: user, item: [R] int64 codes from 0.
    """
    kept = np.ones(len(user), dtype=bool)
    while True:
        often = (np.bincount(user[kept], minlength=user.max() + 1) >= k)[user] & (np.bincount(item[kept], minlength=item.max() + 1) >= k)[
            item
        ]
        if not (kept & ~often).any():
            return kept
        kept &= often


def count_ties(user: np.ndarray, time: np.ndarray) -> dict[str, int]:
    """How many users have two interactions of equal time, and how many have such a tie for their last place.

    Whole-day stamps count as they stand: two interactions of one day are a tie.
    Args: user [N] int64 codes from 0; time [N] unix seconds; in any order.
    """
    order = np.lexsort((time, user))
    user, time = user[order], time[order]
    same_user = user[1:] == user[:-1]
    tied = same_user & (time[1:] == time[:-1])  # [N - 1], row r ties with row r + 1
    ends = np.append(~same_user[1:], True)[: len(tied)]  # row r + 1 is the user's last
    return {
        "users": len(np.unique(user)),
        "users_with_tied_times": len(np.unique(user[1:][tied])),
        "users_with_tied_last": int((tied & ends).sum()),
    }


def _prepare_downstream(source: DownstreamSource, out: Path, name: str, force: bool) -> Domain:
    tables = reviews.read_downstream(source)
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
            suffix = reviews.FEATURE_FILES[modality]
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
        raise BadInput(f"has no row for user {int(np.argmin(counts))} of user2index.", file=rows.file, remedy=reviews.FIX_ROW)


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
