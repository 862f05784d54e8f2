"""Shared storage: files are old or new, whatever a kill or a second writer does; a domain is copied once a node."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

import pytest

from mmm4rec.data.domain import Domain, open_domain
from mmm4rec.errors import BadInput
from studies import mounts, places, storage
from studies.mounts import mount_type, network_filesystem, refuse_network_disk
from studies.places import local_copy
from studies.storage import Storage
from studies.trial_folder import trial_folder

DURABLE = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "write")  # the last: to a file that is open


def run_and_kill(work: Callable[[], object], event: int, events: tuple[str, ...] = DURABLE) -> bool:
    """Run it in a child that is killed before its durable step number `event`; whether it got that far."""
    child = os.fork()
    if child == 0:
        steps = 0

        def count(name: str, arguments: tuple) -> None:
            nonlocal steps
            if name in events and not (name == "open" and arguments[1] in ("r", "rb", None)):
                steps += 1
                if steps > event:
                    os.kill(os.getpid(), signal.SIGKILL)

        status = 1
        try:
            sys.addaudithook(count)
            sys.setprofile(lambda frame, kind, to: count("write", ()) if kind == "c_call" and to.__name__ == "write" else None)
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def fill(folder: Path, text: str, names: tuple[str, ...] = ("a", "deep/b", "result.json")) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{text} {name} " * 1000, encoding="utf-8")


def contents(place: Storage) -> dict[str, str]:
    return {name: (place.read(name) or b"").decode() for name in place.names()}


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """The query of URIs of a local S3 server."""
    if importlib.util.find_spec("moto") is None or importlib.util.find_spec("flask") is None:
        pytest.skip("no local S3: pip install 'moto[server]'")
    environment = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}
    os.environ.update(environment)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        lines = iter(server.stderr.readline, "")
        port = next(found[1] for line in lines if (found := re.search(r"Running on http://127\.0\.0\.1:(\d+)", line)))
        Thread(target=lambda: [None for _ in lines], daemon=True).start()  # its log must not fill the pipe
        yield f"?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
    finally:
        server.terminate()
        server.wait()
        for name in environment:
            os.environ.pop(name, None)


@pytest.fixture
def s3(moto: str, tmp_path: Path) -> str:
    """An empty place in a bucket."""
    Storage(f"s3://bucket{moto}&allow_bucket_creation=true")._filesystem[0].create_dir("bucket")
    return f"s3://bucket/{tmp_path.name}{moto}"


@pytest.fixture(params=["folder", "s3", "fsspec"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """The third is fsspec's in-memory file system, which stands for all that pyarrow does not speak to itself."""
    if request.param == "s3":
        return Storage(request.getfixturevalue("s3"))
    return Storage(str(tmp_path / "shared") if request.param == "folder" else f"memory://{tmp_path.name}/shared")


