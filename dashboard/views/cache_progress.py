"""Before a question: a store with something to ask of, and a cache in step with it."""

from __future__ import annotations

import streamlit as st

from dashboard import boundary, data
from dashboard.views import empty_state
from oki_trace.errors import OkiTraceError

# Less is not noticed; more is told of, and drawn as it goes.
WAIT_S = 0.5


def ready() -> bool:
    """Whether questions can be asked now; if not, the page says how far it is. StoreError."""
    if not any(c.tokens for c in data.recent(50)):
        empty_state.first_trace("No replies yet. Start a chat, then query it here.")
        return False
    left = data.behind(WAIT_S)
    if left is not None:
        boundary.part(_progress, run_every=WAIT_S)()
    return left is None


def _progress() -> None:
    try:
        left = data.behind(0.1)
    except OkiTraceError:
        left = None  # told by the page
    if left is None:
        st.rerun()
        return
    done, of_all = left
    st.progress(
        done / of_all if of_all else 0.0,
        text=f"Reading what is new in the store: {done:,} of {of_all:,} messages.",
    )
    st.caption("Each message is read once. It goes on when you leave this page.")
