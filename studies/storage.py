"""Shared storage: where a study's files go that must outlive a machine, given once as a folder or a URI.

A folder that every node sees under the same name (NFS and the like) or an object store (`s3://`, `gs://`) serves.
A file is written whole or not at all: in a folder under another name first, then renamed; in an object store with one
put, which the store shows when it is complete. So a reader, or a kill, meets the old file or the new one.

Credentials come from the environment, a profile or the machine's role (AWS_*, GOOGLE_APPLICATION_CREDENTIALS), never
from the URI. A store of one's own: `s3://bucket/place?endpoint_override=10.0.0.5:9000&scheme=http&region=us-east-1`.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import pyarrow as pa
from pyarrow import fs

from mmm4rec.errors import BadInput
from studies.state import locked

OBJECT_STORES = ("s3", "gs")
MAPPED_BYTES = 64 << 20  # a longer file is mapped, not read, when it is pushed
BLOCK_BYTES = 8 << 20
TRIES = 5  # at a file that is replaced while it is read
STALE_PART_SECONDS = 3600.0  # what a kill left half written is removed after so long
PUSH_FIRST, PUSH_LAST = ("last.ckpt", "best.safetensors"), ("curve.jsonl", "result.json")

# Types of mounts that other machines write to, as the kernel names them; so is every fuse.* but those of LOCAL_FUSE.
NETWORK_TYPES = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "beegfs", "gpfs", "ceph", "glusterfs", "afs", "orangefs", "9p", "wekafs", "panfs"}
)
LOCAL_FUSE = frozenset({"fuse.fuse-overlayfs", "fuse.mergerfs", "fuse.bindfs", "fuse.lxcfs", "fuse.gocryptfs", "fuse.encfs"})


class Storage:
    """A place for files. Names below it are relative, with `/` between their parts. Pickles as its URI."""

    def __init__(self, uri: str) -> None:
        """Args: uri: a path, `file://`, `s3://bucket/place` or `gs://bucket/place`. Touches neither disk nor network.

        Raises BadInput on another scheme, on a URI without a bucket, and on one that carries a key.
        """
        self.uri, self.path = _parse(str(uri))

    def __repr__(self) -> str:
        return f"Storage({self.uri!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Storage, (self.uri,)

    def sub(self, name: str) -> Storage:
        """The place `name` below this one."""
        if self.path is not None:
            return Storage(str(self.path / _checked(name)))
        parts = urlsplit(self.uri)
        return Storage(urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(_checked(name))}")))

    def push(self, folder: Path, names: Iterable[str] | None = None) -> None:
        """Copy these files of `folder` here, in this order: the one named last is what makes the set complete.

        Without names: all files below it, but for locks and half-written ones; one that vanishes meanwhile is left out.
        Raises FileNotFoundError where a named file is missing, OSError where the storage refuses.
        """
        for name in _files(folder) if names is None else names:
            try:
                content = _content(folder / _checked(name))
            except FileNotFoundError:
                if names is not None:
                    raise
                continue
            self.write(name, content)

    def pull(self, folder: Path, names: Iterable[str] | None = None) -> list[str]:
        """Copy these files, or all, into `folder`, each whole, in this order; the names of those that were there."""
        return [name for name in (self.names() if names is None else names) if self._fetch(name, folder / _checked(name))]

    def names(self) -> list[str]:
        """All files below this place, sorted; without locks and half-written ones."""
        filesystem, base = self._filesystem
        found = filesystem.get_file_info(fs.FileSelector(base, recursive=True, allow_not_found=True))
        names = (info.path[len(base) + 1 :] for info in found if info.type == fs.FileType.File)
        return sorted(name for name in names if not _is_hidden(name))

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        return bool(self._filesystem[0].get_file_info(self._key(name)).type == fs.FileType.File)

    def delete(self, names: Iterable[str] | None = None) -> None:
        """Delete these files; without names: everything below. What is not there is no error."""
        filesystem, base = self._filesystem
        if names is None:
            filesystem.delete_dir_contents(base, missing_dir_ok=True)
            return
        for name in names:
            with suppress(FileNotFoundError):
                filesystem.delete_file(self._key(name))

    def read(self, name: str) -> bytes | None:
        """A small file's content; None where there is none."""
        try:
            with self._filesystem[0].open_input_stream(self._key(name)) as file:
                return bytes(file.read())
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes | pa.Buffer) -> None:
        """Put a file in place, whole."""
        if self.path is not None:
            with _replacing(self.path / _checked(name)) as file:
                file.write(content)
            return
        # Closing this stream shows the object, even after an error in between: so there is nothing in between.
        with self._filesystem[0].open_output_stream(self._key(name)) as stream:
            stream.write(content)

    def check_writable(self) -> None:
        """Write, read back and delete a small file; in a folder, take a lock too. Raises BadInput with the reason."""
        name, content = f".probe-{uuid.uuid4().hex}", os.urandom(16)
        try:
            self.write(name, content)
            came = self.read(name)
            if self.path is not None:
                with (self.path / name).open("r+b") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.delete([name])
        except OSError as error:  # pyarrow's errors of object stores are OSErrors
            remedy = "Check the folder's owner and its mount: locks need NFSv4, or NFSv3 with its lock service."
            if self.path is None:
                remedy = "Check the bucket's name and region, and the credentials in this node's environment, profile or role."
            raise BadInput(f"cannot be used as storage: {error}.", file=self.uri, remedy=remedy) from error
        if came != content:
            raise BadInput("does not give back what was written to it.", file=self.uri, remedy="Choose another storage.")

    @cached_property
    def _filesystem(self) -> tuple[fs.FileSystem, str]:
        if self.path is not None:
            return fs.LocalFileSystem(), str(self.path)
        try:
            filesystem, base = fs.FileSystem.from_uri(self.uri)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise BadInput(
                f"is no storage ({error}).", file=self.uri, remedy="Write it as s3://bucket/place or gs://bucket/place."
            ) from error
        return filesystem, base.rstrip("/")

    def _key(self, name: str) -> str:
        return f"{self._filesystem[1]}/{_checked(name)}"

    def _version(self, name: str) -> Any:
        """Something that changes when the file is replaced: an object's ETag, or a file's inode and time."""
        if self.path is not None:
            state = (self.path / name).stat()
            return state.st_ino, state.st_mtime_ns, state.st_size
        with self._filesystem[0].open_input_stream(self._key(name)) as file:
            return file.metadata()

    def _fetch(self, name: str, target: Path) -> bool:
        """Copy one file here. An object is read in many requests, and one that is replaced between them is read anew."""
        for _ in range(TRIES):
            try:
                version = self._version(name)
            except FileNotFoundError:
                return False
            try:
                with self._filesystem[0].open_input_stream(self._key(name)) as source, _replacing(target) as file:
                    while block := source.read(BLOCK_BYTES):
                        file.write(block)
                    if self._version(name) != version:
                        raise OSError("replaced while it was read")
                return True
            except OSError:
                if self.exists(name) and self._version(name) == version:
                    raise
        raise OSError(f"{self.uri}: {name} was replaced {TRIES} times while it was read")