def test_files_come_back_as_they_were(place: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    fill(here, "first")
    for extra, text in (("empty", ""), (".lock", "x"), (".a.123.part", "half"), ("spaced name, 100%", "odd")):
        (here / extra).write_text(text)
    monkeypatch.setattr(storage, "MAPPED_BYTES", 10_000)  # deep/b and result.json go through a memory map
    assert (place.names(), place.exists("a"), place.read("a"), place.pull(there)) == ([], False, None, [])
    place.sub("one two").push(here)
    kept = ["a", "deep/b", "empty", "result.json", "spaced name, 100%"]
    assert place.sub("one two").names() == kept
    assert place.names() == [f"one two/{name}" for name in kept]
    assert place.sub("one two/deep").exists("b")
    assert place.sub("one two").pull(there, ["result.json", "missing", "deep/b", "empty"]) == ["result.json", "deep/b", "empty"]
    assert all((there / name).read_bytes() == (here / name).read_bytes() for name in ("result.json", "deep/b", "empty"))
    place.delete(["one two/a", "never there"])
    assert place.sub("one two").names() == kept[1:]
    place.delete()
    place.delete()
    assert place.names() == []
    place.check_writable()
    with pytest.raises(FileNotFoundError):
        place.push(here, ["a", "missing"])


def test_a_push_that_is_killed_anywhere_leaves_old_or_new_files_in_order(tmp_path: Path) -> None:
    names = ("last.ckpt", "deep/curve", "result.json")
    old, new = tmp_path / "old", tmp_path / "new"
    fill(old, "old", names)
    fill(new, "new", names)
    event = 0
    while True:
        place = Storage(str(tmp_path / f"shared{event}"))
        place.push(old)
        if not run_and_kill(lambda place=place: place.push(new, names), event):  # type: ignore[misc]
            break
        found = contents(place)
        generations = [found[name].split()[0] for name in names]
        assert [found[name] for name in names] == [f"{g} {n} " * 1000 for g, n in zip(generations, names, strict=True)]
        assert generations == sorted(generations)  # n before o: the last one named is the last that is new
        place.push(new, names)
        assert contents(place) == contents(Storage(str(new)))
        event += 1
    assert event >= 3 * len(names)  # a part file made, renamed, and looked after, each


def test_a_pull_that_is_killed_anywhere_leaves_old_or_new_files(tmp_path: Path) -> None:
    place = Storage(str(tmp_path / "shared"))
    fill(tmp_path / "shared", "new")
    event = 0
    while True:
        here = tmp_path / f"here{event}"
        fill(here, "old", ("a",))
        if not run_and_kill(lambda here=here: place.pull(here), event):  # type: ignore[misc]
            break
        assert all(text in (f"old {name} " * 1000, f"new {name} " * 1000) for name, text in contents(Storage(str(here))).items())
        assert place.pull(here) == ["a", "deep/b", "result.json"]
        assert contents(Storage(str(here))) == contents(place)
        event += 1
    assert event >= 9


def test_parts_that_kills_left_go_after_an_hour(tmp_path: Path) -> None:
    old, young, other = (tmp_path / f".{name}.part" for name in ("a[1].0", "a[1].1", "a1.0"))
    for part in (old, young, other):
        part.touch()
    os.utime(old, (0, 0))
    os.utime(other, (0, 0))
    Storage(str(tmp_path)).write("a[1]", b"x")
    assert [part.exists() for part in (old, young, other)] == [False, True, True]


KILL_PUSHES = """
import os, signal, sys, time
from pathlib import Path
from studies.storage import Storage
def push(name):
    child = os.fork()
    if child == 0:
        Storage(sys.argv[1]).sub(name).push(Path(sys.argv[2]), ["last.ckpt"])
        os._exit(0)
    return child
began = time.monotonic()
os.waitpid(push("whole"), 0)
whole_seconds = time.monotonic() - began
for share in sys.argv[3:]:
    child = push(share)
    time.sleep(float(share) * whole_seconds)
    os.kill(child, signal.SIGKILL)
    print(os.WIFSIGNALED(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
def test_an_object_is_old_or_new_when_its_push_is_killed(s3: str, tmp_path: Path) -> None:
    old, new, shares = b"o" * (12 << 20), b"n" * (12 << 20), ("0.2", "0.4", "0.6", "0.8")  # of the time that a whole push takes
    (tmp_path / "last.ckpt").write_bytes(new)
    for share in shares:
        Storage(s3).sub(share).write("last.ckpt", old)
    told = subprocess.run([sys.executable, "-c", KILL_PUSHES, s3, str(tmp_path), *shares], check=True, capture_output=True, text=True)
    assert "True" in told.stdout.split()  # at least one was killed on its way
    for share in shares:
        assert Storage(s3).sub(share).read("last.ckpt") in (old, new)


def test_an_object_that_cannot_be_read_whole_is_not_pushed(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Storage(s3)
    place.write("a", b"old")
    (tmp_path / "a").write_bytes(b"new")

    def fail(path: Path) -> bytes:
        raise OSError("disk")

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(OSError, match="disk"):
        place.push(tmp_path, ["a"])
    assert place.read("a") == b"old"


def test_a_file_that_is_replaced_while_it_is_read_comes_whole(place: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "BLOCK_BYTES", 1 << 10)
    place.write("a", b"o" * 40_000)
    replaced = iter([b"n" * 20_000, b"m" * 50_000])
    version = Storage._version

    def replace_after_looking(self: Storage, name: str) -> object:
        found = version(self, name)
        if (content := next(replaced, None)) is not None:
            self.write(name, content)
        return found

    monkeypatch.setattr(Storage, "_version", replace_after_looking)
    assert place.pull(tmp_path / "here") == ["a"]
    assert (tmp_path / "here" / "a").read_bytes() == b"m" * 50_000
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("odd://host/place", "no storage that is known"),
        ("file://host/place", "no storage that is known"),
        ("s3:///place", "names no bucket"),
        ("s3://key:secret@bucket/place", "carries a key"),
    ],
)
def test_an_unusable_place_is_refused_without_its_key(uri: str, message: str) -> None:
    with pytest.raises(BadInput, match=message) as refused:
        Storage(uri)
    assert "secret" not in str(refused.value)


def test_places_are_named_without_looking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Storage("here/../there").path == tmp_path / "there"
    assert Storage("file:///a%20b").path == Path("/a b")
    assert Storage("s3://b/x/?region=r").sub("a b/c").uri == "s3://b/x/a%20b/c?region=r"
    assert (Storage("gs://b").sub("x").uri, Storage("gs://b").path) == ("gs://b/x", None)
    for name in ("", "/etc/passwd", "../other", "a/../../b"):
        with pytest.raises(BadInput, match="no name of a file below"):
            Storage("s3://b/x").sub(name)


def test_a_storage_that_takes_nothing_is_refused_with_a_remedy(tmp_path: Path, moto: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=r"cannot be used as storage.*mount"):
        Storage(str(tmp_path / "file" / "below")).check_writable()
    with pytest.raises(BadInput, match=r"cannot be used as storage.*bucket"):
        Storage(f"s3://nobody-has-this/x{moto}").check_writable()


def test_a_trial_on_a_shared_folder_works_in_place_alone(tmp_path: Path) -> None:
    place, got = str(tmp_path / "trials" / "t1"), Event()

    def second() -> None:
        with trial_folder(place, tmp_path / "scratch"):
            got.set()

    with trial_folder(place, tmp_path / "scratch") as folder:
        assert folder.path == tmp_path / "trials" / "t1"
        (folder.path / "result.json").write_text("{}")
        folder.keep()
        waiting = Thread(target=second)
        waiting.start()
        assert not got.wait(0.3)
    waiting.join(5)
    assert got.is_set()
    assert (folder.path / "result.json").exists()


def test_a_trial_on_an_object_store_goes_on_from_what_was_pushed(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    write = Storage.write
    monkeypatch.setattr(Storage, "write", lambda self, name, content: (written.append(name), write(self, name, content)))
    place = Storage(s3).sub("trials/t1").uri
    with suppress(KeyboardInterrupt), trial_folder(place, tmp_path) as folder:
        fill(folder.path, "epoch1", ("curve.jsonl", "best.safetensors", "last.ckpt"))
        folder.keep()
        folder.keep()
        fill(folder.path, "epoch2!", ("curve.jsonl", "last.ckpt"))
        folder.keep()
        fill(folder.path, "lost", ("last.ckpt", "extra"))
        raise KeyboardInterrupt
    assert not (tmp_path / "t1").exists()
    first = ["last.ckpt", "best.safetensors", "curve.jsonl"]
    assert written == [*first, "last.ckpt", "curve.jsonl"]
    written.clear()
    with trial_folder(place, tmp_path) as folder:
        assert sorted(path.name for path in folder.path.iterdir()) == sorted(first)
        assert (folder.path / "last.ckpt").read_text().startswith("epoch2! ")
        fill(folder.path, "end", ("result.json", "ranks.parquet"))
    assert written == ["ranks.parquet", "result.json"]
    assert not (tmp_path / "t1").exists()
    assert contents(Storage(place)).keys() == {*first, "ranks.parquet", "result.json"}


def test_weights_come_once_a_node_from_a_store_with_its_own_address(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "scratch", lambda place: tmp_path / "scratch" / place)
    (tmp_path / "best.safetensors").write_bytes(b"weights")
    uri = places.Places(tmp_path, Storage(s3)).publish_weights(tmp_path / "best.safetensors")
    assert uri is not None
    for _ in range(2):
        assert Path(places.weights_here(uri)).read_bytes() == b"weights"
        Storage(uri).delete()  # the second time it is here
    with pytest.raises(FileNotFoundError, match="holds no"):
        places.weights_here(Storage(s3).sub("checkpoints/none").uri)


def test_a_worker_that_was_overtaken_pushes_nothing(s3: str, tmp_path: Path) -> None:
    def work() -> None:
        with trial_folder(s3, tmp_path) as folder:
            Storage(s3).write("result.json", b"other")
            fill(folder.path, "mine", ("best.safetensors", "result.json"))

    with pytest.raises(RuntimeError, match="another process"):
        work()
    assert contents(Storage(s3)) == {"result.json": "other"}


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every disk is a network's."""
    monkeypatch.setattr(places, "network_filesystem", lambda path: "nfs4")


def test_a_domain_on_a_local_disk_is_its_own_copy(make_domain: Callable[..., Domain], tmp_path: Path) -> None:
    domain = make_domain()
    assert local_copy(str(domain.path), domain.fingerprint, tmp_path / "cache") == domain.path
    assert not (tmp_path / "cache").exists()
    with pytest.raises(BadInput, match="was begun with other"):
        local_copy(str(domain.path), "other", tmp_path / "cache")


@pytest.mark.usefixtures("network")
def test_eight_trials_at_once_copy_a_domain_once(make_domain: Callable[..., Domain], tmp_path: Path) -> None:
    domain, cache, log = make_domain(), tmp_path / "cache", tmp_path / "pulls"
    pull = Storage.pull

    def slow_pull(self: Storage, folder: Path, names: object = None) -> list[str]:
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.2)
        return pull(self, folder, names)  # type: ignore[arg-type]

    children = []
    for _ in range(8):
        child = os.fork()
        if child == 0:
            Storage.pull = slow_pull  # type: ignore[method-assign]
            status = 1
            try:
                status = int(open_domain(local_copy(str(domain.path), domain.fingerprint, cache)).fingerprint != domain.fingerprint)
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8
    assert len(log.read_text().split()) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("network")
