"""The items' pictures, fetched from the addresses in their metadata or taken from a folder.

A fetched picture was checked: scheme, address, size, content type, and that it decodes. What has been fetched, and what
failed for good, is not asked for again; a failure that may pass (a timeout, a busy server) is tried again by the next call.

    images/0000017.jpg      item 17's picture, its longer side no more than `side_pixels`
    images/fetched.jsonl    a line a picture that was asked for: item, address, outcome
    images/missing.csv      items without a picture: item, address, reason
"""

from __future__ import annotations

import ipaddress
import json
import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from mmm4rec.data.domain import Domain, open_domain, set_images, write_atomically
from mmm4rec.errors import BadInput

log = logging.getLogger(__name__)
SCHEMES = ("http", "https")
FORMATS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp"}
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
MOST_PIXELS = 50_000_000
REDIRECTS = 3
BUSY = (429, 500, 502, 503, 504)
PASSING = ("timeout", "connection", "status 429", "status 5")  # outcomes that a later call tries again
READ_BYTES = 1 << 16


@dataclass(frozen=True)
class ImagesConfig:
    """How pictures are fetched and kept."""

    connections: int = 16
    retries: int = 3
    timeout_seconds: float = 10.0  # without a byte
    deadline_seconds: float = 60.0  # for one picture
    most_mb: float = 10.0
    side_pixels: int = 512
    private: bool = False  # whether addresses of private networks and of this machine are allowed

    def __post_init__(self) -> None:
        for name, lowest in {"connections": 1, "retries": 0, "side_pixels": 1}.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {lowest}.")
        if min(self.timeout_seconds, self.deadline_seconds, self.most_mb) <= 0:
            raise ValueError("timeouts, deadlines and sizes are above 0.")


@dataclass(frozen=True)
class Outcome:
    """What came of asking for a picture."""

    item: int  # its number, from 1
    url: str
    outcome: str  # `ok`, or why there is none
    file: str | None = None  # inside the domain's folder


class Refused(ValueError):
    """A picture that is not taken; its text is the outcome."""


def fetch_images(path: str | Path, config: ImagesConfig = ImagesConfig()) -> dict[str, Any]:
    """Fetch what is missing, and say in the domain which items have a picture; returns counts by outcome."""
    domain = open_domain(path)
    urls = [url if isinstance(url, str) and url else None for url in domain.item_table()["image_url"]]
    if not any(urls):
        raise BadInput(
            "has no addresses of pictures.", file=domain.path / "items.parquet", remedy="Take pictures from a folder with --from."
        )
    (domain.path / "images").mkdir(exist_ok=True)
    known = {known.item: known for known in _earlier(domain) if known.url == urls[known.item - 1]}
    wanted = [(number, url) for number, url in enumerate(urls, start=1) if url is not None and number not in known]
    session = _session(config)

    def ask(pair: tuple[int, str]) -> Outcome:
        return _outcome(domain, *pair, lambda: _download(session, pair[1], config), config)

    with (
        (domain.path / "images" / "fetched.jsonl").open("a", encoding="utf-8") as manifest,
        ThreadPoolExecutor(config.connections) as pool,
        tqdm(total=len(urls), initial=len(urls) - len(wanted), desc=domain.name, unit=" pictures", disable=None) as bar,
    ):
        step = 16 * config.connections  # asked for at once: what a kill loses
        for first in range(0, len(wanted), step):
            for found in pool.map(ask, wanted[first : first + step]):
                known[found.item] = found
                manifest.write(json.dumps(asdict(found)) + "\n")
                bar.update()
            manifest.flush()
    return _close(domain, known, urls)


