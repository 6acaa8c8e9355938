"""Chat: the conversation, its replies as clickable tokens, and the step panel beside them.

Decoding is the worker's. The page is in parts that are drawn by themselves: what
has been said, the replies under way (the only part that asks again and again),
the step panel, the reply map. A click on a token draws the panel alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from dashboard import boundary, components, data, url_state
from dashboard.viewdata import replies, storage
from dashboard.views import reply_map, sidebar, step_panel
from oki_trace.errors import OkiTraceError
from oki_trace.explain import call_line
from oki_trace.queueing import ReplyRequest, last_template, new_messages, unanswered_calls
from oki_trace.records import Message, Prompt, Role, Status, WorkerState

POLL_SECONDS = 0.3
TITLE_LENGTH = 200

FIRST_QUESTIONS = (
    "What is the capital of France, and what is it famous for?",
    "Write a short story about a lighthouse.",
    "Name three animals that live in the sea.",
)


@boundary.page
def page() -> None:
    """Draw the page."""
    place = url_state.here()
    opened = data.conversation(place.conversation) if place.conversation else None
    settings = sidebar.settings(opened[0].id if opened else None, opened[1] if opened else ())
    if place.conversation and opened is None:
        st.warning(f"There is no conversation {place.conversation:d} in this store.")
    if opened is None:
        _welcome(settings)
    else:
        _conversation(opened[0].id, opened[1], settings)
    with st.sidebar:
        boundary.part(sidebar.worker_card, run_every=1.0)()
    sidebar.model_card(opened[1] if opened else ())
    sidebar.recent_conversations(place.conversation)


def _input(settings: sidebar.Settings | None, conversation: int | None, *, live: bool) -> None:
    # Inside a container: at the page's root it would pin the page to its end.
    with st.container(key="say"):
        said = st.chat_input(
            "Message the model; it is answered next" if live else "Message the model",
            key="message",
            disabled=settings is None,
        )
    if said and settings is not None:
        _send(said, settings, conversation)


def _tool_answer(
    settings: sidebar.Settings | None, conversation: int, messages: Sequence[Message]
) -> None:
    """Where the first tool call that waits is answered; nothing is executed here."""
    waiting = unanswered_calls(messages)
    if not waiting or waiting[0].name is None:
        return
    call = waiting[0]
    number = f"{messages[-1].id}"
    with st.form(f"tool-{number}", clear_on_submit=True):
        st.text(replies.clipped(call_line(call), 500))
        said = st.text_area(
            "Answer of the tool", key=f"tool-answer-{number}", placeholder="What the tool returns"
        )
        sent = st.form_submit_button("Send answer", disabled=settings is None)
    if sent and settings is not None and call.name is not None:
        _send(said, settings, conversation, call.name)


def _send(
    said: str, settings: sidebar.Settings, conversation: int | None, tool: str | None = None
) -> None:
    choice, sampling, policy, system, template = settings
    try:
        opened = data.conversation(conversation) if conversation else None
        before = opened[1] if opened else ()
        template = template.over(last_template(before))
        waiting = unanswered_calls(before) if tool is not None else []
        if tool is not None and conversation is not None and len(waiting) > 1:
            data.answer_for_tool(conversation, tool, said)
        else:
            system = system if conversation is None else None
            messages = new_messages(said, system=system, tool=tool)
            request = ReplyRequest(messages, choice, sampling, policy, template)
            conversation = data.ask(request, conversation)
    except OkiTraceError as error:
        st.error(replies.sentence(str(error)))
        return
    url_state.go(url_state.Place(conversation))
    st.rerun()


def _welcome(settings: sidebar.Settings | None) -> None:
    with st.container(key="welcome", width=760):
        st.title("See what your model does")
        st.write(
            "Ask something. Every token of the reply can be clicked: what else was considered, "
            "where the model looked, and what each layer would have said."
        )
        _input(settings, None, live=False)
        st.caption("Or begin with one of these:")
        for question in FIRST_QUESTIONS:
            if st.button(question, icon=":material/arrow_forward:", disabled=settings is None):
                assert settings is not None
                _send(question, settings, None)
        builtin = "The built-in smollm2 (SmolLM2-135M-Instruct) needs no account"
        if not data.builtin_is_here():
            builtin += "; the first message fetches it, 93 MB"
        st.caption(f"{builtin}. Everything stays on this machine.")


def _conversation(
    conversation_id: int, messages: Sequence[Message], settings: sidebar.Settings | None
) -> None:
    live = [m.id for m in messages if m.status.is_live]
    with st.container(key="sides"):
        left, right = st.columns([8, 5], gap="medium")
    with left:
        # What follows a reply under way is drawn with it, in the order it was said.
        first = messages.index(next(m for m in messages if m.id == live[0])) if live else None
        boundary.part(_said)(conversation_id, first)
        if first is not None:
            boundary.part(_under_way, run_every=POLL_SECONDS)(conversation_id, first, len(live))
        _tool_answer(settings, conversation_id, messages)
        _input(settings, conversation_id, live=bool(live))
    with right, st.container(key="panel"):
        boundary.part(step_panel.show)(conversation_id)
    with left, st.container(key="map"):
        boundary.part(reply_map.section)(conversation_id)


def _said(conversation_id: int, end: int | None) -> None:
    """The title and the messages up to the first that is under way."""
    opened = data.conversation(conversation_id)
    if opened is None:
        return
    _heading(opened[0].title)
    for message in opened[1][:end]:
        _message(message, opened[1])


def _under_way(conversation_id: int, first: int, live: int) -> None:
    """The replies under way, anew a few times a second; when one has ended, the whole page."""
    opened = data.conversation(conversation_id)
    if opened is None or sum(m.status.is_live for m in opened[1]) != live:
        st.rerun()
    for message in opened[1][first:]:
        _message(message, opened[1])


def _heading(title: str) -> None:
    with st.container(
        horizontal=True,
        horizontal_alignment="distribute",
        vertical_alignment="center",
        key="heading",
    ):
        st.text(title[:TITLE_LENGTH])
        st.segmented_control(
            "Colour the tokens by",
            replies.COLOURS,
            default="surprisal",
            required=True,
            key="colour",
            label_visibility="collapsed",
        )


def _prompt_with(message: Message, messages: Sequence[Message]) -> Prompt | None:
    """A prompt that the message stands in, if it can hold any special token."""
    if not set("<[") & set(message.content):
        return None
    after = (m for m in messages if m.position > message.position and m.prompt_len is not None)
    reply = next(after, None)
    return None if reply is None else data.prompt(reply)


def _message(message: Message, messages: Sequence[Message]) -> None:
    if message.role is not Role.ASSISTANT:
        label = "" if message.role is Role.USER else str(message.role)
        if message.tool_name:
            label += f" {message.tool_name}"
        shown = replies.bubble_data(message.content, label, _prompt_with(message, messages))
        components.bubble(data=shown, key=f"said-{message.id}")
        return
    steps = data.steps(message)
    components.reply(
        key=f"reply-{message.id}",
        data=replies.reply_data(
            steps,
            conversation=message.conversation_id,
            message=message.id,
            colour=st.session_state.get("colour") or "surprisal",
            layers=message.capture.layers if message.capture else 0,
            live=message.status.is_live,
            status=_status(message, len(steps)),
            bad=message.status in (Status.FAILED, Status.INTERRUPTED),
            parts=message.parts,
        ),
    )
    if message.status.is_live:
        _waiting(message)


def _waiting(message: Message) -> None:
    with st.container(horizontal=True, vertical_alignment="center"):
        if st.button("Stop", key=f"stop-{message.id}", icon=":material/stop_circle:"):
            data.stop(message)
        state = data.worker_state()
        if state is None or state.state == "gone":
            data.see_to_worker()
        if message.status is Status.QUEUED:
            before = [waiting for waiting in data.waiting() if waiting < message.id]
            if before:
                some = "1 reply" if len(before) == 1 else f"{len(before)} replies"
                st.caption(f"Queued: {some} before it.")
            elif state is None or state.state in ("gone", "starting"):
                st.caption("Starting the model's process…")
            else:
                _loading(state)
        elif not message.tokens:
            if message.prompt_len is None:
                _loading(state)
            else:
                st.caption("Reading the prompt…")


def _loading(state: WorkerState | None) -> None:
    """How far the model is that the reply waits for."""
    words = "Loading the model…"
    if state is not None and state.state == "loading" and state.progress is not None:
        detail = replies.plain(state.detail) if state.detail else words
        st.progress(min(max(state.progress, 0.0), 1.0), text=detail)
    else:
        st.caption(words)


def _status(message: Message, tokens: int) -> str:
    if message.status in (Status.FAILED, Status.INTERRUPTED):
        return f"{message.status}: {message.reason}" if message.reason else str(message.status)
    parts = [str(message.status)]
    if message.status is Status.STOPPED and message.reason not in (None, "", "stopped"):
        parts[0] += f" ({message.reason})"
    if not tokens and not message.status.is_live:
        return parts[0]
    parts.append(replies.counted(tokens, "token"))
    if message.seconds:
        parts.append(f"{tokens / message.seconds:.1f} tokens/s")
    if not message.status.is_live:
        parts.append(storage.size(data.message_bytes(message)))
    if message.model_id:
        parts.append(message.model_id)
    return " · ".join(parts)
