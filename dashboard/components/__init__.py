"""The explorer's own elements, drawn in the browser.

Each is one JavaScript file that gets plain data and writes it with
``textContent`` alone: what a model wrote can be no markup here. A click comes
back as a trigger. They follow the theme through Streamlit's CSS variables.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import streamlit as st

_FOLDER = Path(__file__).parent


def _component(name: str) -> Callable[..., Any]:
    def read(file: str) -> str:
        return (_FOLDER / file).read_text(encoding="utf-8")

    return st.components.v2.component(
        f"oki_trace_{name}",
        html=f'<div class="root {name}"></div>',
        css=read("shared.css") + read(f"{name}.css"),
        js=read("shared.js") + read(f"{name}.js"),
    )


bubble = _component("bubble")
reply = _component("reply")
facts = _component("facts")
bars = _component("bars")
evidence = _component("evidence")
lens = _component("lens")
changes = _component("changes")
reply_map = _component("map")
compare = _component("compare")
table = _component("table")
picture = _component("picture")
