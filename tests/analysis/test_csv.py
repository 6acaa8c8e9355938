"""What a model writes is no formula in a spreadsheet, and no command to a terminal."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from oki_trace.analysis import results

SHARED = Path(__file__).resolve().parents[2] / "dashboard" / "components" / "shared.js"


@pytest.mark.parametrize(
    "text",
    [
        "=1+1",
        "@SUM(A1)",
        "+cmd|' /C calc'!A0",
        "-2+3",
        "\t=1",
        "\r\n=1",
        " =1",
        '=HYPERLINK("http://x/?"&A1)',
        "＝1+1",
    ],
)
def test_no_text_is_a_formula(text: str) -> None:
    assert results.for_a_spreadsheet(text) == "'" + text


@pytest.mark.parametrize(
    "value", ["-", " =", "\n\n", "a=1", " Paris", "", "'x", -1.5, 3, None, b"="]
)
def test_all_else_is_as_it_was(value: object) -> None:
    assert results.for_a_spreadsheet(value) is value


@given(st.lists(st.one_of(st.text(), st.floats(), st.none()), min_size=1, max_size=4))
@example(["\r"])
@example(["\n", "\r\n", 'a"b,c'])
def test_a_row_reads_back_but_for_the_apostrophes(row: list[object]) -> None:
    names = ["=name"] * len(row)
    file = io.StringIO(newline="")
    results.write_csv(names, [row], file)
    header, *found = csv.reader(io.StringIO(file.getvalue(), newline=""))
    assert header == ["'=name"] * len(row)
    expected = [results.for_a_spreadsheet(results.plain(value)) for value in row]
    assert found == [["" if value is None else str(value) for value in expected]]


def test_the_browser_guards_the_same_texts() -> None:
    assert f"/^{results._FORMULA.pattern}/s.test(value)" in SHARED.read_text(encoding="utf-8")
