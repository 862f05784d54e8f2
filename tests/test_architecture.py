"""Imports point downward, and the core stands without the extras."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY_MODEL

from mmm4rec.data.domain import Domain

ROOT = Path(__file__).parents[1]
CORE_LIBRARIES = {"torch", "numpy", "pandas", "pyarrow", "safetensors", "yaml", "tqdm"}
EXTRAS = {  # what a file may import besides, inside the function that needs it
    "demo.py": {"PIL"},
    "encode.py": {"sklearn", "PIL", "scipy"},
    "pretrained.py": {"PIL", "transformers", "huggingface_hub"},
    "images.py": {"PIL", "urllib3"},
    "stage.py": {"duckdb"},
    "hub.py": {"huggingface_hub"},
}
ROOMS = ("data", "models", "training", "run", "inference", "__main__")  # each may import what stands before it


def imports_of(file: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


def test_rooms_import_downward_only() -> None:
    for file in sorted((ROOT / "mmm4rec").rglob("*.py")):
        room = file.relative_to(ROOT / "mmm4rec").parts[0].removesuffix(".py")
        if room not in ROOMS:
            continue
        for name in imports_of(file):
            parts = name.split(".")
            if parts[0] == "mmm4rec" and len(parts) > 1 and parts[1] in ROOMS:
                assert ROOMS.index(parts[1]) <= ROOMS.index(room), f"{file} imports {name}"
            assert parts[0] != "studies", f"{file} imports {name}"


def test_core_imports_core_libraries_only() -> None:
    for file in sorted((ROOT / "mmm4rec").rglob("*.py")):
        allowed = CORE_LIBRARIES | sys.stdlib_module_names | {"mmm4rec"} | EXTRAS.get(file.name, set())
        outside = {name.split(".")[0] for name in imports_of(file)} - allowed
        assert not outside, f"{file} imports {outside}"


@pytest.mark.slow
def test_training_runs_where_no_extra_is_installed(make_domain: Callable[..., Domain], tmp_path: Path) -> None:
    domain = make_domain()
    hidden = ["ray", "mlflow", "optuna", "matplotlib", *sorted(set().union(*EXTRAS.values()))]
    sets = [f"model.{key}={value}" for key, value in TINY_MODEL.items()]
    arguments = ["train", "--domain", str(domain.path), "--out", str(tmp_path / "run"), "--epochs", "1", "--set", *sets]
    script = f"import sys; sys.modules.update(dict.fromkeys({hidden})); from mmm4rec.__main__ import main; sys.exit(main({arguments}))"
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert (tmp_path / "run" / "result.json").exists()
