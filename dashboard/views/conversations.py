"""Conversations: browse and search the past ones."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from dashboard import data

PAGE_SIZE = 50


def page() -> None:
    """Draw the page."""
    st.title("Conversations")
    with st.container(horizontal=True, vertical_alignment="bottom"):
        search = st.text_input(
            "Search", key="search", placeholder="text in titles and messages", width=420
        )
        number = st.number_input("Page", 1, None, 1, key="page", width=120)
    found = data.find(search.strip(), PAGE_SIZE, (int(number) - 1) * PAGE_SIZE)
    if not found:
        if search:
            st.caption("Nothing found.")
        elif number > 1:
            st.caption("No conversations on this page.")
        else:
            st.caption("No conversations yet: begin one in Chat.")
        return
    frame = pd.DataFrame(
        {
            "id": [c.id for c in found],
            "title": [c.title for c in found],
            "when": [c.updated_at for c in found],
            "model": [", ".join(c.model_ids) for c in found],
            "messages": [c.messages for c in found],
            "tokens": [c.tokens for c in found],
            "status": [str(c.status) for c in found],
        }
    )
    chosen = st.dataframe(
        frame,
        hide_index=True,
        on_select="rerun",
        selection_mode="single-cell",
        key="conversations",
        column_config={
            "id": st.column_config.NumberColumn(width="small"),
            "title": st.column_config.TextColumn(width="medium"),
            "when": st.column_config.DatetimeColumn(format="distance"),
        },
    )
    cells = chosen.selection.cells
    if cells:
        row = cells[0][0]
        pages = st.session_state["pages"]
        st.switch_page(pages["chat"], query_params={"conversation": str(found[row].id)})
    st.caption("Click a row to open it.")
