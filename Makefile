# Two commands do everything on a machine that has Python 3.11 or newer:
#   make quickstart    install into .venv and run the embedded default
#   make test          install into .venv and pass the tests

PYTHON ?= python3
BIN := .venv/bin
# The release that this repository is tested with; the package itself allows a range. Elsewhere
# than on a CPU: make install TORCH="torch==2.13.0 --index-url ..." for the build of your GPU.
TORCH ?= torch==2.13.0
OUT ?= runs/quickstart

.PHONY: help install dev quickstart federation test test-flwr chaos nightly lint types audit format docs bench bench-gpu evidence-small clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

PIP := $(BIN)/pip install --quiet --disable-pip-version-check

install: $(BIN)/.installed ## make .venv and install the package

dev: $(BIN)/.developed ## make .venv and install the package with the tools of development

$(BIN)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(PIP) $(TORCH)
	$(PIP) -e .
	@touch $@

$(BIN)/.developed: $(BIN)/.installed
	$(PIP) -e ".[dev,docs,encoder]"
	@touch $@

quickstart: install ## train mixed-rank clients with three methods: a table, a picture, adapters
	@$(BIN)/prelort compare examples/quickstart.toml --out $(OUT)

federation: install ## run 1 SuperLink and 3 sites on this machine, with TLS and keys, to the end
	@test -e runs/federation || $(BIN)/prelort new runs/federation
	PATH="$(CURDIR)/$(BIN):$$PATH" runs/federation/scripts/demo.sh

test: dev ## run the tests
	$(BIN)/python -m pytest -n auto --maxprocesses 8 -m "not chaos and not nightly"

# The other end of the range of flwr, beside everything else of .venv.
FLWR ?= $(shell $(BIN)/python -c 'from importlib.metadata import version as v; print("1.41.0" if v("flwr").startswith("1.42") else "1.42.0")')

test-flwr: dev ## run the tests that depend on Flower with the other supported version of flwr
	$(PYTHON) -m venv .venv-flwr
	$(BIN)/python -c 'import sysconfig as s; print(s.get_path("purelib"))' \
		> "$$(.venv-flwr/bin/python -c 'import sysconfig as s; print(s.get_path("purelib"))')/base.pth"
	.venv-flwr/bin/pip uninstall --quiet --disable-pip-version-check --yes setuptools
	.venv-flwr/bin/pip install --quiet --disable-pip-version-check "flwr==$(FLWR)"
	.venv-flwr/bin/python -c 'import flwr, importlib.metadata as m; assert m.version("flwr") == "$(FLWR)"'
	PYTHONPATH=$(CURDIR)/src .venv-flwr/bin/python -m pytest tests/federation tests/deployment tests/sites/test_tls.py \
		tests/sites/test_engines.py

chaos: dev ## run the tests in which processes are killed, hang and misbehave, and real sites: minutes
	$(BIN)/python -m pytest -n 2 --maxschedchunk 1 -m chaos tests

nightly: dev ## run the tests of all architectures against plain PEFT
	$(BIN)/python -m pytest -n auto --maxprocesses 8 -m nightly

lint: dev ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: dev ## check types
	$(BIN)/mypy

# An advisory of the database, to see whether it can be reached.
ADVISORY := https://api.osv.dev/v1/vulns/PYSEC-2019-217

audit: dev ## look up known vulnerabilities of what is installed; skipped where the database cannot be reached
	@if $(BIN)/python -c 'from urllib.request import urlopen; urlopen("$(ADVISORY)", timeout=10)' 2> /dev/null; then \
		$(PIP) pip-audit && $(BIN)/pip-audit --vulnerability-service osv --skip-editable; \
	else echo "audit skipped: $(ADVISORY) cannot be reached"; fi

format: dev ## fix style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: dev ## build the documentation into site/
	$(BIN)/zensical build --strict

# Those with a short version; docs/performance.md has the commands of the long ones.
BENCHMARKS := overhead together nested_cost example_gradients memory aggregation floor startup wire secure scale on_paper gpu several_gpus plan_error

bench: install ## a short version of the benchmarks, results in benchmarks/results/short
	@for name in $(BENCHMARKS); do \
		echo "benchmarks/$$name.py --short"; \
		$(BIN)/python benchmarks/$$name.py --short || exit 1; \
	done

bench-gpu: install ## real architectures on GPUs, against plain PEFT and two Trainers; says what it skips
	-$(PIP) -e ".[quantised]" trl
	-$(BIN)/python benchmarks/gpu.py
	-$(BIN)/python benchmarks/plan_error.py --device cuda
	-$(BIN)/python benchmarks/several_gpus.py
	-$(BIN)/python benchmarks/memory.py --device cuda
	-$(BIN)/python benchmarks/nested_cost.py --device cuda

evidence-small: install ## all methods x 3 seeds on the embedded model, as in docs/results: about 13 minutes
	$(BIN)/prelort compare benchmarks/studies/claim-python.toml --out runs/evidence-small --jobs 2

clean: ## remove the environment and build outputs
	rm -rf .venv .venv-flwr site dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
