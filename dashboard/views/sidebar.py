"""The sidebar of the chat: which model, how it samples, what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

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

# What was chosen, by the key of its widget. A widget's own state is gone as soon as
# it is not drawn: on another page, or while its part of the sidebar is shut.
CHOSEN = "chat-settings"


def settings() -> Settings | None:
    """Draw the settings; None, with the reason shown, when they make no sense."""
    with st.sidebar:
        if st.button("New conversation", icon=":material/add:", width="stretch"):
            address.go(address.Place())
            st.rerun()
        choice = _model()
        # Shut, it is not drawn: its widgets are the most costly of the page.
        part = st.expander("Sampling and capture", key="sampling", on_change="rerun")
        if part.open:
            with part:
                _sampling_widgets()
        try:
            sampling, policy, system = _asked()
        except UsageError as error:
            st.error(str(error))
            return None
        if not part.open:
            st.caption(shapes.plain(shapes.settings_line(sampling, policy, system)))
    return choice, sampling, policy, system


def _chosen() -> dict[str, Any]:
    """What is chosen of everything, the defaults where nothing was."""
    policy, sampling = CapturePolicy(), Sampling()
    defaults = {
        "model": environment.Settings.from_environment().model_id,
        "four_bit": False,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "seed": None,
        "penalty": 1.0,
        "max_new_tokens": sampling.max_new_tokens,
        "tensors": policy.tensors,
        "topk_logits": policy.topk_logits,
        "topk_evidence": policy.topk_evidence,
        "topk_lens": policy.topk_lens,
        "system": "",
    }
    kept: dict[str, Any] = st.session_state.setdefault(CHOSEN, {})
    kept.update({key: st.session_state[key] for key in defaults if key in st.session_state})
    return {**defaults, **kept}


def _seeded(key: str) -> str:
    """``key``, of a widget that comes back as it was left."""
    if key not in st.session_state:
        st.session_state[key] = _chosen()[key]
    return key


def _model() -> ModelChoice:
    default = environment.Settings.from_environment().model_id
    chosen = _chosen()["model"] or default
    known = list(dict.fromkeys([default, "smollm2", chosen, *data.models_used()]))
    name = st.selectbox(
        "Model",
        known,
        key=_seeded("model"),
        accept_new_options=True,
        help="A Hugging Face id, a folder, a .gguf file, or smollm2 (built in). "
        "Type to name another one.",
    )
    four_bit = st.toggle(
        "4-bit weights",
        key=_seeded("four_bit"),
        help="Loads with bitsandbytes; where that cannot be done the model is loaded in its own "
        "precision, and its card says so.",
    )
    return ModelChoice(str(name or default).strip(), four_bit)


def _sampling_widgets() -> None:
    temperature = st.slider(
        "Temperature", 0.0, 2.0, step=0.05, key=_seeded("temperature"), help="0 is greedy."
    )
    off = temperature == 0
    st.slider("Top-p", 0.05, 1.0, step=0.05, key=_seeded("top_p"), disabled=off)
    st.number_input(
        "Top-k", 0, 1000, key=_seeded("top_k"), disabled=off, help="0 keeps every token."
    )
    st.number_input("Seed", 0, None, None, key=_seeded("seed"), disabled=off, placeholder="any")
    st.slider("Repetition penalty", 1.0, 2.0, step=0.05, key=_seeded("penalty"))
    st.number_input("Most new tokens", 1, 8192, key=_seeded("max_new_tokens"))
    st.selectbox(
        "Full tensors",
        TENSORS,
        key=_seeded("tensors"),
        help="Logits, hidden states, and attention of every head. half: 16-bit floats. "
        "compact: a third of that, within stated bounds. exact: the model's own bits. "
        "none: the rows alone.",
    )
    with st.container(horizontal=True, key="kept"):
        for name, key, of_what in (
            ("Candidates", "topk_logits", "tokens of each step"),
            ("Attended", "topk_evidence", "positions of each layer"),
            ("Lens", "topk_lens", "tokens of each layer"),
        ):
            st.number_input(
                name, 1, 1000, key=_seeded(key), width=76, help=f"How many {of_what} are kept."
            )
    st.text_area("System message", key=_seeded("system"), placeholder="none", height=80)


def _asked() -> tuple[Sampling, CapturePolicy, str | None]:
    """What the settings ask for. Raises UsageError for what makes no sense."""
    chosen = _chosen()
    off = chosen["temperature"] == 0
    sampling = Sampling(
        max_new_tokens=int(chosen["max_new_tokens"]),
        temperature=None if off else chosen["temperature"],
        top_p=None if off else chosen["top_p"],
        top_k=None if off else int(chosen["top_k"]),
        repetition_penalty=chosen["penalty"],
        seed=None if off or chosen["seed"] is None else int(chosen["seed"]),
    )
    logits, evidence, lens = (
        int(chosen[key]) for key in ("topk_logits", "topk_evidence", "topk_lens")
    )
    policy = CapturePolicy(logits, evidence, lens, chosen["tensors"])
    return sampling, policy, chosen["system"].strip() or None


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
            for badge in shapes.trust(message):
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
                help=f"{c.tokens:,} tokens · {'damaged' if c.damage else c.status}",
            ):
                address.go(address.Place(c.id))
                st.rerun()
