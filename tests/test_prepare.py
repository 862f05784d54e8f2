"""Raw files to domains: k-core, order, ties, sequences, texts, features, and every kind of bad input."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmm4rec.data import stage, strict
from mmm4rec.data.domain import open_domain
from mmm4rec.data.features import MODALITIES, open_features
from mmm4rec.data.prepare import PrepareConfig, prepare
from mmm4rec.data.reviews.items import item_text, plain_text
from mmm4rec.data.stage import count_ties, k_core_mask
from mmm4rec.errors import BadInput

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the real data sets are not on this machine")
DAY = 86_400
Row = tuple[str, str, int]  # user, item, unix seconds
HEADER = "user_id:token\titem_id_list:token_seq\titem_id:token\n"

# Six users who each took six items, one a day: a 5-core already.
GRID: list[Row] = [(f"u{u}", f"i{i}", (10 * u + i) * DAY) for u in range(6) for i in range(6)]


def write_amazon(folder: Path, rows: list[Row], meta: list[dict[str, Any]] | None = None, *, kind: str = "csv") -> Path:
    """A category folder `Toys`: ratings CSV or reviews JSON, and metadata for every item unless given."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "csv":
        (folder / "Toys.csv").write_text("".join(f"{item},{user},5.0,{time}\r\n" for user, item, time in rows))
    else:
        write_json(folder / "Toys_5.json.gz", [{"reviewerID": user, "asin": item, "unixReviewTime": time} for user, item, time in rows])
    write_json(folder / "meta_Toys.json.gz", meta or [{"asin": item, "title": f"Toy {item}"} for item in sorted({row[1] for row in rows})])
    return folder


