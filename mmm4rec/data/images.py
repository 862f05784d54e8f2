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
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

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
PASSING = ("timeout", "connection", "status 429", "status 5", "private", "too large")  # what another call, or other limits, may mend
REDIRECTED = (301, 302, 303, 307, 308)
READ_BYTES = 1 << 16
HEADERS = {"User-Agent": "mmm4rec", "Accept": "image/*", "Accept-Encoding": "identity"}


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


NO_ADDRESS = Outcome(0, "", "no address")


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
    table = domain.item_table()
    known = {earlier.item: earlier for earlier in _earlier(domain)}
    items = table["item"].tolist()
    taken = 0
    for number, item in enumerate(tqdm(items, desc=domain.name, unit=" pictures", delay=1, disable=None), start=1):
        if item in files:
            known[number] = _outcome(domain, number, files[item].name, files[item].read_bytes, config)
            taken += known[number].outcome == "ok"
    if not taken:
        raise BadInput("holds no picture named after an item's id.", file=source, remedy=f"Name them as {items[0]}.jpg.")
    return _close(domain, known, table["image_url"].tolist())


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
    """Write what is missing, then which items have a picture: what there was before and is not replaced stays."""
    before = [image if isinstance(image, str) and (domain.path / image).is_file() else None for image in domain.item_table()["image"]]
    found = [known.get(number, NO_ADDRESS) for number in range(1, domain.n_items + 1)]
    files = [each.file or earlier for each, earlier in zip(found, before, strict=True)]
    reasons = ["ok" if file is not None else each.outcome for file, each in zip(files, found, strict=True)]
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


class Exchange:
    """One picture's requests, redirects and retries: all of it ends at the deadline, whatever a server sends or does not."""

    here = threading.local()  # the exchange of this thread

    def __init__(self, seconds: float) -> None:
        self.over, self._seconds = False, seconds
        self.socket: socket.socket | None = None  # of the request that is under way

    def __enter__(self) -> Exchange:
        Exchange.here.now, self._timer = self, threading.Timer(self._seconds, self._end)
        self._timer.daemon = True
        self._timer.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._timer.cancel()

    def _end(self) -> None:
        self.over = True
        with suppress(OSError):
            if self.socket is not None:
                self.socket.shutdown(socket.SHUT_RDWR)


def _download(session: Any, url: str, config: ImagesConfig) -> bytes:
    """The bytes at an address. Raises Refused with the reason."""
    from urllib3 import Retry
    from urllib3.exceptions import HTTPError, LocationParseError, LocationValueError, MaxRetryError, NewConnectionError, TimeoutError

    tries = Retry(config.retries, status_forcelist=BUSY, backoff_factor=0.3, backoff_max=8, redirect=False)
    with Exchange(config.deadline_seconds) as exchange:
        try:
            for _ in range(REDIRECTS + config.retries + 1):
                status, answer = _ask(session, url, config)
                if status in REDIRECTED and answer:
                    url = urljoin(url, answer.decode("latin-1"))
                elif status in BUSY and tries.total and not exchange.over:
                    tries = tries.increment("GET", url)
                    tries.sleep()
                elif status == 200:
                    if exchange.over:
                        break
                    return answer
                else:
                    raise Refused(f"status {status}")
            raise Refused("redirect (too many)" if not exchange.over else "timeout")
        except Refused:
            if exchange.over:
                raise Refused(f"timeout (over {config.deadline_seconds} s)") from None
            raise
        except MaxRetryError as error:
            slow = isinstance(error.reason, TimeoutError) and not isinstance(error.reason, NewConnectionError)
            raise Refused(f"{'timeout' if slow or exchange.over else 'connection'} ({error.reason})") from error
        except (LocationParseError, LocationValueError, UnicodeError) as error:
            raise Refused(f"address ({error})") from error
        except (HTTPError, OSError) as error:
            kind = "timeout" if exchange.over or isinstance(error, TimeoutError) else "connection"
            raise Refused(f"{kind} ({error})") from error


def _ask(session: Any, url: str, config: ImagesConfig) -> tuple[int, bytes]:
    """One request: its status, and the picture, or where a redirect leads. Nothing that is not wanted is read. Raises Refused."""
    if not url.lower().startswith(tuple(f"{scheme}://" for scheme in SCHEMES)):
        raise Refused(f"scheme (only {' and '.join(SCHEMES)})")
    response = session.request("GET", url, preload_content=False, decode_content=False, redirect=False, headers=HEADERS)
    try:
        if response.status in REDIRECTED:
            return response.status, response.headers.get("Location", "").encode("latin-1", "replace")
        if response.status != 200:
            return response.status, b""
        most, length = int(config.most_mb * 1e6), response.headers.get("Content-Length", "")
        kind = response.headers.get("Content-Type", "").split(";")[0].strip().lower()
        if not kind.startswith("image/"):
            raise Refused(f"content type ({kind or 'none'})")
        content = b""
        while (not length.isdecimal() or int(length) <= most) and (part := response.read1(READ_BYTES, decode_content=False)):
            content += part
            if len(content) > most:
                break
        if len(content) > most or (length.isdecimal() and int(length) > most):
            raise Refused(f"too large (over {config.most_mb} MB)")
        return 200, content
    finally:
        response.close()


def is_public(address: str) -> bool:
    """Whether an IP address, or the one that it stands for, belongs to the public internet."""
    ip = ipaddress.ip_address(address.split("%", maxsplit=1)[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in TRANSLATED:
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        else:
            ip = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else ip)
    return ip.is_global and not ip.is_multicast


TRANSLATED = ipaddress.IPv6Network("64:ff9b::/96")


def _session(config: ImagesConfig) -> Any:
    """A pool of connections that tries again where one fails; unless `private`, no connection leaves the public internet.

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
            exchange: Exchange = Exchange.here.now
            exchange.socket = self.sock
            if exchange.over:
                raise TimeoutError("the deadline is over")
            return super().getresponse()

    class PublicTLS(Public, HTTPSConnection):
        pass

    class Pool(HTTPConnectionPool):
        ConnectionCls = Public

    class PoolTLS(HTTPSConnectionPool):
        ConnectionCls = PublicTLS

    retry = Retry(config.retries, status=0, redirect=False, backoff_factor=0.3, backoff_max=8, respect_retry_after_header=False)
    wait = Timeout(config.timeout_seconds, config.timeout_seconds)
    manager = PoolManager(num_pools=64, maxsize=config.connections, block=False, retries=retry, timeout=wait)
    manager.pool_classes_by_scheme = {"http": Pool, "https": PoolTLS}
    return manager
