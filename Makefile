# `make demo` and `make test` work on a bare machine with Python and make; both are quick the second time.

PYTHON ?= python3
PYTHON_OLDEST ?= $(PYTHON)

BIN := .venv/bin
BASE := .venv/.base
DEV := .venv/.dev
FIGURES := .venv/.figures
OLDEST := .venv-oldest/.done
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --dist=worksteal

.PHONY: demo test test-fast test-gpu test-oldest lint types layers doctest check wheel-test diagnosis figures layout clean

demo: $(BASE)  ## train the demo's four networks, then say how to look at them
	$(BIN)/lightning-interp demo

test: $(DEV)  ## all tests, but those that need a GPU
	$(PYTEST) -m "not gpu"

test-fast: $(DEV)  ## without the slow ones
	$(PYTEST) -m "not gpu and not slow"

test-gpu: $(DEV)  ## those that need a GPU
	$(PYTEST) -m gpu

test-oldest: $(OLDEST)  ## with the lowest versions that pyproject.toml allows
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest --numprocesses=auto --dist=worksteal -m "not gpu and not slow"

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV)
	$(BIN)/mypy

layers: $(DEV)
	$(BIN)/lint-imports

doctest: $(DEV)
	$(PYTEST) lightning_interp

check: lint types layers test-fast  ## what to run before a commit

wheel-test: $(DEV)  ## the wheel works without the source tree
	rm -rf dist
	$(BIN)/python -m build --wheel
	.ci/wheel-test "$(PYTHON)" dist/*.whl

diagnosis: $(DEV)  ## a small part of the fault suite, trained and scored anew: some four minutes
	$(BIN)/python -m benchmarks.diagnosis run --reduced --out "$$(mktemp -d)"

figures: $(FIGURES)  ## the screenshots of the README, from real runs (needs a Chromium)
	$(BIN)/python examples/figures.py

layout:  ## the list of files in CONTRIBUTING.md
	$(PYTHON) docs/layout.py

clean:
	rm -rf .venv .venv-oldest dist build

$(BASE): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(DEV): $(BASE)
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

$(FIGURES): $(BASE)
	$(BIN)/python -m pip install --quiet -e ".[figures]"
	touch $@

$(OLDEST): pyproject.toml requirements/oldest.txt
	$(PYTHON_OLDEST) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet -c requirements/oldest.txt -e ".[test]"
	touch $@
