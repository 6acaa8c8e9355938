"""Pictures as pure functions: rows in, an Altair chart out."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import Any, TypeVar

import altair as alt
import pandas as pd

from dashboard.viewdata.replies import Json

HEIGHT = 270
QUARTERS = [0, 0.25, 0.5, 0.75, 1]
# Streamlit sets legends far from their charts.
LEGEND: dict[str, Any] = {"orient": "top", "symbolType": "circle", "padding": 0, "offset": 8}


def trajectories(rows: Sequence[Json], field: str) -> alt.Chart:
    """Tokens through the layers; ``field`` is "rank", on a log scale with 1 on top, or "prob".

    Colours go by the order of the tokens: the chosen one has the accent.
    """
    frame = pd.DataFrame(rows)
    names = list(dict.fromkeys(frame["token"]))
    known = frame.dropna(subset=[field])
    # Two lines may meet: the last drawn is on top, and it is to be the chosen one.
    base = alt.Chart(frame).encode(
        x=_layers(),
        y=_ranks(known) if field == "rank" else _probs(),
        color=alt.Color(
            "token:N",
            sort=names,
            scale=alt.Scale(domain=names),
            title=None,
            legend=alt.Legend(**LEGEND, labelLimit=170, columns=3),
        ),
        tooltip=[
            alt.Tooltip("token:N"),
            alt.Tooltip("layer:Q"),
            alt.Tooltip("rank:Q", format=","),
            alt.Tooltip("prob:Q", format=".4f", title="probability"),
        ],
    )
    line: alt.Chart = base.mark_line(
        point=alt.OverlayMarkDef(size=26, filled=True), strokeWidth=2, clip=False
    )
    what = "Rank" if field == "rank" else "Probability"
    return _drawn(line, HEIGHT, f"{what} through the layers of {', '.join(names)}")


def by_layer(rows: Sequence[Json]) -> alt.Chart:
    """Entropy of each layer's distribution, and its distance from the final one, in nats."""
    names = {"entropy": "entropy", "kl": "KL to the final layer"}
    frame = pd.DataFrame(
        [
            {"layer": row["layer"], "what": name, "nats": row[key]}
            for key, name in names.items()
            for row in rows
        ]
    )
    base = alt.Chart(frame).encode(
        x=_layers(),
        y=alt.Y("nats:Q", title="nats", axis=alt.Axis(tickCount=5)),
        color=alt.Color(
            "what:N",
            sort=list(names.values()),
            scale=alt.Scale(domain=list(names.values())),
            title=None,
            legend=alt.Legend(**LEGEND, labelLimit=170),
        ),
        tooltip=[
            alt.Tooltip("what:N", title="measure"),
            alt.Tooltip("layer:Q"),
            alt.Tooltip("nats:Q", format=".3f"),
        ],
    )
    line: alt.Chart = base.mark_line(point=alt.OverlayMarkDef(size=22, filled=True), strokeWidth=2)
    return _drawn(line, HEIGHT, "Entropy and KL to the final layer, layer by layer, in nats")


def apart(rows: Sequence[Json], divergence: int | None) -> alt.LayerChart:
    """How far two replies' distributions are apart, a bar a place: what is sure, and what may be.

    ``divergence`` is the place, from 1, of the first token that differs.
    """
    frame = pd.DataFrame(rows)
    base = alt.Chart(frame).encode(
        x=alt.X(
            "place:Q",
            title="place in the replies",
            axis=alt.Axis(tickMinStep=1, grid=False),
            scale=alt.Scale(domain=[0.5, frame["place"].max() + 0.5], nice=False),
        ),
        tooltip=[
            alt.Tooltip("place:Q"),
            alt.Tooltip("left:N"),
            alt.Tooltip("right:N"),
            alt.Tooltip("low:Q", format=".4f", title="at least"),
            alt.Tooltip("high:Q", format=".4f", title="at most"),
        ],
    )
    size = max(1.0, min(14.0, 420 / float(frame["place"].max())))
    scale = alt.Scale(domain=[0, 1])
    colour = alt.Color(
        "token:N",
        title=None,
        scale=_SAMENESS,
        legend=alt.Legend(**LEGEND, symbolOpacity=1),
    )
    may = base.mark_bar(size=size, opacity=0.3).encode(
        y=alt.Y(
            "low:Q",
            title="total variation",
            scale=scale,
            axis=alt.Axis(values=[0, 0.25, 0.5, 0.75, 1]),
        ),
        y2="high:Q",
        color=colour,
    )
    sure = base.mark_bar(size=size).encode(y=alt.Y("low:Q", scale=scale), color=colour)
    parts = [may, sure]
    if divergence is not None:
        mark = alt.Chart(pd.DataFrame([{"place": divergence - 0.5}]))
        parts.append(
            mark.mark_rule(color="gray", strokeDash=[4, 3], strokeWidth=1.5).encode(x="place:Q")
        )
    told = "Total variation between the two replies' distributions, place by place"
    return _drawn(alt.LayerChart(layer=parts), 240, told)


def growth(rows: Sequence[Json]) -> alt.Chart:
    """A store's data over the time of its replies, running totals, stacked by kind."""
    scale, unit = _unit(max(row["bytes"] for row in rows))
    frame = pd.DataFrame(rows)
    frame["amount"] = frame["bytes"] / scale
    chart: alt.Chart = (
        alt.Chart(frame)
        .mark_area(interpolate="step-after", line=True, opacity=0.75)
        .encode(
            x=alt.X(
                "when:T",
                title=None,
                axis=alt.Axis(
                    grid=False, tickCount=6, labelFlush=True, format=_moments(frame["when"])
                ),
            ),
            y=alt.Y("amount:Q", stack=True, title=unit, axis=alt.Axis(tickCount=5)),
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
    return _drawn(chart, HEIGHT, "The store's data over time: rows and full tensors")


def _unit(most: float) -> tuple[float, str]:
    """The factor and the name of the unit in which ``most`` bytes are told."""
    for factor, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if most >= factor:
            return factor, name
    return 1.0, "B"


def _moments(when: pd.Series[Any]) -> str:
    """How times are told on an axis: as finely as the span of them needs, and no finer."""
    span = when.max() - when.min()
    if span < dt.timedelta(minutes=5):
        return "%H:%M:%S"
    if span < dt.timedelta(days=1):
        return "%H:%M"
    return "%b %d, %H:%M" if span < dt.timedelta(days=4) else "%b %d"


Drawn = TypeVar("Drawn", alt.Chart, alt.LayerChart)


def _drawn(chart: Drawn, height: int, told: str) -> Drawn:
    """So high, called so by a screen reader, and as SVG, which stays sharp and can be saved."""
    found: Drawn = chart.properties(
        height=height, description=told, usermeta={"embedOptions": {"renderer": "svg"}}
    )
    return found


# In the order of the theme's categories: the accent is what differs.
_SAMENESS = alt.Scale(domain=["different tokens", "the same token"])


def _layers() -> alt.X:
    return alt.X("layer:Q", title="layer", axis=alt.Axis(tickMinStep=1, grid=False))


def _ranks(known: pd.DataFrame) -> alt.Y:
    worst = max([10, *known["rank"].astype(int)])
    return alt.Y(
        "rank:Q",
        title="rank",
        scale=alt.Scale(type="log", domain=[worst, 1], nice=False),
        axis=alt.Axis(values=[10**n for n in range(7) if 10**n <= worst], format="~s"),
    )


def _probs() -> alt.Y:
    return alt.Y("prob:Q", title="probability", scale=alt.Scale(domain=[0, 1]))
