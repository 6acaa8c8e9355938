"""Pages as AppTest runs them, and what they gave their own elements to draw, which it knows not.

AppTest follows no navigation: a page beside the first is run by itself.
"""

from __future__ import annotations

import json
from typing import Any

from streamlit.testing.v1 import AppTest

from tests.dashboard import server


def shown(app: AppTest, key: str) -> dict[str, Any]:
    """What one of the explorer's own elements was given to draw."""
    elements = (e.proto for e in app.main if type(e).__name__ == "UnknownElement")
    proto = next(p for p in elements if getattr(p, "id", "").endswith(f"-{key}"))
    drawn: dict[str, Any] = json.loads(proto.json)
    return drawn


def plainly(text: str) -> str:
    """Without what keeps a text from being read as Markdown."""
    return text.replace("\\", "").replace("\u2060", "")


def chat(**query: int) -> AppTest:
    app = AppTest.from_file(str(server.HOME), default_timeout=60)
    for name, value in query.items():
        app.query_params[name] = str(value)
    return app.run()


def conversations() -> AppTest:
    def page() -> None:
        from dashboard.views import conversations

        conversations.page()

    return AppTest.from_function(page, default_timeout=60).run()


def wide_map(**query: int) -> AppTest:
    def page() -> None:
        from dashboard.views import reply_map

        reply_map.page()

    app = AppTest.from_function(page, default_timeout=60)
    for name, value in query.items():
        app.query_params[name] = str(value)
    return app.run()


def drawn(app: AppTest) -> int:
    """How many of the explorer's own elements are on the page; AppTest knows them not."""
    return sum(type(element).__name__ == "UnknownElement" for element in app.main)


def acting(*conversations: int) -> AppTest:
    """What can be done with these conversations; AppTest ticks no rows."""

    def page(ids: tuple[int, ...]) -> None:
        from dashboard import data
        from dashboard.views import conversations

        found = [data.conversation(number) for number in ids]
        conversations.actions([one[0] for one in found if one])

    return AppTest.from_function(page, default_timeout=60, args=(conversations,)).run()


def comparing(*replies: int, **query: int) -> AppTest:
    def page() -> None:
        from dashboard.views import compare

        compare.page()

    app = AppTest.from_function(page, default_timeout=60)
    for side, reply in zip(("left", "right"), replies, strict=False):
        app.query_params[side] = str(reply)
    for name, value in query.items():
        app.query_params[name] = str(value)
    return app.run()
