"""A chart with buttons that save it as CSV, PNG and SVG."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import streamlit as st

from dashboard import components
from dashboard.viewdata import wording


def chart(
    drawn: alt.Chart | alt.LayerChart, rows: Sequence[wording.Json], key: str, name: str
) -> None:
    """Draw ``drawn``, which was made from ``rows``; ``name`` is the name of its files."""
    within = f"picture-{key}"
    components.picture(
        data={"within": f"st-key-{within}", "name": name, "rows": wording.csv_rows(rows)},
        key=f"save-{key}",
    )
    with st.container(key=within):
        st.altair_chart(drawn, key=key)