def write_json(file: Path, records: list[dict[str, Any]]) -> None:
    with gzip.open(file, "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps(record) + "\n" for record in records)


def write_downstream(folder: Path, sequences: list[list[int]], n_items: int, *, limit: int = 50) -> Path:
    """A UniSRec folder `Toys`, as process_amazon.py writes it: histories cut to their last `limit` items, latest row first."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for user, sequence in enumerate(sequences):
        n = len(sequence)
        for split, ends in (("train", range(n - 3, 0, -1)), ("valid", [n - 2]), ("test", [n - 1])):
            for end in ends:
                history = " ".join(map(str, sequence[:end][-limit:]))
                lines[split].append(f"{user}\t{history}\t{sequence[end]}\n")
    for split, rows in lines.items():
        (folder / f"Toys.{split}.inter").write_text(HEADER + "".join(rows))
    (folder / "Toys.user2index").write_text("".join(f"U{user}\t{user}\n" for user in range(len(sequences))))
    (folder / "Toys.item2index").write_text("".join(f"I{item}\t{item}\n" for item in reversed(range(n_items))))
    (folder / "Toys.text").write_text("item_id:token\ttext:token_seq\n" + "".join(f"I{item}\tToy {item}. \n" for item in range(n_items)))
    return folder


def sequences_of(domain_path: Path) -> list[list[int]]:
    """Each user's items, as item numbers."""
    domain = open_domain(domain_path)
    return [part.tolist() for part in np.split(domain.items, domain.offsets[1:-1])]


# k-core, order and ties


@pytest.mark.parametrize("seed", range(20))
def test_k_core_is_what_removing_one_row_at_a_time_leaves(seed: int) -> None:
    rng = np.random.default_rng(seed)
    user, item = rng.integers(0, 12, size=60), rng.integers(0, 9, size=60)
    rows = set(range(60))
    while True:
        users, items = Counter(user[row] for row in rows), Counter(item[row] for row in rows)
        rare = [row for row in rows if users[user[row]] < 4 or items[item[row]] < 4]
        if not rare:
            break
        rows.remove(rare[0])
    assert np.flatnonzero(k_core_mask(user, item, 4)).tolist() == sorted(rows)


def test_k_core_cascades_to_its_fixed_point_and_its_drops_are_counted(tmp_path: Path) -> None:
    # i9 has 4 rows and goes; u9 then has 4 rows and goes; i0 .. i3 keep 6 each.
    extra = [("u9", f"i{i}", i) for i in range(4)] + [("u9", "i9", 9)] + [(f"u{u}", "i9", 9) for u in range(3)]
    domain = prepare(write_amazon(tmp_path / "raw", GRID + extra), tmp_path / "out")
    assert (domain.n_users, domain.n_items, len(domain.items)) == (6, 6, 36)
    assert domain.info["provenance"]["k_core_dropped"] == {"interactions": 8, "users": 1, "items": 1}


def test_the_order_of_the_raw_rows_and_their_format_change_nothing(tmp_path: Path) -> None:
    rows = [(user, item, time // (3 * DAY) * DAY) for user, item, time in GRID]  # three interactions a day: ties
    meta: list[dict[str, Any]] = [{"asin": f"i{i}", "title": f"Toy {i}"} for i in range(6)] + [{"asin": "i0", "title": "A longer title"}]
    first = prepare(write_amazon(tmp_path / "raw", rows, meta), tmp_path / "first")
    random.Random(1).shuffle(rows)
    second = prepare(write_amazon(tmp_path / "shuffled", rows, meta[::-1]), tmp_path / "second")
    third = prepare(write_amazon(tmp_path / "json", rows, meta, kind="json"), tmp_path / "third")
    for other in (second, third):
        assert other.fingerprint == first.fingerprint
        for array in ("offsets", "items", "timestamps"):
            np.testing.assert_array_equal(getattr(first, array), getattr(other, array))
        assert other.item_table().equals(first.item_table())
    assert first.item_table()["text"][0] == "A longer title."


def test_rows_go_by_time_then_item_id_and_only_equal_rows_are_dropped(tmp_path: Path) -> None:
    rows = [("u", "c", 5), ("u", "b", 5), ("u", "a", 9), ("u", "b", 5), ("u", "b", 7), ("t", "c", 1)]
    domain = prepare(write_amazon(tmp_path / "raw", rows), tmp_path / "out", PrepareConfig(k_core=1), name="mine")
    assert sequences_of(tmp_path / "out") == [[3], [2, 3, 2, 1]]  # users t, u; items a, b, c
    assert domain.timestamps is not None
    assert domain.timestamps.tolist() == [1, 5, 5, 7, 9]
    assert domain.name == "mine"
    assert domain.info["provenance"]["rows_read"] == 6
    assert domain.info["provenance"]["duplicates_dropped"] == 1


@pytest.mark.parametrize("at_once", [1, 2, 3, 5, 100])
def test_ties_are_counted_by_hand(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # user 0 ties in the middle, 1 at the end, 2 twice (three equal times), 3 never, 4 has one row; equal times across users are none.
    user = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4])
    time = np.array([1, 2, 2, 3, 4, 4, 5, 5, 5, 6, 7, 7])
    monkeypatch.setattr(stage, "ROWS_AT_ONCE", at_once)
    assert count_ties(user, time) == {"users": 5, "users_with_tied_times": 3, "users_with_tied_last": 2}


def test_a_repeated_row_is_no_tie_and_two_items_of_one_day_are(tmp_path: Path) -> None:
    rows = [("u", "a", DAY), ("u", "a", DAY), ("v", "a", 0), ("v", "b", DAY), ("v", "c", DAY)]
    provenance = prepare(write_amazon(tmp_path / "raw", rows), tmp_path / "out", PrepareConfig(k_core=1)).info["provenance"]
    assert provenance["ties"] == {"users": 2, "users_with_tied_times": 1, "users_with_tied_last": 1}
    assert provenance["whole_day_times"] == 4


# Texts


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("Fish &amp; chips", "Fish & chips"),
        ("<p>One</p><p>two<br/>three</p>", "One two three"),
        ("<b>H</b><sub>2</sub>O", "H2O"),
        ("a<script>var x = '<b>';</script> b <style>p {}</style>", "a b"),
        ("3 < 4 and 5 > 2", "3 < 4 and 5 > 2"),
        ("x<![if !supportLists]>y<![endif]>z<![odd]>", "xyz"),
        (" two\n lines\t", "two lines"),
    ],
)
def test_html_becomes_plain_text(markup: str, text: str) -> None:
    assert plain_text(markup) == text


def test_item_text_is_title_brand_category_description() -> None:
    text = item_text(["Kite &amp; line"], ["Acme"], ["Toys", "Toys", "Kites"], ["<p>It flies!</p>"])
    assert text == "Kite & line. Acme. Toys, Kites. It flies!"


