"""The explorer's own components, drawn in the browser.

Each is a JavaScript file that gets plain data and writes it with ``textContent``
alone, so that no text of a model becomes markup. Clicks come back as triggers. The
theme comes from Streamlit's CSS variables.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import streamlit as st

_FOLDER = Path(__file__).parent


def _component(name: str, *parts: str) -> Callable[..., Any]:
    """The component ``name``; ``parts`` are further files of its script."""

    def read(file: str) -> str:
        return (_FOLDER / file).read_text(encoding="utf-8")

    return st.components.v2.component(
        f"oki_trace_{name}",
        html=f'<div class="root {name}"></div>',
        css=read("shared.css") + read(f"{name}.css"),
        js="".join(read(f"{part}.js") for part in ("shared", *parts, name)),
    )


bubble = _component("bubble")
reply = _component("reply")
facts = _component("facts")
bars = _component("bars")
evidence = _component("evidence")
lens = _component("lens")
changes = _component("changes")
reply_map = _component("map", "map_cells", "map_paint", "map_save")
compare = _component("compare")
table = _component("table")
picture = _component("picture")
rows = _component("rows")
amounts = _component("amounts")
tree = _component("tree")
paths = _component("paths")
