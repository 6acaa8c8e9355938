"""The reply map: the lens or the attention of a whole reply at once.

In the chat it is below the conversation; its own page has the full width. The traced
tokens of the prompt are to the left of the reply, if the user wants to see them. It
reads one window of steps, and full tensors only when a head is chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import streamlit as st

from dashboard import boundary, components, data, url_state
from dashboard.viewdata import attention, lens, map_columns, wording
from dashboard.viewdata.map_columns import MapColumn
from dashboard.views import layout, step_panel
from oki_trace.records import CaptureReport, Message

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
    layout.choose_conversation(
        "Reply map",
        "Choose a conversation to see the map of its last reply:",
        "see its map",
        [c for c in data.recent_conversations() if c.tokens],
    )


def _head(conversation_id: int) -> None:
    """The selected step."""
    step_panel.draw_head(conversation_id)


def section(conversation_id: int, *, wide: bool = False) -> None:
    """The map of the selected reply, or of a scored text."""
    selected = step_panel.selected_token(conversation_id)
    capture = selected.message.capture if selected else None
    if selected is None or capture is None:
        if wide:
            st.caption("No tokens yet. Send a message in Chat to see the map of its reply here.")
        return
    message = selected.message
    with layout.section_row("Reply map", "map-head"):
        kind = layout.choice("Map", KINDS, "map_kind")
        layer, head = None, attention.MEAN
        if kind == "attention" and capture.attention_layers:
            layer = step_panel.layer_select(capture.attention_layers, key="map_layer")
            count = data.head_count(selected.owner, selected.address, given=selected.given)
            head = step_panel.head_select(selected.owner, count, key="map_head")
        columns = _columns(selected)
        size = WINDOW if head == attention.MEAN else FULL_WINDOW
        window = _window(selected, columns, size)
    if message.status.is_live and not st.toggle("Show steps so far", key="map_live"):
        st.caption("Decoding… The map is drawn when the reply ends.")
    elif kind == "attention":
        _attention(selected, capture, layer, head, window)
    else:
        _layers(message, capture, window)


def _columns(selected: step_panel.Selected) -> list[MapColumn]:
    """The columns of the whole map; those of the prompt if the user wants them."""
    prompt = selected.prompt
    if prompt and selected.steps:
        shown = st.toggle(
            "Show the prompt", key="map_prompt", help="Its traced tokens, to the left of the reply."
        )
        prompt = prompt if shown else {}
    message = selected.message
    return map_columns.map_columns(message.id, message.prompt_len or 0, prompt, selected.steps)


def _window(
    selected: step_panel.Selected, columns: Sequence[MapColumn], size: int
) -> Sequence[MapColumn]:
    """The columns to show: at first the window with the selected token."""
    windows = map_columns.windows(columns, size)
    if len(windows) == 1:
        return columns
    # For a token of a prompt that is not shown, the first window.
    at = next((n for n, column in enumerate(columns) if column.number == selected.number), 0)
    shown = next(n for n, (_, end) in enumerate(windows) if at < end)
    first, end = st.selectbox(
        "Steps",
        windows,
        index=shown,
        format_func=lambda window: map_columns.window_label(columns, window),
        # Selecting a token outside the window selects its window.
        key=f"map_window_{selected.message.id}_{size}_{columns[0].number}_{shown}",
        label_visibility="collapsed",
        width=280,
    )
    return columns[first:end]


def _layers(message: Message, capture: CaptureReport, columns: Sequence[MapColumn]) -> None:
    if not capture.logit_lens_available:
        st.caption(wording.sentence(f"Lens not available: {capture.lens_reason}"))
        return
    layout.check_warning(message)
    name = step_panel.lens_select(data.lens_names(message), "map_lens")
    grid = lens.joined_lens(
        [
            (data.lens_grid(owner, run.first, run.end, given=run.given, lens=name), run.shift)
            for owner, run in _runs(columns)
        ]
    )
    if not len(grid.step_index):
        st.caption("The lens of these steps has not been computed yet.")
        return
    _draw(message, lens.lens_map(grid, columns), "layers", columns)
    both = columns[0].number < 0 <= columns[-1].number
    seam = " The vertical line marks the start of the reply." if both else ""
    st.caption(
        "Each cell is the likeliest token if that layer were the last; the top row is the model's "
        f"own prediction.{seam} Click a cell to select its step."
    )


def _attention(
    selected: step_panel.Selected,
    capture: CaptureReport,
    layer: int | None,
    head: str,
    columns: Sequence[MapColumn],
) -> None:
    message = selected.message
    prompt = data.prompt(message)
    if layer is None or prompt is None:
        st.caption(wording.sentence(f"Attention: {capture.evidence_provenance}"))
        return
    found = []
    for owner, run in _runs(columns):
        if head == attention.MEAN:
            points = data.attention_points(owner, layer, run.first, run.end, given=run.given)
        else:
            points = data.full_attention(owner, layer, head, run.first, run.end, given=run.given)
        found.append((points, run.shift))
    note = f"The {capture.policy.topk_evidence:,} most attended positions of each step."
    if head != attention.MEAN:
        note = f"Every position, from the full tensors, {FULL_WINDOW:d} steps at a time."
    hide_sinks = step_panel.sink_toggle("map_sink")
    steps = selected.steps
    without = attention.sink_positions(prompt, steps) if hide_sinks else frozenset()
    points = attention.joined_points(found)
    shown = attention.attention_map(prompt, steps, points, columns, without)
    _draw(message, shown, f"attention-layer-{layer}-{head.replace(' ', '-')}", columns)
    seam = " The line marks the start of the reply." if steps else ""
    st.caption(f"{note}{seam} Click a cell to select its step.")


def _runs(columns: Sequence[MapColumn]) -> Iterator[tuple[Message, map_columns.Run]]:
    """What to read for ``columns``, each with the message whose steps they are."""
    for run in map_columns.runs(columns):
        owner = data.message(run.owner)
        if owner is not None:
            yield owner, run


def _draw(message: Message, shown: wording.Json, name: str, columns: Sequence[MapColumn]) -> None:
    first = columns[0]
    where = f"step-{first.number}" if first.number >= 0 else f"position-{first.step.position}"
    components.reply_map(
        key="reply-map",
        data={
            **shown,
            "conversation": message.conversation_id,
            "message": message.id,
            "prompt": first.number < 0,
            "name": f"{name}-message-{message.id}-from-{where}",
            "height": HEIGHT,
        },
        # A step of another reply was selected: the rerun is enough.
        on_load_change=lambda: None,
    )
