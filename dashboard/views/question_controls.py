"""The controls of the Questions page: view, options, replies, and the two subjects to compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import streamlit as st

from dashboard import data
from dashboard.question_state import QuestionState
from dashboard.viewdata import wording
from dashboard.views import layout
from oki_trace.analysis.question import Option, Question, Value, parse_step
from oki_trace.records import Role
from oki_trace.sanitize import inert

# Where the session keeps the state that the widgets show.
SHOWN = "question-shown"


def draw(state: QuestionState, question: Question) -> QuestionState:
    """Draw the controls in the state of the address; returns the state that they have now."""
    followed = st.session_state.get(SHOWN) != state
    with layout.row("ask-head", align="bottom"):
        chosen = _view(state, question, followed)
        chosen = _options(chosen, question, followed)
    subject = question.views[chosen.view].compares
    if subject is not None:
        chosen = _subjects(chosen, subject, followed)
    if subject in (None, "model"):
        chosen = _scope(chosen, followed)
    st.session_state[SHOWN] = chosen
    return chosen


def _view(state: QuestionState, question: Question, followed: bool) -> QuestionState:
    if len(question.offered) < 2:
        return state
    chosen = st.segmented_control(
        "View",
        list(question.offered),
        key=layout.seed(f"ask-view-{question.name}", state.view, followed),
        format_func=lambda name: question.views[name].label or f"by {name}",
        required=True,
        label_visibility="collapsed",
    )
    view = chosen or state.view
    if view != state.view and question.compares:
        return replace(state, view=view, first="", second="")
    return replace(state, view=view)


def _options(state: QuestionState, question: Question, followed: bool) -> QuestionState:
    """The options that the statement of this view uses."""
    sql = question.views[state.view].sql
    for name, option in question.options.items():
        if f"${name}" not in sql:
            continue
        now = dict(state.options).get(name, option.default)
        value = _option(option, layout.seed(f"ask-{name}-{question.name}", now, followed))
        state = state.with_option(name, None if value == option.default else value)
    return state


def _option(option: Option, key: str) -> Value:
    help_ = option.meaning[:1].upper() + option.meaning[1:] + "."
    if option.choices:
        chosen: str = st.selectbox(option.label, option.choices, key=key, help=help_, width=150)
        return chosen
    if option.is_name:
        typed = st.text_input(option.label, key=key, help=help_, width=150)
        return option.parse(typed) or option.default
    number: float = st.number_input(
        option.label,
        0.0 if option.is_share else option.least,
        1.0 if option.is_share else 10_000,
        step=0.05 if option.is_share else 1,
        key=key,
        help=help_,
        width=150,
    )
    return number


# ------------------------------------------------------------------------- the scope


def _choice(
    label: str, offered: Sequence[Any], key: str, width: int, *, hint: str = "any", **more: Any
) -> Any:
    """A select box that may be empty; what the session holds under ``key`` is offered too."""
    held = st.session_state[key]
    options = [*offered] if held is None or held in offered else [held, *offered]
    return st.selectbox(label, options, index=None, key=key, placeholder=hint, width=width, **more)


def _scope(state: QuestionState, followed: bool) -> QuestionState:
    def seed(name: str) -> str:
        return layout.seed(f"ask-{name}", getattr(state, name), followed)

    with layout.row("ask-scope", align="bottom"):
        models = data.models_used()
        model = _choice("Model", models, seed("model"), 170, accept_new_options=True)
        conversation = _conversation(state, followed)
        message = _reply(state, conversation, followed)
        since = st.date_input("From", None, key=seed("since"), width=130)
        until = st.date_input("To", None, key=seed("until"), width=130)
        text = st.text_input(
            "Text",
            key=seed("text"),
            placeholder="any",
            help="Only replies with this text in a message up to and including the reply.",
            width=170,
        )
        role_help = "The role of the message that contains the text."
        role = _choice("Role", list(Role), seed("role"), 125, format_func=str, help=role_help)
    return replace(
        state,
        model=model,
        conversation=conversation,
        message=message,
        since=since,
        until=until,
        text=text.strip(),
        role=role,
    )


def _conversation(state: QuestionState, followed: bool) -> int | None:
    titles = {
        str(c.id): f"{c.id} · {_title(c.title)}"
        for c in data.recent_conversations(50)
        if c.model_ids
    }
    now = None if state.conversation is None else str(state.conversation)
    chosen: str | None = _choice(
        "Conversation",
        list(titles),
        layout.seed("ask-conversation", now, followed),
        230,
        format_func=lambda number: titles.get(number, number),
        accept_new_options=True,
        help="Choose a recent conversation, or type the number of another.",
    )
    number = parse_step((chosen or "").strip())
    return number and number[0]


def _reply(state: QuestionState, conversation: int | None, followed: bool) -> int | None:
    """One of the replies of the chosen conversation."""
    opened = data.conversation(conversation) if conversation is not None else None
    if opened is None:
        return state.message
    ids = [m.id for m in opened[1] if m.tokens or m.is_score]
    now = state.message if state.message in ids else None
    if len(ids) < 2:
        return now
    key = layout.seed(f"ask-message-{conversation}", now, followed)
    chosen: int | None = _choice(
        "Reply", ids, key, 130, format_func=lambda number: f"message {number}"
    )
    return chosen


def _title(text: str) -> str:
    return wording.shorten(inert(" ".join(text.split()), keep="") or "Untitled", 40)


# ---------------------------------------------------------------------- two subjects


def _subjects(state: QuestionState, subject: str, followed: bool) -> QuestionState:
    with layout.row("ask-sides", align="bottom"):
        if subject == "model":
            first, second = _models(state, followed)
        else:
            first, second = _replies(state, followed, with_step=subject == "step")
        is_pair = subject == "reply" and first and second
        icon = ":material/compare_arrows:"
        if is_pair and st.button("Compare side by side", icon=icon, key="side-by-side"):
            layout.open_page("compare", {"left": first, "right": second})
    return replace(state, first=first, second=second)


def _models(state: QuestionState, followed: bool) -> Sequence[str]:
    used = data.models_used()
    chosen = [
        _choice(
            name,
            used,
            layout.seed(f"ask-{name}", now or None, followed),
            260,
            hint="Choose a model",
            accept_new_options=True,
        )
        for name, now in (("First model", state.first), ("Second model", state.second))
    ]
    return [(model or "").strip() for model in chosen]


def _replies(state: QuestionState, followed: bool, *, with_step: bool) -> Sequence[str]:
    names = {
        m.id: f"{m.id} · {_title(c.title)} · {_title(m.model_id or 'unknown model')}"
        for c, m in data.recent_replies()
        if m.tokens or not with_step
    }
    subjects = []
    for name, now in (("First", state.first), ("Second", state.second)):
        message, step = parse_step(now) or (None, None)
        chosen = _choice(
            f"{name} reply",
            list(names),
            layout.seed(f"ask-{name}-reply", message, followed),
            330,
            hint="Choose a reply",
            format_func=lambda number: names.get(number, f"message {number}"),
        )
        subject = "" if chosen is None else str(chosen)
        if chosen is not None and with_step:
            key = layout.seed(f"ask-{name}-step", step or 0, followed)
            subject = f"{chosen}:{st.number_input('Step', 0, None, key=key, width=110)}"
        subjects.append(subject)
    return subjects
