# make quickstart and make test each work on a fresh clone with python3, pip and make.
PYTHON ?= python3
BIN := .venv/bin
USUAL := not gpu and not slow and not bench

.PHONY: install quickstart test faults lint bench

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

quickstart: install
	$(BIN)/python -m jobs.quickstart

# What starts Ray or a browser comes last and alone: it keeps all cores busy by itself.
test: install
	$(BIN)/python -m pytest -rs -n auto --maxprocesses 4 -m "$(USUAL) and not ray and not e2e"
	$(BIN)/python -m pytest -rs -m "$(USUAL) and (ray or e2e)"

# Kills, failing stores and crowds of publishers on a real S3 server, at full length.
faults: install
	LORASEG_FAULTS=full bash .ci/durable_tests.sh -m faults tests/integration/faults

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

bench: install
	$(BIN)/python -m tests.bench all
