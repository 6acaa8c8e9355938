"""Elements that several pages share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from dashboard import components, url_state
from dashboard.viewdata import replies, wording
from oki_trace.errors import OkiTraceError
from oki_trace.records import Conversation, Message

if TYPE_CHECKING:  # Altair is slow to import, and not every page has charts
    import altair as alt

T = TypeVar("T")


# The session key that says that widgets may not have reached the browser.
UNSENT = "unsent"


def seed(key: str, value: object, changed: bool) -> str:
    """Set the widget ``key`` to ``value`` if that has ``changed``, or the widget is new.

    A value in the session state is sent to the browser once, and lost when a click
    interrupts the run that sends it. It is set again until a run of a page has ended.
    """
    state = st.session_state
    if changed or key not in state:
        state[key] = value
        state[UNSENT] = True
    elif UNSENT in state:
        state[key] = state[key]
    return key


def open_page(name: str, query: Mapping[str, object]) -> None:
    """Leave for another page, with these parameters in its URL."""
    parameters = {key: str(value) for key, value in query.items()}
    st.switch_page(st.session_state["pages"][name], query_params=parameters)


def open_in_chat(place: url_state.Location, key: str) -> None:
    """A button that opens ``place`` in the chat."""
    if st.button("Open in chat", icon=":material/chat:", key=f"open-{key}", type="tertiary"):
        open_page("chat", place.query())


def empty_state(nothing: str, then: str) -> None:
    """``No replies yet. Start a chat, then …``, and a button that opens the chat."""
    st.write(f"No {nothing} yet. Start a chat, then {then} here.")
    if "pages" in st.session_state and st.button(
        "Start a chat", icon=":material/chat:", type="primary"
    ):
        open_page("chat", {})


def choose_conversation(title: str, note: str, then: str, offered: Sequence[Conversation]) -> None:
    """A page without an open conversation: those to choose from, or how to make the first."""
    st.title(title)
    if not offered:
        empty_state("replies", then)
        return
    st.caption(note)
    with st.container(key="recent", gap=None):
        for one in offered:
            if st.button(wording.escape(one.title[:80]), key=f"choose-{one.id}", type="tertiary"):
                url_state.navigate(url_state.Location(one.id))
                st.rerun()


@contextmanager
def errors_shown() -> Iterator[None]:
    """Shows an error that a user can fix, in place of the rest of the block."""
    try:
        yield
    except OkiTraceError as error:
        st.error(wording.sentence(str(error)))


def row(
    key: str,
    *,
    align: Literal["center", "bottom"] = "center",
    place: Literal["left", "right", "distribute"] = "left",
) -> DeltaGenerator:
    """A row of elements, at one of its sides or distributed over its width."""
    return st.container(
        horizontal=True,
        horizontal_alignment=place,
        vertical_alignment=align,
        key=key,
    )


def title_row(title: str) -> DeltaGenerator:
    """A row with ``title`` on the left, to add elements to on its right."""
    heading = row("heading", place="distribute")
    heading.text(title[:200])
    return heading


def section_row(title: str, key: str) -> DeltaGenerator:
    """A row with the heading of a section, to add elements to."""
    heading = row(key)
    heading.markdown(f"#### {title}", width="content")
    return heading


def wait_for_click(noun: str, note: str, key: str, *, on_click: Callable[[], None]) -> None:
    """A button that runs what a link asks for, after a note on it."""
    with st.container(border=True):
        st.write(f"This {noun} came from a link. {note}")
        st.button(f"Run {noun}", icon=":material/play_arrow:", key=key, on_click=on_click)


def choice(label: str, options: Sequence[T], key: str) -> T:
    """One of ``options`` as buttons, the first one at first; ``label`` is for screen readers."""
    return st.segmented_control(
        label, options, default=options[0], required=True, key=key, label_visibility="collapsed"
    )


def pick(label: str, names: Sequence[str], key: str, hint: str, width: int) -> int | None:
    """The number of one of ``names``, none at first: for the keyboard, beside a table."""
    chosen: int | None = st.selectbox(
        label,
        range(len(names)),
        index=None,
        format_func=names.__getitem__,
        key=key,
        placeholder=hint,
        label_visibility="collapsed",
        width=width,
    )
    return chosen


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
    icon = ":material/download:"
    st.download_button(f"Export {name}", make, file, key=key, icon=icon, on_click="ignore", **more)


def check_warning(message: Message) -> None:
    """A warning if the checks of a reply failed."""
    warning = replies.check_warning(message)
    if warning:
        st.warning(wording.escape(warning), icon=":material/warning:")
