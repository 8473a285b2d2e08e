# `make demo`, `make test`, and `make parity`, which prints the errors beside scGPT. All create the virtual environment if it is absent.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test parity lint audit constraints clean

demo: $(VENV)/.installed
	$(BIN)/scfm demo --out demo

# Two processes of one thread each: most tests gain nothing from a second thread. A process that dies ends the run, and
# so does a test that neither ends nor hears the signal of its time limit, with all its stacks: xdist would wait forever.
test: $(VENV)/.installed-dev lint $(VENV)/peers
	OMP_NUM_THREADS=1 SCFM_SCGPT="$(abspath $(VENV))/peers/scgpt" $(BIN)/python -m pytest -n 2 --dist loadfile \
		--max-worker-restart 0 -o faulthandler_timeout=400 -o faulthandler_exit_on_timeout=true

parity: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q tests/golden --parity

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy scfm

# Known vulnerabilities of the pinned packages; passes, and says so, where PyPI's advisories cannot be reached
audit:
	$(PYTHON) scripts/audit.py

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

# Beside the released scGPT exports are tested; it stays out of the environment, whose packages it would hold back
$(VENV)/peers: | $(BIN)/python
	mkdir -p $@
	$(BIN)/python -m pip install --quiet --no-deps scgpt==0.2.4 --target $@/scgpt || \
		echo "scGPT 0.2.4 could not be installed: the tests beside it will be skipped"

# Resolves the newest versions in a fresh environment and pins what came out
constraints:
	$(PYTHON) -m venv .venv-constraints
	.venv-constraints/bin/python -m pip install --quiet torch==2.13.0
	.venv-constraints/bin/python -m pip install --quiet '.[dev]'
	echo "# What 'make demo' and 'make test' install, pinned. Renew with: make constraints" > constraints.txt
	.venv-constraints/bin/python -m pip freeze --exclude scfm | sed 's/+cpu//' >> constraints.txt
	rm -rf .venv-constraints

clean:
	rm -rf $(VENV) .venv-audit .pytest_cache .mypy_cache .ruff_cache .hypothesis demo runs
