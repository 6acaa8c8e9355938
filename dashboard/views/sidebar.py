"""The sidebar of the chat: the model, sampling, capture, and recent conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, get_args

import streamlit as st

from dashboard import data, url_state
from dashboard.viewdata import replies, wording
from dashboard.views import layout
from oki_trace import queueing
from oki_trace import settings as environment
from oki_trace.records import (
    CapturePolicy,
    Message,
    ModelChoice,
    PromptTrace,
    Role,
    Sampling,
    TemplateOptions,
    TensorMode,
)
from oki_trace.template_options import options_from, parse_tools

STATES = {
    "starting": ("Starting", "orange"),
    "idle": ("Ready", "green"),
    "loading": ("Loading", "orange"),
    "decoding": ("Decoding", "blue"),
    "failed": ("Failed", "red"),
    "gone": ("Not running", "gray"),
}

TENSORS: tuple[TensorMode, ...] = get_args(TensorMode)
PROMPT_TRACES: tuple[str, ...] = ("none", *get_args(PromptTrace))

# Of an argument of the chat template: the value of earlier turns, or the template's default.
UNCHANGED = "unchanged"
SWITCHES = {
    "enable_thinking": ("Thinking", (UNCHANGED, "true", "false")),
    "reasoning_effort": ("Reasoning effort", (UNCHANGED, "low", "medium", "high")),
}

Settings = tuple[ModelChoice, Sampling, CapturePolicy, str | None, TemplateOptions]

# The settings by the key of their widget. Streamlit drops the state of a widget that is
# not drawn: on another page, or while its part of the sidebar is closed.
CHOSEN = "chat-settings"
# The conversation that the model was last taken from.
FOLLOWED = "chat-followed"
# What each widget showed when it was first drawn.
FIRST = "chat-first"


def draw_settings(conversation: int | None, messages: Sequence[Message]) -> Settings | None:
    """Draw the settings and return them; None, with an error shown, if they are invalid.

    ``messages`` are those of the open ``conversation``, which keeps its model unless
    another is chosen.
    """
    _follow(conversation, messages)
    with st.sidebar:
        if st.button("Start a chat", icon=":material/add:", width="stretch"):
            url_state.navigate(url_state.Location())
            st.rerun()
        choice = _model(messages)
        switches = data.template_switches(choice.model_id) if choice else ()
        # Closed, it is not drawn: its widgets are the most costly of the page.
        part = st.expander("Sampling and capture", key="sampling", on_change="rerun")
        if part.open:
            with part:
                _sampling_widgets(data.model_defaults(choice.model_id) if choice else {})
                _template_widgets(switches)
        with layout.errors_shown():
            sampling, policy, system = _requested()
            template = _template(switches)
            if not part.open:
                st.caption(wording.escape(replies.settings_summary(sampling, policy, system)))
            return None if choice is None else (choice, sampling, policy, system, template)
    return None


def _chosen() -> dict[str, Any]:
    """Every setting: as chosen, or its default."""
    defaults: dict[str, Any] = {
        "model": environment.Settings.from_environment().model_id,
        "four_bit": False,
        "temperature": 0.0,
        "top_p": None,
        "top_k": None,
        "seed": None,
        "penalty": None,
        "max_new_tokens": Sampling().max_new_tokens,
        **asdict(CapturePolicy()),
        "trace_prompt": "light",
        "system": "",
        "enable_thinking": UNCHANGED,
        "reasoning_effort": UNCHANGED,
        "template_args": "",
        "tools": "",
    }
    kept: dict[str, Any] = st.session_state.setdefault(CHOSEN, {})
    kept.update({key: st.session_state[key] for key in defaults if key in st.session_state})
    return {**defaults, **kept}


def _default(key: str) -> Any:
    """What the widget ``key`` shows while the browser has no value of its own for it.

    A default, not a value set in the session state: that is sent to the browser once, and lost
    when a click interrupts the run that sends it. It stays the same while the widget is drawn:
    a field that is emptied would otherwise take what it held before.
    """
    first: dict[str, Any] = st.session_state.setdefault(FIRST, {})
    if key not in st.session_state or key not in first:
        first[key] = _chosen()[key]
    return first[key]


def _setting(key: str) -> dict[str, Any]:
    """The key of a widget and its default."""
    return {"key": key, "value": _default(key)}


def _follow(conversation: int | None, messages: Sequence[Message]) -> None:
    """On opening a conversation, choose the model of its last reply, loaded the same way."""
    if st.session_state.get(FOLLOWED) == conversation:
        return
    st.session_state[FOLLOWED] = conversation
    last = last_choice(messages)
    if last is None and not any(message.role is Role.ASSISTANT for message in messages):
        return
    chosen = st.session_state.setdefault(CHOSEN, {})
    chosen["loaded"] = last
    chosen["model"] = st.session_state["model"] = last.model_id if last else None
    chosen["four_bit"] = st.session_state["four_bit"] = bool(last and last.use_4bit)


def last_choice(messages: Sequence[Message]) -> ModelChoice | None:
    """The model of the conversation's last reply; None if no reply names it."""
    last = queueing.last_choice(messages)
    if last is not None:
        return last
    # An imported trace may name the model alone.
    names = [m.model_id for m in messages if m.role is Role.ASSISTANT and m.model_id]
    return ModelChoice(names[-1]) if names else None


