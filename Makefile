# make quickstart | test | lint | bench. Everything runs in .venv, which the first of them creates.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= true

.PHONY: quickstart test lint format bench clean

quickstart: $(VENV)/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/quickstart/run.sh

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

bench: $(VENV)/installed-dev
	for file in attention_mask dense_step expert_compute expert_utilisation moe_exchange schedules; do \
	  $(BIN)/python benchmarks/$$file.py --json benchmarks/results/$$file.json | tee benchmarks/results/$$file.txt || exit 1; \
	done

clean:
	rm -rf data runs export

$(VENV)/installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools wheel torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps megatron-core
	touch $@
