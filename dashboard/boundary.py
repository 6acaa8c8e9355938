"""Around each view and each part of one: what goes wrong is a sentence, a button and the details.

A store that cannot be read says so in its own sentence. Everything unexpected has
one of ours, and its traceback to copy. Never Streamlit's own box: it offers
searches on the web that carry the message.
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
from dashboard.viewdata import replies
from oki_trace.errors import OkiTraceError
from oki_trace.sanitize import inert

P = ParamSpec("P")

_LOG = logging.getLogger(__name__)

# Where the parts of a page leave what went wrong while the whole page is drawn.
_COLLECTING = "boundary-collecting"
# Of a deep recursion nobody needs every line.
_MOST_CHARACTERS = 20_000


class _PartFailed(Exception):
    """A part of the page failed; ``cause`` says how. The page tells it, once."""

    def __init__(self, cause: Exception) -> None:
        super().__init__()
        self.cause = cause


def page(draw: Callable[[], None]) -> Callable[[], None]:
    """``draw``, of a whole page, with every failure told where the page ends."""

    @functools.wraps(draw)
    def drawn() -> None:
        try:
            draw()
        except _PartFailed as failed:
            _tell(failed.cause, "page")
        except Exception as error:
            _tell(error, "page")

    return drawn


def part(draw: Callable[P, None], *, run_every: float | None = None) -> Callable[P, None]:
    """``draw`` as a fragment, which is drawn by itself every ``run_every`` seconds, or on a click.

    Of several parts that fail with their page, the first ends the page, which tells it.
    A part that fails by itself later tells it in its own place.
    """
    name = f"{draw.__module__}.{draw.__qualname__}"

    @functools.wraps(draw)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            draw(*args, **kwargs)
        except Exception as error:
            collecting: list[Exception] | None = st.session_state.get(_COLLECTING)
            if collecting is None:
                _tell(error, name)
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
    """Tell what went wrong outside of every page and part; returns that it is told.

    Streamlit calls it where it would show its own box. The page is not drawn then,
    and a click on anything draws it anew.
    """
    _tell(error, "script")
    return True


def _tell(error: Exception, name: str) -> None:
    """The sentence, the way to try again, and for what nobody expected the details."""
    with st.container(key=f"failed-{name.replace('.', '-')}"):
        if isinstance(error, OkiTraceError):
            st.error(replies.sentence(str(error)), icon=":material/error:")
        else:
            _LOG.error("A view failed.", exc_info=error)
            st.error(
                "This view failed because of a bug in oki-trace "
                f"({replies.plain(type(error).__name__)}).",
                icon=":material/error:",
            )
        # As a callback, since where Streamlit asks for a box nothing can be drawn anew.
        st.button("Try again", icon=":material/refresh:", key=f"again-{name}", on_click=data.reopen)
        if not isinstance(error, OkiTraceError):
            with st.expander("Details", icon=":material/bug_report:"):
                st.caption("Copy these into a bug report. They may contain your text.")
                st.code(details(error), language=None, wrap_lines=True, height=280)


def details(error: Exception) -> str:
    """The traceback, and what it happened with: plain text."""
    lines = [
        *(f"{name} {version(name)}" for name in ("oki-trace", "streamlit")),
        f"Python {platform.python_version()} on {platform.platform()}",
    ]
    told = "".join(traceback.format_exception(error))
    if len(told) > _MOST_CHARACTERS:
        half = _MOST_CHARACTERS // 2
        told = f"{told[:half]}\n…\n{told[-half:]}"
    return inert(f"{', '.join(lines)}\n\n{told}")
