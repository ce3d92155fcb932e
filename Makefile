# `make quickstart` and `make test` need Python 3.11+ and make, nothing else: both make .venv themselves.
PYTHON ?= python3
BIN := .venv/bin
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: quickstart reproduce reproduce-fast test test-slow bench lint clean

.venv/run.stamp: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev.stamp: requirements-dev.txt .venv/run.stamp
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

quickstart: .venv/run.stamp
	$(BIN)/python quickstart.py --workdir runs/quickstart

reproduce-fast: .venv/run.stamp
	$(BIN)/python -m reproduce --fast --workdir runs/reproduce-fast --out runs/reproduce-fast/results

reproduce: .venv/run.stamp
	$(BIN)/python -m reproduce

# Some two hours on 2 cores. The trained networks are those of the README's digits commands, and Fashion-MNIST's first
# order of `make reproduce`; its data set is to be at hand (docs/data.md).
bench: .venv/run.stamp runs/bench/digits_ve.stamp runs/bench/digits_vp.stamp runs/bench/fashion_ve.stamp
	$(BIN)/python -m benchmarks.likelihood --workdir runs/bench/digits_ve --config configs/digits/ve_ncsnpp.py
	$(BIN)/python -m benchmarks.likelihood --workdir runs/bench/digits_vp --config configs/digits/vp_ddpmpp.py
	$(BIN)/python -m benchmarks.likelihood --workdir runs/bench/fashion_ve --config configs/reproduce/fashion_ve.py \
		--batch 8 --repeats 1
	$(BIN)/python -m benchmarks.likelihood --batch 4 --repeats 1 --no-reference --steps 896
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.step --flags
	$(BIN)/python -m benchmarks.step --jitted 4
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.input
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.precision --workdir runs/bench/digits_ve --config configs/digits/ve_ncsnpp.py
	$(BIN)/python -m benchmarks.growth --out benchmarks/growth.png
	$(BIN)/python -m benchmarks.unrolled_steps

runs/bench/digits_ve.stamp: .venv/run.stamp
	$(BIN)/python main.py --config configs/digits/ve_ncsnpp.py --workdir $(basename $@) --mode train
	touch $@

runs/bench/digits_vp.stamp: .venv/run.stamp
	$(BIN)/python main.py --config configs/digits/vp_ddpmpp.py --workdir $(basename $@) --mode train
	touch $@

runs/bench/fashion_ve.stamp: .venv/run.stamp
	$(BIN)/python main.py --config configs/reproduce/fashion_ve.py --workdir $(basename $@) --mode train
	touch $@

test: .venv/dev.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-slow: .venv/dev.stamp
	$(BIN)/python -m pytest -m slow

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf .venv runs .jax_cache
