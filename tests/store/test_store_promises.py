"""The page of promises names tests that are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "promises.md"
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE.read_text(encoding="utf-8"))


def named_in(file: Path) -> set[str]:
    """The names of the tests in a file, and of the classes they are in."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name.lower().startswith("test")
    }


@pytest.mark.parametrize(("file", "name"), NAMED, ids="::".join)
def test_each_promise_has_its_test(file: str, name: str) -> None:
    assert name in named_in(ROOT / file)


def test_every_part_of_the_page_names_one() -> None:
    parts = PAGE.read_text(encoding="utf-8").split("\n## ")[1:]
    assert len(parts) > 8
    assert [part.partition("\n")[0] for part in parts if "\n- `tests/" not in part] == []


def test_the_readme_and_the_store_s_page_lead_there() -> None:
    for page, link in (("README.md", "(docs/promises.md)"), ("docs/store.md", "(promises.md)")):
        assert link in (ROOT / page).read_text(encoding="utf-8")
