"""Charts of answers as pure functions: marks in, an Altair chart out.

The colours are those of Okabe and Ito, toned to the theme: they stay distinct for every kind of
colour vision, on light and dark backgrounds. Several lines also have marks of several shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import altair as alt
import pandas as pd

from dashboard.viewdata import answers
from dashboard.viewdata.answers import NEVER
from dashboard.viewdata.wording import Json
from oki_trace.analysis.question import Answer, Drawing

Chart = alt.Chart | alt.LayerChart

COLOURS = ("#cf6a37", "#3f7fbf", "#2a9d8f", "#c06a9a", "#b08a1e", "#8a9099")
SHAPES = (
    *("circle", "square", "triangle-up", "diamond", "cross", "triangle-down"),
    *("triangle-left", "stroke"),
)
# The parts of a stack: those that are texts in colours, the last ones in greys.
PARTS = (
    *("#cf6a37", "#2a9d8f", "#3f7fbf", "#c06a9a", "#d9b44a"),
    *("#7d848d", "#b4bac1", "#d9dce0"),
)
HEIGHT = 400
# A part of a stack that is nowhere larger than this is invisible.
LEAST_PART = 0.004
# The selection of a bar or a dot that stands for a step.
PICK = "picked"


def chart(
    answer: Answer, drawing: Drawing, rows: Sequence[Json], *, clickable: bool = False
) -> Chart:
    """The chart of ``rows``, as ``marks`` gives them."""
    draw = {
        "columns": _columns,
        "lines": _lines,
        "ranked": _ranked,
        "stacked": _stacked,
        "cells": _cells,
        "dots": _dots,
    }[drawing.kind]
    drawn = draw(answer, drawing, rows)
    if clickable:
        pick = alt.selection_point(name=PICK, fields=["at"], on="click")
        drawn = drawn.add_params(pick).configure_bar(cursor="pointer")
    measures = ", ".join(answers.spoken(answer, name) for name in drawing.y)
    title = f"{measures} by {_along(drawing)}"
    # SVG stays sharp and can be saved, however many marks there are.
    return drawn.properties(
        description=title[:1].upper() + title[1:], usermeta={"embedOptions": {"renderer": "svg"}}
    )


def _tooltip(answer: Answer, what: str | None = None) -> list[alt.Tooltip]:
    """The whole row; ``what`` is the title of the mark's own name."""
    named = [alt.Tooltip(f"{key}:N", title=name) for key, name in answers.columns(answer)]
    return named if what is None else [alt.Tooltip("what:N", title=what), *named]


def _ordered(rows: Sequence[Json], title: str) -> alt.X:
    names = list(dict.fromkeys(row["x"] for row in rows))
    numbers = [int(name) for name in names if name.isdecimal()]
    if len(numbers) >= len(names) - 1:
        # Every number has its place, also one without a mark.
        last = [name for name in names if not name.isdecimal()]
        names = [*map(str, range(max(numbers, default=0) + 1)), *last]
        # In a narrow chart the last label does not fit.
        title = f"{title} (last bar: {last[0]})" if last else title
    return _names(names, title, grid=False)


def _names(names: Sequence[str], title: str, *, grid: bool) -> alt.X:
    return alt.X(
        "x:N",
        title=title,
        sort=names,
        scale=alt.Scale(domain=names, paddingInner=0.15),
        axis=alt.Axis(labelAngle=0, labelOverlap="parity", grid=grid, ticks=False),
    )


def _along(drawing: Drawing) -> str:
    name = drawing.x[0]
    return "step of the reply" if name in ("from_step", "step") else name


def _value(
    answer: Answer, drawing: Drawing, rows: Sequence[Json], channel: type[Any], *, stack: bool
) -> Any:
    top = max([row["y"] for row in rows], default=1.0)
    share = all(answers.is_share(answer, name) for name in drawing.y)
    title = answers.unit(answer, drawing.y[0])
    if len(drawing.y) > 1 or drawing.line:
        units = {column.unit for column in answer.columns if column.name in drawing.y}
        title = "share" if share else units.pop() if len(units) == 1 else ""
    scale = alt.Scale(domain=[0, 1]) if share and (stack or top > 0.4) else alt.Scale(zero=True)
    return channel(
        "y:Q",
        title=title or None,
        scale=scale,
        stack="zero" if stack else None,
        axis=alt.Axis(tickCount=5, domain=False),
    )


