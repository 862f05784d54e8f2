"""Facts about raw formats, malformed rows, memory and splits: whatever the files, one domain, or one clear error."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from raw_files import DAY, FORMATS, ROWS, lines, text, write
from raw_files import image as image_of

from mmm4rec.data import reviews, stage, strict
from mmm4rec.data.domain import open_domain
from mmm4rec.data.prepare import PrepareConfig, prepare
from mmm4rec.data.reviews.amazon import _image_2023
from mmm4rec.data.reviews.items import parse_literal, plain_text
from mmm4rec.data.stage import earliest_from
from mmm4rec.data.strict import Faults, read_columns
from mmm4rec.errors import BadInput
from mmm4rec.models.baselines.popularity import Popularity

pytest.importorskip("duckdb", reason="raw reviews are prepared with mmm4rec[prepare]")

FUZZED = int(os.environ.get("MMM4REC_FUZZ", "300"))
KEPT = ROWS[:36]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_domain(kind: str, tmp_path: Path) -> None:
    domain = prepare(write(kind, tmp_path / "Toys"), tmp_path / "out", name="toys")
    users = [sorted((time, item) for user, item, time in KEPT if user == f"u{u}") for u in range(6)]
    assert domain.items.tolist() == [int(item[1]) + 1 for history in users for _, item in history]
    assert domain.timestamps is not None
    assert domain.timestamps.tolist() == [time for history in users for time, _ in history]
    table = domain.item_table()
    assert table["item"].tolist() == [f"i{i}" for i in range(6)]
    assert table["text"].tolist() == [text(f"i{i}") for i in range(6)]
    assert table["image_url"].tolist() == [image_of(f"i{i}") for i in range(6)]
    provenance = domain.info["provenance"]
    assert kind.startswith(provenance["format"])
    assert (provenance["rows_read"], provenance["items_with_image_url"]) == (38, 6)
    assert provenance["k_core_dropped"] == {"interactions": 2, "users": 1, "items": 1}


def test_a_table_of_any_name_and_columns_and_without_times(tmp_path: Path) -> None:
    table = pd.DataFrame(ROWS, columns=["uid", "sku", "ts"])
    table.assign(ts=table["ts"] * 1_000_000).to_csv(tmp_path / "clicks.tsv", sep="\t", index=False)
    columns = reviews.Columns.parse(["user=uid", "item=sku", "time=ts", "time_unit=us"])
    timed = prepare(tmp_path / "clicks.tsv", tmp_path / "timed", PrepareConfig(columns=columns))
    assert (timed.name, timed.fingerprint) == ("clicks", prepare(write("table_csv", tmp_path / "raw"), tmp_path / "same").fingerprint)
    untimed = prepare(tmp_path / "clicks.tsv", tmp_path / "untimed", PrepareConfig(columns=reviews.Columns(user="uid", item="sku")))
    assert untimed.timestamps is None
    in_order = [[int(item[1]) + 1 for user, item, _ in KEPT if user == f"u{u}"] for u in range(6)]
    assert untimed.items.tolist() == [item for history in in_order for item in history]
    with pytest.raises(BadInput, match="does not know place"):
        reviews.Columns.parse(["place=x"])


def test_times_finer_than_a_second_order_and_are_stored_in_seconds(tmp_path: Path) -> None:
    rows = [("u", "b", 1500), ("u", "a", 1700), ("u", "c", 1600), ("u", "d", 1600)]
    pd.DataFrame(rows, columns=["user", "item", "time"]).to_csv(tmp_path / "x.csv", index=False)
    domain = prepare(tmp_path / "x.csv", tmp_path / "out", PrepareConfig(k_core=1, columns=reviews.Columns(time_unit="ms")))
    assert domain.items.tolist() == [2, 3, 4, 1]
    assert domain.timestamps is not None
    assert domain.timestamps.tolist() == [1, 1, 1, 1]
    assert domain.info["provenance"]["ties"]["users_with_tied_times"] == 1


# Malformed rows


def faulty(folder: Path, good: int, bad: list[str]) -> Path:
    folder.mkdir()
    rows = [f"i{i % 6},u{i // 6 % 6},5.0,{i * DAY}" for i in range(good)]
    for number, row in enumerate(bad):
        rows.insert(1 + number * (len(rows) // len(bad)), row)
    lines(folder / "Toys.csv", rows)
    lines(folder / "meta_Toys.json", [json.dumps({"asin": f"i{i}", "title": "t"}) for i in range(6)])
    return folder


BAD_ROWS = ["i1,u1,5.0", "i1,u1,5.0,noon", "", "i1,,5.0,1", "i\x00,u1,5.0,1", "i1,u1,5.0,1.5", "i1,u1,5.0,-1", "a\rb,u1,5.0,1"]


@pytest.mark.parametrize("at_once", [64, 1000, 1 << 20])
def test_malformed_rows_are_left_out_counted_and_told(at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict, "BLOCK_BYTES", at_once)
    whole = prepare(faulty(tmp_path / "whole", 400, ["i0,u0,5.0,0"]), tmp_path / "a")
    domain = prepare(faulty(tmp_path / "faulty", 400, [*BAD_ROWS, "i0,u0,5.0,0"]), tmp_path / "b", PrepareConfig(malformed=0.05))
    assert domain.fingerprint == whole.fingerprint
    told = domain.info["provenance"]["interactions_read"]
    assert (told["rows"], told["malformed"]) == (409, 8)
    assert told["first_malformed"][0] == {"line": 2, "rule": "has 3 fields; a row has 4: item, user, rating, time."}
    assert "noon" in told["first_malformed"][1]["rule"]


def test_more_malformed_rows_than_the_limit_end_the_work(tmp_path: Path) -> None:
    raw = faulty(tmp_path / "raw", 400, BAD_ROWS)
    with pytest.raises(
        BadInput, match=r"Toys.csv:2: has 3 fields.*8 of 408 rows that were read are malformed; the limit is 1.00%.*--malformed"
    ):
        prepare(raw, tmp_path / "out", PrepareConfig(malformed=0.01))
    assert sorted(place.name for place in tmp_path.iterdir()) == ["raw"]


def test_a_file_that_is_wrong_altogether_is_not_read_to_its_end() -> None:
    """It ends at the first fault that is too many whatever is to come, and not before: the order of the rows changes nothing."""
    faults = Faults(0.01, most_rows=1000)
    for line in range(1, 11):
        faults.add(Path("x"), line, "is wrong.")
    with pytest.raises(BadInput, match="11 of"):
        faults.add(Path("x"), 11, "is wrong.")


def test_whether_malformed_rows_are_too_many_does_not_depend_on_their_order(tmp_path: Path) -> None:
    raw = faulty(tmp_path / "raw", 3000, [])
    good = (raw / "Toys.csv").read_text().splitlines()
    for number, rows in enumerate(([*["x"] * 25, *good], [*good, *["x"] * 25])):
        lines(raw / "Toys.csv", [good[0], *rows])  # a first line that tells the format
        assert (
            prepare(raw, tmp_path / f"out{number}", PrepareConfig(malformed=0.01)).info["provenance"]["interactions_read"]["malformed"]
            == 25
        )


def test_halving_finds_the_lines_that_do_not_parse_alone(tmp_path: Path) -> None:
    """The good rows and their places are those of the same lines read one by one."""
    import pyarrow as pa

    draw = random.Random(0)
    rows = [draw.choice(["a,1", "b,2", "c", "d,x", "", "e,3,4", "f,\xff", "g,5\r"]) for _ in range(500)]
    (tmp_path / "x.csv").write_bytes("\n".join(rows).encode("latin-1"))
    faults = Faults(1.0)
    kinds = {"name": pa.string(), "number": pa.int64()}
    found = [
        (first + place, name)
        for first, places, table in read_columns(tmp_path / "x.csv", kinds, ",", faults)
        for place, name in zip(places.tolist(), table["name"].to_pylist(), strict=True)
    ]
    good = ("a,1", "b,2", "g,5\r")
    assert found == [(line, row[0]) for line, row in enumerate(rows, start=1) if row in good]
    assert (faults.rows, faults.count) == (500, 500 - len(found))


def test_python_dictionaries_are_read_as_literals_and_never_evaluated(tmp_path: Path) -> None:
    assert parse_literal("{'asin': 'x', 'related': {'also': ['y']}}") == {"asin": "x", "related": {"also": ["y"]}}
    assert parse_literal('{"asin": null}') == {"asin": None}
    trap = tmp_path / "trap"
    for line in (
        f"__import__('os').mkdir({str(trap)!r})",
        "[" * 100_000,
        "-" * 100_000 + "1",
        "{'a': 1",
        "(" * 500,
        "'" + "x" * 10,
        "{'a': [].x}",
    ):
        with pytest.raises(ValueError, match=r"is no JSON|is a Python|characters"):
            parse_literal(line)
    assert not trap.exists()


def test_an_address_that_no_file_can_hold_is_none(tmp_path: Path) -> None:
    raw = faulty(tmp_path / "raw", 400, [])
    lines(raw / "meta_Toys.json", [json.dumps({"asin": f"i{i}", "title": "t \ud800", "imageURL": "http://x/\ud800"}) for i in range(6)])
    domain = prepare(raw, tmp_path / "out")
    assert domain.info["provenance"]["items_with_image_url"] == 0
    assert domain.item_table()["text"].tolist() == ["t ?"] * 6


def test_markup_that_never_ends_is_read_in_linear_time() -> None:
    began = time.perf_counter()
    for part in ("<![", "<!--", "<a ", "<script>", "&", "</"):
        plain_text(part * 100_000)
    assert time.perf_counter() - began < 5


# What a source is


@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        (["user=uid", "item=sku", "time=tsx"], "has no column tsx; its columns are uid, sku, ts"),
        (["user=typo", "item=sku"], "has no column typo"),
        (["user=uid", "item=uid"], "gives one column two meanings"),
        (["user=uid", "item=sku", "time=ts", "title=typo"], "has no column typo; its columns are sku, title"),
        ([], "is of an unknown format"),
    ],
)
def test_columns_that_are_not_there_are_told(pairs: list[str], says: str, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    pd.DataFrame(ROWS, columns=["uid", "sku", "ts"]).to_csv(raw / "interactions.csv", index=False)
    (raw / "items.csv").write_text("sku,title\ni1,Kite\n")
    with pytest.raises(BadInput, match=says):
        prepare(raw, tmp_path / "out", PrepareConfig(columns=reviews.Columns.parse(pairs)))


def test_a_ratings_file_with_a_header_is_not_taken_for_2018(tmp_path: Path) -> None:
    lines(tmp_path / "ratings.csv", ["userId,movieId,rating,timestamp", *(f"{user[1]},{item[1]},5.0,{time}" for user, item, time in ROWS)])
    with pytest.raises(BadInput, match="unknown format"):
        prepare(tmp_path / "ratings.csv", tmp_path / "out")
    named = reviews.Columns.parse(["user=userId", "item=movieId", "time=timestamp"])
    assert prepare(tmp_path / "ratings.csv", tmp_path / "out", PrepareConfig(columns=named)).n_users == 6


def test_two_editions_of_one_category_in_a_folder_are_refused(tmp_path: Path) -> None:
    raw = write("amazon2018", tmp_path / "raw")
    FORMATS["amazon2014"](raw)
    with pytest.raises(BadInput, match="several editions: amazon2014, amazon2018"):
        prepare(raw, tmp_path / "out")


@pytest.mark.parametrize(("kind", "unit"), [("int64", "ns"), ("int64", "us"), ("date", "s"), ("zoned", "s")])
def test_times_of_a_parquet_file_of_any_type(kind: str, unit: str, tmp_path: Path) -> None:
    table = pd.DataFrame(ROWS, columns=["user", "item", "time"])
    dates = pd.to_datetime(table["time"], unit="s")
    parts = {"ns": 10**9, "us": 10**6, "s": 1}[unit]
    times = {"int64": table["time"] * parts, "date": dates.dt.date, "zoned": dates.dt.tz_localize("UTC")}[kind]
    table.assign(time=times).to_parquet(tmp_path / "x.parquet")
    domain = prepare(tmp_path / "x.parquet", tmp_path / "out", PrepareConfig(columns=reviews.Columns(time_unit=unit)))  # type: ignore[arg-type]
    assert domain.fingerprint == prepare(write("table_csv", tmp_path / "raw"), tmp_path / "same").fingerprint


def test_json_and_parquet_of_2023_choose_the_same_picture() -> None:
    for pictures in (
        [{"variant": "MAIN", "large": "A", "hi_res": None}, {"variant": "PT01", "large": "B", "hi_res": "C"}],
        [{"variant": "PT01", "large": "A"}, {"variant": "MAIN", "large": "B"}],
        [{"large": None, "thumb": "t"}],
        [],
    ):
        columns = {key: [one.get(key) for one in pictures] for key in ("variant", "large", "hi_res", "thumb")}
        assert _image_2023(pictures) == _image_2023(columns)
    assert _image_2023([{"variant": "PT01", "large": "A"}, {"variant": "MAIN", "large": "B"}]) == "B"


# Order, blocks, memory


def test_shuffled_input_read_in_small_pieces_has_the_same_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    rows = [f"i{int(i)},u{int(u)},5.0,{int(t) * DAY}" for u, i, t in zip(*(draw.integers(0, n, 3000) for n in (90, 60, 40)), strict=True)]
    rows += rows[:50]  # duplicates
    meta = [json.dumps({"asin": f"i{i}", "title": f"Toy {i}"}) for i in range(60)]
    prints = []
    for number, at_once in enumerate((1 << 24, 1 << 24, 500)):
        folder = tmp_path / f"raw{number}"
        folder.mkdir()
        lines(folder / "Toys.csv", rows)
        lines(folder / "meta_Toys.json", meta)
        monkeypatch.setattr(strict, "BLOCK_BYTES", at_once)
        monkeypatch.setattr(stage, "ROWS_AT_ONCE", min(at_once, 777) if number == 2 else 2**21)
        domain = prepare(folder, tmp_path / f"out{number}")
        prints.append((domain.fingerprint, domain.info["provenance"]["ties"], domain.info["provenance"]["duplicates_dropped"]))
        random.Random(number).shuffle(rows)
        random.Random(number).shuffle(meta)
    assert prints[0] == prints[1] == prints[2]
    keys = Counter(tuple(row.split(",")) for row in rows)
    assert prints[0][2] == len(rows) - len(keys)


def test_too_little_memory_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"memory limit is 0.06 GB.*--memory-gb"):
        prepare(write("amazon2018", tmp_path / "raw"), tmp_path / "out", PrepareConfig(memory_gb=0.1))


# The global-time split


def test_the_earliest_moment_from_which_a_share_lies() -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        time = draw.integers(0, 30, draw.integers(1, 40))
        share = draw.uniform(0, 1)
        expected = next(moment for moment in range(32) if (time >= moment).sum() <= int(share * len(time)))
        assert earliest_from(time, share) == expected


def test_global_time_by_hand(tmp_path: Path) -> None:
    """Validation from 80 on, test from 90 on: of each user the last target before 90, and the last of all."""
    histories = {"a": [1, 2, 81, 82, 91, 95], "b": [3, 4, 5, 6], "c": [85, 99], "d": [7, 83, 84], "e": list(range(10, 80, 14))}
    rows = [(user, f"i{number}", time) for user, times in histories.items() for number, time in enumerate(times)]
    pd.DataFrame(rows, columns=["user", "item", "time"]).to_csv(tmp_path / "x.csv", index=False)
    config = PrepareConfig(k_core=1, split="global-time", valid_share=5 / 20, test_share=3 / 20)
    domain = prepare(tmp_path / "x.csv", tmp_path / "out", config)
    before_valid, before_test = domain.before(np.arange(5))
    assert before_valid.tolist() == [2, 4, 0, 1, 5]
    assert before_test.tolist() == [4, 4, 1, 3, 5]

    def pairs(split: str) -> list[tuple[int, int]]:
        users, ends = domain.examples(split)  # type: ignore[arg-type]
        return list(zip(users.tolist(), ends.tolist(), strict=True))

    assert pairs("train") == [(0, 1), (1, 1), (1, 2), (1, 3), (4, 1), (4, 2), (4, 3), (4, 4)]
    assert pairs("valid") == [(0, 3), (3, 2)]  # c has no history before 85
    assert pairs("test") == [(0, 5), (2, 1)]
    counts = Popularity(domain).get_buffer("counts")[:, 0]
    expected = Counter(f"i{number}" for times in histories.values() for number, time in enumerate(times) if time < 80)
    assert counts.tolist() == [0.0, *(float(expected[item]) for item in domain.item_table()["item"])]
    assert domain.fingerprint != prepare(tmp_path / "x.csv", tmp_path / "loo", PrepareConfig(k_core=1)).fingerprint


def test_a_global_time_split_without_validation_is_refused(tmp_path: Path) -> None:
    rows = [(f"u{u}", f"i{i}", 1 + i // 5) for u in range(6) for i in range(6)]  # the last of six at a second moment
    pd.DataFrame(rows, columns=["user", "item", "time"]).to_csv(tmp_path / "x.csv", index=False)
    with pytest.raises(BadInput, match="leaves no validation"):
        prepare(tmp_path / "x.csv", tmp_path / "out", PrepareConfig(split="global-time", test_share=0.2))


@pytest.mark.parametrize("wrong", [{"valid_share": float("nan")}, {"memory_gb": float("inf")}, {"k_core": 0}, {"malformed": -1}])
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must be|above 0"):
        PrepareConfig(**wrong)  # type: ignore[arg-type]


def test_no_training_target_is_later_than_an_evaluated_one(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    rows = [(f"u{u}", f"i{i}", int(t)) for u, i, t in zip(*(draw.integers(0, n, 4000) for n in (200, 50, 10**9)), strict=True)]
    pd.DataFrame(rows, columns=["user", "item", "time"]).to_csv(tmp_path / "x.csv", index=False)
    domain = prepare(tmp_path / "x.csv", tmp_path / "out", PrepareConfig(split="global-time"))
    assert domain.timestamps is not None
    times = {}
    for split in ("train", "valid", "test"):
        users, ends = domain.examples(split)  # type: ignore[arg-type]
        times[split] = domain.timestamps[domain.offsets[users] + ends]
    assert times["train"].max() < times["valid"].min() <= times["valid"].max() < times["test"].min()
    assert open_domain(tmp_path / "out").examples("all").stops[-1] == len(domain.items) - domain.n_users


def test_a_source_without_times_has_no_global_time(tmp_path: Path) -> None:
    pd.DataFrame(ROWS, columns=["user", "item", "t"]).drop(columns="t").to_csv(tmp_path / "x.csv", index=False)
    with pytest.raises(BadInput, match="has no times"):
        prepare(tmp_path / "x.csv", tmp_path / "out", PrepareConfig(split="global-time"))


# Fuzzed files


def mutate(content: bytes, draw: random.Random) -> bytes:
    """One to three changes: cut, flipped, deleted, doubled or foreign bytes, a huge number, deep brackets."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(changed) + 1)
        span = draw.choice((1, 1, 3, 20, 400))
        kind = draw.randrange(9)
        if kind == 0:
            del changed[at:]
        elif kind == 1 and at < len(changed):
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == 2:
            del changed[at : at + span]
        elif kind == 3:
            changed[at:at] = changed[at : at + span]
        elif kind == 4:
            changed[at:at] = bytes(draw.randrange(256) for _ in range(span))
        elif kind == 5:
            changed[at:at] = draw.choice((b"9" * 400, b"-1e999", b"NaN", b"null", b"\x00", b"\xff\xfe", b"\r", b"\n\n", b'"', b"\\ud800"))
        elif kind == 6:
            changed[at:at] = draw.choice((b"[", b"{", b"(", b"-", b'{"a":')) * draw.choice((3, 300, 60_000))
        elif kind == 7:
            lines_of = bytes(changed).split(b"\n")
            draw.shuffle(lines_of)
            changed = bytearray(b"\n".join(lines_of))
        elif changed:
            changed[at : at + span] = b"," * span
    return bytes(changed)


