# `make quickstart` and `make test` work in a fresh clone; they need python3, pip and make.
PYTHON ?= python3
BIN := .venv/bin
DEFAULT := not gpu and not slow and not bench

.PHONY: install quickstart test test-library test-cluster faults lint bench

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

quickstart: install
	$(BIN)/python -m jobs.quickstart

# The tests that start Ray or a browser wait often (for processes to start and nodes to time out), so
# they run beside the others; they themselves run one at a time.
test: install
	$(MAKE) --no-print-directory --jobs=2 test-cluster test-library

test-library: install
	$(BIN)/python -m pytest -rs -n auto --maxprocesses 4 -m "$(DEFAULT) and not ray and not e2e"

test-cluster: install
	$(BIN)/python -m pytest -rs -m "$(DEFAULT) and (ray or e2e)"

# The long form of the fault tests: killed processes, failing stores and concurrent publishers.
faults: install
	LORASEG_FAULTS=full bash .ci/durable_tests.sh -m faults tests/integration/faults

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

bench: install
	$(BIN)/python -m tests.bench all
