PYTHON ?= python3
BIN := .venv/bin
CONSTRAINTS := $(shell command -v nvidia-smi >/dev/null 2>&1 || echo -c constraints-cpu.txt)

.PHONY: train test lint bench demo-sweep soak
train: .venv/ready
	$(BIN)/python train.py

# A file of tests on each core, in the order of their names: most of their time is that of many small processes and of Triton's interpreter, which use one.
test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# Kills small runs 200 times at moments drawn anew; each has to go on to the same end, to the bit.
soak: .venv/ready
	APC_KILLS=200 APC_STAGE=all $(BIN)/python -m pytest -s tests/test_killed.py

# Rows of benchmarks/results.csv: the kernels, whole Lloyd passes and what more GPUs gain where there is an NVIDIA GPU, assignment on the CPU everywhere.
bench: .venv/ready
	if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		$(BIN)/python benchmarks/kernels.py && $(BIN)/python benchmarks/lloyd.py && $(BIN)/python benchmarks/scaling.py; fi
	$(BIN)/python benchmarks/cpu.py

# A small sweep over clusters and weightings, run here; `wandb sweep configs/sweep/demo.yaml` runs the same on a server.
demo-sweep: .venv/ready
	$(BIN)/apc sweep configs/sweep/demo.yaml

.venv/ready: pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --editable '.[dev]'
	touch $@
