PYTHON ?= python3
BIN := .venv/bin
CONSTRAINTS := $(shell command -v nvidia-smi >/dev/null 2>&1 || echo -c constraints-cpu.txt)

.PHONY: train test lint bench demo-sweep
train: .venv/ready
	$(BIN)/python train.py

test: .venv/ready
	$(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Rows of benchmarks/results.csv: the kernels and whole Lloyd passes where there is an NVIDIA GPU, assignment on the CPU everywhere.
bench: .venv/ready
	if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		$(BIN)/python benchmarks/kernels.py && $(BIN)/python benchmarks/lloyd.py; fi
	$(BIN)/python benchmarks/cpu.py

# A small sweep over clusters and weightings, run here; `wandb sweep configs/sweep/demo.yaml` runs the same on a server.
demo-sweep: .venv/ready
	$(BIN)/python -m apc.sweep configs/sweep/demo.yaml

.venv/ready: pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --editable '.[dev]'
	touch $@
