"""The same few interactions and items as files of every raw format that `mmm4rec prepare` reads."""

from __future__ import annotations

import bz2
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd

DAY = 86_400
Row = tuple[str, str, int]  # user, item, unix seconds

# Six users who each took six items, one a day: a 5-core already; then two rows that no 5-core keeps.
ROWS: list[Row] = [(f"u{u}", f"i{i}", (10 * u + (i * 5) % 6) * DAY) for u in range(6) for i in range(6)]
ROWS += [("u9", "i1", 7), ("u0", "i9", 8)]
ITEMS = sorted({item for _, item, _ in ROWS})


def title(item: str) -> str:
    return f"Kite & line, number {item}"


def image(item: str) -> str:
    return f"https://pictures.example/{item}.jpg"


def text(item: str) -> str:
    """What a domain says of an item, whatever the format."""
    return f"{title(item)}. Acme. Toys, Kites. It flies."


def lines(file: Path, records: list[str]) -> None:
    content = "".join(f"{record}\n" for record in records).encode()
    content = {".gz": gzip.compress, ".bz2": bz2.compress}.get(file.suffix, bytes)(content)
    file.write_bytes(content)


def meta_2018() -> list[str]:
    return [
        json.dumps(
            {
                "asin": item,
                "title": title(item).replace("&", "&amp;"),
                "brand": "Acme",
                "category": ["Toys", "Kites", "Toys"],
                "description": ["<p>It <b>flies</b>.</p>"],
                "imageURLHighRes": [image(item)],
            }
        )
        for item in ITEMS
    ]


def amazon2014(folder: Path) -> None:
    lines(folder / "ratings_Toys.csv", [f"{user},{item},5.0,{time}" for user, item, time in ROWS])
    _meta_2014(folder)


def amazon2014_reviews(folder: Path) -> None:
    lines(folder / "reviews_Toys_5.json.gz", _reviews())
    _meta_2014(folder)


def _meta_2014(folder: Path) -> None:
    records = [
        {
            "asin": item,
            "title": title(item),
            "brand": "Acme",
            "categories": [["Toys", "Kites"]],
            "description": "It flies.",
            "imUrl": image(item),
        }
        for item in ITEMS
    ]
    lines(folder / "meta_Toys.json.gz", [repr(record) for record in records])  # Python dictionaries, single quotes


def _reviews() -> list[str]:
    return [json.dumps({"reviewerID": user, "asin": item, "unixReviewTime": time, "reviewText": "x"}) for user, item, time in ROWS]


def amazon2018(folder: Path) -> None:
    lines(folder / "Toys.csv", [f"{item},{user},5.0,{time}" for user, item, time in ROWS])
    lines(folder / "meta_Toys.json.gz", meta_2018())


def amazon2018_reviews(folder: Path) -> None:
    lines(folder / "Toys_5.json.bz2", _reviews())
    lines(folder / "meta_Toys.json", meta_2018())


def _meta_2023() -> list[dict[str, object]]:
    return [
        {
            "parent_asin": item,
            "title": title(item),
            "store": "Acme",
            "categories": ["Toys", "Kites"],
            "features": [],
            "description": ["It flies."],
            "images": [
                {"variant": "PT01", "large": "https://pictures.example/other.jpg"},
                {"variant": "MAIN", "large": image(item), "hi_res": None},
            ],
        }
        for item in ITEMS
    ]


def amazon2023(folder: Path) -> None:
    reviews = [{"user_id": user, "parent_asin": item, "asin": "x", "timestamp": time * 1000 + 7, "title": "t"} for user, item, time in ROWS]
    lines(folder / "Toys.jsonl.gz", [json.dumps(review) for review in reviews])
    lines(folder / "meta_Toys.jsonl.gz", [json.dumps(record) for record in _meta_2023()])


def amazon2023_ratings(folder: Path) -> None:
    rows = [f"{user},{item},5.0,{time * 1000}" for user, item, time in ROWS]
    lines(folder / "Toys.csv.gz", ["user_id,parent_asin,rating,timestamp", *rows])
    lines(folder / "meta_Toys.jsonl", [json.dumps(record) for record in _meta_2023()])


