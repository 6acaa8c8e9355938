"""Chat: the conversation, its replies as clickable tokens, and the step panel next to them.

The worker decodes. Each part of the page reruns alone: the finished messages, the
live replies (the only part that polls), the step panel and the reply map. A click
on a token redraws the panel alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import streamlit as st

from dashboard import boundary, components, data, url_state
from dashboard.viewdata import branches as branch_data
from dashboard.viewdata import prompts, replies, storage, wording
from dashboard.views import branches, layout, reply_map, sidebar, step_panel
from oki_trace.explain import call_line
from oki_trace.message_spans import message_spans, scored_span
from oki_trace.queueing import (
    ReplyRequest,
    add_tool_result,
    last_template,
    new_messages,
    submit,
    unanswered_calls,
)
from oki_trace.records import Forced, Message, Prompt, Role, Status, StepSummary, WorkerState

POLL_SECONDS = 0.3
# How many messages this session has sent.
SENT = "messages-sent"

FIRST_QUESTIONS = (
    "What is the capital of France, and what is it famous for?",
    "Write a short story about a lighthouse.",
    "Name three animals that live in the sea.",
)


@boundary.page
def page() -> None:
    """Draw the page."""
    place = url_state.current()
    opened = branches.opened(place.conversation) if place.conversation else None
    path = opened.path if opened else ()
    settings = sidebar.draw_settings(opened.conversation.id if opened else None, path)
    if place.conversation and opened is None:
        st.warning(f"There is no conversation {place.conversation:d} in this store.")
    if opened is None:
        _welcome(settings)
    else:
        _conversation(opened.conversation.id, path, settings)
    with st.sidebar:
        boundary.part(sidebar.worker_card, run_every=1.0)()
    sidebar.model_card(path)
    sidebar.recent_conversations(place.conversation)


def _input(settings: sidebar.Settings | None, conversation: int | None, *, live: bool) -> None:
    # Inside a container: at the root of the page it would keep the page scrolled to its end.
    with st.container(key="say"), layout.row("say-row"):
        text = st.chat_input(
            "Queue the next message" if live else "Message the model",
            key="message",
            disabled=settings is None,
        )
        # Sending a message begins a new field, which is empty.
        sent = st.session_state.get(SENT, 0)
        with st.popover(
            "Begin the answer",
            icon=":material/format_quote:",
            type="tertiary",
            help="Set the first words of the answer; the model continues from them.",
        ):
            begun = st.text_area(
                "The answer begins with",
                key=f"prefill-{sent}",
                width=420,
                help="The model continues from here. Leave out a space at the end: most tokens "
                "begin with their own.",
            )
    if text and settings is not None:
        _send(text, settings, conversation, begun=begun)


def _tool_result(
    settings: sidebar.Settings | None, conversation: int, messages: Sequence[Message]
) -> None:
    """A form for the result of the first pending tool call; nothing is executed here."""
    waiting = unanswered_calls(messages)
    if not waiting or waiting[0].name is None:
        return
    call = waiting[0]
    number = f"{messages[-1].id}"
    with st.form(f"tool-{number}", clear_on_submit=True):
        st.text(wording.shorten(call_line(call), 500))
        text = st.text_area(
            "Tool result", key=f"tool-result-{number}", placeholder="What the tool returns"
        )
        sent = st.form_submit_button("Send result", disabled=settings is None)
    if sent and settings is not None and call.name is not None:
        _send(text, settings, conversation, call.name)


def _send(
    text: str,
    settings: sidebar.Settings,
    conversation: int | None,
    tool: str | None = None,
    *,
    begun: str = "",
) -> None:
    """Queue a message and its reply, which begins with ``begun``."""
    choice, sampling, policy, system, template = settings
    with layout.errors_shown():
        opened = branches.opened(conversation) if conversation else None
        before = opened.path if opened else ()
        template = template.over(last_template(before))
        if tool is not None and conversation is not None and len(unanswered_calls(before)) > 1:
            add_tool_result(data.writer(), conversation, tool, text)
        else:
            messages = new_messages(text, system=None if conversation else system, tool=tool)
            forced = Forced(text=begun) if begun else None
            request = ReplyRequest(messages, choice, sampling, policy, template, forced)
            st.session_state[SENT] = st.session_state.get(SENT, 0) + 1
            parent = before[-1].id if before else None
            conversation, _ = submit(data.writer(), request, conversation, parent_id=parent)
        url_state.navigate(url_state.Location(conversation))
        st.rerun()


def _welcome(settings: sidebar.Settings | None) -> None:
    with st.container(key="welcome", width=760):
        st.title("See what your model does")
        st.write(
            "Send a message, then click any token of the reply to see its candidates, the "
            "positions that the model attended to, and the prediction of each layer."
        )
        _input(settings, None, live=False)
        st.caption("Or start with an example:")
        for question in FIRST_QUESTIONS:
            if st.button(question, icon=":material/arrow_forward:", disabled=settings is None):
                assert settings is not None
                _send(question, settings, None)
        builtin = "The built-in smollm2 (SmolLM2-135M-Instruct) needs no account"
        if not data.builtin_model_fetched():
            builtin += "; the first message downloads it (93 MB)"
        st.caption(f"{builtin}. Everything stays on this machine.")


def _conversation(
    conversation_id: int, messages: Sequence[Message], settings: sidebar.Settings | None
) -> None:
    live = [m.id for m in messages if m.status.is_live]
    with st.container(key="sides"):
        left, right = st.columns([8, 5], gap="medium")
    with left:
        first = branch_data.first_live(messages)
        boundary.part(_finished)(conversation_id, first, settings)
        if first is not None:
            boundary.part(_live, run_every=POLL_SECONDS)(conversation_id, first, len(live))
        _tool_result(settings, conversation_id, messages)
        _input(settings, conversation_id, live=bool(live))
    with right, st.container(key="panel"):
        boundary.part(step_panel.show)(conversation_id, _of_branches(settings))
    with left, st.container(key="map"):
        boundary.part(reply_map.section)(conversation_id)


def _of_branches(settings: sidebar.Settings | None) -> branches.Settings | None:
    return None if settings is None else (settings[1], settings[2])


def _finished(conversation_id: int, end: int | None, settings: sidebar.Settings | None) -> None:
    """The title and the messages before the first live reply."""
    opened = branches.opened(conversation_id)
    if opened is None:
        return
    with layout.title_row(opened.conversation.title):
        layout.choice("Colour the tokens by", replies.COLOURS, "colour")
    for message in opened.path[:end]:
        _message(message, opened.path)
        branches.controls(message, opened.messages, _of_branches(settings))


def _live(conversation_id: int, first: int, live: int) -> None:
    """The live replies, redrawn a few times a second; when one ends, the page reruns."""
    opened = branches.opened(conversation_id)
    if opened is None or sum(m.status.is_live for m in opened.path) != live:
        st.rerun()
    for message in opened.path[first:]:
        _message(message, opened.path)
        branches.controls(message, opened.messages, None)


def _prompt_with(message: Message, messages: Sequence[Message]) -> Prompt | None:
    """A prompt that contains the message, if the message may contain a special token."""
    if not set("<[") & set(message.content):
        return None
    after = (m for m in messages if m.position > message.position and m.prompt_len is not None)
    reply = next(after, None)
    return None if reply is None else data.prompt(reply)


def _colour() -> replies.Colour:
    return st.session_state.get("colour") or "surprisal"


def _given(message: Message, messages: Sequence[Message], label: str) -> bool:
    """Draw a message as the tokens that the model was given, if a reply's prompt was traced."""
    for reply in messages:
        if reply.position <= message.position or reply.role is not Role.ASSISTANT:
            continue
        traced = {at: one.step for at, one in data.prompt_steps(reply).items()}
        prompt = data.prompt(reply) if traced else None
        if prompt is None:
            continue
        before = [m for m in messages if m.position < reply.position]
        span = message_spans(prompt, before).get(message.id)
        if span is not None and not traced.keys().isdisjoint(span):
            _draw_given(f"given-{message.id}", reply, prompt, traced, span, label)
            return True
    return False