def test_items_without_metadata_have_no_text_and_are_counted(tmp_path: Path) -> None:
    meta: list[dict[str, Any]] = [
        {"asin": "i0", "title": "Kite", "imageURL": ["x"]},
        {"asin": "i1", "title": "var t = new Date().getTime()"},
        {"asin": "other", "title": "Not here"},
    ]
    domain = prepare(write_amazon(tmp_path / "raw", GRID, meta), tmp_path / "out")
    assert domain.item_table()["text"].tolist() == ["Kite.", "", "", "", "", ""]
    counts = [domain.info["provenance"][f"items_{what}"] for what in ("without_metadata", "without_text", "with_image_url")]
    assert counts == [4, 5, 1]


# Downstream folders


@pytest.mark.parametrize("limit", [50, 4, 1])
def test_sequences_are_rebuilt_whole_even_where_histories_are_cut(tmp_path: Path, limit: int) -> None:
    rng = np.random.default_rng(limit)
    sequences = [rng.integers(0, 7, size=n).tolist() for n in (3, 4, 5, 6, 30, 51, 52, 53, 120)]  # few items: many repeats
    domain = prepare(write_downstream(tmp_path / "raw", sequences, 7, limit=limit), tmp_path / "out")
    assert sequences_of(tmp_path / "out") == [[item + 1 for item in sequence] for sequence in sequences]
    cut = {50: 3, 4: 6, 1: 9}[limit]  # a test history holds n - 1 items
    assert domain.info["provenance"]["users_with_cut_histories"] == cut
    assert domain.timestamps is None


def test_a_file_read_in_many_blocks_is_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 7, size=n).tolist() for n in range(3, 60)]
    downstream, amazon = write_downstream(tmp_path / "toys", sequences, 7), write_amazon(tmp_path / "raw", GRID)
    whole = [prepare(downstream, tmp_path / "a").fingerprint, prepare(amazon, tmp_path / "b").fingerprint]
    monkeypatch.setattr(strict, "BLOCK_BYTES", 200)  # the longest row has about 110 bytes
    blocks = [prepare(downstream, tmp_path / "c").fingerprint, prepare(amazon, tmp_path / "d").fingerprint]
    assert blocks == whole


def test_features_stand_beside_their_items_and_rows_of_zeros_are_absent(tmp_path: Path) -> None:
    raw = write_downstream(tmp_path / "raw", [[0, 1, 2, 0]], 3)
    vectors = np.arange(12, dtype="<f4").reshape(3, 4)
    vectors[1] = 0
    vectors.tofile(raw / "Toys.feat3CLS")
    domain = prepare(raw, tmp_path / "out")
    table = open_features(domain, "image")
    assert table is not None
    np.testing.assert_array_equal(table.vectors, vectors)
    assert (table.present.tolist(), table.encoder) == ([True, False, True], "unisrec:feat3CLS:4")
    assert open_features(domain, "text") is None
    assert domain.item_table()["item"].tolist() == ["I0", "I1", "I2"]
    assert domain.item_table()["text"].tolist() == ["Toy 0.", "Toy 1.", "Toy 2."]


def test_an_item_without_a_line_of_text_is_counted_and_a_tab_is_white_space(tmp_path: Path) -> None:
    raw = write_downstream(tmp_path / "raw", [[0, 1, 2, 0]], 3)
    (raw / "Toys.text").write_text("item_id:token\ttext:token_seq\nI2\tA\tkite\n")
    domain = prepare(raw, tmp_path / "out")
    assert domain.item_table()["text"].tolist() == ["", "", "A kite"]
    assert domain.info["provenance"]["items_without_text"] == 2


# Which files are read, what is kept safe


def test_the_full_ratings_go_before_a_5_core_and_the_domain_says_so_without_paths(tmp_path: Path) -> None:
    raw = write_amazon(tmp_path / "raw", GRID)
    write_amazon(raw, [*GRID, ("u0", "i0", 1)], kind="json")
    provenance = prepare(raw, tmp_path / "out").info["provenance"]
    assert provenance["rows_read"] == 36
    assert (provenance["sources"], provenance["sources_passed_over"]) == (["Toys.csv", "meta_Toys.json.gz"], ["Toys_5.json.gz"])
    assert str(tmp_path) not in (tmp_path / "out" / "domain.json").read_text()
    assert prepare(raw / "Toys_5.json.gz", tmp_path / "file").info["provenance"]["rows_read"] == 37
    (raw / "Toys.csv").rename(raw / "Toys_5.csv")
    (raw / "Toys_5.json.gz").rename(raw / "Toys.json.gz")
    assert prepare(raw, tmp_path / "json").info["provenance"]["sources"][0] == "Toys.json.gz"


