"""The state of the query cache, for the pages that query it."""

from __future__ import annotations

import streamlit as st

from dashboard import boundary, data
from dashboard.views import layout
from oki_trace.errors import OkiTraceError

# A shorter sync is not shown; a longer one shows its progress.
WAIT_S = 0.5


def ready() -> bool:
    """Whether the cache is up to date; if not, the page shows why. Raises StoreError."""
    if not any(c.model_ids for c in data.recent_conversations(50)):
        layout.empty_state("replies", "query it")
        return False
    backlog = data.cache_backlog(WAIT_S)
    if backlog is not None:
        boundary.part(_progress, run_every=WAIT_S)()
    return backlog is None


def _progress() -> None:
    try:
        backlog = data.cache_backlog(0.1)
    except OkiTraceError:
        backlog = None  # the page shows the error
    if backlog is None:
        st.rerun()
    done, of_all = backlog
    st.progress(
        done / of_all if of_all else 0.0,
        text=f"Reading the store: {done:,} of {of_all:,} messages.",
    )
    st.caption("Each message is read once. Reading continues when you leave this page.")