def amazon2023_parquet(folder: Path) -> None:
    """As its publishers' page on the hub has it: shards, and pictures as lists in one object."""
    for name in ("raw_review_Toys", "raw_meta_Toys"):
        (folder / name).mkdir()
    reviews = pd.DataFrame([{"user_id": user, "parent_asin": item, "timestamp": time * 1000} for user, item, time in ROWS])
    records = pd.DataFrame(_meta_2023()).assign(images=[{"hi_res": [None], "large": [image(item)], "thumb": []} for item in ITEMS])
    for number, half in enumerate((slice(0, 20), slice(20, None))):
        reviews[half].to_parquet(folder / "raw_review_Toys" / f"full-0000{number}.parquet")
    records.to_parquet(folder / "raw_meta_Toys" / "full-00000.parquet")


def recbole(folder: Path) -> None:
    rows = [f"{user}\t{item}\t5.0\t{time}.25" for user, item, time in ROWS]
    lines(folder / "Toys.inter", ["user_id:token\titem_id:token\trating:float\ttimestamp:float", *rows])
    header = "item_id:token\ttitle:token_seq\tbrand:token\tcategories:token_seq\tdescription:token_seq\timUrl:token"
    lines(folder / "Toys.item", [header, *(f"{item}\t{title(item)}\tAcme\tToys, Kites\tIt flies.\t{image(item)}" for item in ITEMS)])


def _table(time: str = "time") -> pd.DataFrame:
    return pd.DataFrame(ROWS, columns=["user", "item", time])


def _items(item: str = "item") -> pd.DataFrame:
    table = pd.DataFrame({item: ITEMS, "title": [title(each) for each in ITEMS], "image_url": [image(each) for each in ITEMS]})
    return table.assign(brand="Acme", category="Toys, Kites", description="It flies.")


def table_csv(folder: Path) -> None:
    _table().assign(other="a,b").to_csv(folder / "interactions.csv", index=False)
    _items().to_csv(folder / "items.csv.gz", index=False)


def table_parquet(folder: Path) -> None:
    table = _table()
    table.assign(time=pd.to_datetime(table["time"], unit="s")).to_parquet(folder / "interactions.parquet")
    _items().to_parquet(folder / "items.parquet")


FORMATS: dict[str, Callable[[Path], None]] = {
    writer.__name__: writer
    for writer in (
        amazon2014,
        amazon2014_reviews,
        amazon2018,
        amazon2018_reviews,
        amazon2023,
        amazon2023_ratings,
        amazon2023_parquet,
        recbole,
        table_csv,
        table_parquet,
    )
}


def unisrec(folder: Path) -> None:
    """A UniSRec / MISSRec folder of the same shape: it has indices, no times, and features."""
    sequences = [[(5 * place + user) % 6 for place in range(6)] for user in range(6)]
    rows: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for user, sequence in enumerate(sequences):
        for split, ends in (("train", (3, 2, 1)), ("valid", (4,)), ("test", (5,))):
            rows[split] += [f"{user}\t{' '.join(map(str, sequence[:end]))}\t{sequence[end]}" for end in ends]
    for split, some in rows.items():
        lines(folder / f"Toys.{split}.inter", ["user_id:token\titem_id_list:token_seq\titem_id:token", *some])
    lines(folder / "Toys.user2index", [f"u{user}\t{user}" for user in range(6)])
    lines(folder / "Toys.item2index", [f"i{item}\t{item}" for item in range(6)])
    lines(folder / "Toys.text", ["item_id:token\ttext:token_seq", *(f"i{item}\t{title(f'i{item}')}" for item in range(6))])
    (folder / "Toys.feat1CLS").write_bytes(bytes(range(96)))


def write(kind: str, folder: Path) -> Path:
    folder.mkdir(parents=True)
    ({**FORMATS, "unisrec": unisrec})[kind](folder)
    return folder
