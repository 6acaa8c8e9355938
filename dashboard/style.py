"""The CSS of the pages, on top of the theme in ``.streamlit/config.toml``."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from oki_trace.launcher import is_loopback


def logo() -> None:
    """The logo in the colours of the current theme."""
    st.logo(Path(__file__).with_name(f"logo-{_theme()}.svg"), size="large")


def apply() -> None:
    """Add the CSS to the page."""
    # Streamlit defines CSS variables for its colours only inside components.
    back, line, focus = (
        str(st.get_option(f"theme.{_theme()}.{name}") or fallback)
        for name, fallback in (
            ("backgroundColor", "Canvas"),
            ("borderColor", "GrayText"),
            ("primaryColor", "Highlight"),
        )
    )
    css = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    variables = f":root {{ --oki-back: {back}; --oki-line: {line}; --oki-focus: {focus}; }}"
    st.html(f"<style>{variables}\n{css}</style>")


def warn_if_public() -> None:
    """Warn on every page if other machines can reach the explorer."""
    address = st.get_option("server.address")
    if address is None or not is_loopback(str(address)):
        st.warning(
            "Other machines can reach this explorer, and it has no password: anyone who finds it "
            "can read and delete every conversation.",
            icon=":material/public:",
        )


def _theme() -> str:
    return "dark" if st.context.theme.type == "dark" else "light"
