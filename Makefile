PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
TESTS := $(wildcard tests/docs tests/unit tests/cluster tests/gpu tests/recipes/test_unequal_workers.py tests/recipes)
LOCK   := $(if $(shell command -v flock),flock .cache/venv.lock)
TORCH  := $(shell sed -n 's/^ *"\(torch[<>=].*\)",$$/\1/p' pyproject.toml)

export OMP_NUM_THREADS ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0
export HF_HUB_DISABLE_TELEMETRY ?= 1
unit test suites slow faults fuzz demo bench gpu: export HF_HUB_OFFLINE ?= 1

.PHONY: venv help demo unit test suites slow faults fuzz lint types bench gpu web-shots cuda-proofs audit dist clean

venv: $(STAMP)  ## install smolray and its tools into .venv (the default)

help:  ## list the targets
	@awk -F ':.*##' '/^[a-z-]+:.*##/ {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Installed again only when the requirements changed. The lock lets two makes start at once; the stamp comes last, so
# a broken install is repeated. Torch first and by its range: a CPU build that an index offers is taken, a GPU machine
# gets CUDA.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "smolray needs Python 3.11 or newer, found " + sys.version)'
	@mkdir -p .cache
	@$(LOCK) sh -euc '\
	  if [ -n "$$(find $@ -newer pyproject.toml -newer constraints.txt 2>/dev/null)" ]; then exit 0; fi; \
	  [ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV); \
	  $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt "$(TORCH)"; \
	  $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e ".[demo,dev]"; \
	  touch $@'

demo: venv  ## the whole flow on a real data set: prepare, train, evaluate, export
	$(BIN)/python -m jobs.demo

unit: venv  ## the fast loop: unit tests that load no model, two at a time
	$(BIN)/python -m pytest -m "not slow and not faults and not seconds" -n 2 --dist worksteal tests/unit $(ARGS)

# What mypy found stands above all tests: where something failed, it is told again below them.
test: lint  ## lint, types and the tests that take seconds
	+$(MAKE) --no-print-directory -j 2 types suites || { $(MAKE) --no-print-directory types; exit 1; }

# Two files at a time, in the order of TESTS, which ends with short ones: both processes end together.
suites: venv
	$(BIN)/python -m pytest -m "not slow and not faults" -n 2 --dist loadfile --no-loadscope-reorder $(TESTS) $(ARGS)

slow: venv  ## the tests that take minutes
	$(BIN)/python -m pytest -m "slow and not faults" $(ARGS)

faults: venv  ## the tests that kill processes and nodes (root)
	$(BIN)/python -m pytest -m faults $(ARGS)

fuzz: venv  ## 2,000 damaged sources, and damaged checkpoints and settings
	$(BIN)/python -m pytest -m fuzz -n 2 tests/fuzz $(ARGS)

lint: venv  ## style of the code: ruff check and ruff format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: venv  ## mypy
	$(BIN)/mypy --num-workers 2

bench: venv  ## the benchmarks of jobs/README.md
	$(BIN)/python jobs/benchmark.py $(ARGS)

gpu: venv  ## check this machine's GPU: gpu.json, and gpu.html to attach to a report
	$(BIN)/python -m jobs.gpu $(ARGS)

web-shots: venv  ## screenshots of the pages of `smolray web`, in .cache/web-shots (needs chromium)
	$(BIN)/python -m tests.web_shots $(ARGS)

# Attention compiled for cards that are not here, with the CUDA build of torch: it needs no GPU, but 5 GB of disk, in a
# folder of its own that goes before the environment's packages. What is missing is told, and the tests are skipped.
SMOLRAY_CUDA_TORCH ?= $(CURDIR)/.cache/cuda-torch
cuda-proofs: venv  ## what a GPU would compile, without one: downloads the CUDA build of torch (2 GB) once
	$(BIN)/python -m tests.proofs.install $(SMOLRAY_CUDA_TORCH)
	SMOLRAY_CUDA_TORCH=$(SMOLRAY_CUDA_TORCH) $(BIN)/python -m pytest -m "not slow" -rPs -n 2 tests/proofs $(ARGS)

# A package without an answer fails the audit: a mirror without advisories audits nothing.
audit: venv  ## known faults of the pinned packages (asks pypi.org)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt pip-audit
	$(BIN)/pip-audit -r constraints.txt --no-deps --disable-pip --strict

# The environment is empty but for the wheel and what it asks for, and the commands run outside of the checkout.
dist: venv  ## build the wheel and the sdist, check both, and try the wheel in an empty environment
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt build twine
	rm -rf dist .cache/dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m venv .cache/dist
	.cache/dist/bin/python -m pip install --disable-pip-version-check --quiet -c constraints.txt dist/*.whl
	cd .cache/dist && bin/smolray --version && bin/smolray config list && bin/smolray config show > /dev/null

clean:  ## remove what was installed and cached here
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache *.egg-info build dist