def _scored(message: Message) -> bool:
    """Draw a scored text, whose tokens are all given; False if the message is none."""
    traced = {at: one.step for at, one in data.prompt_steps(message).items()}
    own = {at: step for at, step in traced.items() if step.origin == "given"}
    prompt = data.prompt(message) if own else None
    if prompt is None or not message.content:
        return False
    span = scored_span(len(prompt), min(own))
    _draw_given(f"reply-{message.id}", message, prompt, own, span, None)
    return True


def _draw_given(
    key: str,
    reply: Message,
    prompt: Prompt,
    traced: Mapping[int, StepSummary],
    span: range,
    label: str | None,
) -> None:
    """Draw tokens of the prompt of ``reply``; without a ``label`` they are a scored text."""
    scored = label is None
    shown = prompts.given_data(
        prompt,
        traced,
        span,
        conversation=reply.conversation_id,
        message=reply.id,
        colour=_colour(),
        layers=reply.capture.layers if reply.capture else 0,
        label=label,
        status=prompts.scored_status(reply, list(traced.values())) if scored else "",
        bad=scored and reply.status in (Status.FAILED, Status.INTERRUPTED),
    )
    components.reply(key=key, data=shown)


def _message(message: Message, messages: Sequence[Message]) -> None:
    if message.role is not Role.ASSISTANT:
        label = "" if message.role is Role.USER else str(message.role)
        if message.tool_name:
            label += f" {message.tool_name}"
        if _given(message, messages, label):
            return
        shown = replies.bubble_data(message.content, label, _prompt_with(message, messages))
        components.bubble(data=shown, key=f"message-{message.id}")
        return
    steps = data.steps(message)
    live = message.status.is_live
    if not steps and not live and _scored(message):
        return
    if not steps and message.status is Status.COMPLETE and message.content:
        # Given or imported without a trace: its text is all there is.
        shown = replies.bubble_data(message.content, "assistant")
        components.bubble(data=shown, key=f"message-{message.id}")
        return
    size = storage.size(data.store().message_bytes(message.id)) if steps and not live else ""
    prompt = data.prompt(message) if message.prefix_len else None
    prefix = {at: one.step for at, one in data.prefix_steps(message).items()} if prompt else {}
    shared = branch_data.shared_steps(message, prefix)
    drawn = replies.reply_data(
        steps,
        conversation=message.conversation_id,
        message=message.id,
        colour=_colour(),
        layers=message.capture.layers if message.capture else 0,
        live=live,
        status=replies.status_line(message, len(steps), size),
        bad=message.status in (Status.FAILED, Status.INTERRUPTED),
        parts=message.parts,
        shared=shared or (),
    )
    if shared is None and prompt is not None:
        drawn = branch_data.with_plain_beginning(drawn, message, prompt)
    components.reply(key=f"reply-{message.id}", data=drawn)
    if live:
        _live_controls(message)


def _live_controls(message: Message) -> None:
    with layout.row(f"live-{message.id}"):
        if st.button("Stop", key=f"stop-{message.id}", icon=":material/stop_circle:"):
            data.writer().request_stop(message.id)
        state = data.worker_state()
        if state is None or state.state == "gone":
            data.ensure_worker()
        if message.status is Status.QUEUED:
            before = sum(reply < message.id for reply in data.store().waiting())
            if before:
                st.caption(f"Queued behind {wording.counted(before, 'reply')}.")
            elif state is None or state.state in ("gone", "starting"):
                st.caption("Starting the model process…")
            else:
                _loading(state)
        elif message.prompt_len is None:
            _loading(state)
        elif not message.tokens:
            st.caption("Reading the prompt…")


def _loading(state: WorkerState | None) -> None:
    """The progress of loading the model that the reply waits for."""
    if state is not None and state.state == "loading" and state.progress is not None:
        detail = wording.escape(state.detail or "Loading the model…")
        st.progress(min(max(state.progress, 0.0), 1.0), text=detail)
    else:
        st.caption("Loading the model…")
