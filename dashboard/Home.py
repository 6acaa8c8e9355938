"""The explorer's front door: ``streamlit run dashboard/Home.py``."""

from __future__ import annotations

import sys
from pathlib import Path

# Streamlit puts this folder on the path, and runs this file at every click; the
# pages import it as a package.
ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

import streamlit as st  # noqa: E402

from dashboard import data, look  # noqa: E402
from dashboard.views import (  # noqa: E402
    chat,
    compare,
    conversations,
    questions,
    reply_map,
    sql,
    store,
)

st.set_page_config(page_title="oki-trace", page_icon="🔎", layout="wide")
look.logo()
look.apply()
look.warn_of_strangers()
data.open_store()

pages = {
    "chat": st.Page(chat.page, title="Chat", icon=":material/chat:", default=True),
    "map": st.Page(reply_map.page, title="Reply map", icon=":material/grid_on:", url_path="map"),
    "conversations": st.Page(
        conversations.page,
        title="Conversations",
        icon=":material/forum:",
        url_path="conversations",
    ),
    "compare": st.Page(
        compare.page, title="Compare", icon=":material/compare_arrows:", url_path="compare"
    ),
    "questions": st.Page(
        questions.page, title="Questions", icon=":material/query_stats:", url_path="questions"
    ),
    "sql": st.Page(sql.page, title="SQL", icon=":material/terminal:", url_path="sql"),
    "store": st.Page(store.page, title="Store", icon=":material/database:", url_path="store"),
}
st.session_state["pages"] = pages
# The first page has no path of its own; who types the one that the others suggest finds it too.
typed = st.Page(chat.typed, title="Chat", url_path="chat", visibility="hidden")
st.navigation([*pages.values(), typed]).run()