def test_an_existing_domain_is_replaced_only_by_force(tmp_path: Path) -> None:
    before = prepare(write_amazon(tmp_path / "raw", GRID), tmp_path / "out")
    with pytest.raises(BadInput, match=r"exists already.*--force"):
        prepare(write_downstream(tmp_path / "other", [[0, 1, 2]], 3), tmp_path / "out")
    assert open_domain(tmp_path / "out").fingerprint == before.fingerprint
    assert prepare(tmp_path / "raw", tmp_path / "out", name="again", force=True).name == "again"


def test_force_never_replaces_the_source(tmp_path: Path) -> None:
    raw = write_amazon(tmp_path / "raw", GRID)
    for out in (raw, tmp_path):
        with pytest.raises(BadInput, match="holds the source"):
            prepare(raw, out, force=True)
    assert (raw / "Toys.csv").is_file()


# Bad input: (name, builder of the source, what the message must say)


def amazon_with(file: str, line: int, text: str) -> Callable[[Path], Path]:
    """A good category folder in which one line of a file is replaced."""

    def build(tmp_path: Path) -> Path:
        raw = write_amazon(tmp_path / "raw", GRID, kind="json" if file == "Toys_5.json.gz" else "csv")
        place = raw / file
        content = gzip.decompress(place.read_bytes()) if file.endswith(".gz") else place.read_bytes()
        lines = content.split(b"\n")
        lines[line - 1] = text.encode("latin-1")
        place.write_bytes(gzip.compress(b"\n".join(lines)) if file.endswith(".gz") else b"\n".join(lines))
        return raw

    return build


def downstream_with(change: Callable[[Path], object]) -> Callable[[Path], Path]:
    """A good downstream folder (U0: 0 1 2 3 4, U1: 4 3 2 1 0) that a change spoils."""

    def build(tmp_path: Path) -> Path:
        raw = write_downstream(tmp_path / "raw", [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]], 5)
        change(raw)
        return raw

    return build


def replaced(file: str, old: str, new: str) -> Callable[[Path], Path]:
    def change(raw: Path) -> None:
        content = (raw / file).read_text()
        assert content.count(old) == 1
        (raw / file).write_text(content.replace(old, new))

    return downstream_with(change)


def features(values: np.ndarray) -> Callable[[Path], Path]:
    return downstream_with(lambda raw: values.astype("<f4").tofile(raw / "Toys.feat1CLS"))


def sparse(tmp_path: Path) -> Path:
    return write_amazon(tmp_path / "raw", GRID[:10])


def two_domains(tmp_path: Path) -> Path:
    raw = write_amazon(tmp_path / "raw", GRID)
    (raw / "Games.csv").write_text("i,u,5.0,1\n")
    return raw


def no_metadata(tmp_path: Path) -> Path:
    raw = write_amazon(tmp_path / "raw", GRID)
    (raw / "meta_Toys.json.gz").unlink()
    return raw


def cut_gzip(tmp_path: Path) -> Path:
    raw = write_amazon(tmp_path / "raw", GRID)
    (raw / "meta_Toys.json.gz").write_bytes((raw / "meta_Toys.json.gz").read_bytes()[:-12])
    return raw


def unknown_format(tmp_path: Path) -> Path:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "notes.txt").write_text("hello\n")
    return tmp_path / "raw"


