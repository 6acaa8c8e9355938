"""Charts as pure functions: rows in, an Altair chart out."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import Any, TypeVar

import altair as alt
import pandas as pd

from dashboard.viewdata.wording import Json

HEIGHT = 270
QUARTERS = [0, 0.25, 0.5, 0.75, 1]
# Streamlit places legends far from their charts.
LEGEND: dict[str, Any] = {"orient": "top", "symbolType": "circle", "padding": 0, "offset": 8}


def layer_curves(rows: Sequence[Json], field: str) -> alt.Chart:
    """Tokens by layer; ``field`` is "rank", on a log scale with 1 on top, or "prob".

    Colours follow the order of the tokens: the chosen one, which is first, has the accent.
    """
    frame = pd.DataFrame(rows)
    names = list(dict.fromkeys(frame["token"]))
    what = "Rank" if field == "rank" else "Probability"
    return _lines(
        frame,
        _ranks(frame["rank"].dropna()) if field == "rank" else _probs(),
        "token",
        names,
        [
            alt.Tooltip("token:N"),
            alt.Tooltip("layer:Q"),
            alt.Tooltip("rank:Q", format=","),
            alt.Tooltip("prob:Q", format=".4f", title="probability"),
        ],
        f"{what} by layer of {', '.join(names)}",
    )


def entropy_and_kl(rows: Sequence[Json]) -> alt.Chart:
    """Entropy of each layer's distribution, and its KL divergence from the final one, in nats."""
    names = {"entropy": "entropy", "kl": "KL to the final layer"}
    frame = (
        pd.DataFrame(rows).rename(columns=names).melt("layer", var_name="what", value_name="nats")
    )
    return _lines(
        frame,
        alt.Y("nats:Q", title="nats", axis=alt.Axis(tickCount=5)),
        "what",
        list(names.values()),
        [
            alt.Tooltip("what:N", title="measure"),
            alt.Tooltip("layer:Q"),
            alt.Tooltip("nats:Q", format=".3f"),
        ],
        "Entropy of each layer, and its KL to the final layer, in nats",
    )


def _lines(
    frame: pd.DataFrame,
    y: alt.Y,
    by: str,
    names: Sequence[str],
    tooltip: Sequence[alt.Tooltip],
    description: str,
) -> alt.Chart:
    """A line over the layers for each of ``names``, the values of the column ``by``."""
    colour = alt.Color(
        f"{by}:N",
        sort=names,
        scale=alt.Scale(domain=names),
        title=None,
        legend=alt.Legend(**LEGEND, labelLimit=170, columns=3),
    )
    x = alt.X("layer:Q", title="layer", axis=alt.Axis(tickMinStep=1, grid=False))
    line: alt.Chart = (
        alt.Chart(frame)
        .mark_line(point=alt.OverlayMarkDef(size=24, filled=True), strokeWidth=2, clip=False)
        .encode(x=x, y=y, color=colour, tooltip=tooltip)
    )
    return _finished(line, HEIGHT, description)


def distance_chart(rows: Sequence[Json], divergence: int | None) -> alt.LayerChart:
    """The distance of two replies' distributions, a bar for each pair: its lower and upper bound.

    ``divergence`` is the number of the first pair that differs.
    """
    frame = pd.DataFrame(rows)
    last = int(frame["pair"].max())
    base = alt.Chart(frame).encode(
        x=alt.X(
            "pair:Q",
            title="pair of steps",
            axis=alt.Axis(tickMinStep=1, grid=False),
            scale=alt.Scale(domain=[-0.5, last + 0.5], nice=False),
        ),
        tooltip=[
            alt.Tooltip("pair:Q"),
            alt.Tooltip("left:N"),
            alt.Tooltip("right:N"),
            alt.Tooltip("low:Q", format=".4f", title="at least"),
            alt.Tooltip("high:Q", format=".4f", title="at most"),
        ],
    )
    size = max(1.0, min(14.0, 300 / (last + 1)))
    scale = alt.Scale(domain=[0, 1])
    colour = alt.Color(
        "token:N",
        title=None,
        scale=_SAMENESS,
        legend=alt.Legend(**LEGEND, symbolOpacity=1) if frame["token"].nunique() > 1 else None,
    )
    possible = base.mark_bar(size=size, opacity=0.3).encode(
        y=alt.Y(
            "low:Q",
            title="total variation",
            scale=scale,
            axis=alt.Axis(values=QUARTERS),
        ),
        y2="high:Q",
        color=colour,
    )
    certain = base.mark_bar(size=size).encode(y=alt.Y("low:Q", scale=scale), color=colour)
    layers = [possible, certain]
    if divergence is not None:
        mark = alt.Chart(pd.DataFrame([{"pair": divergence - 0.5}]))
        layers.append(
            mark.mark_rule(color="gray", strokeDash=[4, 3], strokeWidth=1.5).encode(x="pair:Q")
        )
    description = "Total variation between the two replies' distributions, token by token"
    return _finished(alt.LayerChart(layer=layers), 240, description)


