"""What this machine can do: the facts that matter to a run."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mmm4rec.device import choose_device
from mmm4rec.execute import code_version
from mmm4rec.models import ssd

EXTRAS = {
    "prepare": ("duckdb", "urllib3", "pillow"),
    "encode": ("scikit-learn", "pillow", "transformers"),
    "hub": ("huggingface_hub",),
    "postgresql": ("psycopg", "SQLAlchemy"),
    "studies": ("ray", "optuna", "mlflow", "matplotlib", "scipy", "jinja2", "fsspec"),
}


def machine() -> dict[str, Any]:
    """What matters to a run on this machine, as plain data."""
    device = choose_device("auto")
    installed = {(part.name or "").lower(): part.version for part in metadata.distributions()}
    cuda = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return {
        "code_version": code_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu_threads": torch.get_num_threads(),
        "memory_bytes": memory_bytes(),
        "cuda_devices": [{"name": part.name, "memory_bytes": part.total_memory} for part in cuda],
        "kernel_problem": kernel_problem(device),
        "auto_scan": {str(length): ssd.choose(length, device) for length in (20, 200, 2000)},
        "packages": {extra: {name: installed.get(name.lower()) for name in names} for extra, names in EXTRAS.items()},
    }


def memory_bytes() -> int | None:
    """The machine's memory, or the container's share of it; None where the system does not say."""
    if os.name != "posix":
        return None
    total, limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), Path("/sys/fs/cgroup/memory.max")
    share = limit.read_text().strip() if limit.is_file() else "max"
    return total if share == "max" else min(total, int(share))


def kernel_problem(device: torch.device) -> str | None:
    """Why mamba-ssm's kernel cannot be used; None when it ran on a small input just now."""
    if device.type != ssd.KERNEL_DEVICE:
        return "this torch sees no CUDA device"
    x, delta, a = torch.ones(1, 64, 2, 16, device=device), torch.ones(1, 64, 2, device=device), -torch.ones(2, device=device)
    try:
        ssd.scan(x, delta, a, x, x, implementation="triton")
    except Exception as error:  # whatever stops the compiler, the driver or the package: it is the answer
        return str(error) or type(error).__name__
    return None


def machine_lines(facts: dict[str, Any]) -> list[str]:
    cuda = [f"{part['name']}, {part['memory_bytes'] / 2**30:.0f} GiB" for part in facts["cuda_devices"]]
    memory, problem = facts["memory_bytes"], facts["kernel_problem"]
    lines = {
        "mmm4rec": f"{facts['code_version']}, Python {facts['python']}, torch {facts['torch']}",
        "CPU": f"{facts['cpu_threads']} threads of torch, memory {'unknown' if memory is None else f'{memory / 2**30:.1f} GiB'}",
        "CUDA devices": "; ".join(cuda) or "none",
        "mamba-ssm kernel": "can be used" if problem is None else f"cannot be used: {problem}",
        "scan by auto": ", ".join(f"{name} at length {length}" for length, name in facts["auto_scan"].items()),
    }
    for extra, packages in facts["packages"].items():
        known = ", ".join(f"{name} {version or 'missing'}" for name, version in packages.items())
        lines[f"extra '{extra}'"] = known if all(packages.values()) else f"{known}; install: pip install 'mmm4rec[{extra}]'"
    return [f"{name:20}{text}" for name, text in lines.items()]
