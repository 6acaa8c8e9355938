"""The sidebar of the chat: which model, how it samples, what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import streamlit as st

from dashboard import address, data, shapes
from oki_trace import settings as environment
from oki_trace.errors import UsageError
from oki_trace.records import CapturePolicy, Message, ModelChoice, Sampling, TensorMode, WorkerState

STATES = {
    "starting": ("Starting", "orange"),
    "idle": ("Ready", "green"),
    "loading": ("Loading", "orange"),
    "decoding": ("Decoding", "blue"),
    "failed": ("Failed", "red"),
    "gone": ("Not running", "gray"),
}


TENSORS: tuple[TensorMode, ...] = get_args(TensorMode)

Settings = tuple[ModelChoice, Sampling, CapturePolicy, str | None]


def settings() -> Settings | None:
    """Draw the settings; None, with the reason shown, when they make no sense."""
    with st.sidebar:
        if st.button("New conversation", icon=":material/add:", width="stretch"):
            address.go(address.Place())
            st.rerun()
        choice = _model()
        sampling, policy, system = _sampling()
    return None if sampling is None else (choice, sampling, policy, system)


def _model() -> ModelChoice:
    default = environment.Settings.from_environment().model_id
    known = list(dict.fromkeys([default, "smollm2", *data.models_used()]))
    name = st.selectbox(
        "Model",
        known,
        key="model",
        accept_new_options=True,
        help="A Hugging Face id, a folder, a .gguf file, or smollm2 (built in). "
        "Type to name another one.",
    )
    four_bit = st.toggle(
        "4-bit weights",
        key="four_bit",
        help="Loads with bitsandbytes; where that cannot be done the model is loaded in its own "
        "precision, and its card says so.",
    )
    return ModelChoice(str(name or default).strip(), four_bit)


def _sampling() -> tuple[Sampling | None, CapturePolicy, str | None]:
    with st.expander("Sampling and capture"):
        temperature = st.slider(
            "Temperature", 0.0, 2.0, 0.0, 0.05, key="temperature", help="0 is greedy."
        )
        off = temperature == 0
        top_p = st.slider("Top-p", 0.05, 1.0, 1.0, 0.05, key="top_p", disabled=off)
        top_k = st.number_input(
            "Top-k", 0, 1000, 0, key="top_k", disabled=off, help="0 keeps every token."
        )
        seed = st.number_input("Seed", 0, None, None, key="seed", disabled=off, placeholder="any")
        penalty = st.slider("Repetition penalty", 1.0, 2.0, 1.0, 0.05, key="penalty")
        tokens = st.number_input("Most new tokens", 1, 8192, 256, key="max_new_tokens")
        tensors = st.selectbox(
            "Full tensors",
            TENSORS,
            index=TENSORS.index(CapturePolicy().tensors),
            key="tensors",
            help="Logits, hidden states, and attention of every head. half: 16-bit floats. "
            "compact: a third of that, within stated bounds. exact: the model's own bits. "
            "none: the rows alone.",
        )
        kept = CapturePolicy()
        with st.container(horizontal=True, key="kept"):
            candidates = _kept("Candidates", kept.topk_logits, "topk_logits", "tokens of each step")
            attended = _kept(
                "Attended", kept.topk_evidence, "topk_evidence", "positions of each layer"
            )
            lens = _kept("Lens", kept.topk_lens, "topk_lens", "tokens of each layer")
        system = st.text_area("System message", key="system", placeholder="none", height=80)
    policy = CapturePolicy(candidates, attended, lens, tensors)
    try:
        sampling = Sampling(
            max_new_tokens=int(tokens),
            temperature=None if off else temperature,
            top_p=None if off else top_p,
            top_k=None if off else int(top_k),
            repetition_penalty=penalty,
            seed=None if off or seed is None else int(seed),
        )
    except UsageError as error:
        st.error(str(error))
        return None, policy, None
    return sampling, policy, system.strip() or None


def _kept(name: str, default: int, key: str, of_what: str) -> int:
    """How many entries of a kind are kept."""
    return int(
        st.number_input(
            name, 1, 1000, default, key=key, width=76, help=f"How many {of_what} are kept."
        )
    )


def model_card(messages: Sequence[Message]) -> None:
    """The model of the last reply, and how far what is shown of it can be trusted."""
    message = next((m for m in reversed(messages) if m.capture is not None), None)
    if message is None or message.capture is None:
        return
    capture = message.capture
    with st.sidebar, st.container(border=True, gap="xsmall", key="model-card"):
        name = shapes.clipped(message.model_id or "unknown model", 60)
        st.caption(f"**{shapes.plain(name)}**")
        st.caption(shapes.plain(shapes.model_line(capture)))
        with st.container(horizontal=True, gap="xsmall"):
            for badge in shapes.trust(capture):
                st.badge(badge.name, color=badge.colour, help=shapes.plain(badge.meaning))


def worker_card() -> None:
    """What the process that owns the model is doing."""
    state = data.worker_state()
    if state is None:
        return
    label, colour = STATES.get(state.state, (state.state, "gray"))
    with st.container(border=True, gap="xsmall"):
        st.badge(label, color=colour)  # type: ignore[arg-type]
        text = _detail(state)
        if text:
            st.caption(shapes.plain(text))
        if state.state == "loading" and state.progress is not None:
            st.progress(min(max(state.progress, 0.0), 1.0))


def _detail(state: WorkerState) -> str:
    if state.state == "gone":
        return "It starts with the next message."
    return state.detail or state.model_id or ""


def recent_conversations(current: int | None) -> None:
    """The latest conversations, to go on with."""
    found = data.recent()
    if not found:
        return
    with st.sidebar, st.container(key="recent", gap=None):
        st.caption("Recent")
        for c in found:
            chosen = c.id == current
            label = shapes.plain(c.title[:60].strip()) or "Untitled"
            if st.button(
                f"**{label}**" if chosen else label,
                key=f"open-{c.id}",
                type="tertiary",
                width="stretch",
                help=f"{c.tokens:,} tokens · {c.status}",
            ):
                address.go(address.Place(c.id))
                st.rerun()
