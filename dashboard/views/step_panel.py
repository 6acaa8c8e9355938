"""One step of a reply: what was considered, what was looked at, what each layer would have said.

It is a part of the page that is drawn by itself; its head (``components.facts``)
is where a click on any token of the page arrives.
"""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from dashboard import components, data, url_state
from dashboard.viewdata import attention, lens, replies
from oki_trace.records import CaptureReport, Message, Role, Step, StepSummary

Focus = tuple[Message, list[StepSummary], int]

TABLES = ("tokens", "changes")


def focus(conversation_id: int) -> Focus | None:
    """The reply and step to show: the address's, else where the last reply hesitated most.

    While a reply is live and nothing is chosen, its newest token whose lens is
    there is followed.
    """
    place = url_state.here()
    opened = data.conversation(conversation_id)
    begun = [m for m in opened[1] if m.role is Role.ASSISTANT and m.tokens] if opened else []
    if not begun:
        return None
    message = next((m for m in begun if m.id == place.message), begun[-1])
    steps = data.steps(message)
    if not steps:
        return None
    if place.message == message.id and place.step is not None:
        return message, steps, min(place.step, len(steps) - 1)
    if message.status.is_live:
        return message, steps, replies.newest(steps) or 0
    return message, steps, replies.most_surprising(steps, message.parts) or 0


def show(conversation_id: int) -> None:
    """Draw the panel."""
    found = focus(conversation_id)
    step = data.step(found[0], found[2]) if found else None
    capture = found[0].capture if found else None
    if found is None or step is None or capture is None:
        head(replies.NO_STEP)
        st.caption("When there is a reply, the step of one of its tokens shows here.")
        return
    message, steps, index = found
    head(
        replies.facts_data(
            step,
            steps[index],
            len(steps),
            conversation=conversation_id,
            message=message.id,
            following=message.status.is_live and url_state.here().step is None,
        )
    )
    components.bars(data=replies.bars_data(step), key="bars")
    st.caption(replies.plain(replies.decision(step, message.generation)))
    effects = replies.effects_data(step)
    if effects:
        components.table(data=effects, key="effects")
    doubt = replies.doubt_of(message)
    if doubt:
        st.warning(replies.plain(doubt), icon=":material/warning:")
    _evidence(message, capture, steps, step)
    _lens(message, capture, step)


def head(shown: replies.Json) -> None:
    """The token and its numbers; every click on a token of the page arrives here."""
    components.facts(
        data=shown,
        key="facts",
        on_pick_change=_picked,
        on_refresh_change=lambda: None,  # that it is drawn anew is all
    )


def _picked() -> None:
    chosen = st.session_state["facts"].pick
    if chosen:
        url_state.go(
            url_state.Place(*(int(chosen[name]) for name in ("conversation", "message", "step")))
        )


# ------------------------------------------------------------------------ evidence


def _evidence(
    message: Message, capture: CaptureReport, steps: Sequence[StepSummary], step: Step
) -> None:
    prompt = data.prompt(message)
    if step.evidence is None or prompt is None:
        with st.container(key="evidence-head"):
            st.markdown("#### Evidence", width="content")
        st.caption(replies.sentence(f"Attention: {capture.evidence_provenance}"))
        return
    count = data.head_count(message, step.step_index)
    with st.container(horizontal=True, vertical_alignment="center", key="evidence-head"):
        st.markdown("#### Evidence", width="content")
        layer = layer_of([one.layer for one in step.attention])
        which = head_of(message, count)
    park = leave_out()
    if which == attention.MEAN:
        weights = attention.kept_row(step, layer)
    else:
        tensor = data.attentions(message, step.step_index)
        assert tensor is not None
        weights = attention.positions(*attention.full_row(tensor, layer, which))
    seen = [s for s in steps if s.position < step.position]
    found = attention.evidence(
        weights,
        attention.parked(prompt, seen) if park else (),
        scale=which != attention.MAXIMUM,
    )
    components.evidence(
        data={
            **attention.evidence_data(prompt, steps, step.position, found),
            "step": step.step_index,
        },
        key="evidence",
    )
    notes = attention.notes(found, which, len(weights), None if count else replies.absence(message))
    if capture.attention_check is not None:
        notes = f"{notes} Attention check {replies.check(capture.attention_check)}."
    st.caption(notes)


