"""`ray submit cluster/onprem.yaml` for real: two nodes and a laptop made of namespaces, one node taken away in the middle.

    sudo make test-cluster        # or: python tests/cluster/two_nodes.py [--new-head]

The laptop runs `ray up` and `ray submit --tmux` with cluster/onprem.yaml (its addresses changed) and is switched off. The
study must go on, run trials on both nodes, lose one of them, and end complete. With --new-head it is the head that is
lost: a new one must go on from the shared storage. Also told: who is refused without the token, and which ports are open.
Exit status: 0 seen, 1 not; 0 with a message where this machine cannot make namespaces.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml
from evidence import by_node, counting, trials
from machines import HOME, NETWORK, STORAGE, Machine, boot, enclosed, lacking, prepare_enclosure, wait_for

ROOT = Path(__file__).resolve().parents[2]
VENV, PYTHON = Path(sys.prefix), Path(sys.base_prefix)
SPEC = Path(__file__).with_name("tiny.yaml")
CLUSTER = f"{HOME}/onprem.yaml"
STUDY = yaml.safe_load(SPEC.read_text(encoding="utf-8"))
COMMAND = f"--spec {HOME}/mmm4rec/{SPEC.relative_to(ROOT)} --storage {STORAGE}"
LIMIT_SECONDS = 900
LEASE_SECONDS = 95  # for so long a lost driver still holds its study
BEGUN = time.monotonic()


class NotSeenError(Exception):
    """What should have been seen was not."""


@dataclass
class Cluster:
    """What is running: machines, the folder that holds their disks, and the laptop's cluster file."""

    folder: Path
    laptop: Machine
    head: Machine
    worker: Machine
    driver: str = field(default="pgrep -f '^python .*transfer_sweep.py'")

    @property
    def study(self) -> Path:
        """The study's folder in the shared storage."""
        return self.folder / "storage" / STUDY["study"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new-head", action="store_true", help="take the head away, not the worker, and go on with a new one")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.inside:
        return _inside(told.inside, new_head=told.new_head)
    if reason := lacking():
        print(f"skipped: {reason}.")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # clean up then, too
    folder = Path(tempfile.mkdtemp(prefix="two-nodes-", dir="/tmp"))
    try:
        return enclosed([sys.executable, __file__, "--inside", str(folder), *sys.argv[1:]], timeout_seconds=LIMIT_SECONDS)
    finally:
        shutil.rmtree(folder)


def _inside(folder: Path, *, new_head: bool) -> int:
    try:
        cluster = start(folder)
        refused(cluster)
        ports(cluster)
        submit(cluster)
        ran_on_both(cluster)
        if new_head:
            cluster = lose_the_head(cluster)
        else:
            cluster.laptop.take_away()
            say("the laptop is switched off")
            lose_the_worker(cluster)
        complete(cluster)
    except (NotSeenError, TimeoutError, subprocess.TimeoutExpired) as error:
        print(f"FAILED: {error}", flush=True)
        _tell_logs(folder)
        return 1
    say("all seen")
    return 0


def start(folder: Path) -> Cluster:
    """Boot three machines and `ray up` from the laptop, in the repository's root, which only the laptop has."""
    prepare_enclosure(folder)
    laptop = boot("laptop", 9, folder, keep=[VENV, PYTHON, ROOT])
    worker, head = boot_node("worker", 3, folder), boot_node("head", 2, folder)
    must(laptop, f"{VENV}/bin/ray get-auth-token --generate > /dev/null")
    cluster = Cluster(folder, laptop, head, worker)
    bring_up(cluster)
    return cluster


def boot_node(name: str, number: int, folder: Path) -> Machine:
    """A node with a virtual environment of its own that borrows the given one's packages, so that setup_node.sh need not install them."""
    node = boot(name, number, folder, keep=[VENV, PYTHON], hide=[] if ROOT.is_relative_to("/tmp") else [ROOT])
    wanted = subprocess.run(
        f"cat {shlex.quote(str(ROOT))}/pyproject.toml {shlex.quote(str(ROOT))}/cluster/constraints.txt | sha256sum",
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    packages = VENV / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    commands = [
        f"{VENV}/bin/python -m venv --without-pip ~/mmm4rec-venv",
        f"printf '%s\\n' ~/mmm4rec {packages} > $(echo ~/mmm4rec-venv/lib/python*/site-packages)/given.pth",
        "printf '#!/bin/sh\\nexec ~/mmm4rec-venv/bin/python -m ray.scripts.scripts \"$@\"\\n' > ~/mmm4rec-venv/bin/ray",
        "chmod +x ~/mmm4rec-venv/bin/ray",
        f"echo '{wanted}' > ~/mmm4rec-venv/installed",
        "touch ~/.bashrc",
    ]
    must(node, " && ".join(commands))
    return node


def bring_up(cluster: Cluster) -> None:
    """`ray up` with cluster/onprem.yaml, and wait for the worker."""
    config = yaml.safe_load((ROOT / "cluster" / "onprem.yaml").read_text(encoding="utf-8"))
    config["provider"].update(head_ip=cluster.head.address, worker_ips=[cluster.worker.address])
    config["auth"]["ssh_user"] = "root"
    (cluster.folder / "laptop" / CLUSTER.lstrip("/")).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    must(cluster.laptop, f"cd {ROOT} && {VENV}/bin/ray up {CLUSTER} --yes --no-config-cache", seconds=180)
    say(f"ray up: {cluster.head.name} runs")
    wait_for("the worker in the cluster", lambda: nodes_alive(cluster) == 2, seconds=90, every=2)
    say("the worker has joined")


def nodes_alive(cluster: Cluster) -> int:
    """How many nodes Ray has."""
    status = cluster.head.run(". ~/.mmm4rec.sh; ray status").stdout
    active = re.search(r"Active:\n(.*?)Pending:", status, re.DOTALL)
    return sum(int(count) for count in re.findall(r"^ *(\d+) ", active[1], re.MULTILINE)) if active else 0


def refused(cluster: Cluster) -> None:
    """The head answers who has the token, and nobody else."""
    wrong = "mkdir -p ~/wrong/.ray && printf 0%.0s $(seq 64) > ~/wrong/.ray/auth_token"
    must(cluster.laptop, f"{wrong}; mkdir -p ~/none")
    callers = {"with the token": ("", "token"), "without a token": ("/none", "disabled"), "with another token": ("/wrong", "token")}
    for who, (home, mode) in callers.items():
        ask = f"{VENV}/bin/ray status --address {cluster.head.address}:6379"
        done = cluster.laptop.run(ask, timeout_seconds=90, HOME=HOME + home, RAY_AUTH_MODE=mode)
        answered, unauthenticated = done.returncode == 0, "InvalidAuthToken" in done.stdout
        expect(answered if not home else unauthenticated and not answered, f"`ray status` {who}: {done.stdout[-300:]}")
        say(f"`ray status` from the laptop {who}: {'answered' if answered else 'refused (InvalidAuthToken)'}")


def ports(cluster: Cluster) -> None:
    """Say what listens where; behind cluster/firewall.nft the laptop reaches SSH alone."""
    nodes = f"{cluster.head.address}, {cluster.worker.address}, {NETWORK}.4"
    for node in (cluster.head, cluster.worker):
        listening = listeners(node)
        for address in sorted({address for address, _, _ in listening}):
            say(f"{node.name} listens on {address}: {', '.join(f'{port} {who}' for a, port, who in sorted(listening) if a == address)}")
        if shutil.which("nft") is None:
            say("nft is missing: the firewall is not tried (Debian: apt-get install nftables)")
            continue
        rules = re.sub(
            r"define nodes = .*", f"define nodes = {{ {nodes} }}", (ROOT / "cluster" / "firewall.nft").read_text(encoding="utf-8")
        )
        (cluster.folder / node.name / HOME.lstrip("/") / "firewall.nft").write_text(rules, encoding="utf-8")
        must(node, "nft -f ~/firewall.nft")
        open_ports = reached(cluster.laptop, node.address, sorted({port for address, port, _ in listening if address != "127.0.0.1"}))
        expect(open_ports == [22], f"behind the firewall the laptop reaches ports {open_ports} of {node.name}")
        say(f"behind firewall.nft the laptop reaches {node.name}'s port 22 alone")


def listeners(node: Machine) -> list[tuple[str, int, str]]:
    """(address, port, program) of what listens on TCP."""
    found = []
    for line in must(node, "ss -Hltnp").splitlines():
        address, port = line.split()[3].rsplit(":", 1)
        who = re.search(r'\("([^"]+)"', line)
        found.append((address.strip("[]").removeprefix("::ffff:"), int(port), who[1] if who else "?"))
    return found


def reached(laptop: Machine, address: str, wanted: Sequence[int]) -> list[int]:
    """Those of the ports that take a connection."""
    code = (
        "import socket, sys\n"
        "for port in sys.argv[2:]:\n"
        "    try: socket.create_connection((sys.argv[1], int(port)), 0.7).close(); print(port)\n"
        "    except OSError: pass"
    )
    arguments = " ".join(map(str, [address, *wanted]))
    return [int(port) for port in must(laptop, f"{VENV}/bin/python -c {shlex.quote(code)} {arguments}").split()]


def submit(cluster: Cluster) -> None:
    """`ray submit --tmux`: the driver runs on the head, whatever becomes of the laptop."""
    ray = f"{VENV}/bin/ray submit --no-config-cache --tmux {CLUSTER}"
    must(cluster.laptop, f"cd {ROOT} && {ray} studies/transfer_sweep.py -- {COMMAND}", seconds=90)
    wait_for("the driver", lambda: driving(cluster), seconds=20)
    say(f"ray submit --tmux: the driver runs on {cluster.head.name}")


def driving(cluster: Cluster) -> bool:
    return cluster.head.run(cluster.driver).returncode == 0


def ran_on_both(cluster: Cluster) -> None:
    """Wait until trials run on both nodes."""

    def both() -> bool:
        running = {trial["nodes"][-1] for trial in trials(cluster.study).values() if trial["nodes"] and not trial["ended"]}
        if not driving(cluster):
            raise NotSeenError(f"the driver ended early:\n{screen(cluster)}")
        return running == {cluster.head.name, cluster.worker.name}

    wait_for("trials on both nodes", both, seconds=240, every=0.5)
    say(f"trials run on both nodes: {by_node(cluster.study)}")


def lose_the_worker(cluster: Cluster) -> None:
    cluster.worker.take_away()
    say("the worker is taken away in the middle")


def lose_the_head(cluster: Cluster) -> Cluster:
    """Take the head away, its disk with it; a new one goes on with what the shared storage has."""
    time.sleep(12)  # a snapshot or two
    cluster.head.take_away()
    lost = time.monotonic()
    say("the head is taken away in the middle, and its disk")
    new = replace(cluster, head=boot_node("newhead", 4, cluster.folder))
    bring_up(new)
    time.sleep(max(0.0, lost + LEASE_SECONDS - time.monotonic()))
    submit(new)
    return new


def complete(cluster: Cluster) -> None:
    """Wait for the driver's end and see that the study is whole."""
    wait_for("the study's end", lambda: not driving(cluster), seconds=400, every=1)
    say(f"the driver has ended: {by_node(cluster.study)}")
    if cluster.worker.keeper.poll() is not None:
        moved = [key for key, trial in trials(cluster.study).items() if trial["nodes"][:1] == ["worker"] and "head" in trial["nodes"]]
        expect(bool(moved), "no trial of the worker went on on the head")
        say(f"{len(moved)} of the worker's trials went on on the head")
    again = cluster.head.run(f". ~/.mmm4rec.sh; cd ~ && python ~/transfer_sweep.py {COMMAND}", timeout_seconds=120)
    expect(again.returncode == 0, f"the same command again ends with status {again.returncode}:\n{again.stdout[-3000:]}\n{screen(cluster)}")
    count = counting(f"results/{STUDY['study']}/study.sqlite3")
    told = must(cluster.head, f". ~/.mmm4rec.sh; cd ~ && python -c {shlex.quote(count)}")
    confirmed = json.loads(told.splitlines()[-1])
    print(again.stdout[-1500:], flush=True)
    cells = sum(len(group["domains"]) * len(group["arms"]) for group in STUDY["cells"])
    expect(confirmed["unfinished"] == 0, f"trials that have not ended: {confirmed}")
    expect(confirmed["confirmed"] == cells * STUDY["budget"]["confirm_seeds"], f"confirm trials: {confirmed}")
    expect(confirmed["searched"] == cells * STUDY["budget"]["search_trials"], f"search trials: {confirmed}")
    expect(confirmed["holes"] == 0, f"curves with a hole or an epoch twice: {confirmed}")
    say(f"the study is complete: {confirmed}")


def screen(cluster: Cluster) -> str:
    """What the driver's tmux window shows."""
    return cluster.head.run("tmux capture-pane -p -S -200 | grep -v '^$' | tail -60").stdout


def must(machine: Machine, command: str, *, seconds: float = 60) -> str:
    """Run a command that has to succeed, and return what it says."""
    done = machine.run(command, timeout_seconds=seconds)
    expect(done.returncode == 0, f"on {machine.name}: {command}\nended with status {done.returncode}:\n{done.stdout[-6000:]}")
    return done.stdout


def expect(seen: bool, what: str) -> None:
    if not seen:
        raise NotSeenError(what)


def say(what: str) -> None:
    print(f"[{time.monotonic() - BEGUN:5.0f} s] {what}", flush=True)


def _tell_logs(folder: Path) -> None:
    for log in [*folder.glob("*.log"), *folder.glob("head/tmp/ray/session_latest/logs/monitor.*")]:
        print(f"--- {log.name}\n{log.read_text(errors='replace')[-2000:]}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
