# `make mini` and `make test` do all the set-up on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
EXPORT ?= egs/mini/exp/mini/export
BIN := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: mini test test-all check lint bench clients docs install clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

mini: install  ## the whole road on the embedded default; ends with the path of the report
	egs/mini/run.sh

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint  ## ruff, mypy, and the tests of one process without the road
	$(BIN)/pytest -n 2 --dist loadfile --ignore=tests/test_road.py

test: lint  ## what CI runs: check, and the mini road in a shortened form
	$(BIN)/pytest -n 2 --dist loadfile

test-all: lint  ## everything, slow tests too
	$(BIN)/pytest -n 2 --dist loadfile -m "not gpu"

bench: install  ## speed against the references, side by side
	for tool in tools/bench_*.py; do $(BIN)/python $$tool; done

clients: install  ## EXPORT under HEAR, X-ARES and S3PRL on small tasks
	$(BIN)/python tools/clients/run.py $(EXPORT) egs/mini/data/corpus/sounds

docs: install  ## the site, in build/site; warnings are errors
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf egs/*/data egs/*/exp .pytest_cache .mypy_cache .ruff_cache