def test_a_copy_that_was_killed_is_no_copy(make_domain: Callable[..., Domain], tmp_path: Path) -> None:
    domain, event = make_domain(), 0
    whole = {name: (domain.path / name).read_bytes() for name in Storage(str(domain.path)).names()}
    while run_and_kill(lambda: local_copy(str(domain.path), domain.fingerprint, tmp_path / f"cache{event}"), event):  # noqa: B023
        copy = local_copy(str(domain.path), domain.fingerprint, tmp_path / f"cache{event}")
        assert {name: (copy / name).read_bytes() for name in Storage(str(copy)).names()} == whole
        assert not [path for path in (tmp_path / f"cache{event}").iterdir() if path.name.endswith(".part")]
        event += 6  # every sixth: a step is like its neighbours
    assert event > 20


@pytest.mark.usefixtures("network")
def test_a_copy_follows_new_features_and_refuses_another_domain(make_domain: Callable[..., Domain], tmp_path: Path) -> None:
    domain, cache = make_domain(), tmp_path / "cache"
    first = local_copy(str(domain.path), domain.fingerprint, cache)
    assert first != domain.path
    assert local_copy(str(domain.path), domain.fingerprint, cache) == first
    described = domain.path / "features" / "text.json"
    described.write_text(json.dumps(json.loads(described.read_text()) | {"encoder": "a new one"}))
    second = local_copy(str(domain.path), domain.fingerprint, cache)
    assert (second != first, "a new one" in (second / "features" / "text.json").read_text()) == (True, True)
    with pytest.raises(BadInput, match="was begun with other"):
        local_copy(str(domain.path), "other", cache)
    with pytest.raises(BadInput, match=r"no domain\.json"):
        local_copy(str(tmp_path / "nowhere"), "x", cache)
    assert sorted(path for path in cache.iterdir() if path.is_dir()) == sorted([first, second])


