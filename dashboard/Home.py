"""The explorer's front door: ``streamlit run dashboard/Home.py``.

It is two things. Streamlit's command finds ``app`` here and serves it: the server,
with our guard around it. For each window that server then runs this file as a
script, which draws the page.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Streamlit puts this folder on the path, and runs this file at every click; the
# pages import it as a package.
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
        """Tell what went wrong outside of every view, as in a click's callback."""
        from dashboard import boundary

        return boundary.uncaught(error)

    app = st.App(__file__, middleware=[Middleware(Guard)], on_script_error=uncaught)
