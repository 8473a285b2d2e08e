# Two commands: `make demo` and `make test`. Both create the virtual environment if it is absent.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint constraints clean

demo: $(VENV)/.installed
	$(BIN)/scfm demo --out demo

test: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy scfm

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone: its own pin keeps every later step from choosing another build
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# Resolves the newest versions in a fresh environment and pins what came out
constraints:
	$(PYTHON) -m venv .venv-constraints
	.venv-constraints/bin/python -m pip install --quiet torch==2.13.0
	.venv-constraints/bin/python -m pip install --quiet '.[dev]'
	echo "# What 'make demo' and 'make test' install, pinned. Renew with: make constraints" > constraints.txt
	.venv-constraints/bin/python -m pip freeze --exclude scfm | sed 's/+cpu//' >> constraints.txt
	rm -rf .venv-constraints

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis demo runs
