"""The reply map: a whole reply at once, what each layer would have said or where each step looked.

In the chat it stands below the conversation; as a page of its own it has the
whole width. Only what a window of steps needs is read, and full tensors only
when a head is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from dashboard import boundary, components, data, url_state
from dashboard.viewdata import attention, lens, replies
from dashboard.views import empty_state, step_panel
from oki_trace.records import CaptureReport, Message, StepSummary

KINDS = ("layers", "attention")
# Steps in one window: of rows many, of full tensors (each is read whole) few.
WINDOW = 512
FULL_WINDOW = 64
HEIGHT = 660


@boundary.page
def page() -> None:
    """The map on a page of its own."""
    place = url_state.here()
    opened = data.conversation(place.conversation) if place.conversation else None
    if opened is None:
        _choose()
        return
    with st.container(
        horizontal=True,
        horizontal_alignment="distribute",
        vertical_alignment="center",
        key="heading",
    ):
        st.text(opened[0].title[:200])
        if st.button("Open in chat", icon=":material/chat:", type="tertiary"):
            st.switch_page(st.session_state["pages"]["chat"], query_params=url_state.here().query())
    boundary.part(_step)(opened[0].id)
    boundary.part(section)(opened[0].id, wide=True)


def _choose() -> None:
    """The latest conversations, for who comes here first."""
    st.title("Reply map")
    found = [c for c in data.recent() if c.tokens]
    if not found:
        empty_state.first_trace(
            "No replies yet: begin a conversation in Chat, and its map is here."
        )
        return
    st.caption("A whole reply at once. Choose a conversation:")
    with st.container(key="recent", gap=None):
        for c in found:
            if st.button(replies.plain(c.title[:80]), key=f"map-{c.id}", type="tertiary"):
                url_state.go(url_state.Place(c.id))
                st.rerun()


def _step(conversation_id: int) -> None:
    """The chosen step in short."""
    found = step_panel.focus(conversation_id)
    step = data.step(found[0], found[2]) if found else None
    if found is None or step is None:
        step_panel.head(replies.NO_STEP)
        return
    message, steps, index = found
    step_panel.head(
        replies.facts_data(
            step, steps[index], len(steps), conversation=conversation_id, message=message.id
        )
    )


def section(conversation_id: int, *, wide: bool = False) -> None:
    """The map of the reply that is open."""
    found = step_panel.focus(conversation_id)
    capture = found[0].capture if found else None
    if found is None or capture is None:
        if wide:
            st.caption("This conversation has no reply with tokens yet.")
        return
    message, steps, index = found
    with st.container(horizontal=True, vertical_alignment="center", key="map-head"):
        st.markdown("#### Reply map", width="content")
        kind = st.segmented_control(
            "What to map",
            KINDS,
            default="layers",
            required=True,
            key="map_kind",
            label_visibility="collapsed",
        )
        layer, head = None, attention.MEAN
        if kind == "attention" and capture.attention_layers:
            layer = step_panel.layer_of(capture.attention_layers, key="map_layer")
            count = data.head_count(message, index)
            head = step_panel.head_of(message, count, key="map_head")
        size = WINDOW if head == attention.MEAN else FULL_WINDOW
        first, end = _window(message, len(steps), index, size)
    if message.status.is_live and not st.toggle("Draw what is there so far", key="map_live"):
        st.caption("Still decoding: the map is drawn when the reply has ended.")
    elif kind == "attention":
        _attention(message, capture, steps, layer, head, first, end)
    else:
        _layers(message, capture, steps, first, end)


def _window(message: Message, count: int, index: int, size: int) -> tuple[int, int]:
    """The stretch of steps to show: the one with the chosen step, until another is chosen."""
    if count <= size:
        return 0, count
    starts = list(range(0, count, size))
    first = st.selectbox(
        "Steps",
        starts,
        index=index // size,
        format_func=lambda n: f"steps {n + 1:,} to {min(n + size, count):,} of {count:,}",
        # Another step may be in another window, and then that one is wanted.
        key=f"map_window_{message.id}_{size}_{index // size}",
        label_visibility="collapsed",
        width=230,
    )
    return first, min(first + size, count)


def _layers(
    message: Message, capture: CaptureReport, steps: Sequence[StepSummary], first: int, end: int
) -> None:
    if not capture.logit_lens_available:
        st.caption(replies.sentence(f"Lens not available: {capture.lens_reason}"))
        return
    doubt = replies.doubt_of(message)
    if doubt:
        st.warning(replies.plain(doubt), icon=":material/warning:")
    grid = data.lens_grid(message, first, end)
    if not len(grid.step_index):
        st.caption("None of these steps has its lens yet.")
        return
    _draw(message, lens.lens_map(grid, steps), "layers", first)
    st.caption(
        "Each cell is the likeliest token if that layer were the last; the top row is the model's "
        "own. Click a cell to go to its step."
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
        st.caption(replies.sentence(f"Attention: {capture.evidence_provenance}"))
        return
    if head == attention.MEAN:
        found = data.attention_points(message, layer, first, end)
        note = f"The {capture.policy.topk_evidence:,} most attended positions of each step."
    else:
        found = data.full_attention(message, layer, head, first, end)
        note = f"Every position, from the full tensors, {FULL_WINDOW:d} steps at a time."
    park = step_panel.leave_out("map_sink")
    without = attention.parked(prompt, steps) if park else frozenset()
    shown = attention.attention_map(prompt, steps, found, first, end, without)
    _draw(message, shown, f"attention-layer-{layer}-{head.replace(' ', '-')}", first)
    st.caption(f"{note} The line is where the reply begins. Click a cell to go to its step.")


def _draw(message: Message, shown: replies.Json, name: str, first: int) -> None:
    components.reply_map(
        key="reply-map",
        data={
            **shown,
            "conversation": message.conversation_id,
            "message": message.id,
            "name": f"{name}-message-{message.id}-from-step-{first + 1}",
            "height": HEIGHT,
        },
        # A step of another reply was chosen: that it is drawn anew is all.
        on_load_change=lambda: None,
    )
