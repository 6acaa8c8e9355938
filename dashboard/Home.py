"""The explorer's front door: ``streamlit run dashboard/Home.py``."""

from __future__ import annotations

import sys
from pathlib import Path

# Streamlit puts this folder on the path; the pages import it as a package.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import streamlit as st

from dashboard import data, look
from dashboard.views import chat, conversations, store

st.set_page_config(page_title="oki-trace", page_icon="🔎", layout="wide")
st.logo(Path(__file__).with_name("logo.svg"), size="large")
look.apply()
data.open_store()

pages = {
    "chat": st.Page(chat.page, title="Chat", icon=":material/chat:", url_path="chat", default=True),
    "conversations": st.Page(
        conversations.page,
        title="Conversations",
        icon=":material/forum:",
        url_path="conversations",
    ),
    "store": st.Page(store.page, title="Store", icon=":material/database:", url_path="store"),
}
st.session_state["pages"] = pages
st.navigation(list(pages.values())).run()
