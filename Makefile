# make study    installs into .venv and runs the demo transfer study
# make test     the same, then runs the tests
# On a machine without an NVIDIA GPU torch comes as its CPU build; no CUDA packages are downloaded.

PYTHON ?= python3
VENV := .venv
CPU_INDEX := https://download.pytorch.org/whl/cpu
# asked once here: pip would ask an index that is out of reach again for every package
CPU_BUILD = $(PYTHON) -c 'from urllib.request import urlopen; urlopen("$(CPU_INDEX)/torch/", timeout=10)' 2>/dev/null && echo --extra-index-url $(CPU_INDEX)
TORCH_BUILD = $(if $(shell command -v nvidia-smi),,$(shell $(CPU_BUILD)))

.PHONY: study test test-cluster lint types install

study: install
	$(VENV)/bin/python studies/transfer_sweep.py --spec demo

test: install
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

test-cluster: install  # as root: two nodes made of namespaces, with an sshd each
	$(VENV)/bin/python tests/cluster/two_nodes.py

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: install
	$(VENV)/bin/mypy

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml cluster/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "mmm4rec needs Python 3.11 or newer. Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet $(TORCH_BUILD) --constraint cluster/constraints.txt --editable '.[dev]'
	@touch $@
