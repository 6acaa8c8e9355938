"""The page about the store says what the store is."""

from __future__ import annotations

import re
from pathlib import Path

from scripts import store_schema

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "store.md"


def test_the_tables_are_those_of_the_models() -> None:
    text = PAGE.read_text(encoding="utf-8")
    told = text.partition(store_schema.BEGIN)[2].partition(store_schema.END)[0]
    assert told.strip() == store_schema.schema().strip(), "run: python scripts/store_schema.py"


def test_every_promise_names_a_test_that_is_there() -> None:
    named = set(re.findall(r"`(test_\w+\.py)`", PAGE.read_text(encoding="utf-8")))
    assert len(named) > 8
    assert all((ROOT / "tests" / "store" / name).is_file() for name in named)


def test_the_readme_leads_there() -> None:
    assert "(docs/store.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
