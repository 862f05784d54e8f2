"""Generated shops with titles, pictures and times: the data of the embedded default study.

Every shop sells items of its own under brands of its own; what items *are* and how shoppers choose is
shared, so what a model learns on the sources is true on the targets. An item has a topic, told by its
title alone, and a hue and a shape, shown by its picture alone. A shopper has a favourite shape, and a
shopper's next item depends on the last item and on the pause before it (`appeal` is the whole rule):

* short pause (the visit goes on): an item of the topic that follows the last one's in TOPICS, in the
  last item's hue;
* long pause (the last item opened a visit): another item of the last one's topic, in the opposite hue.

Choices are a multinomial logit (McFadden, 1974): topic, hue and shape add to an item's popularity, and
a share of the choices is made by popularity alone.

Dimensions: I items, U users, N interactions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from mmm4rec.data.domain import Domain, new_folder, open_domain, write_domain
from mmm4rec.data.encode import encode_domains, encode_extra

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

# What a title can name. Each topic leads to the next one, the last to the first. Words: the nouns, then the uses.
TOPICS = (
    ("coffee grinder", "espresso cup", "moka pot", "milk frother", "filter papers", "barista", "espresso", "slow mornings"),
    ("cake tin", "rolling pin", "mixing bowl", "piping bag", "oven mitt", "bread", "pastry", "birthday cakes"),
    ("seed tray", "watering can", "plant pot", "pruning shears", "trellis", "balcony", "vegetables", "raised beds"),
    ("wood chisel", "hand saw", "workbench clamp", "block plane", "tape measure", "joinery", "hardwood", "home repairs"),
    ("paint brush", "easel", "watercolour palette", "canvas panel", "sketch pad", "oil painting", "portraits", "art class"),
    ("desk lamp", "monitor stand", "pen holder", "notebook", "letter tray", "home office", "study desks", "paperwork"),
    ("book stand", "reading light", "bookmark", "bookend", "page magnifier", "novels", "bedtime reading", "libraries"),
    ("guitar strings", "music stand", "metronome", "ukulele", "drum sticks", "rehearsal", "beginners' band", "practice rooms"),
    ("sewing kit", "thread spools", "knitting needles", "pin cushion", "fabric scissors", "quilting", "mending", "embroidery"),
    ("dog leash", "cat tree", "pet brush", "food scoop", "chew toy", "puppies", "kittens", "small animals"),
    ("running belt", "sweat band", "ankle weights", "stopwatch", "trail socks", "marathon", "sprint training", "joggers"),
    ("bike light", "saddle bag", "cycling bell", "tyre pump", "chain cleaner", "commuting", "road bikes", "mountain rides"),
    ("sleeping bag", "tent pegs", "camp stove", "headlamp", "dry sack", "backpacking", "wild camping", "summits"),
    ("fishing reel", "tackle box", "landing net", "lure set", "rod holder", "trout", "fly fishing", "the lake"),
    ("swim goggles", "beach towel", "snorkel", "kickboard", "swim cap", "pool lanes", "open water", "surf days"),
    ("bath mat", "soap dish", "shower caddy", "loofah", "towel rail", "spa evenings", "washrooms", "bubble baths"),
)
QUALITIES = ("classic", "compact", "deluxe", "essential", "everyday", "lightweight", "premium", "slim", "sturdy", "modern")
MATERIALS = ("bamboo", "steel", "cotton", "leather", "silicone", "oak", "recycled", "ceramic", "felt", "brass")
SYLLABLES = ("bel", "cor", "dan", "fen", "gal", "hol", "jun", "kor", "lum", "mer", "nor", "pel", "quil", "ros", "tam", "vel", "wyn", "zor")
SHAPES = ("disc", "square", "triangle", "ring", "cross")
PATTERNS = ("plain", "stripes", "dots")

DAY_SECONDS = 86_400
SHORT_PAUSE_SECONDS = (120, 14_400)  # two minutes to four hours
LONG_PAUSE_SECONDS = (14 * DAY_SECONDS, 90 * DAY_SECONDS)
OPENING_SECONDS = 1_577_836_800  # 2020-01-01; first visits spread over the year that follows
PICTURE_PIXELS = 48


@dataclass(frozen=True)
class DemoConfig:
    """Sizes of the demo and the strength of its rule."""

    sources: tuple[str, ...] = ("bazaar", "market", "warehouse")
    targets: tuple[str, ...] = ("attic", "corner", "harbour")
    source_users: int = 1200
    source_items: int = 400
    target_users: int = 400
    target_items: int = 250
    sizes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # (users, items) of single shops, in the place of the above
    dimensions: int = 64  # of a feature vector
    long_pause_share: float = 0.3
    topic_weight: float = 4.0  # logits
    hue_weight: float = 2.0
    shape_weight: float = 2.0
    popularity_spread: float = 0.5
    impulse_share: float = 0.1  # of the choices, made by popularity alone
    no_picture_share: float = 0.02  # of the items
    no_text_share: float = 0.01

    def __post_init__(self) -> None:
        shops = (*self.sources, *self.targets)
        if len(set(shops)) != len(shops):
            raise ValueError("names a shop twice.")
        for name, size in self.sizes.items():
            if name not in shops or len(size) != 2 or min(size) < 1:
                raise ValueError(f"sizes has {name}: {list(size)}; it gives [users, items] of one of the shops: {', '.join(shops)}.")

    def size(self, shop: str) -> tuple[int, ...]:
        """A shop's (users, items)."""
        usual = (self.source_users, self.source_items) if shop in self.sources else (self.target_users, self.target_items)
        return self.sizes.get(shop, usual)


