"""The files of cluster/: against Ray's own schema, KubeRay's fields, a Slurm that is played, and a look for secrets."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"
ROOT = CLUSTER.parent

# The fields of KubeRay 1.6's objects: its API reference.
RAY_JOB = {
    *(
        "activeDeadlineSeconds",
        "backoffLimit",
        "clusterSelector",
        "deletionStrategy",
        "entrypoint",
        "entrypointNumCpus",
        "entrypointNumGpus",
    ),
    *("entrypointResources", "jobId", "managedBy", "metadata", "rayClusterSpec", "runtimeEnvYAML", "shutdownAfterJobFinishes"),
    *("submissionMode", "submitterConfig", "submitterPodTemplate", "suspend", "ttlSecondsAfterFinished"),
}
RAY_CLUSTER = {
    *("authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions", "headGroupSpec", "headServiceAnnotations"),
    *("managedBy", "rayVersion", "suspend", "workerGroupSpecs"),
}
HEAD_GROUP = {"enableIngress", "headService", "rayStartParams", "serviceType", "template"}
WORKER_GROUP = {
    *("groupName", "idleTimeoutSeconds", "maxReplicas", "minReplicas", "numOfHosts", "rayStartParams", "replicas", "scaleStrategy"),
    *("suspend", "template"),
}
POD = {
    *("automountServiceAccountToken", "containers", "initContainers", "nodeSelector", "restartPolicy", "securityContext"),
    *("serviceAccountName", "tolerations", "volumes"),
}
CONTAINER = {"args", "command", "env", "envFrom", "image", "name", "ports", "resources", "securityContext", "volumeMounts"}


def load(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["gpu.yaml", "onprem.yaml"])
def test_a_cluster_file_is_valid_for_ray(name: str) -> None:
    config = prepare_config(load(name))
    validate_config(config)
    wrong = {**config, "worker_count": 3}
    with pytest.raises(Exception, match="worker_count"):
        validate_config(wrong)


@pytest.mark.parametrize("name", ["gpu.yaml", "onprem.yaml"])
def test_a_cluster_file_brings_package_dependencies_and_token_to_every_node(name: str) -> None:
    config = load(name)
    assert config["file_mounts"]["~/mmm4rec"] == "."
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("setup_node.sh" in command for command in config["setup_commands"])
    starts = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    assert not any("0.0.0.0" in command for command in starts)
    assert any("--dashboard-host=127.0.0.1" in command for command in starts)


def test_gpu_workers_come_and_go() -> None:
    config = load("gpu.yaml")
    workers = config["available_node_types"]["gpu"]
    assert workers["min_workers"] == 0
    assert workers["max_workers"] <= config["max_workers"]
    assert any("RAY_ADDRESS=auto" in command for command in config["head_setup_commands"]), "the driver must wait for the first GPU"
    inside = config["provider"]["security_group"]["IpPermissions"]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in inside] == [(22, 22)]
    assert "0.0.0.0/0" not in str(inside)


def test_onprem_starts_workers_with_the_autoscaler_that_does() -> None:
    head = load("onprem.yaml")["head_start_ray_commands"][-1]
    assert "RAY_enable_autoscaler_v2=0" in head.split("ray start")[0]
    assert "--node-ip-address=$head_ip" in head


def test_kuberay_objects_have_only_fields_that_there_are() -> None:
    job, standing, policy = yaml.safe_load_all((CLUSTER / "kuberay.yaml").read_text(encoding="utf-8"))
    assert [one["apiVersion"] for one in (job, standing, policy)] == ["ray.io/v1", "ray.io/v1", "networking.k8s.io/v1"]
    assert [one["kind"] for one in (job, standing, policy)] == ["RayJob", "RayCluster", "NetworkPolicy"]
    assert set(job["spec"]) <= RAY_JOB
    assert job["spec"]["rayClusterSpec"] == standing["spec"], "the job's cluster and the standing one have gone apart"
    cluster = standing["spec"]
    assert set(cluster) <= RAY_CLUSTER
    assert cluster["authOptions"] == {"mode": "token"}
    assert set(cluster["headGroupSpec"]) <= HEAD_GROUP
    templates = [cluster["headGroupSpec"]["template"], job["spec"]["submitterPodTemplate"]]
    for group in cluster["workerGroupSpecs"]:
        assert set(group) <= WORKER_GROUP
        assert group["minReplicas"] == 0 < group["maxReplicas"]
        templates.append(group["template"])
    for template in templates:
        _check_pod(template, policy["spec"]["podSelector"]["matchLabels"])


def _check_pod(template: dict[str, Any], labels: dict[str, str]) -> None:
    assert template["metadata"]["labels"] == labels, "the policy does not cover the pod"
    pod = template["spec"]
    assert set(pod) <= POD
    volumes = {volume["name"] for volume in pod.get("volumes", ())}
    for container in pod["containers"]:
        assert set(container) <= CONTAINER
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", container["name"])
        assert {mount["name"] for mount in container.get("volumeMounts", ())} == volumes
        assert set(container["resources"]["requests"]) == set(container["resources"]["limits"])


def test_ray_version_is_one_everywhere() -> None:
    pinned = re.search(r"^ray==(\S+)$", (CLUSTER / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned is not None
    assert load_all("kuberay.yaml")[1]["spec"]["rayVersion"] == pinned[1]


def load_all(name: str) -> list[Any]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text(encoding="utf-8")))


@pytest.mark.slow
def test_kuberay_entrypoint_is_a_command_of_ours() -> None:
    words = load_all("kuberay.yaml")[0]["spec"]["entrypoint"].split()
    assert words[:3] == ["python", "-m", "studies.transfer_sweep"]
    options = [*words[3:], "--dry-run"]
    done = subprocess.run([sys.executable, "-m", "studies.transfer_sweep", *options], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_dockerfile_pins_and_holds_no_secret() -> None:
    text = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
    lines = re.sub(r"\\\n", " ", text).splitlines()
    assert [line for line in lines if line.startswith("FROM")] == ["FROM python:3.11.11-slim-bookworm"]
    installs = [line for line in lines if "pip install" in line]
    assert len(installs) == 1
    assert "--constraint cluster/constraints.txt" in installs[0]
    assert "USER 1000" in lines
    assert not [line for line in lines if line.startswith("ARG") or re.search(r"TOKEN|PASSWORD|SECRET|KEY", line)]
    for line in lines:
        if line.startswith("COPY"):
            assert all((ROOT / source).exists() for source in line.split()[1:-1]), line


def test_no_file_holds_a_secret() -> None:
    patterns = [
        r"AKIA[0-9A-Z]{16}",
        r"-----BEGIN",
        r"\b[0-9a-f]{40,}\b",
        r"://[^/\s:@]+:[^/\s@$]+@",
        r"(?i)(password|secret_key|token)\s*[=:]\s*['\"]?\w{8,}",
    ]
    for file in CLUSTER.iterdir():
        text = file.read_text(encoding="utf-8")
        assert not [pattern for pattern in patterns if re.search(pattern, text)], file


@pytest.mark.parametrize("name", ["slurm.sbatch", "setup_node.sh"])
def test_scripts_parse(name: str) -> None:
    assert subprocess.run(["bash", "-n", CLUSTER / name], check=False).returncode == 0


# ---- setup_node.sh


def test_a_node_is_set_up_once_and_again_when_something_changed(tmp_path: Path) -> None:
    copy, home = tmp_path / "copy", tmp_path / "home"
    (copy / "cluster").mkdir(parents=True)
    for name in ("pyproject.toml", "cluster/constraints.txt", "cluster/setup_node.sh"):
        shutil.copy(ROOT / name, copy / name)
    (home / ".ray").mkdir(parents=True)
    fake = tmp_path / "python"  # notes what is installed, and makes a "virtual environment" that holds itself
    fake.write_text(
        f'#!/bin/sh\ncase "$1$2" in -mvenv) mkdir -p "$3/bin"; cp "$0" "$3/bin/python";; -mpip) echo "$*" >> {tmp_path}/installs;; esac\n'
    )
    fake.chmod(0o755)

    def set_up() -> subprocess.CompletedProcess[str]:
        environment = {"HOME": str(home), "PATH": os.environ["PATH"], "MMM4REC_PYTHON": str(fake)}
        return subprocess.run(["bash", copy / "cluster/setup_node.sh"], env=environment, capture_output=True, text=True, check=False)

    assert (no_token := set_up()).returncode == 2
    assert "ray get-auth-token --generate" in no_token.stderr
    (home / ".ray" / "auth_token").write_text("x")
    assert set_up().returncode == 0
    assert set_up().returncode == 0
    assert (home / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600
    assert (home / ".bashrc").read_text().count("mmm4rec") == 1
    installs = (tmp_path / "installs").read_text().splitlines()
    assert len(installs) == 1, "the second time there was nothing to install"
    assert "constraints.txt --editable" in installs[0]
    with (copy / "cluster/constraints.txt").open("a") as file:
        file.write("# changed\n")
    assert set_up().returncode == 0
    assert len((tmp_path / "installs").read_text().splitlines()) == 2


# ---- slurm.sbatch, in a Slurm that is played: every node is this machine

FAKES = {
    "hostname": "echo 127.0.0.1",
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; echo "$@" >> "$PLAY/steps"; exec "$@"',
    "scontrol": 'case "$1" in show) echo first;; requeue) echo "$2" >> "$PLAY/requeued";; esac',
}
LISTENER = """
import socket, sys, time
port = next(int(word.removeprefix('--port=')) for word in sys.argv if word.startswith('--port='))
server = socket.create_server(('127.0.0.1', port))
time.sleep(100)
"""
DRIVERS = {
    "ends": "exit 0",
    "fails": "exit 1",
    "stops when told": "trap 'exit 1' TERM; while :; do sleep 0.05; done",
    "hears nothing": "trap '' TERM; while :; do sleep 0.05; done",
}


def _play(folder: Path, programs: dict[str, str]) -> dict[str, str]:
    """The environment of a job of one node, with these programs first on its PATH."""
    (folder / "bin").mkdir()
    for name, script in {**FAKES, **programs}.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / "bin" / name).chmod(0o755)
    job = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "first",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_CPUS_PER_TASK": "2",
        "SLURM_SUBMIT_DIR": str(folder),
    }
    return {"PATH": f"{folder}/bin:{os.environ['PATH']}", "HOME": str(folder), "PLAY": str(folder), "MMM4REC_VENV": str(folder), **job}


@pytest.mark.parametrize(
    ("driver", "told", "status", "requeued"),
    [("ends", False, 0, False), ("fails", False, 1, False), ("stops when told", True, 1, True), ("hears nothing", True, 137, True)],
)
def test_slurm_queues_again_only_what_the_wall_time_stopped(tmp_path: Path, driver: str, told: bool, status: int, requeued: bool) -> None:
    python = f'case "$*" in *transfer_sweep*) echo "$@" > "$PLAY/driver"; {DRIVERS[driver]};; *) echo token;; esac'
    ray = f'case "$1" in start) exec {sys.executable} -c "{LISTENER}" "$@";; status) printf "Active:\\n 1 node_a\\nPending:\\n";; esac'
    environment = {**_play(tmp_path, {"python": python, "ray": ray}), "MMM4REC_GRACE_SECONDS": "1"}
    job = subprocess.Popen(["bash", CLUSTER / "slurm.sbatch", "--spec", "demo", "--storage", str(tmp_path)], env=environment)
    if told:
        until = time.monotonic() + 20
        while not (tmp_path / "driver").exists() and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(0.3)
        job.send_signal(signal.SIGTERM)
    assert job.wait(30) == status
    assert (tmp_path / "requeued").exists() == requeued
    assert f"--spec demo --storage {tmp_path}" in (tmp_path / "driver").read_text()
    assert "ray start --head" in (tmp_path / "steps").read_text()
    started = [line for line in (tmp_path / "steps").read_text().splitlines() if "ray start" in line]
    assert not any(_runs(line.removeprefix("ray ")) for line in started), "Ray outlives the job"


def _runs(command: str) -> bool:
    return any(
        command.encode() in file.read_bytes().replace(b"\0", b" ") for file in Path("/proc").glob("[0-9]*/cmdline") if _readable(file)
    )


def _readable(file: Path) -> bool:
    try:
        file.read_bytes()
    except OSError:
        return False
    return True


def test_slurm_wants_shared_storage(tmp_path: Path) -> None:
    done = subprocess.run(["bash", CLUSTER / "slurm.sbatch"], env=_play(tmp_path, {}), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--storage" in done.stderr


@pytest.mark.slow
def test_slurm_runs_a_study_on_a_real_ray(tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    cells = "arms: {popularity: {recommender: popularity}}\ncells: [{domains: [attic], arms: [popularity]}]\n"
    spec.write_text(f"study: played\ndomains: {{demo: true}}\n{cells}budget: {{confirm_seeds: 1}}\n")
    folder = tmp_path / "play"
    folder.mkdir()
    environment = _play(folder, {name: f'exec "{Path(sys.prefix) / "bin" / name}" "$@"' for name in ("python", "ray")})
    command = ["bash", CLUSTER / "slurm.sbatch", "--spec", spec, "--storage", tmp_path / "storage"]
    job = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
    assert job.returncode == 0, job.stdout[-3000:] + job.stderr[-3000:]
    assert "Ray has 1 of 1 nodes." in job.stdout
    assert list((tmp_path / "storage").rglob("result.json"))
    assert (folder / "results" / "played" / "tables").is_dir()
    assert not (folder / "requeued").exists()