def take_images(path: str | Path, source: Path, config: ImagesConfig = ImagesConfig()) -> dict[str, Any]:
    """Take the pictures that a folder has under the items' ids, and say so in the domain; returns counts by outcome."""
    domain = open_domain(path)
    if not source.is_dir():
        raise BadInput("is no folder.", file=source, remedy="Give the folder of the pictures.")
    files = {file.stem: file for file in sorted(source.iterdir()) if file.suffix.lower() in SUFFIXES}
    (domain.path / "images").mkdir(exist_ok=True)
    known = {}
    items = domain.item_table()["item"].tolist()
    for number, item in enumerate(tqdm(items, desc=domain.name, unit=" pictures", delay=1, disable=None), start=1):
        if item in files:
            known[number] = _outcome(domain, number, files[item].name, files[item].read_bytes, config)
    if not any(found.outcome == "ok" for found in known.values()):
        raise BadInput("holds no picture named after an item's id.", file=source, remedy=f"Name them as {items[0]}.jpg.")
    return _close(domain, known, [None] * domain.n_items)


def _earlier(domain: Domain) -> Iterator[Outcome]:
    """What earlier calls came to, for good: pictures that are still there, and failures that do not pass."""
    file = domain.path / "images" / "fetched.jsonl"
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []:
        try:
            found = Outcome(**json.loads(line))
        except (ValueError, TypeError):  # a line that a kill cut short
            continue
        if not 1 <= found.item <= domain.n_items or found.outcome.startswith(PASSING):
            continue
        if found.outcome != "ok" or (found.file is not None and (domain.path / "images" / Path(found.file).name).is_file()):
            yield found


def _outcome(domain: Domain, number: int, url: str, read: Callable[[], bytes], config: ImagesConfig) -> Outcome:
    try:
        content, suffix = checked(read(), config)
    except Refused as reason:
        return Outcome(number, url, str(reason))
    except OSError as error:
        return Outcome(number, url, f"connection ({error})")
    name = f"{number:07d}{suffix}"
    write_atomically(domain.path / "images" / name, content)
    return Outcome(number, url, "ok", f"images/{name}")


def _close(domain: Domain, known: dict[int, Outcome], urls: list[str | None]) -> dict[str, Any]:
    """Write what is missing, then which items have a picture."""
    files = [known[number].file if number in known else None for number in range(1, domain.n_items + 1)]
    reasons = [known[number].outcome if number in known else "no address" for number in range(1, domain.n_items + 1)]
    table = pd.DataFrame({"item": domain.item_table()["item"], "image_url": urls, "reason": reasons})
    write_atomically(domain.path / "images" / "missing.csv", table[table["reason"] != "ok"].to_csv(index=False).encode())
    set_images(domain, files)
    counts = Counter(reason.split(" (")[0] for reason in reasons)
    return {"domain": domain.name, "items": domain.n_items, "pictures": counts.pop("ok", 0), "missing": dict(counts.most_common())}


def checked(content: bytes, config: ImagesConfig) -> tuple[bytes, str]:
    """A picture as it is kept, and its suffix. Raises Refused when it does not decode, or is too large."""
    from PIL import Image

    try:
        with Image.open(BytesIO(content), formats=tuple(FORMATS)) as image:
            if image.width * image.height > MOST_PIXELS:
                raise Refused(f"too many pixels ({image.width} x {image.height})")
            suffix = FORMATS[str(image.format)]
            image.load()
            if max(image.size) <= config.side_pixels:
                return content, suffix
            small, kept = image.convert("RGB"), BytesIO()
            small.thumbnail((config.side_pixels, config.side_pixels))
            small.save(kept, "JPEG", quality=90)
            return kept.getvalue(), ".jpg"
    except Refused:
        raise
    except Image.DecompressionBombError as error:
        raise Refused(f"too many pixels ({error})") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise Refused(f"no picture ({error})") from error


