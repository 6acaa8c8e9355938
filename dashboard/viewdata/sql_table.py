"""The table, chart and files of an SQL result, and example queries: pure functions.

A query can name its columns anything, so a chart never uses those names as fields,
where Vega-Lite would interpret some of them.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import altair as alt
import pandas as pd

from dashboard.question_charts import COLOURS, HEIGHT
from dashboard.viewdata.wording import shorten
from oki_trace.sanitize import inert

if TYPE_CHECKING:
    from oki_trace.analysis.tables import Table

EXAMPLES = {
    "The most frequent tokens, and their probability": """\
SELECT token, count(*) AS times, avg(prob) AS prob
FROM step
WHERE step_index IS NOT NULL -- generated tokens, not those of the prompt
GROUP BY token
ORDER BY times DESC
LIMIT 25""",
    "Share of steps at which each layer ranks the chosen token first": """\
SELECT layer, avg((chosen_rank = 1)::INT) AS first, avg(chosen_prob) AS prob
FROM lens_layer
WHERE lens = 'logit' AND step_index IS NOT NULL
GROUP BY layer
ORDER BY layer""",
    "Entropy and probability by step": """\
SELECT step_index, avg(entropy) AS entropy, avg(prob) AS prob, count(*) AS replies
FROM step
WHERE step_index IS NOT NULL
GROUP BY step_index
ORDER BY step_index""",
    "The most frequent top token of each middle layer": """\
SELECT layer, top_token, count(*) AS times, avg(top_prob) AS prob
FROM lens_layer
WHERE lens = 'logit' AND step_index IS NOT NULL AND layer BETWEEN 10 AND 20
GROUP BY layer, top_token
QUALIFY row_number() OVER (PARTITION BY layer ORDER BY count(*) DESC) = 1
ORDER BY layer""",
    "Steps where sampling differs from greedy decoding": """\
SELECT conversation_id, message_id, step_index, token, step.prob, runner_up_token,
  runner_up_prob
FROM step JOIN message ON message.id = message_id
WHERE token_id <> greedy_id
ORDER BY step.prob
LIMIT 50""",
    "The most attended tokens of the prompt": """\
SELECT prompt_token.token, segment, sum(weight) AS weight, count(*) AS times
FROM attention_entry
JOIN prompt_token USING (message_id, position)
WHERE position > 0 AND step_index IS NOT NULL
GROUP BY prompt_token.token, segment
ORDER BY weight DESC
LIMIT 25""",
    "Time per token, by model": """\
