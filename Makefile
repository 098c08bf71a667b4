# Everything runs in .venv, which is made on the first call; a second call installs nothing.
#   make quickstart ARGS="--trainer.max_steps 20"      more arguments for the command
#   make test PYTHON=python3.12 VENV=.venv-3.12        another interpreter

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin

# One thread per rank: two ranks on two cores are slower when each starts a thread per core.
OMP_NUM_THREADS ?= 1
export OMP_NUM_THREADS
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart quickstart-gpu test grid lint format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart: $(VENV)/.installed-cli ## Train a small MoE language model on 2 CPU ranks: two or three minutes
	$(BIN)/lightning-moe fit --config configs/quickstart.yaml $(ARGS)

quickstart-gpu: $(VENV)/.installed-cli ## Train on a box with 8 GPUs
	$(BIN)/lightning-moe fit --config configs/gpu_8.yaml $(ARGS)

test: $(VENV)/.installed-test ## Run the tests; ARGS="tests/nn -k router" selects
	$(BIN)/python -m pytest $(ARGS)

grid: $(VENV)/.installed-test ## Run the tests that a pairwise selection stands for in the others: long
	$(BIN)/python -m pytest -m grid $(ARGS)

lint: $(VENV)/.installed-dev ## Check style and types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: $(VENV)/.installed-dev ## Format the code and apply the safe fixes
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

clean: ## Remove the virtual environment, caches and what runs wrote
	rm -rf $(VENV) build dist *.egg-info lightning_moe/nn/csrc/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis runs lightning_logs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Order-only on the interpreter: it is a link to the system's, whose age says nothing.
$(VENV)/.installed-%: pyproject.toml constraints.txt setup.py lightning_moe/nn/csrc/tile_kernels.c | $(BIN)/python
	$(BIN)/python -m pip install --quiet "pip>=23.1"
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[$*]"
	@touch $@

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "$(PYTHON) was not found. Install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "Python 3.10 or newer is needed, but $(PYTHON) is $$($(PYTHON) -V 2>&1)." \
	    "Name another one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "$(PYTHON) lacks the module venv. Install it (on Debian and Ubuntu: apt install python3-venv)" \
	    "or name another Python: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
