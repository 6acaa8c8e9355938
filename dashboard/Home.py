"""The entry point of the explorer: ``streamlit run dashboard/Home.py``.

Streamlit imports this file once and serves its ``app``, the server with our guard
around it. For each window the server then runs this file as a script, which draws
the page.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Streamlit puts this folder on the path; the pages import it as a package.
ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

if __name__ == "__main__":
    from dashboard import navigation

    navigation.run()
else:
    import streamlit as st
    from starlette.middleware import Middleware

    from dashboard.guard import Guard

    def uncaught(error: Exception) -> bool:
        """Show an error outside of every view, such as in the callback of a click."""
        from dashboard import boundary

        return boundary.uncaught(error)

    app = st.App(__file__, middleware=[Middleware(Guard)], on_script_error=uncaught)
