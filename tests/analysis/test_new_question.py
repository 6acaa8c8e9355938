"""The guide's promise: a question is one module and its name in ``QUESTIONS``.

The module below stands for a new file in ``oki_trace/analysis/questions``. Nothing else is
changed, and the command line and the explorer ask it, with an option of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from oki_trace.analysis import questions
from oki_trace.analysis.question import Column, Drawing, Option, Question, View
from oki_trace.cli import main
from oki_trace.store.writing.writer import TraceWriter
from tests.analysis import made

LENGTHS = Question(
    "lengths",
    "Lengths",
    "Long tokens",
    "How many tokens of a reply are long.",
    "A long token is one of at least so many characters.",
    {
        "reply": View(
            """
WITH scope AS ($scope)
SELECT conversation_id AS conversation, message_id AS message, count(*) AS steps,
  avg((length(token) >= $characters)::INT) AS long_share
FROM step JOIN scope USING (message_id) JOIN message ON message.id = message_id
GROUP BY conversation_id, message_id
ORDER BY message
""",
            (
                Column("conversation", "name", "the conversation"),
                Column("message", "name", "the reply"),
                Column("steps", "number", "its steps"),
                Column("long_share", "share", "share of its tokens that are long", label="long"),
            ),
            {"share": Drawing("ranked", ("message",), ("long_share",))},
        ),
    },
    {"characters": Option(4, "Characters", "the least length of a long token")},
)


@pytest.fixture
def db(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A store with two replies of three steps whose token is " the", and the question."""
    monkeypatch.setitem(questions.QUESTIONS, LENGTHS.name, LENGTHS)
    path = str(tmp_path / "store.db")
    monkeypatch.setenv("OKI_TRACE_DB", path)
    with TraceWriter(path) as writer:
        made.whole(writer)
        made.whole(writer)
    yield path
    st.cache_resource.clear()
    st.cache_data.clear()


def ask(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as leaving:
        main(["ask", *arguments])
    assert leaving.value.code in (None, 0)
    return capsys.readouterr().out


def test_the_command_line_asks_a_new_question(db: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "lengths" in ask(capsys)
    assert "█" in ask(capsys, "lengths")
    rows = json.loads(ask(capsys, "lengths", "--json"))["rows"]
    assert [(row["steps"], row["long_share"]) for row in rows] == [(3, 1.0), (3, 1.0)]
    answer = json.loads(ask(capsys, "lengths", "--set", "characters=5", "--json"))
    assert [row["long_share"] for row in answer["rows"]] == [0.0, 0.0]
    assert ">= 5" in answer["sql"]


@pytest.mark.parametrize("pair", ["characters=0", "characters=x", "characters", "top=3"])
def test_an_option_that_is_not_allowed_is_named(
    db: str, capsys: pytest.CaptureFixture[str], pair: str
) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["ask", "lengths", "--set", pair])
    assert leaving.value.code == 2
    assert "its options are characters (a whole number from 1)" in capsys.readouterr().err


def page(**query: Any) -> AppTest:
    def draw() -> None:
        from dashboard.views import questions

        questions.page()

    app = AppTest.from_function(draw, default_timeout=60)
    for key, value in query.items():
        app.query_params[key] = str(value)
    return app.run()


def test_the_explorer_asks_a_new_question(db: str) -> None:
    from dashboard import data

    data.reopen()
    assert data.cache_backlog(60.0) is None
    app = page(question="lengths", characters=5)
    assert not app.exception
    assert app.title[0].value == "Lengths"
    (table,) = app.dataframe
    assert list(table.value["long_share"]) == [0.0, 0.0]
    assert len(app.get("vega_lite_chart")) + len(app.get("arrow_vega_lite_chart")) == 1
    app.number_input(key="ask-characters-lengths").set_value(4).run()
    assert list(app.dataframe[0].value["long_share"]) == [1.0, 1.0]
    assert "characters" not in app.query_params
    app.button(key="ask-settle").click().run()
    app.button(key="ask-lengths").click().run()
    assert not app.exception
    assert app.title[0].value == "Lengths"
    data.reopen()
