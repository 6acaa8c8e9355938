"""Store: where the traces are and how much room they take."""

from __future__ import annotations

import streamlit as st

from dashboard import data


def page() -> None:
    """Draw the page."""
    st.title("Store")
    info = data.info()
    st.code(info.url, language=None)
    tiles = (
        ("Size", f"{info.bytes / 1e6:,.1f} MB"),
        ("Full tensors", f"{info.tensor_bytes / 1e6:,.1f} MB"),
        ("A token takes", f"{info.bytes / info.steps / 1e3:,.0f} kB" if info.steps else "–"),
        ("Conversations", f"{info.conversations:,}"),
        ("Messages", f"{info.messages:,}"),
        ("Steps", f"{info.steps:,}"),
    )
    for start in (0, 3):
        for column, (name, value) in zip(st.columns(3), tiles[start : start + 3], strict=True):
            column.metric(name, value, border=True)
    st.caption(f"Schema {info.schema}.")
