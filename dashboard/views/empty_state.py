"""Where a page has nothing to show yet: the way to a first trace."""

from __future__ import annotations

import streamlit as st


def first_trace(why: str) -> None:
    """Say why the page is empty, and lead to the chat."""
    st.write(why)
    pages = st.session_state.get("pages")
    if pages and st.button("Begin in Chat", icon=":material/chat:", type="primary"):
        st.switch_page(pages["chat"])