CSV, REVIEWS, META = "Toys.csv", "Toys_5.json.gz", "meta_Toys.json.gz"
BAD_INPUTS: list[tuple[str, Callable[[Path], Path], list[str]]] = [
    ("no source", lambda tmp_path: tmp_path / "raw", ["raw: does not exist", "Give a folder"]),
    ("unknown format", unknown_format, ["raw: is of an unknown format", "Give a folder"]),
    ("two domains", two_domains, ["raw: holds several domains: Games, Toys"]),
    ("no metadata", no_metadata, ["meta_Toys.json.gz: is missing", "beside Toys.csv"]),
    ("a field too few", amazon_with(CSV, 3, "i2,u0,5.0"), ["Toys.csv:3: has 3 fields; a row has 4", "Correct the row"]),
    ("a field too many", amazon_with(CSV, 1, "i2,u0,5.0,1,1"), ["Toys.csv:1: has 5 fields; a row has 4"]),
    ("an empty line", amazon_with(CSV, 7, ""), ["Toys.csv:7: has 1 field; a row has 4"]),
    ("a time of letters", amazon_with(CSV, 4, "i2,u0,5.0,noon"), ["Toys.csv:4: time is 'noon', which is no number"]),
    ("a time that is not finite", amazon_with(CSV, 4, "i2,u0,5.0,nan"), ["Toys.csv:4: time is nan", "whole unix seconds"]),
    ("a negative time", amazon_with(CSV, 5, "i2,u0,5.0,-1"), ["Toys.csv:5: time is -1", "whole unix seconds"]),
    ("milliseconds", amazon_with(CSV, 5, "i2,u0,5.0,1529193600000"), ["Toys.csv:5: time is 1529193600000", "whole unix seconds"]),
    ("no user", amazon_with(CSV, 2, "i2,,5.0,1"), ["Toys.csv:2: the item or the user is empty"]),
    ("ratings not UTF-8", amazon_with(CSV, 6, "i\xe9,u0,5.0,1"), ["Toys.csv:6: is not UTF-8"]),
    ("no 5-core", sparse, ["Toys.csv: has no 5-core", "10 rows", "smaller k-core"]),
    ("reviews no JSON", amazon_with(REVIEWS, 2, "{'asin': 'i0'}"), ["Toys_5.json.gz:2: is no JSON", "strict JSON"]),
    ("a review without a time", amazon_with(REVIEWS, 9, '{"asin": "i0", "reviewerID": "u"}'), ["Toys_5.json.gz:9: has no unixReviewTime"]),
    (
        "a review at no time",
        amazon_with(REVIEWS, 3, '{"asin": "i0", "reviewerID": "u", "unixReviewTime": NaN}'),
        ["Toys_5.json.gz:3: unixReviewTime is nan", "whole unix seconds"],
    ),
    (
        "a review of no item",
        amazon_with(REVIEWS, 3, '{"asin": 7, "reviewerID": "u", "unixReviewTime": 1}'),
        ["Toys_5.json.gz:3: asin is 7; an id is printable text"],
    ),
    ("a list for a review", amazon_with(REVIEWS, 3, "[1]"), ["Toys_5.json.gz:3: is a JSON list"]),
    ("metadata without asin", amazon_with(META, 2, '{"title": "Kite"}'), ["meta_Toys.json.gz:2: has no asin"]),
    ("a title that is no text", amazon_with(META, 2, '{"asin": "i1", "title": {"a": 1}}'), ["meta_Toys.json.gz:2: title is dict"]),
    ("metadata not UTF-8", amazon_with(META, 2, '{"asin": "i1", "title": "\xe9"}'), ["meta_Toys.json.gz:2: is not UTF-8"]),
    ("a gzip file cut short", cut_gzip, ["meta_Toys.json.gz:", "cannot be read", "Download"]),
    ("no test rows", downstream_with(lambda raw: (raw / "Toys.test.inter").unlink()), ["Toys.test.inter: is missing"]),
    ("a header and no rows", downstream_with(lambda raw: (raw / "Toys.test.inter").write_text(HEADER)), ["Toys.test.inter: holds no rows"]),
    ("another header", replaced("Toys.valid.inter", "item_id_list", "items"), ["Toys.valid.inter:1: starts with", "its header is"]),
    ("a row without a history", replaced("Toys.test.inter", "1\t4 3 2 1\t0", "1\t0"), ["Toys.test.inter:3: has 2 fields; a row has 3"]),
    ("a history of letters", replaced("Toys.test.inter", "4 3 2 1", "4 3 x 1"), ["Toys.test.inter:3: history '4 3 x 1'"]),
    ("an unknown item", replaced("Toys.test.inter", "4 3 2 1", "4 3 9 1"), ["Toys.test.inter:3: item 9 is unknown", "ends at 4"]),
    ("an unknown user", replaced("Toys.valid.inter", "1\t4 3 2\t1", "7\t4 3 2\t1"), ["Toys.valid.inter:3: user 7 is unknown"]),
    ("a user without a test row", replaced("Toys.test.inter", "1\t4 3 2 1\t0\n", ""), ["Toys.test.inter: has no row for user 1"]),
    ("a user with two test rows", replaced("Toys.test.inter", "1\t4 3 2 1", "0\t4 3 2 1"), ["Toys.test.inter:3: user 0 has a second row"]),
    ("train rows missing", replaced("Toys.train.inter", "1\t4\t3\n", ""), ["Toys.test.inter:3: user 1's history has 4 items where 3"]),
    ("a test history that differs", replaced("Toys.test.inter", "4 3 2 1", "4 3 3 1"), ["Toys.valid.inter:3: user 1's row contradicts"]),
    ("a valid target that differs", replaced("Toys.valid.inter", "4 3 2\t1", "4 3 2\t2"), ["Toys.valid.inter:3: user 1's row contradicts"]),
    ("a train history that differs", replaced("Toys.train.inter", "1\t4 3\t2", "1\t4 2\t2"), ["Toys.train.inter:4: user 1's row"]),
    ("an index given twice", replaced("Toys.item2index", "I3\t3", "I3\t4"), ["Toys.item2index:2: gives 'I3' index 4"]),
    ("text for an unknown item", replaced("Toys.text", "I3\t", "J3\t"), ["Toys.text:5: item 'J3' is unknown"]),
    ("a text row without a tab", replaced("Toys.text", "I3\t", "I3 "), ["Toys.text:5: is 'I3 Toy 3. '"]),
    ("features of another number of rows", features(np.ones((4, 3))), ["Toys.feat1CLS: has 48 bytes", "5 rows"]),
    ("features that are no numbers", features(np.full((5, 2), np.nan)), ["Toys.feat1CLS: row 0", "is not finite"]),
]  # fmt: skip


