"""Pictures as pure functions: records in, an Altair chart out."""

from __future__ import annotations

import altair as alt
import pandas as pd

from oki_trace.records import Lens


def trajectory(lens: Lens, token: str) -> alt.Chart:
    """The chosen token's rank through the layers, rank 1 on top, on a log scale."""
    frame = pd.DataFrame(
        {
            "layer": range(len(lens.chosen_rank)),
            "rank": lens.chosen_rank,
            "prob": lens.chosen_prob,
            "entropy": lens.entropy,
        }
    )
    worst = max(10, int(lens.chosen_rank.max()))
    base = alt.Chart(frame).encode(
        x=alt.X("layer:Q", title="layer", axis=alt.Axis(tickMinStep=1, grid=False)),
        y=alt.Y(
            "rank:Q",
            title=f"rank of {token}",
            scale=alt.Scale(type="log", domain=[worst, 1], nice=False),
            axis=alt.Axis(values=[10**n for n in range(7) if 10**n <= worst], format="~s"),
        ),
        tooltip=[
            alt.Tooltip("layer:Q"),
            alt.Tooltip("rank:Q", format=","),
            alt.Tooltip("prob:Q", format=".4f"),
            alt.Tooltip("entropy:Q", format=".2f", title="entropy (nats)"),
        ],
    )
    line: alt.Chart = base.mark_line(point=alt.OverlayMarkDef(size=28, filled=True), strokeWidth=2)
    return line.properties(height=170)