@dataclass(frozen=True)
class Catalogue:
    """A shop's items; row i - 1 is item i."""

    topic: np.ndarray  # [I] place in TOPICS
    hue: np.ndarray  # [I] radians
    shape: np.ndarray  # [I] place in SHAPES
    popularity: np.ndarray  # [I] logits
    texts: list[str]
    has_picture: np.ndarray  # [I] bool


def write_demo(out: str | Path, *, seed: int = 0, force: bool = False, config: DemoConfig | None = None) -> list[Domain]:
    """Write the demo, whole or not at all: the sources, then the targets, each in `out/<name>/` with features.

    `out/encoders/text` and `out/encoders/image` hold the encoders, fitted on the sources only;
    `out/demo.json` names sources and targets. The same seed gives the same bytes.
    Raises BadInput when `out` exists and `force` is off, or the packages that encode are missing.
    """
    config, out = config or DemoConfig(), Path(out)
    names = (*config.sources, *config.targets)
    with new_folder(out, force=force, marker="demo.json") as folder:
        for index, name in enumerate(names):
            write_shop(folder / name, name, np.random.default_rng([seed, index]), config, seed=seed)
        sources, everyone = [folder / name for name in config.sources], [folder / name for name in names]
        for kind, modality in (("lexical", "text"), ("pixel", "image")):
            place = folder / "encoders" / modality
            encode_domains(everyone, encoder=kind, fit_on=sources, save=place, dimensions=config.dimensions)
        plan = {"schema_version": 1, "seed": seed, "sources": config.sources, "targets": config.targets}
        (folder / "demo.json").write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")
    return [open_domain(out / name) for name in names]


def write_shop(place: Path, name: str, random: np.random.Generator, config: DemoConfig, *, seed: int) -> Domain:
    """Write one shop as a domain with pictures, without features."""
    n_users, n_items = config.size(name)
    catalogue = stock_shop(random, n_items, config)
    offsets, items, timestamps = simulate(random, catalogue, n_users, config)
    numbers = range(1, len(catalogue.topic) + 1)
    pictures = [f"images/{i}.png" if catalogue.has_picture[i - 1] else None for i in numbers]
    table = pd.DataFrame({"item": [f"{name}-{i}" for i in numbers], "text": catalogue.texts, "image": pictures})

    def draw_pictures(folder: Path, fingerprint: str) -> None:
        (folder / "images").mkdir()
        for row in np.flatnonzero(catalogue.has_picture):
            draw_picture(random, float(catalogue.hue[row]), SHAPES[catalogue.shape[row]]).save(folder / f"images/{row + 1}.png")

    return write_domain(
        place,
        name=name,
        offsets=offsets,
        items=items,
        timestamps=timestamps,
        item_table=table,
        user_ids=[f"{name}-shopper-{u}" for u in range(1, len(offsets))],
        tie_break="none (times within a user differ)",
        provenance={"generator": "mmm4rec demo", "seed": seed, "config": asdict(config)},
        extra=draw_pictures,
    )


def stock_shop(random: np.random.Generator, n_items: int, config: DemoConfig) -> Catalogue:
    """Draw a shop's items. Their numbers say nothing about them."""
    mix = random.dirichlet(np.full(len(TOPICS), 5.0))
    topic = random.choice(len(TOPICS), size=n_items, p=mix)
    brands = ["".join(random.choice(SYLLABLES, size=2, replace=False)).title() for _ in range(8)]
    texts = [write_title(random, TOPICS[k], brands) for k in topic]
    return Catalogue(
        topic=topic,
        hue=random.uniform(0, 2 * np.pi, n_items),
        shape=random.integers(len(SHAPES), size=n_items),
        popularity=random.normal(0, config.popularity_spread, n_items),
        texts=["" if gone else text for text, gone in zip(texts, random.random(n_items) < config.no_text_share, strict=True)],
        has_picture=random.random(n_items) >= config.no_picture_share,
    )


def write_title(random: np.random.Generator, topic: Sequence[str], brands: Sequence[str]) -> str:
    """A product title, for example 'Pelcor Compact Steel Moka Pot for Slow Mornings'."""
    brand, quality, material = random.choice(brands), random.choice(QUALITIES), random.choice(MATERIALS)
    noun, use = random.choice(topic[:5]), random.choice(topic[5:])
    return f"{brand} {quality.title()} {material.title()} {noun.title()} for {use.title()}"


