"""Facts about fetched pictures, against a server that misbehaves."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest

from mmm4rec.__main__ import main
from mmm4rec.data import images
from mmm4rec.data.domain import Domain, open_domain, write_domain
from mmm4rec.data.encode import picture_files
from mmm4rec.data.images import ImagesConfig, fetch_images, is_public, take_images
from mmm4rec.errors import BadInput

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("urllib3", reason="pictures are fetched with mmm4rec[prepare]")

QUICK = ImagesConfig(connections=4, retries=1, timeout_seconds=0.5, deadline_seconds=1.5, most_mb=0.05, private=True)


def picture(kind: str = "JPEG", size: tuple[int, int] = (40, 30)) -> bytes:
    content = BytesIO()
    Image.new("RGB", size, (200, 30, 40)).save(content, kind)
    return content.getvalue()


class Misbehaving(BaseHTTPRequestHandler):
    """What it does is in the path."""

    asked: ClassVar[Counter[str]] = Counter()
    mended = False  # whether /flaky works by now
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.asked[self.path] += 1
        with suppress(OSError):  # whoever asked has gone
            getattr(self, "do_" + self.path.strip("/").split("/")[0].split(".")[0], self.do_missing)()

    def answer(self, content: bytes, kind: str = "image/jpeg", status: int = 200, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def do_ok(self) -> None:
        self.answer(picture())

    def do_png(self) -> None:
        self.answer(picture("PNG"), "image/png")

    def do_large(self) -> None:
        self.answer(picture("PNG", (3000, 1500)), "image/png")

    def do_missing(self) -> None:
        self.answer(b"not here", "text/plain", 404)

    def do_busy(self) -> None:
        self.answer(b"", status=503, Retry_After="3600")

    def do_twice(self) -> None:
        self.answer(picture()) if self.asked[self.path] % 2 == 0 else self.answer(b"", status=502)

    def do_flaky(self) -> None:
        self.answer(picture()) if type(self).mended else self.answer(b"", status=500)

    def do_html(self) -> None:
        self.answer(b"<html>", "text/html")

    def do_liar(self) -> None:
        self.answer(b"<html>no picture</html>")

    def do_broken(self) -> None:
        self.answer(picture()[:300])

    def do_huge(self) -> None:
        self.answer(b"", length=10**9)

    def do_endless(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "image/jpeg")
        self.send_header("Connection", "close")
        self.end_headers()
        for _ in range(10_000):
            self.wfile.write(bytes(10_000))

    def do_cut(self) -> None:
        self.answer(picture()[:100], length=5000)
        self.close_connection = True

    def do_silent(self) -> None:
        time.sleep(5)

    def do_drops(self) -> None:
        """A byte now and then, for ever."""
        self.send_response(200)
        self.send_header("Content-Type", "image/jpeg")
        self.send_header("Content-Length", "40000")
        self.end_headers()
        for _ in range(100):
            self.wfile.write(b"x")
            time.sleep(0.1)

    def do_headers(self) -> None:
        """A header now and then, for ever."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for number in range(100):
            self.wfile.write(f"X-{number}: y\r\n".encode())
            time.sleep(0.1)

    def drip(self, begin: bytes, drop: bytes) -> None:
        self.wfile.write(begin)
        for _ in range(100):
            self.wfile.write(drop)
            time.sleep(0.1)

    def do_chunk(self) -> None:
        """The size of a chunk, a digit now and then."""
        self.drip(b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nTransfer-Encoding: chunked\r\n\r\n", b"0")

    def do_trailers(self) -> None:
        self.drip(b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"X: y\r\n")

    def do_excuses(self) -> None:
        """Busy, and a long story about it."""
        self.drip(b"HTTP/1.1 503 Busy\r\nContent-Length: 100000\r\n\r\n", b"x")

    def do_detour(self) -> None:
        """A redirect, and an endless page with it."""
        self.drip(b"HTTP/1.1 302 Found\r\nLocation: /ok/detour\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n")

    def do_gzip(self) -> None:
        """Compressed, though nobody asked for it, and empty."""
        self.drip(b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Encoding: gzip\r\n\r\n\x1f\x8b\x08" + bytes(7), bytes(5))

    def do_bomb(self) -> None:
        """A few bytes that decode to 900 million pixels."""
        import struct
        import zlib

        def chunk(name: bytes, content: bytes) -> bytes:
            return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

        header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
        self.answer(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""), "image/png")

    def do_moved(self) -> None:
        self.answer(b"", status=302, Location="/ok/after")

    def do_circle(self) -> None:
        self.answer(b"", status=302, Location="/circle")

    def do_inside(self) -> None:
        port = self.server.server_address[1]
        self.answer(b"", status=302, Location=f"http://127.0.0.2:{port}/ok/secret")

    def do_elsewhere(self) -> None:
        self.answer(b"", status=302, Location="file:///etc/passwd")

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Misbehaving.asked, Misbehaving.mended = Counter(), False
    with ThreadingHTTPServer(("0.0.0.0", 0), Misbehaving) as running:
        running.daemon_threads = True
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def shop(folder: Path, urls: list[str | None]) -> Domain:
    names = [f"i{number}" for number in range(len(urls))]
    table = pd.DataFrame({"item": names, "text": "t", "image": None, "image_url": pd.array(urls, dtype=object)})
    shoppers = {"offsets": np.array([0, 1]), "items": np.array([1]), "timestamps": None, "user_ids": ["u"]}
    return write_domain(folder, name=folder.name, item_table=table, tie_break="none", provenance={}, **shoppers)  # type: ignore[arg-type]


def reasons(domain: Domain) -> dict[str, str]:
    return dict(pd.read_csv(domain.path / "images" / "missing.csv")[["item", "reason"]].itertuples(index=False))


OUTCOMES = {
    "/ok": "ok",
    "/png": "ok",
    "/large": "ok",
    "/moved": "ok",
    "/twice": "ok",
    "/nothing": "status 404",
    "/busy": "status 503",
    "/html": "content type (text/html)",
    "/liar": "no picture",
    "/broken": "no picture",
    "/huge": "too large",
    "/endless": "too large",
    "/cut": "connection",
    "/silent": "timeout",
    "/drops": "timeout",
    "/headers": "timeout",
    "/chunk": "timeout",
    "/trailers": "timeout",
    "/excuses": "status 503",
    "/detour": "ok",
    "/gzip": "timeout",
    "/bomb": "too many pixels",
    "/circle": "redirect",
    "/elsewhere": "scheme",
}


def test_a_server_that_misbehaves_costs_its_pictures_and_no_more(server: str, tmp_path: Path) -> None:
    urls: list[str | None] = [server + path for path in OUTCOMES]
    domain = shop(tmp_path / "shop", [*urls, None, "ftp://x/y.jpg", "no address", "http://[::1", "http://127.0.0.1:1/closed"])
    began = time.monotonic()
    report = fetch_images(domain.path, QUICK)
    assert time.monotonic() - began < 30
    told = reasons(domain)
    for number, (path, outcome) in enumerate(OUTCOMES.items()):
        found = told.pop(f"i{number}", "ok")
        assert found.startswith(outcome), (path, found)
        assert (found == "ok") == (outcome == "ok"), (path, found)
    assert [reason.split(" (")[0] for reason in told.values()] == ["no address", "scheme", "scheme", "address", "connection"]
    assert (report["pictures"], report["items"]) == (6, len(OUTCOMES) + 5)
    files = picture_files(open_domain(domain.path))
    assert [file is not None for file in files] == [outcome == "ok" for outcome in OUTCOMES.values()] + [False] * 5
    kept = [Image.open(file).size for file in files if file is not None]
    assert kept == [(40, 30), (40, 30), (512, 256), (40, 30), (40, 30), (40, 30)]
    assert not list((domain.path / "images").glob(".*"))


def test_what_was_fetched_or_failed_for_good_is_not_asked_again(server: str, tmp_path: Path) -> None:
    domain = shop(tmp_path / "shop", [server + path for path in ("/ok/1", "/nothing", "/flaky", "/liar", "/ok/2")])
    assert fetch_images(domain.path, QUICK)["pictures"] == 2
    with (domain.path / "images" / "fetched.jsonl").open("a") as manifest:
        manifest.write('{"item": 2, "url": "x"\nnonsense\n')  # what a kill may leave
    (domain.path / "images" / "0000005.jpg").unlink()
    Misbehaving.asked.clear()
    Misbehaving.mended = True
    assert fetch_images(domain.path, QUICK)["pictures"] == 3
    assert dict(Misbehaving.asked) == {"/flaky": 1, "/ok/2": 1}
    assert reasons(domain) == {"i1": "status 404", "i3": reasons(domain)["i3"]}


def test_a_changed_address_is_asked_again(server: str, tmp_path: Path) -> None:
    domain = shop(tmp_path / "shop", [server + "/nothing"])
    fetch_images(domain.path, QUICK)
    table = domain.item_table().assign(image_url=server + "/ok")
    table.to_parquet(domain.path / "items.parquet", index=False)
    assert fetch_images(domain.path, QUICK)["pictures"] == 1


def test_private_addresses_are_refused_however_one_is_led_to_them(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strict = replace(QUICK, private=False)
    domain = shop(tmp_path / "shop", [server + "/ok", server.replace("127.0.0.1", "localhost") + "/ok"])
    fetch_images(domain.path, strict)
    assert all(reason.startswith("private address") for reason in reasons(domain).values())
    assert not Misbehaving.asked
    monkeypatch.setattr(images, "is_public", lambda address: address == "127.0.0.1")  # now a redirect leads inside
    domain = shop(tmp_path / "other", [server + "/ok", server + "/inside"])
    assert fetch_images(domain.path, strict)["pictures"] == 1
    assert reasons(domain) == {"i1": "private address (127.0.0.2)"}
    assert Misbehaving.asked == {"/ok": 1, "/inside": 1}


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("10.0.0.1", False),
        ("192.168.1.1", False),
        ("172.16.0.1", False),
        ("169.254.169.254", False),
        ("127.0.0.1", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::a9fe:a9fe", False),
        ("64:ff9b::808:808", True),
        ("2002:7f00:1::1", False),
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(address) is public


def test_what_other_limits_mend_is_asked_again(server: str, tmp_path: Path) -> None:
    domain = shop(tmp_path / "shop", [server + "/ok", server + "/large"])
    assert fetch_images(domain.path, replace(QUICK, private=False))["pictures"] == 0
    assert fetch_images(domain.path, replace(QUICK, most_mb=0.001))["pictures"] == 1
    assert fetch_images(domain.path, QUICK)["pictures"] == 2
    assert Misbehaving.asked == {"/ok": 1, "/large": 2}


def test_fetched_and_taken_pictures_stand_beside_each_other(server: str, tmp_path: Path) -> None:
    domain = shop(tmp_path / "shop", [server + "/ok", server + "/nothing", None])
    fetch_images(domain.path, QUICK)
    source = tmp_path / "photos"
    source.mkdir()
    (source / "i2.png").write_bytes(picture("PNG"))
    assert take_images(domain.path, source)["pictures"] == 2
    assert reasons(domain) == {"i1": "status 404"}
    assert fetch_images(domain.path, QUICK)["pictures"] == 2
    assert [file and file.name for file in picture_files(open_domain(domain.path))] == ["0000001.jpg", None, "0000003.png"]


def test_pictures_are_taken_from_a_folder_by_the_items_ids(tmp_path: Path) -> None:
    domain = shop(tmp_path / "shop", [None, None, None])
    source = tmp_path / "photos"
    source.mkdir()
    (source / "i0.png").write_bytes(picture("PNG"))
    (source / "i2.jpg").write_bytes(b"no picture")
    report = take_images(domain.path, source)
    assert (report["pictures"], report["missing"]) == (1, {"no address": 1, "no picture": 1})
    assert open_domain(domain.path).item_table()["image"].tolist()[0] == "images/0000001.png"
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"no picture named after an item.*i0\.jpg"):
        take_images(domain.path, tmp_path / "empty")


def test_the_command_prints_what_is_missing(server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    domain = shop(tmp_path / "shop", [server + "/ok", server + "/nothing"])
    assert main(["images", str(domain.path), "--private", "--retries", "0"]) == 0
    assert json.loads(capsys.readouterr().out) == {"domain": "shop", "items": 2, "pictures": 1, "missing": {"status 404": 1}}
    assert main(["images", str(shop(tmp_path / "none", [None]).path)]) == 2
    assert "--from" in capsys.readouterr().err
