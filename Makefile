# make demo    set up, compile a Hugging Face MoE decoder, print report, errors and times
# make test    set up, run the tests            make test ARGS="-k mixtral -x"
# make check   format, lint, types, then tests
# make zoo     every MoE family of transformers; continues where it stopped, ends by writing docs/zoo.md. ARGS=--help says more
# make fmt FILES="passes/roll.py"    format and fix these files; name yours where others work in the same checkout
#
# The environment lives in .venv and is made once; it is refreshed when pyproject.toml or constraints.txt change.

SHELL  := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
ARGS   ?=
FILES  ?=

PY    := $(VENV)/bin/python
PIP   := $(PY) -m pip install --disable-pip-version-check --no-input -c constraints.txt
READY := $(VENV)/.ready

.PHONY: setup demo zoo test check lint fmt clean
.DEFAULT_GOAL := test

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "moec needs Python 3.10 or newer; none found. Say make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "== environment in $(VENV), from $(PYTHON)"
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "== torch first, so that nothing else chooses its version"
	$(PIP) setuptools wheel torch
	@echo "== moec and what its tests need"
	$(PIP) --no-build-isolation -e '.[dev,hf,scaling]'
	@touch $@

demo: $(READY)
	$(PY) -u examples/demo.py $(ARGS)

zoo: $(READY)
	$(PY) -u -m benchmarks.zoo $(ARGS)

test: $(READY)
	$(PY) -u -m pytest $(ARGS)

lint: $(READY)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

check: lint test

fmt: $(READY)
	@test -n "$(FILES)" || { echo 'say which files: make fmt FILES="passes/roll.py tests" (or FILES=. for all)' >&2; exit 1; }
	$(PY) -m ruff format $(FILES)
	$(PY) -m ruff check --fix $(FILES)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
