"""The common frame of all pages: style and navigation."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import streamlit as st

from dashboard import boundary, data, style


def run() -> None:
    """Draw the page that is open."""
    st.set_page_config(page_title="oki-trace", page_icon="🔎", layout="wide")
    style.logo()
    style.apply()
    style.warn_if_public()
    pages = {
        "chat": _page("chat", "Chat", "chat", default=True),
        "map": _page("reply_map", "Reply map", "grid_on", url_path="map"),
        "branches": _page("tree", "Branches", "account_tree", url_path="branches"),
        "conversations": _page("conversations", "Conversations", "forum", url_path="conversations"),
        "compare": _page("compare", "Compare", "compare_arrows", url_path="compare"),
        "questions": _page("questions", "Questions", "query_stats", url_path="questions"),
        "sql": _page("sql", "SQL", "terminal", url_path="sql"),
        "store": _page("store", "Store", "database", url_path="store"),
    }
    st.session_state["pages"] = pages
    # The first page has no path; /chat, which the other paths suggest, leads to it as well.
    typed = _page("chat", "Chat", "chat", url_path="chat", visibility="hidden")
    st.navigation([*pages.values(), typed]).run()


def _page(view: str, title: str, icon: str, **more: Any) -> Any:
    """A page that imports its view when it is first opened: none waits for another's libraries."""

    def draw() -> None:
        data.open_store()
        import_module(f"dashboard.views.{view}").page()

    drawn = boundary.page(draw)
    drawn.__name__ = f"{view}_page"
    return st.Page(drawn, title=title, icon=f":material/{icon}:", **more)
