"""The reply map: the lens or the attention of a whole reply at once.

In the chat it is below the conversation; its own page has the full width. It reads
one window of steps, and full tensors only when a head is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from dashboard import boundary, components, data, url_state
from dashboard.viewdata import attention, lens, wording
from dashboard.views import layout, step_panel
from oki_trace.records import CaptureReport, Message, StepSummary

KINDS = ("layers", "attention")
# Steps in a window; fewer of full tensors, each of which is read whole.
WINDOW = 512
FULL_WINDOW = 64
HEIGHT = 660


@boundary.page
def page() -> None:
    """The page of the map."""
    place = url_state.current()
    opened = data.conversation(place.conversation) if place.conversation else None
    if opened is None:
        _choose()
        return
    with layout.title_row(opened[0].title):
        layout.open_in_chat(url_state.current(), "map")
    boundary.part(_head)(opened[0].id)
    boundary.part(section)(opened[0].id, wide=True)


def _choose() -> None:
    """The latest conversations to choose from."""
    st.title("Reply map")
    conversations = [c for c in data.recent_conversations() if c.tokens]
    if not conversations:
        layout.empty_state("replies", "see its map")
        return
    st.caption("Choose a conversation to see the map of its last reply:")
    with st.container(key="recent", gap=None):
        for c in conversations:
            if st.button(wording.escape(c.title[:80]), key=f"map-{c.id}", type="tertiary"):
                url_state.navigate(url_state.Location(c.id))
                st.rerun()


def _head(conversation_id: int) -> None:
    """The selected step."""
    step_panel.draw_head(conversation_id)


def section(conversation_id: int, *, wide: bool = False) -> None:
    """The map of the selected reply."""
    selected = step_panel.selected_step(conversation_id)
    capture = selected[0].capture if selected else None
    if selected is None or capture is None:
        if wide and step_panel.selected_token(conversation_id) is not None:
            st.caption("No map: the tokens of this conversation were all given to the model.")
        elif wide:
            st.caption("No tokens yet. Send a message in Chat to see the map of its reply here.")
        return
    message, steps, index = selected
    with layout.section_row("Reply map", "map-head"):
        kind = layout.choice("Map", KINDS, "map_kind")
        layer, head = None, attention.MEAN
        if kind == "attention" and capture.attention_layers:
            layer = step_panel.layer_select(capture.attention_layers, key="map_layer")
            count = data.head_count(message, index)
            head = step_panel.head_select(message, count, key="map_head")
        size = WINDOW if head == attention.MEAN else FULL_WINDOW
        first, end = _window(message, len(steps), index, size)
    if message.status.is_live and not st.toggle("Show steps so far", key="map_live"):
        st.caption("Decoding… The map is drawn when the reply ends.")
    elif kind == "attention":
        _attention(message, capture, steps, layer, head, first, end)
    else:
        _layers(message, capture, steps, first, end)


def _window(message: Message, count: int, index: int, size: int) -> tuple[int, int]:
    """The window of steps to show, [first, end): the one with the selected step at first."""
    if count <= size:
        return 0, count
    starts = list(range(0, count, size))
    first = st.selectbox(
        "Steps",
        starts,
        index=index // size,
        format_func=lambda n: f"steps {n + 1:,} to {min(n + size, count):,} of {count:,}",
        # Selecting a step outside the window selects its window.
        key=f"map_window_{message.id}_{size}_{index // size}",
        label_visibility="collapsed",
        width=230,
    )
    return first, min(first + size, count)


def _layers(
    message: Message, capture: CaptureReport, steps: Sequence[StepSummary], first: int, end: int
) -> None:
    if not capture.logit_lens_available:
        st.caption(wording.sentence(f"Lens not available: {capture.lens_reason}"))
        return
    layout.check_warning(message)
    grid = data.lens_grid(message, first, end)
    if not len(grid.step_index):
        st.caption("The lens of these steps has not been computed yet.")
        return
    _draw(message, lens.lens_map(grid, steps), "layers", first)
    st.caption(
        "Each cell is the likeliest token if that layer were the last; the top row is the model's "
        "own prediction. Click a cell to select its step."
    )


def _attention(
    message: Message,
    capture: CaptureReport,
    steps: Sequence[StepSummary],
    layer: int | None,
    head: str,
    first: int,
    end: int,
) -> None:
    prompt = data.prompt(message)
    if layer is None or prompt is None:
        st.caption(wording.sentence(f"Attention: {capture.evidence_provenance}"))
        return
    if head == attention.MEAN:
        points = data.attention_points(message, layer, first, end)
        note = f"The {capture.policy.topk_evidence:,} most attended positions of each step."
    else:
        points = data.full_attention(message, layer, head, first, end)
        note = f"Every position, from the full tensors, {FULL_WINDOW:d} steps at a time."
    hide_sinks = step_panel.sink_toggle("map_sink")
    without = attention.sink_positions(prompt, steps) if hide_sinks else frozenset()
    shown = attention.attention_map(prompt, steps, points, first, end, without)
    _draw(message, shown, f"attention-layer-{layer}-{head.replace(' ', '-')}", first)
    st.caption(f"{note} The line marks the start of the reply. Click a cell to select its step.")


def _draw(message: Message, shown: wording.Json, name: str, first: int) -> None:
    components.reply_map(
        key="reply-map",
        data={
            **shown,
            "conversation": message.conversation_id,
            "message": message.id,
            "name": f"{name}-message-{message.id}-from-step-{first}",
            "height": HEIGHT,
        },
        # A step of another reply was selected: the rerun is enough.
        on_load_change=lambda: None,
    )