SELECT model_id, dtype, quantization, count(*) AS steps, median(elapsed_ms) AS median_ms
FROM step JOIN message ON message.id = message_id
WHERE step_index IS NOT NULL
GROUP BY ALL
ORDER BY median_ms""",
}

CHARTS = ("lines", "points", "bars")
# More marks make a chart slow, and no clearer.
MOST_MARKS = 5000
_MOST_COLOURS = len(COLOURS)


def column_names(table: Any) -> list[str]:
    """The column names, sanitized and distinct: a second ``x`` becomes ``x_2``."""
    from oki_trace.analysis.values import distinct

    return distinct(inert(name, keep="") or "(no name)" for name in table.schema.names)


def frame(table: Any) -> pd.DataFrame:
    """The table on the page: numbers, times and booleans keep their type, the rest is text."""
    from oki_trace.analysis.results import plain

    columns: dict[str, Any] = {}
    for name, column in zip(column_names(table), table.columns, strict=True):
        kind = str(column.type)
        if kind.startswith(("int", "uint", "float", "double", "halffloat", "bool", "timestamp")):
            columns[name] = column.to_pandas()
        elif kind.startswith("decimal"):
            columns[name] = [None if v is None else float(v) for v in column.to_pylist()]
        else:
            values = column.to_pylist()
            columns[name] = [None if v is None else inert(str(plain(v))) for v in values]
    return pd.DataFrame(columns, columns=column_names(table))


def as_csv(table: Any) -> str:
    """CSV with a header."""
    from oki_trace.analysis.values import rows_of

    return csv_text(column_names(table), rows_of(table))


def csv_text(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """CSV with a header; text that a spreadsheet would read as a formula is quoted."""
    from oki_trace.analysis.results import write_csv

    file = io.StringIO()
    write_csv(names, rows, file)
    return file.getvalue()


def as_json(table: Any) -> str:
    """A list of objects, as ``oki-trace sql --format json`` prints it."""
    from oki_trace.analysis.results import objects
    from oki_trace.analysis.values import rows_of

    listed = objects(column_names(table), rows_of(table))
    return json.dumps(listed, indent=2, allow_nan=False) + "\n"


def as_parquet(table: Any) -> bytes:
    """Parquet with the types of the columns. Raises QuestionError for one that it lacks."""
    from oki_trace.analysis.results import parquet

    return parquet(table.rename_columns(column_names(table)))


def columns_as_markdown(table: Table) -> str:
    """The columns of one of our tables with their meaning, as Markdown."""
    lines = ["| | |", "| --- | --- |"]
    for column in table.columns:
        meaning = column.meaning.replace("|", "\\|")
        lines.append(f"| `{column.name}` | {meaning} :gray[{column.kind.lower()}] |")
    return "\n".join(lines)


def numeric_columns(rows: pd.DataFrame) -> list[str]:
    """The columns that can be a y axis."""
    return [n for n in rows.columns if rows[n].dtype.kind in "iuf" and rows[n].notna().any()]


def default_chart(rows: pd.DataFrame, x: str) -> str:
    """The kind of chart to begin with for this x axis."""
    kind = rows[x].dtype.kind
    if kind in "iufM":
        return "lines" if rows[x].is_monotonic_increasing else "points"
    return "bars"


def chart(rows: pd.DataFrame, x: str, y: str, colour: str | None, kind: str) -> alt.Chart:
    """``y`` over ``x``; ``colour`` distinguishes the most frequent values, the others are grey."""
    part = rows.head(MOST_MARKS)
    x_kind = part[x].dtype.kind
    is_text = x_kind not in "iufM"
    x_type = "N" if kind == "bars" or is_text else "T" if x_kind == "M" else "Q"
    data = pd.DataFrame({"x": _texts(part[x]) if is_text else part[x], "y": part[y].astype(float)})
    tooltips = [("x", x_type, x), ("y", "Q", y)]
    encodings: dict[str, Any] = {
        "x": alt.X(
            f"x:{x_type}",
            title=x,
            sort=None,
            axis=alt.Axis(labelOverlap="greedy", labelLimit=140, grid=False),
            scale=alt.Undefined if x_type == "N" else alt.Scale(zero=False),
        ),
        "y": alt.Y("y:Q", title=y, stack=None, axis=alt.Axis(tickCount=5, domain=False)),
        "color": alt.value(COLOURS[0]),
    }
    if colour is not None:
        values = _texts(part[colour])
        names = [name for name, _ in Counter(values).most_common(_MOST_COLOURS)]
        data["what"] = [v if v in names else "other" for v in values]
        names += ["other"] if "other" not in names and (data["what"] == "other").any() else []
        tooltips.append(("what", "N", colour))
        encodings["color"] = alt.Color(
            "what:N",
            sort=names,
            scale=alt.Scale(domain=names, range=[*COLOURS, "#8a9099"][: len(names)]),
            title=None,
            legend=alt.Legend(orient="top", labelLimit=220, symbolType="circle", columns=4),
        )
        if kind == "bars":
            encodings["xOffset"] = alt.XOffset("what:N", sort=names)
    encodings["tooltip"] = [
        # Vega would fetch the value of a tooltip field named ``image``.
        alt.Tooltip(f"{c}:{t}", title=f"{n} " if n.lower() in ("image", "title") else n)
        for c, t, n in tooltips
    ]
    base = alt.Chart(data)
    mark = {
        "lines": lambda: base.mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=24)),
        "points": lambda: base.mark_point(size=36, filled=True, opacity=0.75),
        "bars": lambda: base.mark_bar(cornerRadiusTopLeft=2, cornerRadiusTopRight=2),
    }[kind]()
    drawn: alt.Chart = mark.encode(**encodings).properties(
        height=HEIGHT, usermeta={"embedOptions": {"renderer": "svg"}}
    )
    return drawn


def _texts(column: pd.Series[Any]) -> list[str]:
    return [shorten("–" if value is None else str(value), 40) for value in column]