def _colour(names: Sequence[str], range_: Sequence[str] = COLOURS, **more: Any) -> alt.Color:
    return alt.Color(
        "what:N",
        sort=list(names),
        scale=alt.Scale(domain=list(names), range=list(range_)[: len(names)]),
        title=None,
        legend=alt.Legend(orient="top", labelLimit=220, symbolType="circle", **more)
        if len(names) > 1
        else None,
    )


def _shape(names: Sequence[str]) -> alt.Shape:
    return alt.Shape(
        "what:N",
        sort=list(names),
        scale=alt.Scale(domain=list(names), range=list(SHAPES)[: len(names)]),
        legend=alt.Legend(orient="top", title=None) if len(names) > 1 else None,
    )


def _kinds(rows: Sequence[Json]) -> list[str]:
    return list(dict.fromkeys(row["what"] for row in rows))


def _by_model(answer: Answer, rows: Sequence[Json], drawing: Drawing) -> list[Json]:
    """A colour for each model, and the first measure only."""
    first = answers.spoken(answer, drawing.y[0])
    return [{**row, "what": row["model"]} for row in rows if row["what"] == first]


def _columns(answer: Answer, drawing: Drawing, rows: Sequence[Json]) -> Chart:
    if len({row["model"] for row in rows}) > 1:
        return _lines(answer, drawing, rows)
    names = _kinds(rows)
    if drawing.colour == "same_before":
        names = ["after the same text", "after different texts"]
        rows = [{**row, "what": names[row["what"] != "yes"]} for row in rows]
    elif drawing.line:
        names = [answers.unit(answer, name) for name in (drawing.y[0], drawing.line)]
        rows = [{**row, "what": names[0]} for row in rows]
    base = alt.Chart(pd.DataFrame(rows)).encode(
        x=_ordered(rows, _along(drawing)),
        y=_value(answer, drawing, rows, alt.Y, stack=bool(drawing.line)),
        tooltip=_tooltip(answer),
    )
    bars: alt.Chart = base.mark_bar(cornerRadiusTopLeft=2, cornerRadiusTopRight=2)
    bars = bars.encode(color=_colour(names))
    if not drawing.line:
        return bars.properties(height=HEIGHT)
    over = pd.DataFrame(
        [{**row, "what": names[1]} for row in rows if row["line"] is not None and row["x"] != NEVER]
    )
    line = (
        alt.Chart(over)
        .mark_line(point=alt.OverlayMarkDef(size=22, filled=True), strokeWidth=2)
        .encode(
            x=_ordered(rows, _along(drawing)),
            y=alt.Y("line:Q"),
            color=_colour(names),
            tooltip=_tooltip(answer),
        )
    )
    return alt.LayerChart(layer=[bars, line]).properties(height=HEIGHT)


def _lines(answer: Answer, drawing: Drawing, rows: Sequence[Json]) -> Chart:
    if len({row["model"] for row in rows}) > 1:
        rows = _by_model(answer, rows, drawing)
        drawing = Drawing("lines", drawing.x, drawing.y[:1])
    names = _kinds(rows)
    rows = [{**row, "numbered": row["x"] != NEVER} for row in rows]
    base = alt.Chart(pd.DataFrame(rows)).encode(
        x=_ordered(rows, _along(drawing)),
        y=_value(answer, drawing, rows, alt.Y, stack=False),
        color=_colour(names),
        tooltip=_tooltip(answer, "measure" if len(drawing.y) > 1 else None),
    )
    # No line connects a number with "never".
    line = base.mark_line(strokeWidth=2).encode(detail="numbered:N")
    points = base.mark_point(size=44, filled=True, opacity=1).encode(shape=_shape(names))
    return alt.LayerChart(layer=[line, points]).properties(height=HEIGHT)


