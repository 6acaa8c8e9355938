# Everything runs in the checkout's own .venv; `make install` makes it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test newest lowest lint bench pictures

install:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e ".[test]"

demo:
	$(BIN)/oki-trace demo

test:
	$(BIN)/python -m pytest

# The suite but for the pages, in an environment of its own: on another Python
# (make newest PYTHON=python3.13), or with the lowest versions that pyproject.toml allows
# (make lowest PYTHON=python3.11), where an old library's warnings are no errors.
newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install -c constraints.txt -e ".[test]"
	.venv-newest/bin/python -m pytest --ignore tests/dashboard

lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install -c constraints-minimum.txt -e ".[test]"
	.venv-lowest/bin/python -m pytest -W default --ignore tests/dashboard

lint:
	$(BIN)/codespell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench:
	$(BIN)/oki-trace bench

pictures:
	$(BIN)/python -m tests.dashboard.screenshots
