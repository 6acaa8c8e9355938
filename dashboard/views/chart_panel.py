"""A chart, and the buttons that save it: as CSV, PNG and SVG."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import streamlit as st

from dashboard import components
from dashboard.viewdata import replies


def chart(
    drawn: alt.Chart | alt.LayerChart, rows: Sequence[replies.Json], key: str, name: str
) -> None:
    """Draw it; ``rows`` are what it was made of, ``name`` is what its files are called."""
    within = f"picture-{key}"
    components.picture(
        data={"within": f"st-key-{within}", "name": name, "rows": replies.sheet(rows)},
        key=f"save-{key}",
    )
    with st.container(key=within):
        st.altair_chart(drawn, key=key)
