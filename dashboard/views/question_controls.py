"""What the Questions page lets choose: the view, the options, the replies, and what to compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import streamlit as st

from dashboard import data
from dashboard import question_state as asking
from dashboard.question_state import Asked
from dashboard.viewdata import wording
from oki_trace.records import Role
from oki_trace.sanitize import inert

if TYPE_CHECKING:
    from oki_trace.analysis.questions import Question

OPTIONS = {
    "top": "Rows",
    "least": "Least probability",
    "from_layer": "From layer",
    "sample": "Steps read",
}
# The address as the widgets last knew it.
SEEN = "asked-seen"


def draw(asked: Asked, question: Question) -> Asked:
    """Draw the controls, as the address has it; returns what is asked now."""
    followed = st.session_state.get(SEEN) != asked
    with st.container(horizontal=True, vertical_alignment="bottom", key="ask-head"):
        chosen = _view(asked, question, followed)
        chosen = _options(chosen, question, followed)
    if question.name == "compare":
        chosen = _sides(chosen, followed)
    if question.name != "compare" or chosen.view == "model":
        chosen = _scope(chosen, followed)
    st.session_state[SEEN] = chosen
    return chosen


def _seed(key: str, value: Any, followed: bool) -> str:
    """The widget ``key`` takes ``value`` when the address has changed, or it is new."""
    if followed or key not in st.session_state:
        st.session_state[key] = value
    return key


def _view(asked: Asked, question: Question, followed: bool) -> Asked:
    ways = asking.views(question)
    if len(ways) < 2:
        return asked
    by = "two {}s" if question.name == "compare" else "by {}"
    names = {
        "compare": {"reply": "two replies"},
        "attention": {"evidence": "by step, final layer", "grid": "by step and layer"},
    }.get(question.name, {})
    chosen = st.segmented_control(
        "View",
        ways,
        key=_seed(f"ask-view-{question.name}", asked.view, followed),
        format_func=lambda way: names.get(way, by.format(way)),
        required=True,
        label_visibility="collapsed",
    )
    view = chosen or asked.view
    if view != asked.view and question.name == "compare":
        return replace(asked, view=view, first="", second="")
    return replace(asked, view=view)


def _options(asked: Asked, question: Question, followed: bool) -> Asked:
    """The options that have a part in this view."""
    chosen = asked
    for name, (default, meaning) in question.parameters.items():
        view = question.views.get(asked.view)
        if view is not None and f"${name}" not in view.sql:
            continue
        if question.name == "compare" and asked.view != "model":
            continue
        now = getattr(asked, name)
        share = isinstance(default, float)
        value = st.number_input(
            OPTIONS[name],
            0.0 if share else (0 if name == "from_layer" else 1),
            1.0 if share else 10_000,
            step=0.05 if share else 1,
            key=_seed(f"ask-{name}-{question.name}", default if now is None else now, followed),
            help=meaning[:1].upper() + meaning[1:] + ".",
            width=150,
        )
        given: Any = {name: None if value == default else value}
        chosen = replace(chosen, **given)
    return chosen


# --------------------------------------------------------------------- which replies


def _scope(asked: Asked, followed: bool) -> Asked:
    with st.container(horizontal=True, vertical_alignment="bottom", key="ask-scope"):
        models = list(dict.fromkeys([*filter(None, [asked.model]), *data.models_used()]))
        model = st.selectbox(
            "Model",
            models,
            index=None,
            key=_seed("ask-model", asked.model, followed),
            placeholder="any",
            accept_new_options=True,
            width=170,
        )
        conversation = _conversation(asked, followed)
        message = _reply(asked, conversation, followed)
        since = st.date_input(
            "From", None, key=_seed("ask-since", asked.since, followed), width=130
        )
        until = st.date_input("To", None, key=_seed("ask-until", asked.until, followed), width=130)
        text = st.text_input(
            "Text said",
            key=_seed("ask-text", asked.text, followed),
            placeholder="any",
            help="Only replies in whose conversation, up to and with the reply, this was said.",
            width=170,
        )
        role = st.selectbox(
            "Said by",
            list(Role),
            index=None,
            key=_seed("ask-role", asked.role, followed),
            placeholder="anyone",
            format_func=str,
            width=125,
        )
    return replace(
        asked,
        model=model,
        conversation=conversation,
        message=message,
        since=since,
        until=until,
        text=text.strip(),
        role=role,
    )


def _conversation(asked: Asked, followed: bool) -> int | None:
    titles = {
        str(c.id): f"{c.id} · {_title(c.title)}" for c in data.recent_conversations(50) if c.tokens
    }
    now = None if asked.conversation is None else str(asked.conversation)
    chosen = st.selectbox(
        "Conversation",
        list(dict.fromkeys([*filter(None, [now]), *titles])),
        index=None,
        key=_seed("ask-conversation", now, followed),
        format_func=lambda number: titles.get(number, number),
        placeholder="any",
        accept_new_options=True,
        help="One of the latest, or any by its number.",
        width=230,
    )
    found = None if chosen is None else asking.step_of(chosen.strip())
    return None if found is None else found[0]


def _reply(asked: Asked, conversation: int | None, followed: bool) -> int | None:
    """The replies of the conversation that is chosen."""
    opened = data.conversation(conversation) if conversation is not None else None
    if opened is None:
        return asked.message
    replies = [m.id for m in opened[1] if m.tokens]
    now = asked.message if asked.message in replies else None
    if len(replies) < 2:
        return now
    key = f"ask-message-{conversation}"
    chosen: int | None = st.selectbox(
        "Reply",
        replies,
        index=None,
        key=_seed(key, now, followed),
        format_func=lambda number: f"message {number}",
        placeholder="any",
        width=130,
    )
    return chosen


def _title(text: str) -> str:
    return wording.shorten(inert(" ".join(text.split()), keep="") or "Untitled", 40)


# ---------------------------------------------------------------------- two of a kind


def _sides(asked: Asked, followed: bool) -> Asked:
    with st.container(horizontal=True, vertical_alignment="bottom", key="ask-sides"):
        sides = _models(asked, followed) if asked.view == "model" else _replies(asked, followed)
        both = [asking.step_of(side) for side in sides]
        if asked.view == "reply" and both[0] and both[1]:
            left, right = both[0][0], both[1][0]
            if st.button("Side by side", icon=":material/compare_arrows:", key="side-by-side"):
                query = {"left": str(left), "right": str(right)}
                st.switch_page(st.session_state["pages"]["compare"], query_params=query)
    return replace(asked, first=sides[0], second=sides[1])


def _models(asked: Asked, followed: bool) -> Sequence[str]:
    used = data.models_used()
    sides = []
    for name, now in (("First model", asked.first), ("Second model", asked.second)):
        chosen = st.selectbox(
            name,
            list(dict.fromkeys([*filter(None, [now]), *used])),
            index=None,
            key=_seed(f"ask-{name}", now or None, followed),
            placeholder="Choose a model",
            accept_new_options=True,
            width=260,
        )
        sides.append((chosen or "").strip())
    return sides


def _replies(asked: Asked, followed: bool) -> Sequence[str]:
    names = {
        m.id: f"{m.id} · {_title(c.title)} · {_title(m.model_id or 'unknown model')}"
        for c, m in data.recent_replies()
    }
    sides = []
    for name, now in (("First", asked.first), ("Second", asked.second)):
        place = asking.step_of(now)
        message = place[0] if place else None
        offered = list(dict.fromkeys([*([message] if message is not None else []), *names]))
        chosen = st.selectbox(
            f"{name} reply",
            offered,
            index=None,
            key=_seed(f"ask-{name}-reply", message, followed),
            format_func=lambda number: names.get(number, f"message {number}"),
            placeholder="Choose a reply",
            width=330,
        )
        if chosen is None or asked.view == "reply":
            sides.append("" if chosen is None else str(chosen))
            continue
        step = st.number_input(
            "Step",
            0,
            None,
            key=_seed(f"ask-{name}-step", (place[1] if place else None) or 0, followed),
            width=110,
        )
        sides.append(f"{chosen}:{step}")
    return sides
