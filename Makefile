# `make quickstart` and `make test` need Python 3.11 to 3.13 (TensorFlow has wheels for these) and make, nothing else:
# both make .venv themselves, by uv where that is installed.
PYTHON ?= $(or $(firstword $(foreach v,3.13 3.12 3.11,$(shell python$(v) -c "" 2>/dev/null && echo python$(v)))),python3)
UV := $(shell command -v uv)
INSTALL = $(if $(UV),$(UV) pip install --quiet --python .venv,.venv/bin/pip install --quiet --disable-pip-version-check)
DISK_MB := 3200
BIN := .venv/bin
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: quickstart reproduce reproduce-fast test test-slow test-isa bench lint clean

.venv/run.stamp: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
	  echo "error: $(PYTHON) is not Python 3.11 to 3.13; install python3.12, or give another by make PYTHON=" >&2; exit 1; }
	@$(if $(UV),true,$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null) || { \
	  echo "error: $(PYTHON) cannot make a virtual environment; install its venv module (python3-venv)" >&2; exit 1; }
	@test -d .venv || test "$$(df -Pm . | awk 'NR == 2 { print $$4 }')" -ge $(DISK_MB) || { \
	  echo "error: .venv needs $(DISK_MB) MB of disk, which $(CURDIR) does not have" >&2; exit 1; }
	$(if $(UV),$(UV) venv --quiet --allow-existing --python $(PYTHON) .venv,$(PYTHON) -m venv .venv)
	$(INSTALL) -r requirements.txt
	touch $@

.venv/dev.stamp: requirements-dev.txt .venv/run.stamp
	$(INSTALL) -r requirements-dev.txt
	touch $@

# A step's scratch memory in pages of 2 MB: benchmarks/README.md, Step.
quickstart reproduce-fast reproduce bench: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

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
