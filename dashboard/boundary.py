"""Error boundaries around pages and their parts: an error becomes one sentence and a button.

A known error, such as a store that cannot be read, shows its own sentence; an unexpected
error also shows its traceback, which can be copied. Streamlit's own error box is never
shown: it offers web searches that contain the message.
"""

from __future__ import annotations

import functools
import logging
import platform
import traceback
from collections.abc import Callable
from importlib.metadata import version
from typing import ParamSpec

import streamlit as st

from dashboard import data
from dashboard.viewdata import wording
from dashboard.views import layout
from oki_trace.errors import OkiTraceError
from oki_trace.sanitize import inert

P = ParamSpec("P")

_LOG = logging.getLogger(__name__)

# Errors of the parts, while the whole page is drawn.
_COLLECTING = "boundary-collecting"
# The traceback of a deep recursion is cut.
_MOST_CHARACTERS = 20_000


class _PartFailed(Exception):
    """A part of the page failed with ``cause``, which the page shows once."""

    def __init__(self, cause: Exception) -> None:
        super().__init__()
        self.cause = cause


def page(draw: Callable[[], None]) -> Callable[[], None]:
    """``draw``, of a whole page, with an error boundary around it."""

    @functools.wraps(draw)
    def drawn() -> None:
        try:
            draw()
            st.session_state.pop(layout.UNSENT, None)
        except _PartFailed as failed:
            _show(failed.cause, "page")
        except Exception as error:
            _show(error, "page")

    return drawn


def part(draw: Callable[P, None], *, run_every: float | None = None) -> Callable[P, None]:
    """``draw`` as a fragment, which reruns alone: on a click, or every ``run_every`` seconds.

    If parts fail while the page is drawn, the page shows the first error and ends. A part
    that fails in a later rerun shows the error in its own place.
    """
    name = f"{draw.__module__}.{draw.__qualname__}"

    @functools.wraps(draw)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            draw(*args, **kwargs)
        except Exception as error:
            collecting: list[Exception] | None = st.session_state.get(_COLLECTING)
            if collecting is None:
                _show(error, name)
            else:
                collecting.append(error)

    fragment = st.fragment(guarded, run_every=run_every)

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> None:
        failed: list[Exception] = []
        st.session_state[_COLLECTING] = failed
        try:
            fragment(*args, **kwargs)
        finally:
            st.session_state.pop(_COLLECTING, None)
        if failed:
            raise _PartFailed(failed[0])

    return drawn


def uncaught(error: Exception) -> bool:
    """Show an error outside of every page and part; returns that it is handled.

    Streamlit calls it in place of its own error box. The page is not drawn then; a
    click on anything draws it again.
    """
    _show(error, "script")
    return True


def _show(error: Exception, name: str) -> None:
    """The sentence, a button to try again, and the details of an unexpected error."""
    with st.container(key=f"failed-{name.replace('.', '-')}"):
        if isinstance(error, OkiTraceError):
            st.error(wording.sentence(str(error)), icon=":material/error:")
        else:
            _LOG.error("A view failed.", exc_info=error)
            st.error(
                "This view failed because of a bug in oki-trace "
                f"({wording.escape(type(error).__name__)}).",
                icon=":material/error:",
            )
        # A callback, because the page cannot be rerun from ``uncaught``.
        st.button("Try again", icon=":material/refresh:", key=f"again-{name}", on_click=data.reopen)
        if not isinstance(error, OkiTraceError):
            with st.expander("Details", icon=":material/bug_report:"):
                st.caption("Copy these into a bug report. They may contain your text.")
                st.code(details(error), language=None, wrap_lines=True, height=280)


def details(error: Exception) -> str:
    """The versions and the traceback, as plain text."""
    lines = [
        *(f"{name} {version(name)}" for name in ("oki-trace", "streamlit")),
        f"Python {platform.python_version()} on {platform.platform()}",
    ]
    text = "".join(traceback.format_exception(error))
    if len(text) > _MOST_CHARACTERS:
        half = _MOST_CHARACTERS // 2
        text = f"{text[:half]}\n…\n{text[-half:]}"
    return inert(f"{', '.join(lines)}\n\n{text}")
