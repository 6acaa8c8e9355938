"""The empty state of a page: what will appear on it, and the button that leads there."""

from __future__ import annotations

import streamlit as st


def first_trace(nothing: str, then: str) -> None:
    """``No replies yet. Start a chat, then …``, and a button that opens the chat."""
    st.write(f"No {nothing} yet. Start a chat, then {then} here.")
    pages = st.session_state.get("pages")
    if pages and st.button("Start a chat", icon=":material/chat:", type="primary"):
        st.switch_page(pages["chat"])
