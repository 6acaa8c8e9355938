"""Pictures of answers as pure functions: marks in, an Altair chart out.

Colours are the ones of Okabe and Ito, toned to the theme: they stay apart for
every kind of colour vision, on light and on dark ground. Several lines have
marks of several shapes besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import altair as alt
import pandas as pd

from dashboard.viewdata import answers
from dashboard.viewdata.answers import NEVER, SHARES, Drawing
from dashboard.viewdata.wording import Json

if TYPE_CHECKING:
    from oki_trace.analysis.questions import Answer

COLOURS = ("#cf6a37", "#3f7fbf", "#2a9d8f", "#c06a9a", "#b08a1e", "#8a9099")
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
# By what is looked at: the texts in colours, what is neither of them in greys.
PARTS = dict(
    zip(
        SHARES,
        (
            "#cf6a37",
            "#2a9d8f",
            "#3f7fbf",
            "#c06a9a",
            "#d9b44a",
            "#7d848d",
            "#b4bac1",
            "#d9dce0",
        ),
        strict=True,
    )
)
HEIGHT = 400
# A part of a stack that is nowhere larger than this is not seen.
SEEN = 0.004
# The click on a bar or a dot that stands for a step.
PICK = "picked"


def chart(
    answer: Answer, drawing: Drawing, rows: Sequence[Json], *, clickable: bool = False
) -> alt.Chart | alt.LayerChart:
    """The picture of ``rows``, as ``marks`` gives them."""
    draw = {
        "columns": _columns,
        "lines": _lines,
        "ranked": _ranked,
        "stacked": _stacked,
        "cells": _cells,
        "dots": _dots,
    }[drawing.kind]
    drawn = draw(answer, drawing, rows, clickable)
    # As SVG, which stays sharp and can be saved, however many marks there are.
    told = f"{', '.join(map(answers.spoken, drawing.y))} by {_along(drawing)}"
    return drawn.properties(
        description=told[:1].upper() + told[1:], usermeta={"embedOptions": {"renderer": "svg"}}
    )


def _tooltip(answer: Answer, what: str | None = None) -> list[alt.Tooltip]:
    """What hovering shows: all of the row."""
    shown = answers.columns(answer)
    named = [alt.Tooltip(f"{field}:N", title=name) for field, name in shown]
    return named if what is None else [alt.Tooltip("what:N", title=what), *named]


def _ordered(rows: Sequence[Json], title: str) -> alt.X:
    names = list(dict.fromkeys(row["x"] for row in rows))
    numbers = [int(name) for name in names if name.isdecimal()]
    if len(numbers) >= len(names) - 1:
        # Each has its place, also where there is nothing to draw.
        last = [name for name in names if not name.isdecimal()]
        names = [*map(str, range(max(numbers, default=0) + 1)), *last]
        # Where it is narrow, the last label has no room.
        title = f"{title} (last bar: {last[0]})" if last else title
    return alt.X(
        "x:N",
        title=title,
        sort=names,
        scale=alt.Scale(domain=names, paddingInner=0.15),
        axis=alt.Axis(
            labelAngle=0,
            labelOverlap="parity",
            grid=False,
            ticks=False,
        ),
    )


def _along(drawing: Drawing) -> str:
    name = drawing.x[0]
    return "step of the reply" if name in ("first", "step") else name


def _value(
    answer: Answer, drawing: Drawing, rows: Sequence[Json], channel: type[Any], *, stack: bool
) -> Any:
    top = max([row["y"] for row in rows], default=1.0)
    share = all(answers.is_share(answer, name) for name in drawing.y)
    title = ", ".join(answers.unit(answer, name) for name in drawing.y)
    if len(drawing.y) > 1:
        units = {answers.unit(answer, name).endswith("(nats)") for name in drawing.y}
        title = "nats" if units == {True} else ("share of 1" if share else "")
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


def _kinds(rows: Sequence[Json]) -> list[str]:
    return list(dict.fromkeys(row["what"] for row in rows))


def _by_model(rows: Sequence[Json], drawing: Drawing) -> list[Json]:
    """Several models: a colour each, of the first measure alone."""
    first = answers.spoken(drawing.y[0])
    return [{**row, "what": row["model"]} for row in rows if row["what"] == first]


def _columns(
    answer: Answer, drawing: Drawing, rows: Sequence[Json], clickable: bool
) -> alt.Chart | alt.LayerChart:
    if len({row["model"] for row in rows}) > 1:
        return _lines(answer, drawing, rows, clickable)
    names = _kinds(rows)
    if drawing.colour == "same_before":
        rows = [
            {**row, "what": "after the same text" if row["what"] == "yes" else "after another"}
            for row in rows
        ]
        names = ["after the same text", "after another"]
    elif drawing.line:
        names = [_told(answer, drawing.y[0]), _told(answer, drawing.line)]
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


def _told(answer: Answer, name: str) -> str:
    return {"share": "settles here", "cumulative_share": "has settled by here"}.get(
        name, answers.unit(answer, name)
    )


def _lines(
    answer: Answer, drawing: Drawing, rows: Sequence[Json], clickable: bool
) -> alt.Chart | alt.LayerChart:
    if len({row["model"] for row in rows}) > 1:
        rows = _by_model(rows, drawing)
        drawing = Drawing("lines", drawing.x, drawing.y[:1])
    names = _kinds(rows)
    rows = [{**row, "numbered": row["x"] != NEVER} for row in rows]
    base = alt.Chart(pd.DataFrame(rows)).encode(
        x=_ordered(rows, _along(drawing)),
        y=_value(answer, drawing, rows, alt.Y, stack=False),
        color=_colour(names),
        tooltip=_tooltip(answer, "measure" if len(drawing.y) > 1 else None),
    )
    shape = alt.Shape(
        "what:N",
        sort=names,
        scale=alt.Scale(domain=names, range=list(SHAPES)[: len(names)]),
        legend=alt.Legend(orient="top", title=None) if len(names) > 1 else None,
    )
    # No line leads from a number to what is none.
    line = base.mark_line(strokeWidth=2).encode(detail="numbered:N")
    points = base.mark_point(size=44, filled=True, opacity=1).encode(shape=shape)
    return alt.LayerChart(layer=[line, points]).properties(height=HEIGHT)


def _ranked(
    answer: Answer, drawing: Drawing, rows: Sequence[Json], clickable: bool
) -> alt.Chart | alt.LayerChart:
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
    bars: alt.Chart = base.mark_bar(
        cornerRadiusEnd=2, cursor="pointer" if clickable else alt.Undefined
    )
    bars = bars.encode(color=_colour(names))
    if several:
        bars = bars.encode(yOffset=alt.YOffset("what:N", sort=names))
    if clickable:
        bars = bars.add_params(alt.selection_point(name=PICK, fields=["at"], on="click"))
    height = len(labels) * (30 if several else 24) + (110 if several else 70)
    if not drawing.spread:
        return bars.properties(height=height)
    whisker = base.mark_rule(color="#8a9099", strokeWidth=1.5).encode(x=alt.X("low:Q"), x2="high:Q")
    return alt.LayerChart(layer=[bars, whisker]).properties(height=height)


def _stacked(
    answer: Answer, drawing: Drawing, rows: Sequence[Json], clickable: bool
) -> alt.Chart | alt.LayerChart:
    given = {row["what"] for row in rows if row["y"] >= SEEN}
    parts = {answers.spoken(name): PARTS[name] for name in drawing.y}
    parts = {name: colour for name, colour in parts.items() if name in given}
    names = list(parts)
    rows = [{**row, "order": names.index(row["what"])} for row in rows if row["what"] in parts]
    drawn: alt.Chart = (
        alt.Chart(pd.DataFrame(rows))
        .mark_bar()
        .encode(
            x=_ordered(rows, _along(drawing)),
            y=alt.Y(
                "y:Q",
                title="share of the attention",
                stack="zero",
                scale=alt.Scale(domain=[0, 1]),
                axis=alt.Axis(tickCount=5, domain=False),
            ),
            color=_colour(names, list(parts.values()), columns=8),
            order=alt.Order("order:Q"),
            tooltip=[alt.Tooltip("what:N", title="part"), *_tooltip(answer)],
        )
    )
    return drawn.properties(height=HEIGHT)


def _cells(
    answer: Answer, drawing: Drawing, rows: Sequence[Json], clickable: bool
) -> alt.Chart | alt.LayerChart:
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


def _dots(
    answer: Answer, drawing: Drawing, rows: Sequence[Json], clickable: bool
) -> alt.Chart | alt.LayerChart:
    frame = pd.DataFrame(rows)
    names = sorted(_kinds(rows))
    heads = [str(n) for n in range(max(int(row["x"]) for row in rows) + 1)]
    layers = list(range(int(frame["across"].max()) + 1))
    drawn: alt.Chart = (
        alt.Chart(frame)
        .mark_point(filled=True, opacity=0.95)
        .encode(
            x=alt.X(
                "x:N",
                title="head",
                sort=heads,
                scale=alt.Scale(domain=heads),
                axis=alt.Axis(labelAngle=0, labelOverlap="parity", grid=True, ticks=False),
            ),
            y=_upwards(layers),
            color=_colour(names, (*COLOURS, "#7d848d", "#d9b44a")),
            shape=alt.Shape(
                "what:N",
                sort=names,
                scale=alt.Scale(domain=names, range=[*SHAPES, "triangle-left", "stroke"]),
            ),
            size=alt.Size("y:Q", scale=alt.Scale(domain=[0, 1], range=[20, 260]), legend=None),
            tooltip=_tooltip(answer),
        )
    )
    return drawn.properties(height=max(HEIGHT, 18 * len(layers)))
