"""Results of SQL as a table, a chart and files, and questions to start from: pure functions.

Column names and values are whatever a question makes of them: no name of theirs
becomes a name in a chart, where it could mean something.
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
from dashboard.viewdata.replies import clipped
from oki_trace.sanitize import inert

if TYPE_CHECKING:
    from oki_trace.analysis.tables import Table

EXAMPLES = {
    "Which tokens were said most often, and how surely": """\
SELECT token, count(*) AS times, avg(prob) AS prob
FROM step
GROUP BY token
ORDER BY times DESC
LIMIT 25""",
    "From which layer on the chosen token is first": """\
SELECT layer, avg((chosen_rank = 1)::INT) AS first, avg(chosen_prob) AS prob
FROM lens_layer
GROUP BY layer
ORDER BY layer""",
    "How sure each reply is along its steps": """\
SELECT step_index, avg(entropy) AS entropy, avg(prob) AS prob, count(*) AS replies
FROM step
GROUP BY step_index
ORDER BY step_index""",
    "What the middle layers say most often": """\
SELECT layer, top_token, count(*) AS times, avg(top_prob) AS prob
FROM lens_layer
WHERE layer BETWEEN 10 AND 20
GROUP BY layer, top_token
QUALIFY row_number() OVER (PARTITION BY layer ORDER BY count(*) DESC) = 1
ORDER BY layer""",
    "Where a draw said what greedy decoding would not have": """\
SELECT conversation_id, message_id, step_index, token, step.prob, runner_up_token,
  runner_up_prob
FROM step JOIN message ON message.id = message_id
WHERE token_id <> greedy_id
ORDER BY step.prob
LIMIT 50""",
    "Words of the prompt that were looked at most": """\
SELECT prompt_token.token, segment, sum(weight) AS weight, count(*) AS times
FROM attention_entry
JOIN prompt_token USING (message_id, position)
WHERE position > 0
GROUP BY prompt_token.token, segment
ORDER BY weight DESC
LIMIT 25""",
    "How long a token takes, by model": """\
SELECT model_id, dtype, quantization, count(*) AS steps, median(elapsed_ms) AS median_ms
FROM step JOIN message ON message.id = message_id
GROUP BY ALL
ORDER BY median_ms""",
}

CHARTS = ("lines", "points", "bars")
# More marks than this make a picture slow, and no clearer.
MOST_MARKS = 5000
_MOST_COLOURS = len(COLOURS)


def names(table: Any) -> list[str]:
    """The columns' names, safe to be shown, each once: a second ``x`` is ``x_2``."""
    from oki_trace.analysis.values import distinct

    return distinct(inert(name, keep="") or "(no name)" for name in table.schema.names)


def rows(table: Any) -> list[tuple[Any, ...]]:
    """An Arrow table's rows, as Python's values."""
    from oki_trace.analysis.values import rows_of

    return rows_of(table)


def frame(table: Any) -> pd.DataFrame:
    """What the table on the page shows: numbers, moments and truths as such, all else text."""
    from oki_trace.analysis.results import plain

    found: dict[str, Any] = {}
    for name, column in zip(names(table), table.columns, strict=True):
        kind = str(column.type)
        if kind.startswith(("int", "uint", "float", "double", "halffloat", "bool", "timestamp")):
            found[name] = column.to_pandas()
        elif kind.startswith("decimal"):
            found[name] = [None if v is None else float(v) for v in column.to_pylist()]
        else:
            values = column.to_pylist()
            found[name] = [None if v is None else inert(str(plain(v))) for v in values]
    return pd.DataFrame(found, columns=names(table))


def as_csv(table: Any) -> str:
    """With a header; texts that a spreadsheet would take for formulas are kept texts."""
    from oki_trace.analysis.results import write_csv

    file = io.StringIO()
    write_csv(names(table), rows(table), file)
    return file.getvalue()


def as_json(table: Any) -> str:
    """A list of objects, as ``oki-trace sql --format json`` has it."""
    from oki_trace.analysis.results import objects

    return json.dumps(objects(names(table), rows(table)), indent=2, allow_nan=False) + "\n"