@dataclass
class TrialFolder:
    """Where a trial works: `path` on this node; `keep()` makes what stands there outlive it."""

    path: Path
    _storage: Storage | None = None  # None: every node sees `path`
    _pushed: dict[str, tuple[int, int]] = field(default_factory=dict)

    def keep(self) -> None:
        """Push the files that changed since the last time; result.json last, for it says that the run is whole.

        last.ckpt alone is enough to go on: whatever a kill leaves of the others is written anew from it.
        Raises RuntimeError where another process has finished the trial meanwhile.
        """
        if self._storage is None:
            return
        now = _states(self.path)
        if "result.json" not in self._pushed and self._storage.exists("result.json"):
            raise RuntimeError(f"{self._storage.uri}: another process has finished this trial")
        for name in sorted((name for name in now if now[name] != self._pushed.get(name)), key=_push_order):
            self._storage.push(self.path, [name])
            self._pushed[name] = now[name]


@contextmanager
def trial_folder(place: str, scratch: Path) -> Iterator[TrialFolder]:
    """Where a trial works, held by one process at a time; another one waits until the holder ends.

    Args: place: the trial's place on the storage; scratch: a folder on this node's disk, of this study alone.

    In a folder the trial works in place, under a lock that all nodes see: on NFSv4, and NFSv3 with its lock service.
    Where locks do not reach other nodes (`nolock`, `local_lock`, most FUSE mounts) a worker that outlives its driver
    on another node may work beside the new one. Both write the same run, file by file and whole, so that work is done
    twice and nothing is lost; `check_writable` finds a mount that refuses locks, not one that keeps them to itself.

    In an object store the lock holds on this node only, with the same consequence. The trial works in
    scratch/<last part of place>, filled with what the storage holds, which is the truth: what an earlier attempt left
    there and did not push is dropped and computed again. A block that ends well is kept; scratch goes when
    result.json is pushed, and stays otherwise.
    """
    storage = Storage(place)
    if storage.path is not None:
        storage.path.mkdir(parents=True, exist_ok=True)
        with locked(storage.path / ".lock", wait=True):
            yield TrialFolder(storage.path)
        return
    name = PurePosixPath(urlsplit(storage.uri).path).name
    path = scratch / name
    scratch.mkdir(parents=True, exist_ok=True)
    with locked(scratch / f".{name}.lock", wait=True):  # beside the folder: a lock that is removed while others wait for it holds nobody
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        storage.pull(path)
        folder = TrialFolder(path, storage, _states(path))
        try:
            yield folder
            folder.keep()
        finally:
            if "result.json" in folder._pushed:
                shutil.rmtree(path, ignore_errors=True)


