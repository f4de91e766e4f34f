PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 7860
SERVE_PORT ?= 8000
SHOTS ?= $(or $(TMPDIR),/tmp)/shira-screenshots
# pip compiles what it has installed on one core, compileall on all, without a third that is hardly imported
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt
COMPILE := $(BIN)/python -m compileall -qq -j 0 -x '/(tests|transformers/models|_inductor|rllib)/' $(VENV)/lib \
	|| true # some packages hold templates of Python

.DEFAULT_GOAL := help
.PHONY: help app demo serve test nightly check site format lint types bench bench-size bench-toy screenshots soak clean
# Seconds after which a script begins no further case.
BENCHMARKS := overwrite_vs_fuse:60 switch:220 fuse:150 inference:150 per_picture:120 load_many:60 cold_start:60 drift:120

help: ## say what each target does
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

app: $(VENV)/.app ## mix styles in the browser, on the bundled demo model: http://127.0.0.1:7860 (PORT=N for another port)
	$(BIN)/python -m app --port $(PORT)

demo: $(VENV)/.app ## the same without a browser: writes shira-demo.png
	$(BIN)/shira demo

serve: $(VENV)/.serve ## serve pictures over HTTP, on the bundled demo model: http://127.0.0.1:8000 (SERVE_PORT=N for another port)
	mkdir -p build/served && cp -u assets/adapters/*.safetensors build/served/ # uploads and deletions stay out of assets
	$(BIN)/shira serve assets/emoji-diffusion --adapters build/served --port $(SERVE_PORT)

test: $(VENV)/.dev ## run the tests, three files at a time: some wait for a browser
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

nightly: $(VENV)/.dev ## run the tests that are too slow for every change: the benchmarks on toys
	$(BIN)/python -m pytest -m nightly -n 2 --dist loadfile

check: format lint ## format, lint, strict types, docs and tests, as CI runs them
	$(MAKE) --jobs 2 types site test

format: $(VENV)/.dev ## require formatted code (ruff format . formats it)
	$(BIN)/ruff format --check .

lint: $(VENV)/.dev ## require clean code
	$(BIN)/ruff check .

site: $(VENV)/.dev ## build the documentation into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

types: $(VENV)/.dev ## require strict types
	$(BIN)/mypy

bench: $(VENV)/.dev ## measure on this machine's CPU, 15 minutes; writes benchmarks/results/*.json and what is made from them
	$(BIN)/python -m benchmarks.scripts.demo
	for one in $(BENCHMARKS); do \
		$(BIN)/python -m benchmarks.scripts.$${one%:*} --device cpu --budget $${one#*:} || exit 1; done
	$(BIN)/python -m benchmarks.report

bench-size: $(VENV)/.dev ## measure file sizes, 10 minutes; they are the same on every machine
	$(BIN)/python -m benchmarks.scripts.size
	$(BIN)/python -m benchmarks.report

bench-toy: $(VENV)/.dev ## try all benchmarks on tiny models, 3 minutes; leaves the results as they are
	$(BIN)/python -m benchmarks.scripts.size --toy
	for one in $(BENCHMARKS); do \
		$(BIN)/python -m benchmarks.scripts.$${one%:*} --device cpu --toy || exit 1; done

soak: $(VENV)/.dev ## 100,000 random operations, 50,000 mutated files, errors at any tensor operation; 30 minutes of one quiet core
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak --operations 100000 --files 50000 -o benchmarks/results/soak.json

screenshots: $(VENV)/.dev ## draw the app's pictures in docs/ anew, in a run of the browser tests
	SCREENSHOTS=$(SHOTS) $(BIN)/python -m pytest tests/app/page/test_screenshots.py
	cp $(SHOTS)/app.png $(SHOTS)/app-dark.png $(SHOTS)/app-phone.png docs/

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, $$($(PYTHON) --version) found: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.app: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[app]'
	$(COMPILE)
	@touch $@

$(VENV)/.serve: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[serve]'
	$(COMPILE)
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[dev]'
	$(COMPILE)
	@touch $@ $(VENV)/.app $(VENV)/.serve
