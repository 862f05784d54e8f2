"""What the doctor asks on a node of Ray.

Ray gets this module by value: a node with another mmm4rec, or none, answers too. So the module's own imports are Python's
alone; everything else is imported where it is asked about.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Question = tuple[str, dict[str, Any]]  # the name of a function below, and its arguments
Answer = dict[str, Any]  # {"answer": plain data} or {"problem": text}


def ask(questions: Mapping[str, Question], deadline_seconds: float) -> dict[str, Answer]:
    """The answers, by the questions' names. A question that hangs or fails spoils no other one."""
    answers: dict[str, Answer] = {}

    def work(name: str, function: Callable[..., Any], arguments: dict[str, Any]) -> None:
        try:
            answers[name] = {"answer": function(**arguments)}
        except Exception as error:  # whatever stops a node is what the doctor wants to know
            answers[name] = {"problem": f"{type(error).__name__}: {error}"}

    threads = [
        threading.Thread(target=work, args=(name, FUNCTIONS[function], arguments), daemon=True)
        for name, (function, arguments) in questions.items()
    ]
    until = time.monotonic() + deadline_seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    late = {"problem": f"no answer within {deadline_seconds:g} seconds"}
    return {name: answers.get(name, late) for name in questions}


def clock() -> float:
    """Unix time in seconds."""
    return time.time()


def machine() -> dict[str, Any]:
    """What `mmm4rec doctor` says of the machine, in a process of its own, with the packages that it leaves out."""
    from importlib import metadata

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}
    command = [sys.executable, "-m", "mmm4rec", "doctor", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tempfile.gettempdir())
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1])
    versions = {name: metadata.version(name) for name in ("numpy", "ray")}
    return {**json.loads(done.stdout), **versions, "studies": _source_hash("studies")}


def _source_hash(package: str) -> str:
    """Hash of a package's source files."""
    import hashlib
    from importlib.util import find_spec

    found, digest = find_spec(package), hashlib.sha256()
    if found is None or found.origin is None:
        raise ImportError(f"no package {package}")
    root = Path(found.origin).parent
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:10]


def disks(places: Mapping[str, str | None]) -> dict[str, dict[str, Any]]:
    """Free and total bytes of the disk that each place lies on, or will lie on; None is the folder for temporary files."""
    found = {}
    for name, place in places.items():
        path = Path(place or tempfile.gettempdir()).absolute()
        path = next(part for part in (path, *path.parents) if part.is_dir())
        usage = shutil.disk_usage(path)
        writable = os.access(path, os.W_OK)
        found[name] = {"place": str(path), "free_bytes": usage.free, "total_bytes": usage.total, "writable": writable}
    return found


def storage(uri: str, note: str, content: str, answer: str) -> bool:
    """Whether the driver's note in the storage reads as `content` here; leaves its `answer` there. Raises what the storage raises."""
    from studies.storage import Storage

    store = Storage(uri)
    store.check_writable()
    store.write(answer, answer.encode())
    return store.read(note) == content.encode()


def domains(places: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What each prepared domain is, recomputed from its files: `fingerprint`, and `features`, whether each table is what it was."""
    return {name: _domain(Path(place)) if Path(place).is_dir() else {} for name, place in places.items()}


def _domain(place: Path) -> dict[str, Any]:
    import pandas as pd

    from mmm4rec.data.domain import fingerprint, open_domain
    from mmm4rec.data.features import MODALITIES, open_features
    from mmm4rec.errors import BadInput

    try:
        domain = open_domain(place)
        items, users = (pd.read_parquet(place / f"{kind}s.parquet", columns=[kind])[kind].tolist() for kind in ("item", "user"))
        found = fingerprint(domain.offsets, domain.items, domain.timestamps, items, users, domain.info["tie_break"])
        tables = {modality: open_features(domain, modality) for modality in MODALITIES}
    except BadInput as error:
        return {"problem": str(error)}
    digests = {modality: table.digest for modality, table in tables.items() if table is not None}
    whole = {modality: _digest(table) == table.digest for modality, table in tables.items() if table is not None}
    return {"fingerprint": found, "features": digests, "features_whole": whole}


def _digest(table: Any) -> str:
    """As `save_table` takes it."""
    import hashlib

    import numpy as np

    digest = hashlib.sha256(np.ascontiguousarray(table.vectors).data)
    digest.update(np.ascontiguousarray(table.present).data)
    return digest.hexdigest()[:16]


def network(ports: Sequence[int]) -> dict[str, Any]:
    """Whether Ray asks for a token here, and which of these ports listen on every address."""
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    return {"token": bool(is_token_auth_enabled()), "open_ports": sorted(set(ports) & set(_open_ports()))}


def _open_ports() -> list[int]:
    """The TCP ports that listen on every address of this machine, as Linux tells them."""
    ports = []
    for file in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in file.read_text(encoding="ascii").splitlines()[1:] if file.is_file() else ():
            _, local, _, state, *_ = line.split()
            address, _, port = local.partition(":")
            if state == "0A" and not address.strip("0"):  # 0A: it listens
                ports.append(int(port, 16))
    return ports


FUNCTIONS: dict[str, Callable[..., Any]] = {function.__name__: function for function in (machine, disks, storage, domains, network)}
