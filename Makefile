# Two commands need no set-up of their own: `make demo` and `make test`. Each skips what is already in place.
VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= python3

.PHONY: demo test lint types tests fuzz bench clean

demo: $(VENV)/.installed
	$(BIN)/samplewise score --out runs/demo --overwrite

test: $(VENV)/.installed lint types tests

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types:
	$(BIN)/mypy

tests:
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

# Random programs against the loop: `make fuzz SEED=7 MINUTES=30`.
SEED ?= 0
MINUTES ?= 10
fuzz: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzzing --seed $(SEED) --minutes $(MINUTES)

# Ours beside the plain step and every peer that can be installed: about half an hour.
bench: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt opacus==1.6.0 einops unfoldnd
	$(BIN)/pip install --quiet --no-deps backpack-for-pytorch==1.7.1
	$(BIN)/python benchmarks/compare.py

# torch comes first and alone: every later install is constrained to it.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs
