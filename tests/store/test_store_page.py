"""The page about the store says what the store is."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "store.md"


def test_the_tables_are_those_of_the_models() -> None:
    spec = importlib.util.spec_from_file_location("store_schema", ROOT / "docs/store_schema.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = PAGE.read_text(encoding="utf-8")
    told = text.partition(script.BEGIN)[2].partition(script.END)[0]
    assert told.strip() == script.schema().strip(), "run: python docs/store_schema.py"


def test_every_promise_names_a_test_that_is_there() -> None:
    named = set(re.findall(r"`(test_\w+\.py)`", PAGE.read_text(encoding="utf-8")))
    assert len(named) > 8
    assert all((ROOT / "tests" / "store" / name).is_file() for name in named)


def test_the_readme_leads_there() -> None:
    assert "(docs/store.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
