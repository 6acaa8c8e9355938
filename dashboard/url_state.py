"""The open conversation, message and token, as URL parameters.

Only the URL holds them, so a link opens the same view and the browser's back button works.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, fields

import streamlit as st


@dataclass(frozen=True)
class Location:
    """A conversation, and perhaps one token of a reply: a step, or a position of its prompt.

    ``branch``: a message that the shown path through the conversation contains.
    """

    conversation: int | None = None
    message: int | None = None
    step: int | None = None
    position: int | None = None
    branch: int | None = None

    def query(self) -> dict[str, str]:
        """The parameters of the URL."""
        return {name: str(value) for name, value in asdict(self).items() if value is not None}


def current() -> Location:
    """The location in the URL; a parameter that is no number counts as absent."""
    return Location(*(number(f.name) for f in fields(Location)))


def navigate(location: Location) -> None:
    """Write ``location`` into the URL."""
    st.query_params.from_dict(location.query())


def restore(page: str, own: Collection[str]) -> None:
    """Remember the URL of a page whose parameters are ``own``, or restore it.

    Leaving a page can leave an entry in the browser's history with the path of this
    page and the parameters of the next one.
    """
    parameters = st.query_params.to_dict()
    key = f"url-of-{page}"
    if parameters.keys() <= set(own):
        st.session_state[key] = parameters
    else:
        st.query_params.from_dict(st.session_state.get(key, {}))


def number(name: str) -> int | None:
    """The parameter ``name`` of the URL; None if it is absent or no number."""
    value = st.query_params.get(name, "")
    return int(value) if value.isascii() and value.isdecimal() and len(value) < 18 else None
