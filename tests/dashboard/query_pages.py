"""The Questions and SQL pages as AppTest runs them."""

from __future__ import annotations

from typing import Any

from streamlit.testing.v1 import AppTest


def page(name: str, **query: Any) -> AppTest:
    def draw(name: str) -> None:
        import importlib

        importlib.import_module(f"dashboard.views.{name}").page()

    app = AppTest.from_function(draw, default_timeout=60, args=(name,))
    for key, value in query.items():
        app.query_params[key] = str(value)
    return app.run()


def questions(**query: Any) -> AppTest:
    """The page as a link opens it, and asked where it waits for a click."""
    return clicked(page("questions", **query), "ask-link")


def sql(**query: Any) -> AppTest:
    return clicked(page("sql", **query), "sql-run-link")


def clicked(app: AppTest, key: str) -> AppTest:
    found = [button for button in app.button if button.key == key]
    return found[0].click().run() if found else app


def charts(app: AppTest) -> int:
    return len(app.get("vega_lite_chart")) + len(app.get("arrow_vega_lite_chart"))


def address(app: AppTest) -> dict[str, str]:
    found = dict(app.query_params)
    return {k: v[0] if isinstance(v, list) else v for k, v in found.items()}
