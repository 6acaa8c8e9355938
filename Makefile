# Everything runs in the checkout's own .venv; `make install` makes it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test lint bench pictures

install:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e ".[test]"

demo:
	$(BIN)/oki-trace demo

test:
	$(BIN)/python -m pytest

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench:
	$(BIN)/oki-trace bench

pictures:
	$(BIN)/python tests/dashboard/pictures.py
