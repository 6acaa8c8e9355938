"""What the address says is open: conversation, message and step.

The address is the only place that holds it, so a link opens the same view and
the browser's back button works.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import streamlit as st


@dataclass(frozen=True)
class Place:
    """A conversation, and perhaps one step of one of its replies."""

    conversation: int | None = None
    message: int | None = None
    step: int | None = None

    def query(self) -> dict[str, str]:
        """As it stands in an address."""
        return {
            name: str(value)
            for name in ("conversation", "message", "step")
            if (value := getattr(self, name)) is not None
        }


def here() -> Place:
    """The place in the address; what is no number counts as absent."""
    return Place(_number("conversation"), _number("message"), _number("step"))


def go(place: Place) -> None:
    """Write ``place`` into the address."""
    st.query_params.from_dict(place.query())


def keep(page: str, own: Collection[str]) -> None:
    """Remember the address of a page whose parameters are ``own``, or put it back.

    Leaving for another page leaves an entry in the browser's history that has this
    page's path and the other's parameters. Who comes back to it finds what was here.
    """
    now = st.query_params.to_dict()
    kept = f"address-of-{page}"
    if now.keys() <= set(own):
        st.session_state[kept] = now
    else:
        st.query_params.from_dict(st.session_state.get(kept, {}))


def _number(name: str) -> int | None:
    value = st.query_params.get(name, "")
    return int(value) if value.isdecimal() and len(value) < 18 else None