def _model(messages: Sequence[Message]) -> ModelChoice | None:
    default = environment.Settings.from_environment().model_id
    chosen = _chosen()["model"]
    known = list(dict.fromkeys([*filter(None, [chosen]), default, "smollm2", *data.models_used()]))
    name = st.selectbox(
        "Model",
        known,
        index=0 if chosen else None,
        key="model",
        accept_new_options=True,
        placeholder="Choose a model",
        help="A Hugging Face id, a folder, a .gguf file, or smollm2 (built in).",
    )
    name = (name or "").strip()
    last = last_choice(messages)
    if not name:
        st.caption("Choose a model to send a message.")
    elif last is not None and last.model_id != name:
        st.caption(
            f"The last reply here is by {wording.escape(wording.shorten(last.model_id, 60))}."
        )
    four_bit = st.toggle(
        "4-bit weights",
        # Streamlit warns of a default beside a value that `_follow` has just set.
        _default("four_bit") and "four_bit" not in st.session_state,
        key="four_bit",
        help="Loads the model with bitsandbytes. If that fails, it is loaded in its own precision, "
        "and the model card says so.",
    )
    loaded: ModelChoice | None = st.session_state.get(CHOSEN, {}).get("loaded")
    if loaded is not None and loaded.model_id == name:
        return replace(loaded, use_4bit=four_bit)
    return ModelChoice(name, four_bit) if name else None


def _sampling_widgets(own: Mapping[str, float]) -> None:
    """``own`` are the settings of the model's generation config, used where a field is empty."""
    temperature = st.slider(
        "Temperature",
        0.0,
        2.0,
        step=0.05,
        **_setting("temperature"),
        help="0 means greedy decoding.",
    )
    off = temperature == 0

    def optional(
        field: str, key: str, low: float, high: float | None, step: float, **more: Any
    ) -> None:
        """A number that may stay empty: the generation config's setting applies then."""
        setting = "repetition_penalty" if key == "penalty" else key
        value = f", {own[setting]:g}" if setting in own else ""
        more.setdefault("placeholder", f"the model's own{value}")
        st.number_input(field, low, high, step=step, **_setting(key), **more)

    empty = "If empty, the model's generation config applies."
    optional("Top-p", "top_p", 0.01, 1.0, 0.05, disabled=off, help=empty)
    optional("Top-k", "top_k", 0, 1000, 1, disabled=off, help=f"0 keeps every token. {empty}")
    optional("Seed", "seed", 0, None, 1, disabled=off, placeholder="random")
    optional("Repetition penalty", "penalty", 0.01, 10.0, 0.05, help=f"1 turns it off. {empty}")
    st.number_input("Maximum new tokens", 1, 8192, **_setting("max_new_tokens"))
    st.selectbox(
        "Full tensors",
        TENSORS,
        TENSORS.index(_default("tensors")),
        key="tensors",
        help="Logits, hidden states, and attention of every head. half: 16-bit floats. "
        "compact: a third of that, within stated bounds. exact: the model's own bits. "
        "none: no full tensors.",
    )
    st.selectbox(
        "Trace the prompt",
        PROMPT_TRACES,
        PROMPT_TRACES.index(_default("trace_prompt")),
        key="trace_prompt",
        help="Measure the tokens of the prompt too. light: their probability, candidates and "
        "attention, and the best token of each lens layer. full: everything that is kept of the "
        "reply's tokens. none: the reply alone.",
    )
    with st.container(horizontal=True, key="kept"):
        for name, key, of_what in (
            ("Candidates", "topk_logits", "tokens of each step"),
            ("Attended", "topk_evidence", "positions of each layer"),
            ("Lens", "topk_lens", "tokens of each layer"),
        ):
            st.number_input(
                name, 1, 1000, **_setting(key), width=70, help=f"How many {of_what} are kept."
            )
    st.text_area("System message", **_setting("system"), placeholder="none", height=80)


