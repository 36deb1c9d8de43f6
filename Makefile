PY ?= python3
BIN := .venv/bin
# hundreds of processes start: without bytecode each would compile the package
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
.DEFAULT_GOAL := help
.PHONY: help run test test-unit integration_tests test-long check lint fix format reference test-install pictures docs bench bench-quick bench-peers bench-gpu studio clean

help:
	@echo 'make run | test | test-unit | integration_tests | test-long | check (lint) | fix (format) | reference | docs | test-install | bench | bench-quick | bench-peers | bench-gpu | studio | clean'
	@echo 'PY=python3.12 chooses the Python of .venv'
.venv/pyvenv.cfg:
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'needs Python 3.11+; try: make PY=python3.12'; exit 1; }
	@test -L .dev/fanfold || { mkdir -p .dev; rm -f .dev/fanfold; ln -s .. .dev/fanfold; }
	$(PY) -m venv .venv
.venv/.run: pyproject.toml | .venv/pyvenv.cfg
	@echo 'Installing fanfold into .venv (about a minute the first time)'
	$(PIP) -e ".[chem,report]" && touch $@
.venv/.dev: pyproject.toml | .venv/.run
	@echo 'Installing the development tools and all extras into .venv (a few minutes the first time)'
	$(PIP) -e '.[dev]' && touch $@
.venv/.studio: pyproject.toml | .venv/.run
	$(PIP) -e '.[studio]' && touch $@
run: .venv/.run
	$(BIN)/fanfold run quickstart
test: .venv/.dev
	$(PYTEST) -n 3 --dist loadgroup
test-unit: .venv/.dev
	$(PYTEST) -n 3 tests/unit tests/test_architecture.py
integration_tests: .venv/.dev
	$(PYTEST) -n 3 --dist loadgroup tests/integration tests/conformance
test-long: .venv/.dev
	$(PYTEST) -n 2 -m long
check: .venv/.dev
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy
lint: check
fix: .venv/.dev
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
format: fix
reference: .venv/.dev
	$(BIN)/python -m fanfold.tests.documentation.reference
pictures: .venv/.dev
	$(BIN)/python -m fanfold.tests.documentation.pictures
docs: .venv/.dev
	$(BIN)/python -m fanfold.tests.documentation.site
	$(BIN)/zensical build --strict --clean
test-install:
	$(PY) tests/packaging/install.py $(ARGS)
bench: .venv/.dev
	$(BIN)/python -m fanfold.tests.benchmarks.suite
bench-quick: .venv/.dev
	$(BIN)/python -m fanfold.tests.benchmarks.suite --quick
bench-peers: .venv/.dev
	$(BIN)/python -m fanfold.tests.benchmarks.peers
bench-gpu: .venv/.run
	$(BIN)/python -m fanfold.tests.benchmarks.gpu $(ARGS)
studio: .venv/.studio
	LANGGRAPH_CLI_NO_ANALYTICS=1 LANGGRAPH_NO_VERSION_CHECK=true $(BIN)/langgraph dev --n-jobs-per-worker 4
clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache
