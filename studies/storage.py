"""Shared storage: where a study's files go that must outlive a machine, given once as a folder or a URI.

A folder that every node sees under the same name (NFS and the like), an object store (`s3://`, `gs://`), or any other
place that fsspec knows (`abfs://`, `hdfs://`, ..., with the package that it asks for) serves. A file is written whole or
not at all: in a folder under another name first, then renamed; in an object store with one put, which the store shows when
it is complete. So a reader, or a kill, meets the old file or the new one.

Credentials come from the environment, a profile or the machine's role (AWS_*, GOOGLE_APPLICATION_CREDENTIALS), never
from the URI. A store of one's own: `s3://bucket/place?endpoint_override=10.0.0.5:9000&scheme=http&region=us-east-1`.
"""

from __future__ import annotations

import fcntl
import glob
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import fsspec
import pyarrow as pa
from pyarrow import fs

from mmm4rec.errors import BadInput

OBJECT_STORES = ("s3", "gs")
MAPPED_BYTES = 64 << 20  # a longer file is mapped, not read, when it is pushed
BLOCK_BYTES = 8 << 20
TRIES = 5  # at a file that is replaced while it is read
STALE_PART_SECONDS = 3600.0  # what a kill left half written is removed after so long


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
        for name in files_below(folder) if names is None else names:
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

    def for_ray(self) -> dict[str, Any]:
        """What Ray's RunConfig is told of this place."""
        if self.path is not None or urlsplit(self.uri).scheme in OBJECT_STORES:
            return {"storage_path": self.uri}
        filesystem, base = self._filesystem
        return {"storage_path": base, "storage_filesystem": filesystem}

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
        except (OSError, NotImplementedError) as error:  # pyarrow's errors of object stores are OSErrors; some places can only be read
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
            if urlsplit(self.uri).scheme in OBJECT_STORES:
                filesystem, base = fs.FileSystem.from_uri(self.uri)
            else:
                other, base = fsspec.core.url_to_fs(unquote(self.uri))
                filesystem = fs.PyFileSystem(fs.FSSpecHandler(other))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ImportError, ValueError) as error:
            remedy = "Write it as s3://bucket/place or gs://bucket/place, or install the package that it asks for."
            raise BadInput(f"is no storage ({error}).", file=self.uri, remedy=remedy) from error
        return filesystem, base.rstrip("/")

    def _key(self, name: str) -> str:
        return f"{self._filesystem[1]}/{_checked(name)}"

    def _version(self, name: str) -> Any:
        """Something that changes when the file is replaced: an object's ETag, a file's inode, or its time and size."""
        if self.path is not None:
            state = (self.path / name).stat()
            return state.st_ino, state.st_mtime_ns, state.st_size
        if urlsplit(self.uri).scheme not in OBJECT_STORES:
            info = self._filesystem[0].get_file_info(self._key(name))
            if info.type != fs.FileType.File:
                raise FileNotFoundError(name)
            return info.mtime_ns, info.size
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


def _parse(uri: str) -> tuple[str, Path | None]:
    parts = urlsplit(uri)
    if "://" not in uri:
        path = Path(os.path.abspath(Path(uri).expanduser()))  # noqa: PTH100 (resolve() would read the disk)
        return str(path), path
    remedy = "Give a folder, s3://bucket/place, gs://bucket/place, or another place that fsspec knows."
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"  # no key in a message
    if parts.scheme == "file" and not parts.netloc and parts.path.startswith("/"):
        return _parse(unquote(parts.path))
    if parts.scheme == "file" or parts.scheme not in (*OBJECT_STORES, *fsspec.available_protocols()):
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


def files_below(folder: Path) -> list[str]:
    """The names of all files below a folder, sorted; without locks and half-written ones."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if not _is_hidden(name))


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
