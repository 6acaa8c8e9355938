"""The SQL page without a browser, on any store."""

from __future__ import annotations

from typing import Any

import pytest

from dashboard.viewdata import sql_table
from oki_trace.analysis.tables import FUNCTIONS, TABLES
from tests.dashboard import app_pages, sample_stores
from tests.dashboard.query_pages import address, charts, page, sql


def test_sql_begins_with_an_answer(filled: sample_stores.Samples) -> None:
    app = sql()
    assert not app.exception
    assert app.text_area(key="sql-text").value == next(iter(sql_table.EXAMPLES.values()))
    assert list(app.dataframe[0].value.columns) == ["token", "times", "prob"]
    assert "sql" not in app.query_params
    headings = [one.label for one in app.expander]
    assert headings == [f"**{one.name}**" for one in (*TABLES, *FUNCTIONS)]


@pytest.mark.parametrize("example", sql_table.EXAMPLES)
def test_every_example_has_an_answer_and_a_chart(
    filled: sample_stores.Samples, example: str
) -> None:
    app = sql()
    app.selectbox(key="sql-example").set_value(example).run()
    assert not app.exception and not app.error
    assert app.text_area(key="sql-text").value == sql_table.EXAMPLES[example]
    first = next(iter(sql_table.EXAMPLES.values()))
    assert address(app).get("sql", first) == sql_table.EXAMPLES[example]
    # What was drawn with a seed is in none of the samples.
    if "greedy_id" not in sql_table.EXAMPLES[example]:
        app.button_group(key="sql-show").set_value("chart").run()
        assert not app.exception
        assert charts(app) == 1


def test_a_link_runs_its_question(filled: sample_stores.Samples) -> None:
    app = sql(sql="SELECT 6 * 7 AS x, 'a' AS x")
    assert not app.exception
    assert list(app.dataframe[0].value.columns) == ["x", "x_2"]
    app.text_area(key="sql-text").set_value("SELECT 1 AS one").run()
    assert address(app) == {"sql": "SELECT 1 AS one"}
    assert list(app.dataframe[0].value.columns) == ["one"]
    app.text_area(key="sql-text").set_value("").run()
    assert not app.exception
    assert not app.dataframe and not app.error
    assert app.text_area(key="sql-text").value == ""


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("SELEC 1", "cannot be parsed"),
        ("SELECT nope FROM step", "cannot be answered"),
        ("DELETE FROM step", "one SELECT statement"),
        ("SELECT * FROM '/etc/passwd'", "is not allowed"),
        ("SELECT sum(a.i * b.i) FROM range(10000000) a(i), range(10000000) b(i)", "than 1 s"),
    ],
)
def test_what_cannot_be_answered_is_told_in_a_line(
    filled: sample_stores.Samples, text: str, told: str
) -> None:
    app = sql()
    app.number_input(key="sql-seconds").set_value(1)
    app.text_area(key="sql-text").set_value(text).run()
    assert not app.exception
    (error,) = app.error
    assert told in app_pages.plainly(error.value)
    assert "\n" not in error.value
    assert not app.dataframe


def test_sql_from_a_link_waits_for_a_click(
    filled: sample_stores.Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dashboard import data

    ran: list[str] = []
    ask = data.run_sql

    def counted(query: str, *limits: Any) -> Any:
        ran.append(query)
        return ask(query, *limits)

    monkeypatch.setattr(data, "run_sql", counted)
    app = page("sql", sql="SELECT 6 * 7 AS answer")
    assert not app.exception and not app.dataframe and not ran
    assert app.text_area(key="sql-text").value == "SELECT 6 * 7 AS answer"
    assert any("came from a link" in text.value for text in app.markdown)
    # Nor by a change of anything else.
    app.number_input(key="sql-rows").set_value(10).run()
    assert not ran
    app.button(key="sql-run-link").click().run()
    assert ran == ["SELECT 6 * 7 AS answer"]
    assert list(app.dataframe[0].value.columns) == ["answer"]
    # Another link in the same window waits again.
    app.query_params["sql"] = "SELECT 1 AS other"
    app.run()
    assert not app.dataframe and len(ran) == 1
    app.button(key="sql-run").click().run()
    assert list(app.dataframe[0].value.columns) == ["other"]


@pytest.mark.parametrize(
    "query", [{"question": "heads"}, {"question": "heads", "sample": 5000, "message": 999_999}]
)
def test_full_tensors_wait_for_a_click_where_a_link_asks(
    filled: sample_stores.Samples, query: dict[str, Any]
) -> None:
    app = page("questions", **query)
    assert not app.exception and not app.dataframe
    assert any("came from a link" in text.value for text in app.markdown)
    app.run()
    assert not app.dataframe
    # Chosen on the page, it is asked at once.
    app.button(key="ask-settle").click().run()
    app.button(key="ask-heads").click().run()
    assert not app.exception
    assert not [button for button in app.button if button.key == "ask-link"]


def test_more_rows_than_the_limit_are_told_of(filled: sample_stores.Samples) -> None:
    app = sql(sql="SELECT * FROM range(5000)")
    assert len(app.dataframe[0].value) == 1000
    assert any("More rows exist" in caption.value for caption in app.caption)
    app.number_input(key="sql-rows").set_value(6000).run()
    assert len(app.dataframe[0].value) == 5000
    assert not any("More rows exist" in caption.value for caption in app.caption)


def test_a_result_without_numbers_has_no_chart(filled: sample_stores.Samples) -> None:
    app = sql(sql="SELECT content FROM message")
    app.button_group(key="sql-show").set_value("chart").run()
    assert not app.exception
    assert any("needs a numeric column" in caption.value for caption in app.caption)
