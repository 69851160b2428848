PYTHON ?= python3
BIN := .venv/bin
CONSTRAINTS := $(shell command -v nvidia-smi >/dev/null 2>&1 || echo -c constraints-cpu.txt)

.DEFAULT_GOAL := help
.PHONY: help train test lint docs bench demo-sweep soak

help: ## print these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

train: .venv/ready ## run `python train.py` on the bundled model and text (4 to 6 minutes on two CPU cores)
	$(BIN)/python train.py

# One test file per core, in name order: most tests start small processes or Triton's interpreter, which use one core.
test: .venv/ready ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: .venv/ready ## check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy apc
	$(BIN)/lint-imports

docs: .venv/ready ## build the documentation into site/; broken links are errors
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/mkdocs build --strict

bench: .venv/ready ## append rows to benchmarks/results.csv: kernels, Lloyd and scaling on GPUs, assignment on the CPU
	if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		$(BIN)/python benchmarks/kernels.py && $(BIN)/python benchmarks/lloyd.py && $(BIN)/python benchmarks/scaling.py; fi
	$(BIN)/python benchmarks/cpu.py

demo-sweep: .venv/ready ## run a small sweep here, clusters × weighting (21 minutes on two CPU cores)
	$(BIN)/apc sweep configs/sweep/demo.yaml

soak: .venv/ready ## kill small runs 200 times at random moments; each must resume to the same bits
	APC_KILLS=200 APC_STAGE=all $(BIN)/python -m pytest -s tests/test_killed.py

.venv/ready: pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --editable '.[dev]'
	touch $@
