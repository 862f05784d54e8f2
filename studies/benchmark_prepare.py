"""What preparing raw reviews costs: generated files of the Amazon 2018 format, as large as a large category's.

Time and memory of `prepare` in a process of its own, over files that grow while users and items do not; beside it, on a tenth
of rows, users and items, a plain Python implementation of the same steps (dictionaries, sets, one row after the other), which
must come to the same domain; DuckDB beside polars on the step that needs an engine, numbering and ordering the rows.
"""

from __future__ import annotations

import gzip
import json
import os
import resource
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import csv
from tqdm import tqdm

from mmm4rec.data.domain import fingerprint, open_domain, write_atomically
from mmm4rec.data.prepare import TIE_BREAK_BY_ITEM, PrepareConfig, prepare
from mmm4rec.data.reviews.items import item_text
from mmm4rec.data.stage import stage
from mmm4rec.data.strict import Faults, read_columns
from studies.benchmark_cases import in_fresh_process, seconds

ROWS, ITEMS, USERS = 20_000_000, 1_000_000, 5_000_000
CASES = ((10, 10), (2, 1), (1, 1))  # what ROWS, and what USERS and ITEMS are divided by
PIECE = 1_000_000  # rows that are drawn at once
DAY = 86_400
OPENED = 20  # times
TARGETS = {"seconds": "at most 180 s", "bytes": "at most 6 GB", "ratio": "at least 20", "open": "under 0.5 s"}
LETTERS = np.frombuffer(b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", dtype=np.uint8)


def measure(out: Path, rows: int, machine: dict[str, Any]) -> str:
    """Measure files of up to so many ratings; writes benchmark_prepare.json and .md into `out`, and returns the Markdown."""
    users, items = (max(200, round(count * rows / ROWS)) for count in (USERS, ITEMS))
    found: dict[str, Any] = {"machine": machine | {"cores": os.cpu_count()}, "prepared": []}
    with tempfile.TemporaryDirectory(prefix="prepare") as room:
        place = Path(room)
        for part, people in CASES:
            raw, given = place / f"part{part}", {"rows": rows // part, "all_users": users // people, "all_items": items // people}
            in_fresh_process(generate, raw, *given.values())
            found["prepared"].append({**given, **in_fresh_process(prepared, raw, place / f"domain{part}")})
            write_atomically(out / "benchmark_prepare.json", (json.dumps(found, indent=2) + "\n").encode())
        found["plain"] = in_fresh_process(plainly, place / f"part{CASES[0][0]}")
        assert found["plain"]["fingerprint"] == found["prepared"][0]["fingerprint"], "the plain implementation prepares another domain"
        found["engines"] = {name: in_fresh_process(engine, name, place / "part1") for name in ("duckdb", "polars")}
    write_atomically(out / "benchmark_prepare.json", (json.dumps(found, indent=2) + "\n").encode())
    text = table(found)
    write_atomically(out / "benchmark_prepare.md", text.encode())
    return text


def generate(folder: Path, rows: int, users: int, items: int) -> dict[str, Any]:
    """A category `Shop` of the 2018 format: ratings in no order, whole-day stamps, and metadata of all items."""
    folder.mkdir()
    random = np.random.default_rng(0)
    names = {"user": spelled(random, users, b"A", 13), "item": spelled(random, items, b"B0", 8)}
    with csv.CSVWriter(
        folder / "Shop.csv",
        pa.schema([(name, pa.string()) for name in ("item", "user", "rating", "time")]),
        write_options=csv.WriteOptions(include_header=False, quoting_style="none"),
    ) as file:
        for first in tqdm(range(0, rows, PIECE), desc="ratings", unit_scale=PIECE, delay=2, disable=None):
            count = min(PIECE, rows - first)
            who, what = (random.random(count) ** power for power in (2.5, 3.0))  # few of them have most of the rows
            columns = [
                names["item"].take(pa.array((what * items).astype(np.int64))),
                names["user"].take(pa.array((who * users).astype(np.int64))),
                pa.array(["1.0", "2.0", "3.0", "4.0", "5.0"]).take(pa.array(random.integers(0, 5, count))),
                pa.array(random.integers(14_600, 17_800, count) * DAY).cast(pa.string()),
            ]
            file.write_table(pa.table(columns, names=["item", "user", "rating", "time"]))
    write_metadata(folder / "meta_Shop.json.gz", names["item"].to_pylist(), random)
    return {}


def spelled(random: np.random.Generator, count: int, start: bytes, letters: int) -> pa.ChunkedArray:
    """So many ids, all different, in no order."""
    number, digits = random.permutation(count), np.empty((count, len(start) + letters), dtype=np.uint8)
    digits[:, : len(start)] = np.frombuffer(start, dtype=np.uint8)
    for place in range(letters):
        digits[:, -1 - place] = LETTERS[(number // 36**place) % 36]
    ids = pa.array(digits.view(f"S{len(start) + letters}").ravel().astype(str))
    return ids if isinstance(ids, pa.ChunkedArray) else pa.chunked_array([ids])


def write_metadata(file: Path, items: list[str], random: np.random.Generator) -> None:
    """About 1.5 kB an item: title, brand, categories, a description with markup, addresses of pictures, other items."""
    words = np.array(
        [f"{a}{b}" for a in ("steel", "blue", "large", "cotton", "paper", "glass") for b in ("", "ware", "set", "pack", "line")]
    )
    texts = [" ".join(words[random.integers(0, len(words), 120)]) for _ in range(500)]
    picks = random.integers(0, 400, (len(items), 3))
    with gzip.open(file, "wt", compresslevel=1, encoding="utf-8") as stream:
        for item, (a, b, c) in zip(tqdm(items, desc="metadata", delay=2, disable=None), picks.tolist(), strict=True):
            record = {
                "asin": item,
                "title": texts[a][:60],
                "brand": texts[b][:9],
                "category": ["Shop", texts[c][:12], texts[a][:14]],
                "description": [f"<p>{texts[c]}</p> <b>{texts[b][:100]}</b> &amp; more"],
                "imageURLHighRes": [f"https://images.example/{item}.jpg"],
                "also_buy": items[a : a + 25],
            }
            stream.write(json.dumps(record) + "\n")


def prepared(raw: Path, out: Path) -> dict[str, Any]:
    """Time and memory of one preparation, and the time to open what it made."""
    took = seconds(lambda: prepare(raw, out))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    domain = open_domain(out)
    opened = statistics.median(seconds(lambda: open_domain(out)) for _ in range(OPENED))
    kept = {"users": domain.n_users, "items": domain.n_items, "interactions": len(domain.items)}
    file_bytes = sum(file.stat().st_size for file in raw.iterdir())
    return {
        "seconds": took,
        "peak_bytes": peak,
        "open_seconds": opened,
        **kept,
        "fingerprint": domain.fingerprint,
        "file_bytes": file_bytes,
    }


def plainly(raw: Path) -> dict[str, Any]:
    """The same domain by dictionaries and sets, one row after the other: its time, memory and fingerprint."""
    found: dict[str, Any] = {}
    found["seconds"] = seconds(lambda: found.update(fingerprint=plain(raw, k=5)))
    return found | {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def plain(raw: Path, k: int) -> str:
    rows = set()
    with (raw / "Shop.csv").open(encoding="utf-8") as file:
        for line in file:
            item, user, rating, stamp = line.rstrip("\n").split(",")
            float(rating)
            rows.add((user, item, int(stamp)))
    while True:
        users, items = Counter(user for user, _, _ in rows), Counter(item for _, item, _ in rows)
        kept = {row for row in rows if users[row[0]] >= k and items[row[1]] >= k}
        if len(kept) == len(rows):
            break
        rows = kept
    histories: dict[str, list[tuple[int, str]]] = {}
    for user, item, moment in rows:
        histories.setdefault(user, []).append((moment, item))
    for history in histories.values():
        history.sort()
    user_ids, item_ids = sorted(histories), sorted({item for _, item, _ in rows})
    number = {item: place for place, item in enumerate(item_ids, start=1)}
    texts = {}
    with gzip.open(raw / "meta_Shop.json.gz", "rt", encoding="utf-8") as stream:
        for line in stream:
            record = json.loads(line)
            if record["asin"] in number:
                parts = (record["title"], record["brand"], *record["category"], *record["description"])
                assert all(isinstance(part, str) for part in parts)
                texts[record["asin"]] = item_text([record["title"]], [record["brand"]], record["category"], record["description"])
    assert len(texts) == len(item_ids)
    lengths = [len(histories[user]) for user in user_ids]
    offsets = np.cumsum([0, *lengths])
    sequence = np.array([number[item] for user in user_ids for _, item in histories[user]], dtype=np.int32)
    times = np.array([stamp for user in user_ids for stamp, _ in histories[user]], dtype=np.int64)
    return fingerprint(offsets, sequence, times, item_ids, user_ids, TIE_BREAK_BY_ITEM)


def engine(name: str, raw: Path) -> dict[str, Any]:
    """Numbering and ordering the rows of one file by one library, from its parsed batches on: seconds and most memory."""
    with tempfile.TemporaryDirectory(dir=raw.parent) as room:
        took = seconds(lambda: {"duckdb": by_duckdb, "polars": by_polars}[name](raw / "Shop.csv", Path(room)))
    return {"seconds": took, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def batches(file: Path) -> Iterator[pa.RecordBatch]:
    kinds = {"item": pa.string(), "user": pa.string(), "rating": pa.string(), "time_ms": pa.int64()}
    for _, _, rows in read_columns(file, kinds, ",", Faults()):
        yield from rows.select(["user", "item", "time_ms"]).to_batches()


def by_duckdb(file: Path, room: Path) -> int:
    return len(stage(batches(file), room, memory_bytes=int(PrepareConfig().memory_gb * 6e8)))


def by_polars(file: Path, room: Path) -> int:
    import polars as pl

    rows = pl.scan_csv(file, has_header=False, new_columns=["item", "user", "rating", "time_ms"]).select("user", "item", "time_ms")
    for kind in ("user", "item"):
        ids = rows.select(kind).unique().sort(kind).with_row_index("number").collect(engine="streaming")
        ids.write_parquet(room / f"{kind}.parquet")
        rows = rows.join(pl.scan_parquet(room / f"{kind}.parquet").rename({"number": f"{kind}_number"}), on=kind, how="left")
    ordered = rows.select("user_number", "item_number", "time_ms").unique().sort("user_number", "time_ms", "item_number")
    ordered.sink_parquet(room / "rows.parquet")
    return pl.scan_parquet(room / "rows.parquet").select(pl.len()).collect().item()


def table(found: dict[str, Any]) -> str:
    """What was measured, as Markdown."""
    where, plainly_done, tenth, whole = found["machine"], found["plain"], found["prepared"][0], found["prepared"][-1]
    scaled = plainly_done["seconds"] * whole["rows"] / tenth["rows"]
    metadata = f"{whole['all_items']:,} metadata rows (gzip; {tenth['all_items']:,} in the first)"
    prepared_rows = [
        f"| {row['rows']:,} | {row['file_bytes'] / 1e9:.2f} GB | {row['users']:,} / {row['items']:,} / {row['interactions']:,}"
        f" | {row['seconds']:.0f} s | {row['peak_bytes'] / 1e9:.2f} GB | {row['open_seconds'] * 1000:.1f} ms |"
        for row in found["prepared"]
    ]
    engines = [f"| {name} | {told['seconds']:.0f} s | {told['peak_bytes'] / 1e9:.2f} GB |" for name, told in found["engines"].items()]
    return "\n".join(
        [
            "# What preparing raw reviews costs",
            "",
            "Made by `python studies/benchmark.py --prepare`; every figure is in `benchmark_prepare.json`.",
            "",
            f"Generated files of the Amazon 2018 format: ratings CSV of {whole['all_users']:,} users and {metadata}."
            " Memory is the most that the process held, mapped files included:",
            "",
            "| ratings | files | domain: users / items / interactions | prepare | memory | open the domain |",
            "| --- | --- | --- | --- | --- | --- |",
            *prepared_rows,
            "",
            f"Targets for the last row: {TARGETS['seconds']}, {TARGETS['bytes']}, {TARGETS['open']}.",
            "",
            f"Plain Python on the first: {plainly_done['seconds']:.0f} s, {plainly_done['peak_bytes'] / 1e9:.2f} GB, the same"
            f" domain (fingerprint {plainly_done['fingerprint']}); ours takes {tenth['seconds']:.0f} s there:"
            f" {plainly_done['seconds'] / tenth['seconds']:.1f} times as fast. Scaled to {whole['rows']:,} ratings: {scaled:.0f} s,"
            f" {scaled / whole['seconds']:.1f} times ours (aim: {TARGETS['ratio']}).",
            "",
            "Numbering and ordering the rows, by the engine that is used and by another:",
            "",
            "| engine | seconds | memory |",
            "| --- | --- | --- |",
            *engines,
            "",
            f"({where['name']}, {where['cores']} cores, code {where['code_version']}; one run of each.)",
            "",
        ]
    )
