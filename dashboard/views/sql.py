"""SQL: somebody's own question over the whole store, read-only, with the tables beside it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import streamlit as st

from dashboard import boundary, components, data
from dashboard.viewdata import replies, sql_table
from dashboard.views import cache_progress
from oki_trace.errors import OkiTraceError

ROWS, MOST_ROWS = 1_000, 100_000
SECONDS, MOST_SECONDS = 10, 120
TABLE_HEIGHT = 460

# What the editor holds, and what the address holds of it.
TEXT, SEEN = "sql-text", "sql-seen"
RESULT = "sql-result"
# The text that somebody here wrote, chose or ran; that of a link waits for a click.
ALLOWED = "sql-allowed"


@dataclass(frozen=True)
class Asked:
    """The text of a question and its limits."""

    text: str
    rows: int
    seconds: float


@dataclass(frozen=True)
class Result:
    """What came of it: a table, an Arrow one, or the one line that says why not."""

    asked: Asked
    table: Any = None
    cut: bool = False
    took_s: float = 0.0
    error: str = ""


@boundary.page
def page() -> None:
    """Draw the page."""
    st.title("SQL")
    st.write(
        "One SELECT statement, in [DuckDB's SQL](https://duckdb.org/docs/stable/sql/introduction), "
        "over all that the store holds. It can change nothing, and read nothing but these tables "
        "and, by these functions, the kept tensors."
    )
    if not cache_progress.ready():
        return
    with st.container(key="sql-sides"):
        left, right = st.columns([8, 4], gap="medium")
    with right, st.container(key="sql-tables", gap="xsmall"):
        _tables()
    with left:
        asked, pressed = _editor()
        result: Result | None = st.session_state.get(RESULT)
        if pressed:
            allow(asked.text)
        if asked.text and asked.text != st.session_state.get(ALLOWED):
            _unasked()
            return
        if asked.text and (pressed or result is None or result.asked != asked):
            with st.spinner("Asking…"):
                result = _ask(asked, st.empty())
            st.session_state[RESULT] = result
        if result is not None and asked.text:
            _result(result)


def allow(text: str) -> None:
    """Let this text run without another click: it was written or chosen here."""
    st.session_state[ALLOWED] = text.strip()


def _unasked() -> None:
    with st.container(border=True, key="sql-unasked"):
        st.markdown("This query came with the link. It can change nothing, but it may take long.")
        st.button(
            "Run it",
            icon=":material/play_arrow:",
            key="sql-run-link",
            on_click=lambda: allow(st.session_state[TEXT]),
        )


def _tables() -> None:
    st.markdown("#### Tables")
    for table in data.tables():
        with st.expander(f"**{table.name}**", expanded=table.name == "step"):
            st.caption(f"A row is {table.meaning}.")
            st.markdown(sql_table.column_list(table))
    st.markdown("#### Functions")
    for function in data.functions():
        with st.expander(f"**{function.name}**"):
            st.caption(f"{function.meaning[:1].upper()}{function.meaning[1:]}.")
            st.code(f"{function.name}({', '.join(function.parameters)})", language="sql")
            st.caption(f"Returns `{function.returns}`; NULL where there is nothing to read.")


def _editor() -> tuple[Asked, bool]:
    # Without one, what was there before the page was left, or something to begin with.
    first = next(iter(sql_table.EXAMPLES.values()))
    if SEEN not in st.session_state and not st.query_params.get("sql"):
        allow(first)
    address = st.query_params.get("sql") or st.session_state.get(SEEN, first)
    if TEXT not in st.session_state or st.session_state.get(SEEN) != address:
        st.session_state[TEXT] = address
    with st.container(key="sql-editor"):
        st.selectbox(
            "Example",
            list(sql_table.EXAMPLES),
            index=None,
            key="sql-example",
            placeholder="Start from an example",
            label_visibility="collapsed",
            on_change=_take_example,
        )
        text = st.text_area(
            "Your question",
            key=TEXT,
            height=190,
            on_change=lambda: allow(st.session_state[TEXT]),
            placeholder="SELECT token, prob FROM step ORDER BY prob LIMIT 10",
            label_visibility="collapsed",
        )
    with st.container(horizontal=True, vertical_alignment="bottom", key="sql-limits"):
        rows = st.number_input("Rows at most", 1, MOST_ROWS, ROWS, 100, key="sql-rows", width=140)
        seconds = st.number_input(
            "Seconds at most", 1, MOST_SECONDS, SECONDS, key="sql-seconds", width=140
        )
        pressed = st.button(
            "Run",
            type="primary",
            icon=":material/play_arrow:",
            key="sql-run",
            help="Or Ctrl + Enter in the text",
        )
    if text != address:
        st.query_params.from_dict({"sql": text} if text else {})
    st.session_state[SEEN] = text
    return Asked(text.strip(), rows, float(seconds)), pressed


def _take_example() -> None:
    chosen = st.session_state["sql-example"]
    if chosen is not None:
        st.session_state[TEXT] = sql_table.EXAMPLES[chosen]
        allow(st.session_state[TEXT])


def _ask(asked: Asked, place: Any) -> Result:
    began = time.perf_counter()

    def tick() -> None:
        """Draw something now and then: that is when Streamlit ends a page that was left."""
        place.caption(f"{time.perf_counter() - began:.0f} s")

    try:
        found = data.sql(asked.text, asked.rows, asked.seconds, tick)
    except OkiTraceError as error:
        return Result(asked, error=str(error))
    finally:
        place.empty()
    return Result(asked, found.table, found.cut, time.perf_counter() - began)


def _result(result: Result) -> None:
    if result.error:
        st.error(replies.sentence(result.error), icon=":material/error:")
        return
    table = result.table
    with st.container(horizontal=True, vertical_alignment="center", key="sql-result-head"):
        show = st.segmented_control(
            "Show",
            ("table", "chart"),
            default="table",
            required=True,
            key="sql-show",
            label_visibility="collapsed",
        )
        count = "1 row" if table.num_rows == 1 else f"{table.num_rows:,} rows"
        more = ", and there are more: raise the limit to see them" if result.cut else ""
        st.caption(f"{count} in {_time(result.took_s)}{more}.", width="stretch")
        for name, make, mime in (
            ("CSV", sql_table.as_csv, "text/csv"),
            ("JSON", sql_table.as_json, "application/json"),
            ("Parquet", sql_table.as_parquet, "application/vnd.apache.parquet"),
        ):
            st.download_button(
                name,
                partial(make, table),
                f"answer.{name.lower()}",
                mime,
                key=f"sql-{name.lower()}",
                icon=":material/download:",
                on_click="ignore",
            )
    found = sql_table.frame(table)
    if show == "chart":
        _chart(found)
    elif found.empty and not len(found.columns):
        st.caption("The answer has no columns.")
    else:
        height: Any = "content" if len(found) <= 12 else TABLE_HEIGHT
        st.dataframe(found, hide_index=True, height=height, key="sql-table")


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _chart(found: Any) -> None:
    upwards = sql_table.numeric(found)
    columns = list(found.columns)
    if not upwards or found.empty:
        st.caption("A chart needs a column of numbers.")
        return
    with st.container(horizontal=True, vertical_alignment="bottom", key="sql-chart-head"):
        # By the columns there are: another question's may not have those chosen.
        mark = hash(tuple(columns))
        x = st.selectbox("x", columns, key=f"sql-x-{mark}", width=170)
        usual = next((i for i, name in enumerate(upwards) if name != x), 0)
        y = st.selectbox("y", upwards, index=usual, key=f"sql-y-{mark}", width=170)
        colour = st.selectbox(
            "Colour", columns, index=None, key=f"sql-colour-{mark}", placeholder="none", width=170
        )
        kind = sql_table.kind_for(found, x)
        drawn = st.segmented_control(
            "As",
            sql_table.CHARTS,
            default=kind,
            required=True,
            key=f"sql-as-{mark}-{x}",
        )
        components.picture(
            data={"within": "st-key-sql-chart", "name": "answer"}, key="save-sql", width=100
        )
    with st.container(key="sql-chart"):
        st.altair_chart(sql_table.chart(found, x, y, colour, drawn), key="sql-drawn")
    if len(found) > sql_table.MOST_MARKS:
        st.caption(f"The first {sql_table.MOST_MARKS:,} rows are drawn.")