def as_parquet(table: Any) -> bytes:
    """With the columns' own types. Raises QuestionError for one that Parquet has not."""
    from oki_trace.analysis.results import parquet

    return parquet(table.rename_columns(names(table)))


def column_list(table: Table) -> str:
    """A table's columns with their meaning, as Markdown; all of it is ours."""
    lines = ["| | |", "| --- | --- |"]
    for column in table.columns:
        meaning = column.meaning.replace("|", "\\|")
        lines.append(f"| `{column.name}` | {meaning} :gray[{column.kind.lower()}] |")
    return "\n".join(lines)


# --------------------------------------------------------------------------- charts


def numeric(found: pd.DataFrame) -> list[str]:
    """The columns that can be drawn upwards."""
    return [n for n in found.columns if found[n].dtype.kind in "iuf" and found[n].notna().any()]


def kind_for(found: pd.DataFrame, x: str) -> str:
    """The usual chart over this column."""
    kind = found[x].dtype.kind
    if kind in "iufM":
        return "lines" if found[x].is_monotonic_increasing else "points"
    return "bars"


def chart(found: pd.DataFrame, x: str, y: str, colour: str | None, kind: str) -> alt.Chart:
    """``y`` over ``x``; ``colour`` tells at most six values apart, the others are grey."""
    part = found.head(MOST_MARKS)
    data = pd.DataFrame({"x": part[x], "y": part[y].astype(float)})
    if part[x].dtype.kind not in "iufM":
        data["x"] = [clipped("–" if v is None else str(v), 40) for v in part[x]]
    names_ = []
    if colour is not None:
        values = [clipped("–" if v is None else str(v), 40) for v in part[colour]]
        names_ = [name for name, _ in Counter(values).most_common(_MOST_COLOURS)]
        data["what"] = [v if v in names_ else "other" for v in values]
        names_ += ["other"] if "other" not in names_ and (data["what"] == "other").any() else []
    discrete = kind == "bars" or part[x].dtype.kind not in "iufM"
    encoded: dict[str, Any] = {
        "x": alt.X(
            "x:N" if discrete else ("x:T" if part[x].dtype.kind == "M" else "x:Q"),
            title=x,
            sort=None,
            axis=alt.Axis(labelOverlap="greedy", labelLimit=140, grid=False),
            scale=alt.Undefined if discrete else alt.Scale(zero=False),
        ),
        "y": alt.Y("y:Q", title=y, stack=None, axis=alt.Axis(tickCount=5, domain=False)),
        "tooltip": [
            alt.Tooltip(f"{c}:{t}", title=_titled(n))
            for c, t, n in _told(x, y, colour, discrete, part)
        ],
    }
    if colour is not None:
        encoded["color"] = alt.Color(
            "what:N",
            sort=names_,
            scale=alt.Scale(domain=names_, range=[*COLOURS, "#8a9099"][: len(names_)]),
            title=None,
            legend=alt.Legend(orient="top", labelLimit=220, symbolType="circle", columns=4),
        )
    else:
        encoded["color"] = alt.value(COLOURS[0])
    if kind == "bars" and colour is not None:
        encoded["xOffset"] = alt.XOffset("what:N", sort=names_)
    base = alt.Chart(data)
    drawn = {
        "lines": lambda: base.mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=24)),
        "points": lambda: base.mark_point(size=36, filled=True, opacity=0.75),
        "bars": lambda: base.mark_bar(cornerRadiusTopLeft=2, cornerRadiusTopRight=2),
    }[kind]()
    done: alt.Chart = drawn.encode(**encoded).properties(
        height=HEIGHT, usermeta={"embedOptions": {"renderer": "svg"}}
    )
    return done


def _told(
    x: str, y: str, colour: str | None, discrete: bool, part: pd.DataFrame
) -> Sequence[tuple[str, str, str]]:
    of_x = "N" if discrete else ("T" if part[x].dtype.kind == "M" else "Q")
    told = [("x", of_x, x), ("y", "Q", y)]
    return told if colour is None else [*told, ("what", "N", colour)]


def _titled(name: str) -> str:
    """A name as a tooltip's title: it would fetch what stands under ``image``."""
    return f"{name} " if name.lower() in ("image", "title") else name