def local_copy(source: str, fingerprint: str, cache: Path) -> Path:
    """The domain at `source` as a folder on this node: itself where its disk is local, else a copy, made once a node.

    Args: source: path or URI of a domain folder; fingerprint: the domain's; cache: a folder on this node's disk.

    The copy is cache/<fingerprint>-<digest of its features' descriptions>: features may be encoded anew while the
    fingerprint stays, and a running trial goes on with those that it opened.
    Raises BadInput where there is no domain, or another one.
    """
    storage = Storage(source)
    if storage.path is not None and storage.path.is_dir() and network_filesystem(storage.path) is None:
        _check_domain(storage, fingerprint)
        return storage.path
    key = f"{fingerprint}-{_features_digest(storage)}"
    if not (cache / key).exists():
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / f".{key}.lock", wait=True):
            if not (cache / key).exists():
                _fill(cache / key, storage, fingerprint)
    return cache / key


def _fill(place: Path, storage: Storage, fingerprint: str) -> None:
    """Make `place` a copy of the domain, whole or not at all. Needs its lock."""
    part = place.with_name(f".{place.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        _check_domain(storage, fingerprint)
        names = sorted(storage.names(), key=lambda name: (name == "domain.json", name))
        storage.pull(part, names)
        copy = Storage(str(part))
        _check_domain(copy, fingerprint, shown=storage.uri)
        if f"{fingerprint}-{_features_digest(copy)}" != place.name:
            raise BadInput("changed while it was copied.", file=storage.uri, remedy="Start again when its features are encoded.")
        part.replace(place)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _check_domain(storage: Storage, fingerprint: str, shown: str | None = None) -> None:
    text = storage.read("domain.json")
    if text is None:
        remedy = "Put the domains where every node finds them: on the storage."
        raise BadInput("is no domain that this node can see: there is no domain.json.", file=shown or storage.uri, remedy=remedy)
    found = json.loads(text).get("fingerprint")
    if found != fingerprint:
        rule = f"has the fingerprint {found}; the study was begun with {fingerprint}."
        raise BadInput(rule, file=shown or storage.uri, remedy="Put the domain there that the study began with, or start a new study.")


def _features_digest(storage: Storage) -> str:
    features, digest = storage.sub("features"), hashlib.sha256()
    for name in features.names():
        if name.endswith(".json"):
            digest.update(name.encode() + b"\0" + (features.read(name) or b"") + b"\0")
    return digest.hexdigest()[:8]


def network_filesystem(path: Path) -> str | None:
    """The type of the mount that holds `path` where other machines write to it too (`nfs4`, `lustre`, `fuse.s3fs`, ...).

    None for a local disk, and where the system does not tell. `path` need not exist.
    """
    try:
        mountinfo = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return None
    kind = mount_type(path.resolve(), mountinfo)
    is_network = kind in NETWORK_TYPES or (kind.startswith("fuse.") and kind not in LOCAL_FUSE)
    return kind if is_network else None


def mount_type(path: Path, mountinfo: str) -> str:
    """The file system type of the mount that holds `path`: the longest mount point wins, and the later of two equal ones."""
    longest, kind = -1, ""
    for line in mountinfo.splitlines():
        before, dash, after = line.partition(" - ")
        if dash:
            point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), before.split(" ")[4])
            if path.is_relative_to(point) and len(point) >= longest:
                longest, kind = len(point), after.split(" ")[0]
    return kind