def surprisal_chart(rows: Sequence[Json]) -> alt.Chart:
    """The surprisal of each piece of a text under two models: the difference in bits, a bar each.

    Above 0, the right model is more surprised.
    """
    frame = pd.DataFrame(rows)
    frame["more"] = [_MORE[difference < 0] for difference in frame["difference"]]
    last = int(frame["span"].max())
    drawn: alt.Chart = (
        alt.Chart(frame)
        .mark_bar(size=max(1.0, min(14.0, 300 / (last + 1))))
        .encode(
            x=alt.X(
                "span:Q",
                title="piece of the text",
                axis=alt.Axis(tickMinStep=1, grid=False),
                scale=alt.Scale(domain=[-0.5, last + 0.5], nice=False),
            ),
            y=alt.Y("difference:Q", title="right minus left (bits)"),
            color=alt.Color("more:N", title=None, scale=_SURPRISED, legend=alt.Legend(**LEGEND)),
            tooltip=[
                alt.Tooltip("text:N"),
                alt.Tooltip("left:Q", format=".2f", title="left, in bits"),
                alt.Tooltip("right:Q", format=".2f", title="right, in bits"),
            ],
        )
    )
    return _finished(drawn, 240, "Surprisal of each piece of the text: right minus left, in bits")


def growth_chart(rows: Sequence[Json]) -> alt.Chart:
    """Running totals of a store's data over the time of its replies, stacked by kind."""
    frame = pd.DataFrame(rows)
    in_bytes = alt.Axis(tickCount=5, labelExpr="format(datum.value, '~s') + 'B'")
    chart: alt.Chart = (
        alt.Chart(frame)
        .mark_area(interpolate="step-after", line=True, opacity=0.75)
        .encode(
            x=alt.X(
                "when:T",
                title=None,
                axis=alt.Axis(
                    grid=False, tickCount=6, labelFlush=True, format=_time_format(frame["when"])
                ),
            ),
            y=alt.Y("bytes:Q", stack=True, title=None, axis=in_bytes),
            color=alt.Color(
                "what:N",
                title=None,
                scale=alt.Scale(domain=["full tensors", "rows"]),
                legend=alt.Legend(**LEGEND),
            ),
            tooltip=[
                alt.Tooltip("when:T", format="%Y-%m-%d %H:%M", title="up to"),
                alt.Tooltip("what:N", title="kind"),
                alt.Tooltip("size:N"),
                alt.Tooltip("replies:Q", format=","),
                alt.Tooltip("tokens:Q", format=","),
            ],
        )
    )
    return _finished(chart, HEIGHT, "The store's data over time: rows and full tensors")


def _time_format(when: pd.Series[Any]) -> str:
    """The format of times on an axis: as fine as their span requires."""
    span = when.max() - when.min()
    if span < dt.timedelta(minutes=5):
        return "%H:%M:%S"
    if span < dt.timedelta(days=1):
        return "%H:%M"
    return "%b %d, %H:%M" if span < dt.timedelta(days=4) else "%b %d"


Drawn = TypeVar("Drawn", alt.Chart, alt.LayerChart)


def _finished(chart: Drawn, height: int, description: str) -> Drawn:
    """With a height, a description for screen readers, and as SVG, which can be saved."""
    finished: Drawn = chart.properties(
        height=height, description=description, usermeta={"embedOptions": {"renderer": "svg"}}
    )
    return finished


# In the order of the theme's category colours: tokens that differ have the accent.
_SAMENESS = alt.Scale(domain=["different tokens", "the same token"])
_MORE = ("right is more surprised", "left is more surprised")
_SURPRISED = alt.Scale(domain=list(_MORE))


def _ranks(ranks: pd.Series[Any]) -> alt.Y:
    worst = max([10, *ranks.astype(int)])
    return alt.Y(
        "rank:Q",
        title="rank",
        scale=alt.Scale(type="log", domain=[worst, 1], nice=False),
        axis=alt.Axis(values=[10**n for n in range(7) if 10**n <= worst], format="~s"),
    )


def _probs() -> alt.Y:
    return alt.Y("prob:Q", title="probability", scale=alt.Scale(domain=[0, 1]))
