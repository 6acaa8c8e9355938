"""What a page gave its own elements to draw; AppTest knows them not."""

from __future__ import annotations

import json
from typing import Any

from streamlit.testing.v1 import AppTest


def shown(app: AppTest, key: str) -> dict[str, Any]:
    """What one of the explorer's own elements was given to draw."""
    elements = (e.proto for e in app.main if type(e).__name__ == "UnknownElement")
    proto = next(p for p in elements if getattr(p, "id", "").endswith(f"-{key}"))
    drawn: dict[str, Any] = json.loads(proto.json)
    return drawn
