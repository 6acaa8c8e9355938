"""SQL: the user's own queries over the whole store, read-only, next to a list of the tables."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import streamlit as st

from dashboard import boundary, components, data
from dashboard.viewdata import sql_table, wording
from dashboard.views import cache_progress, layout
from oki_trace.analysis.tables import FUNCTIONS, TABLES
from oki_trace.errors import OkiTraceError

ROWS, MOST_ROWS = 1_000, 100_000
SECONDS, MOST_SECONDS = 10, 120
TABLE_HEIGHT = 460

# Session keys: the text of the editor, and the text that the URL had last.
TEXT, SEEN = "sql-text", "sql-seen"
RESULT = "sql-result"
# The text that was written or chosen here, and may run; the text of a link waits for a click.
ALLOWED = "sql-allowed"


@dataclass(frozen=True)
class Query:
    """A query and its limits."""

    text: str
    rows: int
    seconds: float


@dataclass(frozen=True)
class Result:
    """The result of a query: an Arrow table, or an error in one line."""

    query: Query
    table: Any = None
    cut: bool = False
    took_s: float = 0.0
    error: str = ""


@boundary.page
def page() -> None:
    """Draw the page."""
    st.title("SQL")
    st.write(
        "One SELECT statement in [DuckDB's SQL](https://duckdb.org/docs/stable/sql/introduction). "
        "It can read these tables and, through these functions, the full tensors; it cannot "
        "change anything."
    )
    if not cache_progress.ready():
        return
    with st.container(key="sql-sides"):
        left, right = st.columns([8, 4], gap="medium")
    with right, st.container(key="sql-tables", gap="xsmall"):
        _tables()
    with left:
        query, pressed = _editor()
        result: Result | None = st.session_state.get(RESULT)
        if pressed:
            allow(query.text)
        if query.text and query.text != st.session_state.get(ALLOWED):
            note = "It cannot change anything, but may take long."
            text = query.text
            layout.wait_for_click("query", note, "sql-run-link", on_click=lambda: allow(text))
            return
        if query.text and (pressed or result is None or result.query != query):
            with st.spinner("Running the query…"):
                result = _run(query, st.empty())
            st.session_state[RESULT] = result
        if result is not None and query.text:
            _result(result)


def allow(text: str) -> None:
    """Let this text run without another click: it was written or chosen here."""
    st.session_state[ALLOWED] = text.strip()


def _tables() -> None:
    st.markdown("#### Tables")
    for table in TABLES:
        with st.expander(f"**{table.name}**", expanded=table.name == "step"):
            st.caption(f"A row is {table.meaning}.")
            st.markdown(sql_table.columns_as_markdown(table))
    st.markdown("#### Functions")
    for function in FUNCTIONS:
        with st.expander(f"**{function.name}**"):
            st.caption(f"{function.meaning[:1].upper()}{function.meaning[1:]}.")
            st.code(f"{function.name}({', '.join(function.parameters)})", language="sql")
            st.caption(f"Returns `{function.returns}`; NULL if the tensor was not kept.")


def _editor() -> tuple[Query, bool]:
    # Without a query in the URL: the text of the last visit, or the first example.
    first = next(iter(sql_table.EXAMPLES.values()))
    if SEEN not in st.session_state and not st.query_params.get("sql"):
        allow(first)
    in_url = st.query_params.get("sql") or st.session_state.get(SEEN, first)
    layout.seed(TEXT, in_url, st.session_state.get(SEEN) != in_url)
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
            "Query",
            key=TEXT,
            height=190,
            on_change=lambda: allow(st.session_state[TEXT]),
            placeholder="SELECT token, prob FROM step ORDER BY prob LIMIT 10",
            label_visibility="collapsed",
        )
    with layout.row("sql-limits", align="bottom"):
        rows = st.number_input("Maximum rows", 1, MOST_ROWS, ROWS, 100, key="sql-rows", width=140)
        seconds = st.number_input(
            "Maximum seconds", 1, MOST_SECONDS, SECONDS, key="sql-seconds", width=140
        )
        icon, hint = ":material/play_arrow:", "Or press Ctrl + Enter in the text"
        pressed = st.button("Run", type="primary", icon=icon, key="sql-run", help=hint)
    if text != in_url:
        st.query_params.from_dict({"sql": text} if text else {})
    st.session_state[SEEN] = text
    return Query(text.strip(), rows, float(seconds)), pressed


def _take_example() -> None:
    chosen = st.session_state["sql-example"]
    if chosen is not None:
        layout.seed(TEXT, sql_table.EXAMPLES[chosen], True)
        allow(sql_table.EXAMPLES[chosen])


def _run(query: Query, place: Any) -> Result:
    began = time.perf_counter()

    def tick() -> None:
        """Drawing lets Streamlit end the run of a page that was left."""
        place.caption(f"{time.perf_counter() - began:.0f} s")

    try:
        answer = data.run_sql(query.text, query.rows, query.seconds, tick)
    except OkiTraceError as error:
        return Result(query, error=str(error))
    finally:
        place.empty()
    return Result(query, answer.table, answer.cut, time.perf_counter() - began)


def _result(result: Result) -> None:
    if result.error:
        st.error(wording.sentence(result.error), icon=":material/error:")
        return
    table = result.table
    with layout.row("sql-result-head"):
        show = layout.choice("Show", ("table", "chart"), "sql-show")
        count = wording.counted(table.num_rows, "row")
        more = " More rows exist; raise the maximum to see them." if result.cut else ""
        st.caption(f"{count} in {_time(result.took_s)}.{more}", width="stretch")
        for name, make, mime in (
            ("CSV", sql_table.as_csv, "text/csv"),
            ("JSON", sql_table.as_json, "application/json"),
            ("Parquet", sql_table.as_parquet, "application/vnd.apache.parquet"),
        ):
            file, key = f"answer.{name.lower()}", f"sql-{name.lower()}"
            layout.export_button(name, partial(make, table), file, key, mime=mime)
    rows = sql_table.frame(table)
    if show == "chart":
        _chart(rows)
    elif rows.empty and not len(rows.columns):
        st.caption("The result has no columns.")
    else:
        height: Any = "content" if len(rows) <= 12 else TABLE_HEIGHT
        st.dataframe(rows, hide_index=True, height=height, key="sql-table")


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _chart(rows: Any) -> None:
    numeric = sql_table.numeric_columns(rows)
    columns = list(rows.columns)
    if not numeric or rows.empty:
        st.caption("A chart needs a numeric column; add one to the query.")
        return
    with layout.row("sql-chart-head", align="bottom"):
        # Keyed by the columns: those of another query may not have the chosen ones.
        mark = hash(tuple(columns))
        x = st.selectbox("x", columns, key=f"sql-x-{mark}", width=170)
        usual = next((i for i, name in enumerate(numeric) if name != x), 0)
        y = st.selectbox("y", numeric, index=usual, key=f"sql-y-{mark}", width=170)
        colour = st.selectbox(
            "Colour", columns, index=None, key=f"sql-colour-{mark}", placeholder="none", width=170
        )
        kind = sql_table.default_chart(rows, x)
        drawn = st.segmented_control(
            "Chart type", sql_table.CHARTS, default=kind, required=True, key=f"sql-as-{mark}-{x}"
        )
        picture = {"within": "st-key-sql-chart", "name": "answer"}
        components.picture(data=picture, key="save-sql", width=100)
    with st.container(key="sql-chart"):
        st.altair_chart(sql_table.chart(rows, x, y, colour, drawn), key="sql-drawn")
    if len(rows) > sql_table.MOST_MARKS:
        st.caption(f"The first {sql_table.MOST_MARKS:,} rows are drawn.")