@pytest.mark.parametrize(("build", "says"), [case[1:] for case in BAD_INPUTS], ids=[case[0] for case in BAD_INPUTS])
def test_bad_input_names_file_line_rule_and_remedy_and_leaves_nothing(
    tmp_path: Path, build: Callable[[Path], Path], says: list[str]
) -> None:
    src = build(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BadInput) as error:
        prepare(src, tmp_path / "domains" / "out")
    for fragment in says:
        assert fragment in str(error.value)
    assert error.value.remedy
    assert sorted(tmp_path.rglob("*")) == before


# Real data


@needs_shared
@pytest.mark.parametrize(
    ("source", "counts", "n_feature_tables"),
    [
        ("scientific_small", (2928, 1585, 19712), 2),
        ("office_text", (3231, 3317, 22447), 0),
        ("industrial_text", (3285, 3541, 22743), 0),
        ("amazon2018_raw/Gift_Cards", (454, 147, 2949), 0),
    ],
)
def test_real_data_has_its_known_counts(tmp_path: Path, source: str, counts: tuple[int, int, int], n_feature_tables: int) -> None:
    domain = prepare(SHARED / source, tmp_path / "out")
    assert (domain.n_users, domain.n_items, len(domain.items)) == counts
    assert domain.items.min() == 1
    assert domain.items.max() == domain.n_items
    tables = [open_features(domain, modality) for modality in MODALITIES]
    assert [table.vectors.shape for table in tables if table] == [(domain.n_items, 512)] * n_feature_tables
    assert all(domain.item_table()["text"])


@needs_shared
def test_real_gift_cards_have_their_known_ties_and_the_reviews_file_gives_the_same_domain(tmp_path: Path) -> None:
    domain = prepare(SHARED / "amazon2018_raw" / "Gift_Cards", tmp_path / "csv")
    known = {"users": 458, "users_with_tied_times": 439, "users_with_tied_last": 291}
    assert domain.info["provenance"]["ties_before_k_core"] == known
    same = prepare(SHARED / "amazon2018_raw" / "Gift_Cards" / "Gift_Cards_5.json.gz", tmp_path / "json")
    assert same.fingerprint == domain.fingerprint
