"""Branches: a conversation as a tree, and what the model said each way from one of its steps."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from dashboard import boundary, components, data, url_state
from dashboard.viewdata import replies, tree, wording
from dashboard.views import branches, layout
from oki_trace.message_tree import branches_at
from oki_trace.records import Message

POLL_SECONDS = 0.4
FORKS_SHOWN = 12


@boundary.page
def page() -> None:
    """Draw the page."""
    place = url_state.current()
    opened = branches.opened(place.conversation) if place.conversation else None
    if opened is None:
        _choose()
        return
    conversation = opened.conversation
    with layout.title_row(conversation.title):
        layout.open_in_chat(url_state.Location(conversation.id, branch=place.branch), "tree")
    fork = _fork(opened)
    if fork is not None:
        live = any(m.status.is_live for m in branches_at(opened.messages, *fork))
        run_every = POLL_SECONDS if live else None
        boundary.part(_side_by_side, run_every=run_every)(conversation.id, fork, live)
    _tree(opened)


def _choose() -> None:
    """The latest conversations to choose from."""
    layout.choose_conversation(
        "Branches",
        "Choose a conversation to see its branches:",
        "continue one of its replies from another token, and see both",
        [c for c in data.recent_conversations() if c.tokens],
    )


def _fork(opened: branches.Opened) -> tuple[int, int] | None:
    """The fork that is shown: that of the URL, else the newest one."""
    found = tree.forks(opened.messages)
    if not found:
        st.caption(
            "No reply of this conversation has branches yet. In Chat, click a token of a reply and "
            "then the arrow beside another candidate."
        )
        return None
    place = url_state.current()
    wanted = (place.message, place.step)
    by_id = {message.id: message for message in opened.messages}
    if len(found) == 1:
        return found[0]
    return st.selectbox(
        "Fork",
        found[:FORKS_SHOWN] if wanted not in found else list(dict.fromkeys([wanted, *found])),
        format_func=lambda fork: _fork_label(fork, opened.messages, by_id),
        key=f"fork-{opened.conversation.id}",
        width=520,
    )


def _fork_label(
    fork: tuple[int, int], messages: Sequence[Message], by_id: dict[int, Message]
) -> str:
    reply, step = fork
    ways = wording.counted(len(branches_at(messages, reply, step)), "branch")
    text = wording.shorten(by_id[reply].content, 50) if reply in by_id else "a deleted reply"
    return f"step {step} of message {reply} · {ways} · {text}"


def _side_by_side(conversation_id: int, fork: tuple[int, int], live: bool) -> None:
    """The ways from a fork, redrawn while the model goes on; when it ends, the page reruns."""
    found = data.conversation(conversation_id)
    if found is None:
        st.rerun()
    _, messages = found
    reply, step = fork
    if live:
        state = data.worker_state()
        if state is None or state.state == "gone":
            data.ensure_worker()
    ways = [(m, data.steps(m)) for m in branches_at(messages, reply, step)]
    if live and not any(m.status.is_live for m, _ in ways):
        st.rerun()
    kept = ""
    origin = next((m for m in messages if m.id == reply), None)
    if origin is not None:
        steps = data.steps(origin)
        kept = "".join(replies.token_texts(steps[:step]))
        if steps[step:]:
            ways.append((origin, steps[step:]))
    st.markdown(f"#### From step {step:d} of message {reply:d}")
    opened = components.paths(
        data=tree.paths_data(kept, ways, reply), key="paths", on_open_change=lambda: None
    ).open
    if opened is not None:
        _open(conversation_id, int(opened))
    st.caption(
        "The bar is the probability that the model gave the first token. The log-probability is "
        "that of all tokens from the fork on; longer continuations therefore have lower values."
    )


def _tree(opened: branches.Opened) -> None:
    st.markdown("#### All messages")
    shown = {message.id for message in opened.path}
    drawn = tree.tree_data(opened.messages, data.logprobs(opened.conversation.id), shown)
    wanted = components.tree(data=drawn, key="tree", on_open_change=lambda: None).open
    if wanted is not None:
        _open(opened.conversation.id, int(wanted))


def _open(conversation: int, message: int) -> None:
    layout.open_page("chat", url_state.Location(conversation, branch=message).query())
