"""Machines made of namespaces: each with its own network, processes, home, /tmp and shared memory, and an sshd.

All of them live inside one network, PID and mount namespace of their own (`enclosed`), so nothing on the real machine
changes, and when that ends the kernel ends every process, address and mount in it. They share one folder, /mnt/mmm4rec,
which plays the NFS server, and see the virtual environment read-only.
"""

from __future__ import annotations

import os
import pwd
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("unshare", "nsenter", "setpriv", "mount", "ip", "ss", "ssh", "ssh-keygen", "rsync", "tmux")
SSHD = "/usr/sbin/sshd"
NETWORK = "10.213.77"
HOME = pwd.getpwuid(0).pw_dir
STORAGE = "/mnt/mmm4rec"  # the same folder on every machine


def lacking() -> str | None:
    """Why this machine cannot do it, if it cannot."""
    if sys.platform != "linux":
        return "it needs Linux's namespaces"
    if os.geteuid() != 0:
        return "it must be run as root, to make namespaces"
    missing = [name for name in PROGRAMS if shutil.which(name) is None] + [SSHD] * (not Path(SSHD).exists())
    if missing:
        return f"{', '.join(missing)} missing (Debian: apt-get install openssh-server openssh-client iproute2 rsync tmux util-linux)"
    if subprocess.run([*_enclosure(), "true"], capture_output=True, check=False).returncode:
        return "this machine does not let root make namespaces"
    return None


def _enclosure() -> list[str]:
    return ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]


def enclosed(command: Sequence[str], *, timeout_seconds: float) -> int:
    """Run a command in namespaces of its own and return its exit status; whatever it started ends with it."""
    process = subprocess.Popen([*_enclosure(), *command])
    try:
        return process.wait(timeout_seconds)
    except subprocess.TimeoutExpired:
        print(f"not done after {timeout_seconds:.0f} s", flush=True)
        return 1
    finally:
        process.kill()
        process.wait()


