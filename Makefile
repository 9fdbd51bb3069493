# make repro: set up and run the pipeline · make test: set up and run the tests · make help: all targets
.DEFAULT_GOAL := help
.PHONY: help setup repro check test test-slow bench docs gpu lint clean-cache

PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin
# A machine that offers a CPU build of torch to pip offers it to uv too.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
export UV_COMPILE_BYTECODE = 1
export DVC_NO_ANALYTICS = 1
# Stages call plain `python`: the environment's, also inside queued experiments.
export PATH := $(BIN):$(PATH)
unexport PYTHONDONTWRITEBYTECODE

help:
	@echo "make setup      the environment in .venv"
	@echo "make repro      run the pipeline: report/, METRICS.md, metrics/, images/   [PRESET=pythia-70m]"
	@echo "make check      format, lint, types, import contracts, dependencies of stages, links (seconds)"
	@echo "make test       the tests (minutes)"
	@echo "make test-slow  slow tests too (tens of minutes): fixtures from SAE Bench made afresh"
	@echo "make bench      speed against other libraries, as ratios (twenty minutes; trains SAEs first where there are none)"
	@echo "make docs       the documentation as a site, site/index.html"
	@echo "make gpu        on one GPU: the tests marked gpu, speed and memory; writes docs/gpu/record.json and docs/gpu.md"
	@echo "make clean-cache  remove .cache: costs time, never correctness"

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; sys.exit(f"error: Python 3.11 or 3.12 is needed, $(PYTHON) is {v[0]}.{v[1]}: make setup PYTHON=python3.11" if v[:2] not in ((3, 11), (3, 12)) else 0)'
	@echo "setup: the environment in .venv, 4 GB with torch (CPU build), a minute or more by the connection"
	@test -x "$(BIN)/python" || "$(PYTHON)" -m venv .venv
	@test -x "$(BIN)/uv" || "$(BIN)/python" -m pip install --quiet uv
	@"$(BIN)/uv" pip install --python "$(BIN)/python" --quiet -c constraints.txt -e '.[dev]'
	@touch $@
	@echo "setup: done. Next: make repro (the pipeline), or source .venv/bin/activate and sae-research --help"

repro: setup
	@python -m sae_research repro --preset "$(PRESET)"

check: setup
	@ruff format --check .
	@ruff check .
	@ty check
	@lint-imports --no-logo
	@python -m sae_research.cli.dependencies --check
	@python -m pytest -q tests/docs

test: setup
	@OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test-slow: setup
	@OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "slow or not slow" --timeout 1800

bench: setup
	@python -m benchmarks

docs: setup
	@NO_MKDOCS_2_WARNING=1 mkdocs build --quiet && echo "open site/index.html"

gpu: setup
	@python -m benchmarks.gpu

lint: check

clean-cache:
	rm -rf .cache
