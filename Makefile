# Everything that a fresh machine needs is made here: a virtual environment, the packages, then the work itself.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: setup demo test lint types clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; assert sys.version_info[:2] == (3, 11), "Shepherd needs Python 3.11: make PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,s3]'
	@touch $@

# Two runs on a local Ray cluster, one of them under fire, and their comparison.
demo: setup
	$(BIN)/python -P -m orchestrator demo --json out/demo.json

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

clean:
	rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
