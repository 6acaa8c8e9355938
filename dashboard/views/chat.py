"""Chat: the conversation, its replies as clickable tokens, and the step panel beside them.

Decoding is the worker's. While a reply is live the view below reads what is new a
few times a second; leaving, reloading or clicking around touches nothing of it.
"""

from __future__ import annotations

import streamlit as st

from dashboard import address, components, data, shapes
from dashboard.views import sidebar, step_panel
from oki_trace.asking import Ask
from oki_trace.errors import OkiTraceError
from oki_trace.records import Message, Role, Status, StepSummary

POLL_SECONDS = 0.3
TITLE_LENGTH = 200

FIRST_QUESTIONS = (
    "What is the capital of France, and what is it famous for?",
    "Write a short story about a lighthouse.",
    "Name three animals that live in the sea.",
)


def page() -> None:
    """Draw the page."""
    place = address.here()
    settings = sidebar.settings()
    opened = data.conversation(place.conversation) if place.conversation else None
    if place.conversation and opened is None:
        st.warning(f"There is no conversation {place.conversation} in this store.")
    live = opened is not None and any(m.status.is_live for m in opened[1])
    with st.sidebar:
        st.fragment(sidebar.worker_card, run_every=1.0)()
    sidebar.recent_conversations(place.conversation)
    if opened is None:
        _welcome(settings)
    else:
        view = st.fragment(_view, run_every=POLL_SECONDS if live else None)
        view(opened[0].id, settings, live)


def _input(settings: sidebar.Settings | None, conversation: int | None, *, live: bool) -> None:
    # Inside a container: at the page's root it would pin the page to its end.
    with st.container():
        said = st.chat_input("Message the model", key="message", disabled=live or not settings)
    if said and settings is not None:
        _send(said, settings, conversation)


def _send(said: str, settings: sidebar.Settings, conversation: int | None) -> None:
    choice, sampling, policy, system = settings
    try:
        conversation = data.ask(Ask(said, choice, sampling, policy, system), conversation)
    except OkiTraceError as error:
        st.error(str(error))
        return
    address.go(address.Place(conversation))
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
        st.caption(
            "The built-in smollm2 (SmolLM2-135M-Instruct) needs no account; the first message "
            "fetches it, 93 MB. Everything stays on this machine."
        )


def _view(conversation_id: int, settings: sidebar.Settings | None, was_live: bool) -> None:
    opened = data.conversation(conversation_id)
    if opened is None:
        return
    conversation, messages = opened
    live = any(m.status.is_live for m in messages)
    if was_live and not live:
        st.rerun()  # the last token is here: stop polling
    with st.container(key="sides"):
        left, right = st.columns([8, 5], gap="medium")
    replies = [m for m in messages if m.role is Role.ASSISTANT]
    focus = _focus(replies)
    with left:
        _heading(conversation.title)
        for message in messages:
            if message.role is Role.ASSISTANT:
                _reply(message, focus)
            else:
                label = "system" if message.role is Role.SYSTEM else ""
                components.bubble(
                    data={"text": message.content, "label": label}, key=f"said-{message.id}"
                )
        _input(settings, conversation_id, live=live)
        with st.container(key="map"):
            if focus is not None:
                step_panel.reply_map(focus[0], focus[1], focus[2], _pick)
    with right, st.container(key="panel"):
        if focus is None:
            st.caption("A token's step shows here.")
        else:
            step_panel.show(*focus)


Focus = tuple[Message, list[StepSummary], int]


def _focus(replies: list[Message]) -> Focus | None:
    """The reply and step in the panel: the address's, else where the last reply hesitated most.

    While a reply is live and nothing is chosen, its newest token whose lens is
    there is followed.
    """
    place = address.here()
    begun = [m for m in replies if m.tokens]
    if not begun:
        return None
    message = next((m for m in begun if m.id == place.message), begun[-1])
    steps = data.steps(message)
    if not steps:
        return None
    if place.message == message.id and place.step is not None:
        index: int | None = min(place.step, len(steps) - 1)
    elif message.status.is_live:
        settled = [s.step_index for s in steps if s.settle_layer is not None]
        index = settled[-1] if settled else steps[-1].step_index
    else:
        index = shapes.most_surprising(steps)
    return message, steps, index or 0


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
            shapes.COLOURS,
            default="surprisal",
            required=True,
            key="colour",
            label_visibility="collapsed",
        )


def _reply(message: Message, focus: Focus | None) -> None:
    focused = focus is not None and focus[0].id == message.id
    steps = focus[1] if focus is not None and focused else data.steps(message)
    key = f"reply-{message.id}"
    components.reply(
        key=key,
        data=shapes.reply_data(
            steps,
            colour=st.session_state.get("colour") or "surprisal",
            layers=message.capture.layers if message.capture else 0,
            chosen=focus[2] if focus is not None and focused else None,
            live=message.status.is_live,
            keys=focused,
            status=_status(message, len(steps)),
            bad=message.status in (Status.FAILED, Status.INTERRUPTED),
        ),
        on_pick_change=lambda: _pick(message, st.session_state[key].pick),
    )
    # Also when empty: so what follows stays the element it was, and keeps the focus.
    with st.container():
        if message.status.is_live:
            _waiting(message)


def _pick(message: Message, index: int | None) -> None:
    if index is not None:
        address.go(address.Place(message.conversation_id, message.id, int(index)))


def _waiting(message: Message) -> None:
    with st.container(horizontal=True, vertical_alignment="center"):
        if st.button("Stop", key=f"stop-{message.id}", icon=":material/stop_circle:"):
            data.stop(message)
        state = data.worker_state()
        if message.status is Status.QUEUED:
            if state is None or state.state == "gone":
                data.see_to_worker()
                st.caption("Starting the model's process…")
            elif state.state == "loading":
                st.caption("Waiting for the model to load…")
            else:
                st.caption("Waiting for the reply before it…")
        elif not message.tokens:
            begun = message.prompt_len is not None
            st.caption("Reading the prompt…" if begun else "Loading the model…")


def _status(message: Message, tokens: int) -> str:
    if message.status in (Status.FAILED, Status.INTERRUPTED):
        return f"{message.status}: {message.reason}" if message.reason else str(message.status)
    parts = [str(message.status)]
    if message.status is Status.STOPPED and message.reason not in (None, "", "stopped"):
        parts[0] += f" ({message.reason})"
    parts.append(f"{tokens} tokens")
    if message.seconds:
        parts.append(f"{tokens / message.seconds:.1f} tokens/s")
    if not message.status.is_live:
        parts.append(f"{data.message_bytes(message) / 1e6:.1f} MB")
    if message.model_id:
        parts.append(message.model_id)
    return " · ".join(parts)