def refuse_network_disk(path: Path) -> None:
    """Raise BadInput where sqlite files in `path` would lie on a network file system, whose locks sqlite cannot trust."""
    kind = network_filesystem(path)
    if kind is not None:
        remedy = "Give a folder on a local disk with --out and the shared one with --storage, or a PostgreSQL URL for the stores."
        raise BadInput(f"lies on a network file system ({kind}), where sqlite databases get corrupted.", file=path, remedy=remedy)


def _parse(uri: str) -> tuple[str, Path | None]:
    parts = urlsplit(uri)
    if "://" not in uri:
        path = Path(os.path.abspath(Path(uri).expanduser()))  # noqa: PTH100 (resolve() would read the disk)
        return str(path), path
    remedy = "Give a folder, s3://bucket/place or gs://bucket/place."
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"  # no key in a message
    if parts.scheme == "file" and not parts.netloc and parts.path.startswith("/"):
        return _parse(unquote(parts.path))
    if parts.scheme not in OBJECT_STORES:
        raise BadInput(f"is no storage that is known: '{parts.scheme}://'.", file=shown, remedy=remedy)
    if "@" in parts.netloc:
        rule = "carries a key, and a storage's name is written into files."
        raise BadInput(rule, file=shown, remedy="Leave it out; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile or role.")
    if not parts.netloc:
        raise BadInput("names no bucket.", file=shown, remedy=remedy)
    return urlunsplit(parts._replace(path=parts.path.rstrip("/"))), None


def _checked(name: str) -> str:
    """A name that stays below its place. Raises BadInput: names come from a bucket's listing too."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts:
        raise BadInput(f"'{name}' is no name of a file below a folder.", remedy="Use relative names without '..'.")
    return name


def _is_hidden(name: str) -> bool:
    last = PurePosixPath(name).name
    return last.startswith(".") and (last.endswith(".part") or last.endswith(".lock"))


def _files(folder: Path) -> list[str]:
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if not _is_hidden(name))


def _states(folder: Path) -> dict[str, tuple[int, int]]:
    """The time (ns) and size of each file below `folder`: what tells that it changed."""
    states = {}
    for name in _files(folder):
        with suppress(FileNotFoundError):
            state = (folder / name).stat()
            states[name] = (state.st_mtime_ns, state.st_size)
    return states


def _push_order(name: str) -> tuple[int, int, str]:
    if name in PUSH_FIRST:
        return 0, PUSH_FIRST.index(name), name
    return (2, PUSH_LAST.index(name), name) if name in PUSH_LAST else (1, 0, name)


def _content(file: Path) -> bytes | pa.Buffer:
    """A file's content; of a long one a memory map, whose disk errors end the process rather than a put halfway."""
    if file.stat().st_size <= MAPPED_BYTES:
        return file.read_bytes()
    with pa.memory_map(str(file)) as mapped:
        return mapped.read_buffer()


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` in one move. Unlike the core's, two processes may do so at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        with suppress(FileNotFoundError):
            if time.time() - old.stat().st_mtime > STALE_PART_SECONDS:
                old.unlink()
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