def _download(session: Any, url: str, config: ImagesConfig) -> bytes:
    """The bytes at an address. Raises Refused with the reason."""
    import urllib3

    if not url.lower().startswith(tuple(f"{scheme}://" for scheme in SCHEMES)):
        raise Refused(f"scheme (only {' and '.join(SCHEMES)})")
    until, most = time.monotonic() + config.deadline_seconds, int(config.most_mb * 1e6)
    try:
        with closing(
            session.request("GET", url, preload_content=False, headers={"User-Agent": "mmm4rec", "Accept": "image/*"})
        ) as response:
            if response.status != 200:
                raise Refused(f"status {response.status}")
            kind = response.headers.get("Content-Type", "").split(";")[0].strip().lower()
            if not kind.startswith("image/"):
                raise Refused(f"content type ({kind or 'none'})")
            if int(response.headers.get("Content-Length") or 0) > most:
                raise Refused(f"too large (over {config.most_mb} MB)")
            content = b""
            while part := response.read1(READ_BYTES):
                content += part
                if len(content) > most:
                    raise Refused(f"too large (over {config.most_mb} MB)")
                if time.monotonic() > until:
                    raise Refused(f"timeout (over {config.deadline_seconds} s)")
            return content
    except urllib3.exceptions.MaxRetryError as error:
        known = urllib3.exceptions
        slow = isinstance(error.reason, known.TimeoutError) and not isinstance(error.reason, known.NewConnectionError)
        circling = isinstance(error.reason, known.ResponseError) and "redirect" in str(error.reason)
        raise Refused(f"{'redirect' if circling else 'timeout' if slow else 'connection'} ({error.reason})") from error
    except urllib3.exceptions.TimeoutError as error:
        raise Refused(f"timeout ({error})") from error
    except (urllib3.exceptions.LocationParseError, urllib3.exceptions.LocationValueError, UnicodeError, ValueError) as error:
        if isinstance(error, Refused):
            raise
        raise Refused(f"address ({error})") from error
    except urllib3.exceptions.HTTPError as error:
        raise Refused(f"connection ({error})") from error


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet."""
    ip = ipaddress.ip_address(address.split("%", maxsplit=1)[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return ip.is_global and not ip.is_multicast


def _session(config: ImagesConfig) -> Any:
    """A pool of connections that retries and follows a few redirects; unless `private`, no connection leaves the public internet.

    The address is checked once connected, before a byte is sent, so that neither a name nor a redirect leads inside.
    """
    try:
        from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, PoolManager, Retry, Timeout
        from urllib3.connection import HTTPConnection, HTTPSConnection
    except ModuleNotFoundError as error:
        raise BadInput("Fetching pictures needs urllib3, which is not installed.", remedy="Run: pip install 'mmm4rec[prepare]'") from error

    logging.getLogger("urllib3").setLevel(logging.ERROR)  # not a line for every retry

    class Public(HTTPConnection):
        def _new_conn(self) -> socket.socket:
            connected = super()._new_conn()
            address = connected.getpeername()[0]
            if not config.private and not is_public(address):
                connected.close()
                raise Refused(f"private address ({address})")
            return connected

        def getresponse(self) -> Any:
            """Of a server that sends its headers drop by drop the connection is shut down in the end."""
            end = threading.Timer(config.deadline_seconds, self._shut_down)
            end.daemon = True
            end.start()
            try:
                return super().getresponse()
            finally:
                end.cancel()

        def _shut_down(self) -> None:
            with suppress(OSError, AttributeError):
                self.sock.shutdown(socket.SHUT_RDWR)

    class PublicTLS(Public, HTTPSConnection):
        pass

    class Pool(HTTPConnectionPool):
        ConnectionCls = Public

    class PoolTLS(HTTPSConnectionPool):
        ConnectionCls = PublicTLS

    retry = Retry(
        total=config.retries + REDIRECTS,
        connect=config.retries,
        read=config.retries,
        status=config.retries,
        redirect=REDIRECTS,
        status_forcelist=BUSY,
        backoff_factor=0.3,
        backoff_max=8,
        respect_retry_after_header=False,  # a server does not decide how long we sleep
        raise_on_status=False,
    )
    manager = PoolManager(
        num_pools=64,
        maxsize=config.connections,
        block=False,
        retries=retry,
        timeout=Timeout(config.timeout_seconds, config.timeout_seconds),
    )
    manager.pool_classes_by_scheme = {"http": Pool, "https": PoolTLS}
    return manager
