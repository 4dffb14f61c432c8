# make quickstart | test | lint | bench. Everything runs in .venv, which the first of them creates.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= true

.PHONY: quickstart test lint format bench clean

quickstart: $(VENV)/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/quickstart/run.sh

# Tests of the package two files at a time; then, alone on the machine, those that start whole runs or measure time.
ifdef PYTEST_ARGS
test: $(VENV)/installed-dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)
else
test: $(VENV)/installed-dev
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --ignore-glob 'tests/test_*.py'; together=$$?; \
	$(BIN)/python -m pytest tests/test_*.py && exit $$together
endif

lint: $(VENV)/installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

bench: $(VENV)/installed-dev
	for file in attention_mask dense_step expert_compute expert_utilisation moe_exchange schedules checkpoint hf_memory; do \
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
