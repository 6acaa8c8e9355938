"""The explorer's front door: ``streamlit run dashboard/Home.py``."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

# Streamlit puts this folder on the path, and runs this file at every click; the
# pages import it as a package.
ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

import streamlit as st  # noqa: E402

from dashboard import data, look  # noqa: E402


def page(view: str, title: str, icon: str, **more: Any) -> Any:
    """A page, whose view is loaded when it is opened first: none waits for another's libraries."""

    def draw() -> None:
        import_module(f"dashboard.views.{view}").page()

    draw.__name__ = f"{view}_page"
    return st.Page(draw, title=title, icon=f":material/{icon}:", **more)


st.set_page_config(page_title="oki-trace", page_icon="🔎", layout="wide")
look.logo()
look.apply()
look.warn_of_strangers()
data.open_store()

pages = {
    "chat": page("chat", "Chat", "chat", default=True),
    "map": page("reply_map", "Reply map", "grid_on", url_path="map"),
    "conversations": page("conversations", "Conversations", "forum", url_path="conversations"),
    "compare": page("compare", "Compare", "compare_arrows", url_path="compare"),
    "questions": page("questions", "Questions", "query_stats", url_path="questions"),
    "sql": page("sql", "SQL", "terminal", url_path="sql"),
    "store": page("store", "Store", "database", url_path="store"),
}
st.session_state["pages"] = pages
# The first page has no path of its own; who types the one that the others suggest finds it too.
typed = page("chat", "Chat", "chat", url_path="chat", visibility="hidden")
st.navigation([*pages.values(), typed]).run()