@dataclass(frozen=True)
class Machine:
    """A running machine."""

    name: str
    address: str
    keeper: subprocess.Popen[bytes]
    first: int  # its process 1, as seen from outside

    def command(self, command: str, **environment: str) -> list[str]:
        """The command line that runs a shell command on it as root at home, with nothing of our environment."""
        told = {"HOME": HOME, "USER": "root", "TERM": "xterm", "LANG": "C.UTF-8", "PATH": os.environ["PATH"], **environment}
        enter = ["nsenter", "--target", str(self.first), "--net", "--pid", "--mount", "--uts", "--ipc", f"--wd={HOME}"]
        return [*enter, "env", "-i", *(f"{name}={value}" for name, value in told.items()), "bash", "-c", command]

    def run(self, command: str, *, timeout_seconds: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a shell command on it; stderr goes into stdout."""
        return subprocess.run(
            self.command(command, **environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            timeout=timeout_seconds,
            check=False,
        )

    def take_away(self) -> None:
        """As if its plug were pulled: all its processes end at once, and its network is gone."""
        os.kill(self.first, signal.SIGKILL)
        self.keeper.wait()


def prepare_enclosure(folder: Path) -> None:
    """The network and the mounts that all machines start from. `folder` holds what they keep on disk."""
    storage = folder / "storage"
    storage.mkdir()
    shadow = folder / "shadow"
    shadow.write_text("root:*:20000:0:99999:7:::\nsshd:!:20000::::::\n")  # sshd refuses a locked root
    _run("mount", "-t", "tmpfs", "tmpfs", "/mnt")
    Path(STORAGE).mkdir()
    _run("mount", "--bind", str(storage), STORAGE)
    _run("mount", "--bind", str(shadow), "/etc/shadow")
    _run("mount", "-t", "tmpfs", "tmpfs", "/run")
    Path("/run/sshd").mkdir()
    _run("ip", "link", "set", "lo", "up")
    _run("ip", "link", "add", "lan", "type", "bridge")
    _run("ip", "address", "add", f"{NETWORK}.1/24", "dev", "lan")
    _run("ip", "link", "set", "lan", "up")
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key"))


def boot(name: str, number: int, folder: Path, *, keep: Sequence[Path], hide: Sequence[Path] = ()) -> Machine:
    """Start a machine at address NETWORK.number.

    Args: keep: what it sees, read-only, of the real home, /tmp and /home. hide: further folders that it must not see.
    """
    disk, address = folder / name, f"{NETWORK}.{number}"
    home = disk / HOME.lstrip("/")
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    shutil.copy(folder / "key", home / ".ssh" / "id_ed25519")
    shutil.copy(folder / "key.pub", home / ".ssh" / "authorized_keys")
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(home / ".ssh" / "host_key"))
    script = "\n".join(["set -e", f"hostname {name}", *_own_disk(disk, keep, hide), *_network(address), *_sshd(address)])
    keeper = subprocess.Popen(
        ["unshare", "--net", "--pid", "--mount", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc", "bash", "-c", script],
        stdin=subprocess.DEVNULL,
        stdout=(folder / f"{name}.log").open("wb"),
        stderr=subprocess.STDOUT,
    )
    first = _first_process(keeper)
    _run("ip", "link", "add", f"to-{name}", "type", "veth", "peer", "name", "eth0", "netns", str(first))
    _run("ip", "link", "set", f"to-{name}", "master", "lan", "up")
    machine = Machine(name, address, keeper, first)
    wait_for(f"{name}'s sshd", lambda: machine.run(f"ss -Hltn 'src {address}:22'").stdout != "", seconds=20)
    return machine


def _own_disk(disk: Path, keep: Sequence[Path], hide: Sequence[Path]) -> list[str]:
    """The commands that lay a folder of `disk` over each place that machines do not share; /tmp, where `disk` may be, comes last."""
    lines = ["mount -t tmpfs tmpfs /dev/shm"]
    places = [place for place in (*hide, Path("/home"), Path("/var/tmp"), Path(HOME), Path("/tmp")) if place.is_dir()]
    for place in places:
        own = disk / str(place).lstrip("/")
        own.mkdir(parents=True, exist_ok=True, mode=0o1777 if place.name == "tmp" else 0o755)
        for kept in keep:
            if kept.is_relative_to(place):
                seat = own / kept.relative_to(place)
                seat.mkdir(parents=True, exist_ok=True)
                lines += [f"mount --bind {_quoted(kept)} {_quoted(seat)}", f"mount -o remount,bind,ro {_quoted(seat)}"]
    return lines + [f"mount --rbind {_quoted(disk / str(place).lstrip('/'))} {_quoted(place)}" for place in places]


def _network(address: str) -> list[str]:
    return [
        "ip link set lo up",
        "until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done",
        f"ip address add {address}/24 dev eth0",
        "ip link set eth0 up",
        f"ip route add default via {NETWORK}.1",
        f"until ping -c1 -W1 {NETWORK}.1 >/dev/null 2>&1 || ! command -v ping >/dev/null; do sleep 0.1; done",
    ]


def _sshd(address: str) -> list[str]:
    options = {
        "ListenAddress": address,
        "HostKey": f"{HOME}/.ssh/host_key",
        "AuthorizedKeysFile": f"{HOME}/.ssh/authorized_keys",
        "PermitRootLogin": "prohibit-password",
        "PasswordAuthentication": "no",
        "UsePAM": "no",
        "StrictModes": "no",
        "PidFile": "none",
        "MaxStartups": "100",
    }
    return [f"cd {HOME}", f"{SSHD} -D -e -f /dev/null {' '.join(f'-o {name}={value}' for name, value in options.items())} &", "wait"]


def _first_process(keeper: subprocess.Popen[bytes]) -> int:
    children = Path(f"/proc/{keeper.pid}/task/{keeper.pid}/children")
    wait_for("a machine's first process", lambda: children.read_text().strip() != "", seconds=10)
    return int(children.read_text().split()[0])


def wait_for(what: str, ready: object, *, seconds: float, every: float = 0.2) -> None:
    """Wait until ready() is true. Raises TimeoutError."""
    assert callable(ready)
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not there after {seconds:.0f} s")
        time.sleep(every)


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
