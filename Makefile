# Every target does its own set-up: .venv is made and filled on the first run, and left alone after that.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test test-all bars lint clean

# The whole story on photos that ship with scikit-image: train, save, load in diffusers, evaluate. Opens no network.
demo: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/sd-vae demo --out demo --overwrite

# What CI holds: format, lint, types, layers, tests with warnings as errors.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(INSTALLED)
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# Also the tests that take minutes.
test-all: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "slow or not slow"

# Bars that need the photos and weights in ../shared, minutes of CPU, or a GPU; appends to benchmarks/bars.md.
bars: $(INSTALLED)
	$(BIN)/python -m benchmarks.bars

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

clean:
	rm -rf .venv
