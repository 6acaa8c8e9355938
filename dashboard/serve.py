"""``streamlit`` with the pages' libraries imported in advance, so the first page opens at once.

``python dashboard/serve.py run dashboard/Home.py`` is ``streamlit run dashboard/Home.py``.
Private names of Streamlit are used in this module alone: the logger of its cache, its
table of emojis and its command.
"""

from __future__ import annotations

import gc
import logging
import sys
from importlib import import_module
from pathlib import Path

from streamlit.runtime.caching import cache_data_api
from streamlit.web import cli

# This file runs by its path; the pages import each other as a package.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

# The page that opens first, then the others.
MODULES = (
    *("dashboard.navigation", "dashboard.views.chat", "streamlit.emojis", "dashboard.charts"),
    *(f"dashboard.views.{name}" for name in ("conversations", "compare", "questions", "sql")),
)


def load() -> None:
    """Import the pages and their libraries, and draw a chart."""
    # Without a server, every cached function warns that it caches in memory.
    logger = logging.getLogger(cache_data_api.__name__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    for name in MODULES:
        import_module(name)
    logger.setLevel(level)
    charts = import_module("dashboard.charts")
    charts.entropy_and_kl([{"layer": 0, "entropy": 0.0, "kl": 0.0}]).to_dict()
    # Before the first page does: see data.open_store.
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    load()
    sys.exit(cli.main())