def layer_of(offered: Sequence[int], key: str = "evidence_layer") -> int:
    """The layer to look at, as chosen; the final one with attention at first."""
    final = offered[-1]
    return st.selectbox(
        "Layer",
        list(reversed(offered)),
        format_func=lambda n: f"layer {n}, final" if n == final else f"layer {n}",
        key=key,
        label_visibility="collapsed",
        width=128,
    )


def head_of(message: Message, count: int | None, key: str = "evidence_head") -> str:
    """The head to look at, as chosen, of what was kept."""
    offered = attention.heads(count)
    return st.selectbox(
        "Head",
        offered,
        key=key,
        label_visibility="collapsed",
        width=146,
        disabled=count is None,
        help=None
        if count is not None
        else f"Single heads and the maximum need the full tensors, {replies.absence(message)}.",
    )


def leave_out(key: str = "no_sink") -> bool:
    """Whether to leave out what attention is parked on."""
    return st.toggle(
        "Leave out the first token and the chat template",
        value=True,
        key=key,
        help="Models park attention they have no use for on the first token (a sink) and on "
        "special tokens. What is left is scaled so that it adds up to 1.",
    )


# ---------------------------------------------------------------------------- lens


def _lens(message: Message, capture: CaptureReport, step: Step) -> None:
    with st.container(horizontal=True, vertical_alignment="center", key="lens-head"):
        st.markdown("#### Logit Lens", width="content")
        if step.lens is None:
            view = None
        else:
            view = st.segmented_control(
                "Show",
                TABLES,
                default="tokens",
                required=True,
                key="lens_view",
                label_visibility="collapsed",
            )
    if step.lens is None:
        if not capture.logit_lens_available:
            st.caption(replies.sentence(f"Not available: {capture.lens_reason}"))
        elif message.status.is_live:
            st.caption("A few steps behind; it comes before the reply ends.")
        else:
            st.caption("The reply ended before this step's lens was computed.")
        return
    pinned: list[str] = st.session_state.get("pins") or []
    if view == "changes":
        components.changes(
            data={**lens.changes_data(step, step.lens), "step": step.step_index},
            key="changes",
        )
        st.caption(
            "Probability at a layer less that at the layer before it. With ≥ or ≤ the token is "
            "among the kept ones of only one of the two, and the change is at least that large."
        )
    else:
        components.lens(
            data={**lens.lens_data(step, step.lens, pinned), "step": step.step_index},
            key="lens",
            on_pin_change=_pin,
        )
        error = message.lens_check
        check = "" if error is None else f" Lens check {replies.check(error)}."
        st.caption(
            "What the model would say if a layer were its last, through its own final norm and "
            f"head. Early layers often give nonsense.{check}"
        )
    _curves(step)


def _pin() -> None:
    """Pin the token that was clicked, or let it go."""
    label = st.session_state["lens"].pin
    if label is None:
        return
    pins = list(st.session_state.get("pins") or [])
    st.session_state["pins"] = [p for p in pins if p != label] if label in pins else [*pins, label]


def _curves(step: Step) -> None:
    # A chat that has no charts yet does not wait for the libraries that draw them.
    from dashboard import charts
    from dashboard.views import chart_panel

    assert step.lens is not None
    with st.container(horizontal=True, vertical_alignment="center", key="curves-head"):
        st.markdown("#### Through the layers", width="content")
        curve = st.segmented_control(
            "Curve",
            lens.CURVES,
            default="rank",
            required=True,
            key="curve",
            label_visibility="collapsed",
        )
    if curve == "entropy and KL":
        found = lens.by_layer(step.lens)
        name = f"layers-step-{step.step_index + 1}"
        chart_panel.chart(charts.by_layer(found), found, "by_layer", name)
        st.caption(
            "In nats. KL is how far the final distribution is from what the layer would have said."
        )
        return
    kept: list[str] = st.session_state.get("pins") or []
    pinned = st.multiselect(
        "Pinned tokens",
        list(dict.fromkeys([*kept, *lens.pinnable(step, step.lens)])),
        key="pins",
        placeholder="Pin a token: type it, or click it above",
        label_visibility="collapsed",
        accept_new_options=True,
    )
    rows = lens.curves(step, step.lens, pinned)
    drawn = charts.trajectories(rows, "rank" if curve == "rank" else "prob")
    chart_panel.chart(drawn, rows, "trajectory", f"curves-step-{step.step_index + 1}")
    k = step.lens.probs.shape[1]
    st.caption(
        f"The chosen token is known at every layer; of others the {k:d} likeliest of each layer "
        "were kept, and where they are not among them there is a gap."
    )
