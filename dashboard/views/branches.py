"""Branches: the siblings of a message, and what a user can do with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import streamlit as st

from dashboard import data, url_state
from dashboard.viewdata import branches, wording
from dashboard.views import layout
from oki_trace.message_tree import siblings
from oki_trace.queueing import ReplyRequest, fork_candidates, new_messages, submit, submit_branch
from oki_trace.records import (
    NO_PARENT,
    CapturePolicy,
    Conversation,
    Forced,
    Message,
    Role,
    Sampling,
)

# Candidates that are continued at once.
MOST_WAYS = 10
# How a branch is generated; its model is that of the reply it departs from.
Settings = tuple[Sampling, CapturePolicy]


class Opened(NamedTuple):
    """A conversation, all its messages, and those on the path that is shown."""

    conversation: Conversation
    messages: Sequence[Message]
    path: Sequence[Message]


def opened(conversation_id: int) -> Opened | None:
    """The conversation with the path of the URL; None if there is none with this id."""
    found = data.conversation(conversation_id)
    if found is None:
        return None
    place = url_state.current()
    return Opened(*found, branches.shown_path(found[1], place.branch, place.message))


def controls(message: Message, messages: Sequence[Message], settings: Settings | None) -> None:
    """The siblings of a message, and its actions; without settings none can be generated."""
    others = siblings(messages, message)
    side: Literal["left", "right"] = "right" if message.role is Role.USER else "left"
    with layout.row(f"branches-{message.id}", place=side):
        if len(others) > 1:
            _switcher(message, others)
            beside = branches.compared_with(message, others)
            if beside is not None and st.button(
                "Compare",
                key=f"compare-{message.id}",
                type="tertiary",
                icon=":material/compare_arrows:",
                help=f"Compare with message {beside:d}, from where they diverge",
            ):
                layout.open_page("compare", {"left": str(beside), "right": str(message.id)})
        if settings is None:
            return
        if branches.can_regenerate(message) and st.button(
            "Regenerate", key=f"regenerate-{message.id}", type="tertiary", icon=":material/refresh:"
        ):
            branch(message, 0, settings)
        if branches.can_continue(message) and st.button(
            "Continue", key=f"go-on-{message.id}", type="tertiary", icon=":material/arrow_forward:"
        ):
            branch(message, message.tokens, settings)
        if message.role is Role.USER:
            _edit(message, messages, settings)


def _switcher(message: Message, others: Sequence[Message]) -> None:
    at = next(n for n, other in enumerate(others) if other.id == message.id)
    before = st.button(
        "‹", key=f"before-{message.id}", type="tertiary", disabled=at == 0, help="Previous version"
    )
    st.caption(f"{at + 1:d} / {len(others):d}", width="content")
    after = st.button(
        "›",
        key=f"after-{message.id}",
        type="tertiary",
        disabled=at + 1 == len(others),
        help="Next version",
    )
    if before or after:
        _show(message.conversation_id, others[at - 1 if before else at + 1].id)


def _edit(message: Message, messages: Sequence[Message], settings: Settings) -> None:
    """Another version of a user's message, with a reply of its own."""
    reply = next((m for m in messages if m.parent_id == message.id and m.choice), None)
    if reply is None or reply.choice is None:
        return
    with st.popover("Edit", icon=":material/edit:", type="tertiary"):
        text = st.text_area("Message", message.content, key=f"text-{message.id}", width=420)
        if st.button("Send", key=f"send-{message.id}", type="primary", disabled=not text.strip()):
            request = ReplyRequest(new_messages(text), reply.choice, *settings, reply.template)
            with layout.errors_shown():
                _, sent = submit(
                    data.writer(),
                    request,
                    message.conversation_id,
                    parent_id=message.parent_id or NO_PARENT,
                )
                _show(message.conversation_id, sent)


def other_ways(origin: Message, step: int, candidates: int, settings: Settings) -> None:
    """Several branches from one step at once, and a branch that continues with a typed text.

    ``candidates``: how many the step has.
    """
    with st.popover("Branch from here", icon=":material/alt_route:", type="tertiary"):
        if candidates:
            most = min(candidates, MOST_WAYS)
            with layout.row(f"ways-{origin.id}", align="bottom"):
                count = st.number_input(
                    "Candidates", 1, most, min(5, most), key=f"ways-most-{most}", width=110
                )
                tokens = st.number_input("Tokens each", 1, 1000, 20, key="ways-tokens", width=120)
                if st.button("Continue from each", type="primary", key="ways-go"):
                    _continue_from_each(origin, step, int(count), int(tokens), settings)
            st.caption("The most likely candidates, each with its own continuation, side by side.")
        label = "Or continue with your own text" if candidates else "Continue with your own text"
        text = st.text_input(label, key="typed", placeholder="such as “ Lyon”")
        if text:
            _typed(origin, step, text, settings)


def _continue_from_each(
    origin: Message, step: int, count: int, tokens: int, settings: Settings
) -> None:
    sampling, policy = settings
    with layout.errors_shown():
        for candidate in fork_candidates(data.store(), origin, step, range(1, count + 1)):
            # The candidate is the first of the tokens.
            short = replace(sampling, max_new_tokens=tokens - 1)
            forced = Forced((candidate.token_id,))
            submit_branch(data.writer(), origin, step, short, policy, forced=forced)
        place = url_state.Location(origin.conversation_id, origin.id, step)
        layout.open_page("branches", place.query())


def _typed(origin: Message, step: int, text: str, settings: Settings) -> None:
    """The tokens of a typed text, and a button that uses them."""
    with layout.errors_shown():
        model = origin.choice.model_id if origin.choice else origin.model_id or ""
        tokens = data.typed_tokens(model, text)
        st.caption(wording.escape(branches.typed_text(tokens)))
        if st.button("Continue with this text", type="primary", key="typed-go"):
            ids = tuple(number for number, _ in tokens)
            branch(origin, step, settings, ids)


def branch(origin: Message, step: int, settings: Settings, token_ids: tuple[int, ...] = ()) -> None:
    """Queue a branch of a reply, and show it; ``token_ids`` are its first tokens."""
    forced = Forced(token_ids) if token_ids else None
    with layout.errors_shown():
        reply = submit_branch(data.writer(), origin, step, *settings, forced=forced)
        _show(origin.conversation_id, reply)


def _show(conversation: int, message: int) -> None:
    """Open the path through a message, and draw the page anew."""
    url_state.navigate(url_state.Location(conversation, branch=message))
    st.rerun()
