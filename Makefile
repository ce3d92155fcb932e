# `make quickstart` and `make test` need Python 3.11+ and make, nothing else: both make .venv themselves.
PYTHON ?= python3
BIN := .venv/bin
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: quickstart reproduce reproduce-fast test test-slow test-isa bench lint clean

.venv/run.stamp: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev.stamp: requirements-dev.txt .venv/run.stamp
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

quickstart: .venv/run.stamp
	$(BIN)/python -m reproduce.quickstart --workdir runs/quickstart

reproduce-fast: .venv/run.stamp
	$(BIN)/python -m reproduce --fast --workdir runs/reproduce-fast --out runs/reproduce-fast/results

reproduce: .venv/run.stamp
	$(BIN)/python -m reproduce

bench: .venv/run.stamp
	$(BIN)/python -m benchmarks

test: .venv/dev.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

# Two files at a time. A file that has passed is run again only after a change of the code or of a test.
SOURCES := $(wildcard *.py */*.py */*/*.py)
SLOW := $(patsubst tests/%.py,runs/slow/%.passed,$(shell grep -l 'mark\.slow' tests/test_*.py))

test-slow: .venv/dev.stamp
	@$(MAKE) --no-print-directory -j 2 -k $(SLOW)

runs/slow/%.passed: tests/%.py $(SOURCES)
	@mkdir -p runs/slow
	@$(BIN)/python -m pytest -m slow --durations=10 $< > runs/slow/$*.log 2>&1 || { cat runs/slow/$*.log; false; }
	@echo "$*: $$(tail -n 1 runs/slow/$*.log)"
	@touch $@

test-isa: .venv/dev.stamp
	PYTHON=$(BIN)/python tests/isa.sh

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf .venv runs .jax_cache