def test_a_domain_comes_from_an_object_store(make_domain: Callable[..., Domain], s3: str, tmp_path: Path) -> None:
    domain = make_domain()
    Storage(s3).push(domain.path)
    assert open_domain(local_copy(s3, domain.fingerprint, tmp_path / "cache")).fingerprint == domain.fingerprint


MOUNTS = r"""
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 22 0:40 / /home rw shared:7 - nfs4 filer:/home rw,vers=4.2
31 30 0:41 / /home/me/scratch rw shared:8 master:1 - xfs /dev/sdb rw
32 22 0:42 / /mnt/my\040data rw - fuse.s3fs s3fs rw
33 22 0:43 / /net rw - autofs systemd rw
34 22 0:44 / /net rw - lustre mgs:/work rw
35 22 0:45 / /lustrous rw - tmpfs tmpfs rw
a line that means nothing
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/me/study", "nfs4"),
        ("/home", "nfs4"),
        ("/homeless", "ext4"),
        ("/home/me/scratch/x", "xfs"),
        ("/mnt/my data/x", "fuse.s3fs"),
        ("/mnt/my", "ext4"),
        ("/net/x", "lustre"),
    ],
)
def test_a_path_is_on_the_mount_that_is_nearest(path: str, kind: str) -> None:
    assert mount_type(Path(path), MOUNTS) == kind


def test_sqlite_on_a_network_disk_is_refused_and_on_this_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_network_disk(tmp_path)
    for kind, found in (("nfs4", "nfs4"), ("fuse.gcsfuse", "fuse.gcsfuse"), ("fuse.fuse-overlayfs", None), ("ext4", None)):
        monkeypatch.setattr(mounts, "mount_type", lambda path, mountinfo, kind=kind: kind)
        assert network_filesystem(tmp_path / "not there yet") == found
    monkeypatch.setattr(mounts, "mount_type", lambda path, mountinfo: "cifs")
    with pytest.raises(BadInput, match=r"network file system \(cifs\).*--storage"):
        refuse_network_disk(tmp_path)
