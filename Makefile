PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 7860
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help app demo test check format lint types bench clean

help: ## say what each target does
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

app: $(VENV)/.app ## mix styles in the browser, on the bundled demo model: http://127.0.0.1:7860 (PORT=N for another port)
	$(BIN)/python -m app --port $(PORT)

demo: $(VENV)/.app ## the same without a browser: writes shira-demo.png
	$(BIN)/shira demo

test: $(VENV)/.dev ## run the tests
	$(BIN)/python -m pytest

check: format lint types test ## format, lint, strict types and tests, as CI runs them

format: $(VENV)/.dev ## require formatted code (ruff format . formats it)
	$(BIN)/ruff format --check .

lint: $(VENV)/.dev ## require clean code
	$(BIN)/ruff check .

types: $(VENV)/.dev ## require strict types
	$(BIN)/mypy

bench: $(VENV)/.dev ## measure on this machine's CPU; writes benchmarks/results/*.json, docs/benchmarks.md
	$(BIN)/python -m benchmarks.demo
	$(BIN)/python -m benchmarks.size
	for name in overwrite_vs_fuse switch fuse inference load_many drift; do \
		$(BIN)/python -m benchmarks.$$name --device cpu || exit 1; done
	$(BIN)/python -m benchmarks.report

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, $$($(PYTHON) --version) found: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.app: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[app]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.app
