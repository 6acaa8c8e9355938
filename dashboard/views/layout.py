"""Elements that several pages share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from dashboard import components
from dashboard.viewdata import replies, wording
from oki_trace.records import Message

if TYPE_CHECKING:  # Altair is slow to import, and not every page has charts
    import altair as alt

T = TypeVar("T")


def open_page(name: str, query: Mapping[str, object]) -> None:
    """Leave for another page, with these parameters in its URL."""
    parameters = {key: str(value) for key, value in query.items()}
    st.switch_page(st.session_state["pages"][name], query_params=parameters)


def empty_state(nothing: str, then: str) -> None:
    """``No replies yet. Start a chat, then …``, and a button that opens the chat."""
    st.write(f"No {nothing} yet. Start a chat, then {then} here.")
    if "pages" in st.session_state and st.button(
        "Start a chat", icon=":material/chat:", type="primary"
    ):
        open_page("chat", {})


def title_row(title: str, key: str = "heading") -> DeltaGenerator:
    """A row with ``title`` on the left, to add elements to on its right."""
    row = st.container(
        horizontal=True,
        horizontal_alignment="distribute",
        vertical_alignment="center",
        key=key,
    )
    row.text(title[:200])
    return row


def section_row(title: str, key: str) -> DeltaGenerator:
    """A row with the heading of a section, to add elements to."""
    row = st.container(horizontal=True, vertical_alignment="center", key=key)
    row.markdown(f"#### {title}", width="content")
    return row


def choice(label: str, options: Sequence[T], key: str) -> T:
    """One of ``options`` as buttons, the first one at first; ``label`` is for screen readers."""
    return st.segmented_control(
        label,
        options,
        default=options[0],
        required=True,
        key=key,
        label_visibility="collapsed",
    )


def chart(
    drawn: alt.Chart | alt.LayerChart, rows: Sequence[wording.Json], key: str, name: str
) -> None:
    """A chart made from ``rows``, with buttons that save it as files called ``name``."""
    within = f"picture-{key}"
    components.picture(
        data={"within": f"st-key-{within}", "name": name, "rows": wording.csv_rows(rows)},
        key=f"save-{key}",
    )
    with st.container(key=within):
        st.altair_chart(drawn, key=key)


def export_button(
    name: str, make: Callable[[], str | bytes], file: str, key: str, **more: Any
) -> None:
    """A button that saves what ``make`` returns, which is called on a click."""
    st.download_button(
        f"Export {name}",
        make,
        file,
        key=key,
        icon=":material/download:",
        on_click="ignore",
        **more,
    )


def check_warning(message: Message) -> None:
    """A warning if the checks of a reply failed."""
    warning = replies.check_warning(message)
    if warning:
        st.warning(wording.escape(warning), icon=":material/warning:")
