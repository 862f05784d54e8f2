"""Which folders lie on a file system that other machines write to, where sqlite files must not be."""

from __future__ import annotations

import re
from pathlib import Path

from mmm4rec.errors import BadInput

# Types of mounts that other machines write to, as the kernel names them; so is every fuse.* but those of LOCAL_FUSE.
NETWORK_TYPES = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "beegfs", "gpfs", "ceph", "glusterfs", "afs", "orangefs", "9p", "wekafs", "panfs"}
)
LOCAL_FUSE = frozenset({"fuse.fuse-overlayfs", "fuse.mergerfs", "fuse.bindfs", "fuse.lxcfs", "fuse.gocryptfs", "fuse.encfs"})


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