@pytest.mark.timeout(3600)
@pytest.mark.slow
def test_fuzzed_files_give_a_domain_or_one_clear_error(tmp_path: Path) -> None:
    """Never another exception, a hang or something half-written. MMM4REC_FUZZ says how many files."""
    originals = {kind: write(kind, tmp_path / "raw" / kind) for kind in (*FORMATS, "unisrec")}
    outcomes: Counter[str] = Counter()

    def too_long(number: int, frame: object) -> None:
        raise TimeoutError(f"a file took more than 30 s, of seed {seed}")

    signal.signal(signal.SIGALRM, too_long)
    for seed in range(FUZZED):
        draw = random.Random(seed)
        kind = draw.choice(list(originals))
        place = tmp_path / "fuzzed" / str(seed)
        copy_mutated(originals[kind], place / "raw", draw)
        signal.alarm(30)
        try:
            domain = prepare(
                place / "raw", place / "out", PrepareConfig(k_core=draw.choice((1, 5)), malformed=draw.choice((0.0, 0.2, 1.0)))
            )
        except BadInput as error:
            outcomes["refused"] += 1
            told = error.rule
            assert sorted(each.name for each in place.iterdir()) == ["raw"], (seed, told)
        else:
            outcomes["prepared"] += 1
            assert sorted(each.name for each in place.iterdir()) == ["out", "raw"], seed
            assert domain.items.min() >= 1
            assert domain.items.max() <= domain.n_items
            assert len(open_domain(place / "out").item_table()) == domain.n_items
        finally:
            signal.alarm(0)
        remove(place)
    assert min(outcomes["refused"], outcomes["prepared"]) > FUZZED / 10, outcomes


def copy_mutated(source: Path, target: Path, draw: random.Random) -> None:
    """A copy of a folder in which one file is changed, compressed ones sometimes inside."""
    import bz2
    import gzip

    packers: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {
        ".gz": (gzip.decompress, gzip.compress),
        ".bz2": (bz2.decompress, bz2.compress),
    }
    files = sorted(file for file in source.rglob("*") if file.is_file())
    chosen = draw.choice(files)
    for file in files:
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        content = file.read_bytes()
        if file == chosen:
            unpack, pack = packers.get(file.suffix, (bytes, bytes)) if draw.random() < 0.7 else (bytes, bytes)
            content = pack(mutate(unpack(content), draw))
        copy.write_bytes(content)


def remove(place: Path) -> None:
    import shutil

    shutil.rmtree(place)
