"""One step of a reply: what was considered, what was looked at, what each layer would have said."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import streamlit as st

from dashboard import charts, components, data, shapes
from oki_trace.records import CaptureReport, Message, Step, StepSummary

MAP_STEPS = 12


def show(message: Message, steps: Sequence[StepSummary], index: int) -> None:
    """Draw the panel for step ``index`` of ``message``."""
    step = data.step(message, index)
    if step is None or message.capture is None:
        st.caption("This step is not in the store yet.")
        return
    components.facts(data=shapes.facts_data(step, steps[index], len(steps)), key="facts")
    st.markdown("#### Considered")
    components.bars(data=shapes.bars_data(step), key="bars")
    st.markdown("#### Evidence")
    _evidence(message, message.capture, steps, step)
    st.markdown("#### Logit Lens")
    _lens(message, message.capture, step)


def _evidence(
    message: Message, capture: CaptureReport, steps: Sequence[StepSummary], step: Step
) -> None:
    prompt = data.prompt(message)
    if step.evidence is None or prompt is None:
        st.caption(f"Attention: {capture.evidence_provenance}.")
        return
    tensor = data.attentions(message, step.step_index)
    final = step.attention[-1].layer
    layer, head, no_sink = final, "mean", True
    with st.container(horizontal=True, vertical_alignment="bottom"):
        layers = [a.layer for a in reversed(step.attention)]
        layer = st.selectbox(
            "Layer",
            layers,
            format_func=lambda n: f"{n} (final)" if n == final else str(n),
            key="evidence_layer",
            width=120,
        )
        if tensor is not None:
            heads = ["mean", "max", *map(str, range(tensor.array.shape[1]))]
            head = st.selectbox("Head", heads, key="evidence_head", width=110)
        no_sink = st.toggle(
            "Leave out the first token",
            value=True,
            key="no_sink",
            help="Models park attention they have no use for on the first token (a sink).",
        )
    layer = layer if layer in [a.layer for a in step.attention] else final
    if tensor is not None:
        weights = shapes.positions(*data.full_weights(tensor, layer, head))
    else:
        kept = next(a for a in step.attention if a.layer == layer)
        pairs = zip(kept.positions.tolist(), kept.weights.tolist(), strict=True)
        weights = dict(pairs)
    first = shapes.figure(100 * weights.get(0, 0.0), 0, "%")
    components.evidence(
        data=shapes.evidence_data(
            prompt, steps, step.position, weights, left_out=0 if no_sink else None
        ),
        key="evidence",
    )
    notes = [f"First token, left out: {first} of the attention." if no_sink else ""]
    if tensor is None:
        notes.append(f"Only the {len(weights)} most attended positions were kept.")
    notes.append("Attention shows where the model looked, not why.")
    st.caption(" ".join(note for note in notes if note))


def _lens(message: Message, capture: CaptureReport, step: Step) -> None:
    if step.lens is None:
        if not capture.logit_lens_available:
            st.caption(f"Not available: {capture.lens_reason}.")
        elif message.status.is_live:
            st.caption("A few steps behind; it comes before the reply ends.")
        else:
            st.caption("The reply ended before this step's lens was computed.")
        return
    components.lens(data=shapes.lens_data(step, step.lens), key="lens")
    check = "" if capture.lens_check is None else f" Lens check {capture.lens_check:.0e}."
    st.caption(
        "What the model would say if a layer were its last, through its own final norm and head; "
        f"#n is the chosen token's rank there.{check}"
    )
    st.altair_chart(charts.trajectory(step.lens, shapes.visible(step.token)), key="trajectory")


def reply_map(
    message: Message,
    steps: Sequence[StepSummary],
    index: int,
    pick: Callable[[Message, int | None], None],
) -> None:
    """The lens over the reply, a window of steps around the chosen one."""
    if message.capture is None or not message.capture.logit_lens_available:
        return
    if message.status.is_live:
        return  # it would be drawn anew with every token
    if not st.toggle("Reply map: what each layer would have said", value=True, key="show_map"):
        return
    first = index // MAP_STEPS * MAP_STEPS
    end = min(first + MAP_STEPS, len(steps))
    layers = range(message.capture.layers, -1, -1)
    key = "reply-map"
    components.reply_map(
        key=key,
        data=shapes.map_data(data.step_range(message, first, end), layers, index),
        on_pick_change=lambda: pick(message, st.session_state[key].pick),
    )
    if len(steps) > MAP_STEPS:
        st.caption(f"Steps {first + 1} to {end} of {len(steps)}: the map follows the chosen token.")