def _requested() -> tuple[Sampling, CapturePolicy, str | None]:
    """The request that the settings make. Raises UsageError for invalid ones."""
    chosen = _chosen()
    off = chosen["temperature"] == 0
    sampling = Sampling(
        max_new_tokens=chosen["max_new_tokens"],
        repetition_penalty=chosen["penalty"],
        **{key: None if off else chosen[key] for key in ("temperature", "top_p", "top_k", "seed")},
    )
    kept = {key: chosen[key] for key in asdict(CapturePolicy())}
    if kept["trace_prompt"] == "none":
        kept["trace_prompt"] = None
    policy = CapturePolicy(**kept)
    return sampling, policy, chosen["system"] if chosen["system"].strip() else None


def _template_widgets(switches: Sequence[str]) -> None:
    """Arguments of the chat template; ``switches`` are those that it is known to read."""
    for name in switches:
        label, values = SWITCHES[name]
        st.selectbox(
            label,
            values,
            values.index(_default(name)),
            key=name,
            help=f"The argument {wording.escape(name)} of the chat template.",
        )
    st.text_area(
        "Template arguments",
        **_setting("template_args"),
        placeholder="enable_thinking=false",
        height=80,
        help="Arguments of the model's chat template, one KEY=VALUE per line. They apply to later "
        "turns too; KEY=null removes one.",
    )
    st.text_area(
        "Tools",
        **_setting("tools"),
        placeholder="none",
        height=80,
        help="A JSON list of function schemas. Calls are shown, never executed.",
    )


def _template(switches: Sequence[str]) -> TemplateOptions:
    """The arguments and tools of the chat template. Raises UsageError for invalid ones."""
    chosen = _chosen()
    lines = [f"{name}={chosen[name]}" for name in switches if chosen[name] != UNCHANGED]
    lines += [line for line in chosen["template_args"].splitlines() if line.strip()]
    text = chosen["tools"].strip()
    return options_from(lines, parse_tools(text, "Tools") if text else ())


def model_card(messages: Sequence[Message]) -> None:
    """The model of the last reply, and how far its numbers can be trusted."""
    message = next((m for m in reversed(messages) if m.capture is not None), None)
    if message is None or message.capture is None:
        return
    capture = message.capture
    with st.sidebar, st.container(border=True, gap="xsmall", key="model-card"):
        name = wording.shorten(message.model_id or "unknown model", 60)
        st.caption(f"**{wording.escape(name)}**")
        st.caption(
            wording.escape(replies.model_summary(capture)),
            help=wording.escape(capture.fast_paths) if capture.speedups else None,
        )
        with st.container(horizontal=True, gap="xsmall"):
            for badge in replies.trust_badges(message):
                st.badge(
                    wording.escape(badge.name),
                    color=badge.colour,
                    help=wording.escape(badge.meaning),
                )


def worker_card() -> None:
    """The state of the worker."""
    state = data.worker_state()
    if state is None:
        return
    label, colour = STATES.get(state.state, ("Unknown", "gray"))
    with st.container(border=True, gap="xsmall"):
        st.badge(label, color=colour)  # type: ignore[arg-type]
        text = state.detail or state.model_id
        if state.state == "gone":
            text = "It starts with the next message."
        if text:
            st.caption(wording.escape(text))
        if state.state == "loading" and state.progress is not None:
            st.progress(min(max(state.progress, 0.0), 1.0))


def recent_conversations(current: int | None) -> None:
    """Buttons that open the latest conversations."""
    conversations = data.recent_conversations()
    if not conversations:
        return
    with st.sidebar, st.container(key="recent", gap=None):
        st.caption("Recent")
        for c in conversations:
            chosen = c.id == current
            label = wording.escape(c.title[:60].strip()) or "Untitled"
            if st.button(
                f"**{label}**" if chosen else label,
                key=f"open-{c.id}",
                type="tertiary",
                width="stretch",
                help=f"{c.tokens:,} tokens · {'damaged' if c.damage else wording.escape(c.status)}",
            ):
                url_state.navigate(url_state.Location(c.id))
                st.rerun()