def _ranked(answer: Answer, drawing: Drawing, rows: Sequence[Json]) -> Chart:
    labels = list(dict.fromkeys(row["x"] for row in rows))
    names = _kinds(rows)
    base = alt.Chart(pd.DataFrame(rows)).encode(
        y=alt.Y(
            "x:N",
            sort=labels,
            scale=alt.Scale(domain=labels, paddingInner=0.25),
            title=None,
            axis=alt.Axis(
                labelLimit=300,
                labelOverlap=False,
                labelFontSize=12,
                ticks=False,
                domain=False,
                grid=False,
                labelPadding=8,
            ),
        ),
        x=_value(answer, drawing, rows, alt.X, stack=False),
        tooltip=_tooltip(answer, "measure" if len(names) > 1 else None),
    )
    several = len(names) > 1
    bars: alt.Chart = base.mark_bar(cornerRadiusEnd=2).encode(color=_colour(names))
    if several:
        bars = bars.encode(yOffset=alt.YOffset("what:N", sort=names))
    height = len(labels) * (30 if several else 24) + (110 if several else 70)
    if not drawing.spread:
        return bars.properties(height=height)
    whisker = base.mark_rule(color="#8a9099", strokeWidth=1.5).encode(x=alt.X("low:Q"), x2="high:Q")
    return alt.LayerChart(layer=[bars, whisker]).properties(height=height)


def _stacked(answer: Answer, drawing: Drawing, rows: Sequence[Json]) -> Chart:
    visible = {row["what"] for row in rows if row["y"] >= LEAST_PART}
    parts = {
        name: colour
        for name, colour in zip(
            (answers.spoken(answer, name) for name in drawing.y), cycle(PARTS), strict=False
        )
        if name in visible
    }
    names = list(parts)
    rows = [{**row, "order": names.index(row["what"])} for row in rows if row["what"] in parts]
    drawn: alt.Chart = (
        alt.Chart(pd.DataFrame(rows))
        .mark_bar()
        .encode(
            x=_ordered(rows, _along(drawing)),
            y=_value(answer, drawing, rows, alt.Y, stack=True),
            color=_colour(names, list(parts.values()), columns=8),
            order=alt.Order("order:Q"),
            tooltip=[alt.Tooltip("what:N", title="part"), *_tooltip(answer)],
        )
    )
    return drawn.properties(height=HEIGHT)


def _cells(answer: Answer, drawing: Drawing, rows: Sequence[Json]) -> Chart:
    frame = pd.DataFrame(rows)
    drawn: alt.Chart = (
        alt.Chart(frame)
        .mark_rect()
        .encode(
            x=_ordered(rows, _along(drawing)),
            y=_upwards(frame["across"].unique().tolist()),
            color=alt.Color(
                "y:Q",
                title=answers.unit(answer, drawing.y[0]),
                scale=alt.Scale(scheme="viridis", domainMin=0),
                legend=alt.Legend(orient="right", gradientLength=220),
            ),
            tooltip=_tooltip(answer),
        )
    )
    return drawn.properties(height=max(HEIGHT, 18 * frame["across"].nunique()))


def _upwards(layers: Sequence[int]) -> alt.Y:
    return alt.Y(
        "across:O",
        title="layer",
        sort="descending",
        scale=alt.Scale(domain=sorted(layers, reverse=True)),
        axis=alt.Axis(labelOverlap="parity", ticks=False, grid=False),
    )


def _dots(answer: Answer, drawing: Drawing, rows: Sequence[Json]) -> Chart:
    frame = pd.DataFrame(rows)
    names = sorted(_kinds(rows))
    heads = [str(n) for n in range(max(int(row["x"]) for row in rows) + 1)]
    layers = list(range(int(frame["across"].max()) + 1))
    drawn: alt.Chart = (
        alt.Chart(frame)
        .mark_point(filled=True, opacity=0.95)
        .encode(
            x=_names(heads, "head", grid=True),
            y=_upwards(layers),
            color=_colour(names, (*COLOURS, "#7d848d", "#d9b44a")),
            shape=_shape(names),
            size=alt.Size("y:Q", scale=alt.Scale(domain=[0, 1], range=[20, 260]), legend=None),
            tooltip=_tooltip(answer),
        )
    )
    return drawn.properties(height=max(HEIGHT, 18 * len(layers)))
