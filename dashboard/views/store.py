"""Store: where the traces are, how much room they take and for what."""

from __future__ import annotations

import streamlit as st

from dashboard import data


def page() -> None:
    """Draw the page."""
    st.title("Store")
    info = data.info()
    st.code(info.url, language=None)
    tiles = (
        ("On disk", _size(info.bytes), "All the store's files"),
        ("Rows", _size(info.row_bytes), "Tokens, candidates, attention and lens"),
        ("Full tensors", _size(info.tensor_bytes), "Logits, hidden states and attention"),
        ("Log", _size(info.log_bytes), "Repeats some of the data until it is folded in"),
        ("Free", _size(info.free_bytes), "Left by what was deleted; used again"),
        ("A token's rows", _size(info.row_bytes_per_token), "On average"),
        ("A token's tensors", _size(info.tensor_bytes_per_token), "Of tokens that have them"),
        ("Conversations", f"{info.conversations:,}", None),
        ("Messages", f"{info.messages:,}", None),
        ("Steps", f"{info.steps:,}", None),
    )
    with st.container(horizontal=True):
        for name, value, meaning in tiles:
            st.metric(name, value, border=True, help=meaning, width=200)
    st.caption(f"Schema {info.schema}.")


def _size(count: float) -> str:
    """A number of bytes as people say it."""
    if count >= 1e9:
        return f"{count / 1e9:,.1f} GB"
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"