def appeal(catalogue: Catalogue, last: np.ndarray, paused: np.ndarray, favourite: np.ndarray, config: DemoConfig) -> np.ndarray:
    """The rule: the logits [U, I] of each item to come next.

    Args: last [U]: row of each shopper's last item; paused [U] bool: a long pause came before it;
    favourite [U]: the shopper's shape.
    """
    topic = np.where(paused, catalogue.topic[last], (catalogue.topic[last] + 1) % len(TOPICS))
    hue = catalogue.hue[last] + np.pi * paused
    return (
        catalogue.popularity
        + config.topic_weight * (catalogue.topic == topic[:, None])
        + config.hue_weight * np.cos(catalogue.hue - hue[:, None])
        + config.shape_weight * (catalogue.shape == favourite[:, None])
    )


def simulate(
    random: np.random.Generator, catalogue: Catalogue, n_users: int, config: DemoConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Let the shoppers shop: offsets [U + 1], items [N] from 1, timestamps [N] in unix seconds.

    Nobody has fewer than 6 items or the same item twice.
    """
    counts = np.minimum(6 + random.geometric(0.3, n_users) - 1, 20)
    longest, everyone = int(counts.max()), np.arange(n_users)
    paused = random.random((n_users, longest)) < config.long_pause_share
    paused[:, 0] = False  # nothing came before the first item
    pauses = np.where(paused, log_uniform(random, LONG_PAUSE_SECONDS, paused.shape), log_uniform(random, SHORT_PAUSE_SECONDS, paused.shape))
    pauses[:, 0] = random.integers(365 * DAY_SECONDS, size=n_users)
    stamps = OPENING_SECONDS + np.cumsum(pauses, axis=1)
    favourite = random.integers(len(SHAPES), size=n_users)
    rows = np.zeros((n_users, longest), dtype=np.int64)
    logits = catalogue.popularity + config.shape_weight * (catalogue.shape == favourite[:, None])
    owned = np.zeros(logits.shape, dtype=bool)
    for step in range(longest):
        impulsive = random.random((n_users, 1)) < config.impulse_share
        noisy = np.where(impulsive, catalogue.popularity, logits) + random.gumbel(size=logits.shape)
        rows[:, step] = np.where(owned, -np.inf, noisy).argmax(axis=1)
        owned[everyone, rows[:, step]] = True
        logits = appeal(catalogue, rows[:, step], paused[:, step], favourite, config)
    real = np.arange(longest) < counts[:, None]
    return np.concatenate([[0], np.cumsum(counts)]), rows[real] + 1, stamps[real]


def log_uniform(random: np.random.Generator, seconds: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
    """Whole seconds between two bounds, every order of magnitude as likely as the next."""
    low, high = np.log(seconds)
    return np.exp(random.uniform(low, high, shape)).astype(np.int64)


def draw_picture(random: np.random.Generator, hue: float, shape: str) -> Image.Image:
    """An item's picture: the shape in the hue, on paper; its place, size and pattern are the item's own."""
    with encode_extra():
        from PIL import Image, ImageDraw
    size = 4 * PICTURE_PIXELS  # drawn large and scaled down, for smooth edges
    paper = tuple(int(x) for x in random.integers(225, 250, 3))
    degrees, saturation = int(np.degrees(hue)) % 360, int(random.integers(75, 95))
    figure = Image.new("L", (size, size))
    draw_shape(ImageDraw.Draw(figure), shape, size / 2 + random.uniform(-0.05, 0.05, 2) * size, random.uniform(0.3, 0.38) * size)
    ink = Image.new("RGB", (size, size), f"hsv({degrees}, {saturation}%, 80%)")
    draw_pattern(ImageDraw.Draw(ink), str(random.choice(PATTERNS)), f"hsv({degrees}, {saturation - 25}%, 95%)", size)
    return Image.composite(ink, Image.new("RGB", (size, size), paper), figure).resize((PICTURE_PIXELS, PICTURE_PIXELS))


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, centre: np.ndarray, radius: float) -> None:
    """Draw a shape in white on a mask."""
    (x, y), r = (float(c) for c in centre), radius
    box = (x - r, y - r, x + r, y + r)
    if shape == "disc":
        draw.ellipse(box, fill=255)
    elif shape == "square":
        draw.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill=255)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)], fill=255)
    elif shape == "ring":
        draw.ellipse(box, outline=255, width=int(0.4 * r))
    else:
        draw.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=255)
        draw.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=255)


def draw_pattern(draw: ImageDraw.ImageDraw, pattern: str, colour: str, size: int) -> None:
    """Draw a pattern over a square of `size` pixels; plain draws nothing."""
    step = size // 8
    for a in range(0, size, step):
        if pattern == "stripes":
            draw.rectangle((0, a, size, a + step // 3), fill=colour)
        elif pattern == "dots":
            for b in range(0, size, step):
                draw.ellipse((a, b, a + step // 2, b + step // 2), fill=colour)
