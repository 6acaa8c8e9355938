"""Streamlit, with what the pages need loaded before it answers.

``python dashboard/serve.py run dashboard/Home.py`` is ``streamlit run dashboard/Home.py``,
but whoever opens the first page does not wait for libraries.
"""

from __future__ import annotations

import gc
import logging
import sys
from importlib import import_module
from pathlib import Path

from streamlit.runtime.caching import cache_data_api
from streamlit.web import cli

# This file is run by its path, and the pages import each other as a package.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

# The page that opens first and all that it draws with, then the others.
PARTS = (
    *(
        "dashboard.navigation",
        "dashboard.data",
        "dashboard.views.chat",
        "streamlit.emojis",
        "dashboard.charts",
    ),
    *("dashboard.views.chart_panel", "oki_trace.store.schema.migrate"),
    *(f"dashboard.views.{name}" for name in ("conversations", "compare", "questions", "sql")),
)


def load() -> None:
    """Import the pages and their libraries, draw a chart, and have it all kept."""
    # Every cached function says once that no server runs yet, which is as it should be.
    caching = logging.getLogger(cache_data_api.__name__)
    level = caching.level
    caching.setLevel(logging.ERROR)
    for part in PARTS:
        import_module(part)
    caching.setLevel(level)
    charts = import_module("dashboard.charts")
    charts.by_layer([{"layer": 0, "entropy": 0.0, "kl": 0.0}]).to_dict()
    # Else the first page does it: see data.open_store.
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    load()
    sys.exit(cli.main())
