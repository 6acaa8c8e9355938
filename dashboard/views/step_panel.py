"""The step panel: candidates, attention and Logit Lens of one token of a reply or its prompt.

It is a part of the page that reruns alone. Its head (``components.facts``) receives
the clicks on all tokens of the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import streamlit as st

from dashboard import components, data, url_state
from dashboard.viewdata import attention, lens, prompts, replies, wording
from dashboard.views import branches, layout
from oki_trace.records import LOGIT, CaptureReport, Lens, Message, Role, Step, StepSummary
from oki_trace.store.reading.prompt_steps import PromptStep

TABLES = ("tokens", "changes")


@dataclass(frozen=True)
class Selected:
    """The reply whose token is selected, its steps and the traced tokens of its prompt.

    ``summary`` is the selected token, whose step belongs to message ``owner``: an earlier
    reply where both prompts share the token. ``in_prompt``: it is a token of the prompt.
    """

    message: Message
    steps: list[StepSummary]
    prompt: Mapping[int, PromptStep]
    owner: Message
    summary: StepSummary
    in_prompt: bool

    @property
    def given(self) -> bool:
        """Whether the store addresses the step by its position."""
        return self.summary.step_index < 0

    @property
    def address(self) -> int:
        """The step or the position by which the store addresses it."""
        return self.summary.position if self.given else self.summary.step_index

    @property
    def number(self) -> int:
        """The step of the reply; below 0 a token of its prompt, the last one being -1."""
        length = self.message.prompt_len or 0
        return self.summary.position - length if self.in_prompt else self.summary.step_index


def selected_token(conversation_id: int) -> Selected | None:
    """The reply and token of the URL, else the last reply's most surprising one.

    Of a live reply without a chosen step it is the newest step that has its lens.
    """
    place = url_state.current()
    opened = branches.opened(conversation_id)
    replied = [m for m in opened.path if m.role is Role.ASSISTANT] if opened else []
    started = [m for m in replied if m.tokens or data.prompt_steps(m)]
    if not started:
        return None
    message = next((m for m in started if m.id == place.message), started[-1])
    chosen = place.message == message.id
    steps, prompt = data.steps(message), data.prompt_steps(message)
    traced = {at: one.step for at, one in prompt.items()}
    position = None
    if chosen and place.position is not None:
        position = prompts.nearest_position(traced, place.position)
    if position is None and not steps:
        position = prompts.most_surprising_position(traced)
    if position is not None:
        one = prompt[position]
        owner = message if one.message_id == message.id else data.message(one.message_id)
        if owner is not None:
            return Selected(message, steps, prompt, owner, one.step, True)
    if not steps:
        return None
    if chosen and place.step is not None:
        index = min(place.step, len(steps) - 1)
    elif message.status.is_live:
        index = replies.newest_step(steps) or 0
    else:
        index = replies.most_surprising_step(steps, message.parts) or 0
    return Selected(message, steps, prompt, message, steps[index], False)


def show(conversation_id: int, settings: branches.Settings | None = None) -> None:
    """Draw the panel; with settings, a reply can be continued from each of its candidates."""
    selected = draw_head(conversation_id, follow=True)
    if selected is None:
        st.caption("No tokens yet. Send a message to see the steps of its reply here.")
        return
    drawn, step = selected
    message = drawn.message
    can_branch = settings is not None and not drawn.given and not drawn.owner.status.is_live
    picked = components.bars(
        data=replies.candidates_data(step, branch=can_branch),
        key="bars",
        on_branch_change=lambda: None,  # the rerun is enough
    )
    if can_branch and settings is not None and picked.branch is not None:
        branches.branch(drawn.owner, drawn.address, settings, (int(picked.branch),))
    if can_branch and settings is not None:
        known = int((step.topk.token_ids >= 0).sum())  # an import may lack the ids
        branches.other_ways(drawn.owner, drawn.address, known, settings)
    st.caption(wording.escape(replies.decision_text(step, drawn.owner.generation)))
    effects = replies.effects_data(step)
    if effects:
        components.table(data=effects, key="effects")
    layout.check_warning(message)
    capture = drawn.owner.capture
    assert capture is not None
    _evidence(drawn, capture, step)
    _lens(drawn.owner, capture, step)


def draw_head(conversation_id: int, *, follow: bool = False) -> tuple[Selected, Step] | None:
    """Draw the selected token and its numbers, which receive every click on a token of the page.

    ``follow``: without a selected step, move on with a live reply. Returns what is drawn.
    """
    drawn, shown = None, {"empty": True}
    selected = selected_token(conversation_id)
    step = None
    if selected is not None and selected.owner.capture is not None:
        step = data.step(selected.owner, selected.address, given=selected.given)
    if selected is not None and step is not None:
        message, place = selected.message, url_state.current()
        drawn = selected, step
        length = message.prompt_len or 0
        shown = replies.facts_data(
            step,
            selected.summary,
            len(selected.steps),
            conversation=conversation_id,
            message=message.id,
            following=follow and message.status.is_live and place.step is None,
            first=min(selected.prompt, default=length) - length,
            prompt_len=length if selected.in_prompt else None,
            branch=place.branch,
            scored=not selected.steps and message.is_score,
        )
    components.facts(
        data=shown,
        key="facts",
        on_pick_change=_picked,
        on_refresh_change=lambda: None,  # the rerun is enough
    )
    return drawn


def _picked() -> None:
    chosen = st.session_state["facts"].pick
    if not chosen:
        return
    conversation, message, step = (int(chosen[n]) for n in ("conversation", "message", "step"))
    branch = url_state.current().branch
    place = url_state.Location(conversation, message, step, branch=branch)
    if step < 0:  # a token of the prompt, counted back from its end
        reply = data.message(message)
        length = (reply.prompt_len if reply is not None else None) or 0
        position = max(length + step, 0)
        place = url_state.Location(conversation, message, position=position, branch=branch)
    url_state.navigate(place)


def _evidence(selected: Selected, capture: CaptureReport, step: Step) -> None:
    prompt = data.prompt(selected.message)
    if step.evidence is None or prompt is None:
        layout.section_row("Evidence", "evidence-head")
        st.caption(wording.sentence(f"Attention: {capture.evidence_provenance}"))
        return
    count = data.head_count(selected.owner, selected.address, given=selected.given)
    with layout.section_row("Evidence", "evidence-head"):
        layer = layer_select([one.layer for one in step.attention])
        head = head_select(selected.owner, count)
    hide_sinks = sink_toggle()
    if head == attention.MEAN:
        weights = attention.kept_weights(step, layer)
    else:
        tensor = data.attentions(selected.owner, selected.address, given=selected.given)
        assert tensor is not None
        weights = attention.weights_by_position(*attention.head_weights(tensor, layer, head))
    seen = [s for s in selected.steps if s.position < step.position]
    evidence = attention.without_positions(
        weights,
        attention.sink_positions(prompt, seen) if hide_sinks else (),
        scale=head != attention.MAXIMUM,
    )
    components.evidence(
        data={
            **attention.evidence_data(prompt, selected.steps, step.position, evidence),
            "step": step.step_index,
        },
        key="evidence",
    )
    without = None if count else replies.why_no_tensors(selected.owner)
    if selected.given and without is not None:
        without = "which were not kept for this token"
    notes = attention.evidence_notes(evidence, head, len(weights), without)
    if capture.attention_check is not None:
        notes = f"{notes} Attention check {replies.format_difference(capture.attention_check)}."
    st.caption(notes)


def layer_select(offered: Sequence[int], key: str = "evidence_layer") -> int:
    """A choice of layers, the last one with attention first."""
    final = offered[-1]
    return st.selectbox(
        "Layer",
        list(reversed(offered)),
        format_func=lambda n: f"layer {n}, final" if n == final else f"layer {n}",
        key=key,
        label_visibility="collapsed",
        width=128,
    )


def head_select(message: Message, count: int | None, key: str = "evidence_head") -> str:
    """A choice of heads; single ones need the full tensors."""
    offered = attention.head_options(count)
    return st.selectbox(
        "Head",
        offered,
        key=key,
        label_visibility="collapsed",
        width=146,
        disabled=count is None,
        help=None
        if count is not None
        else f"Single heads need the full tensors, {replies.why_no_tensors(message)}.",
    )


def sink_toggle(key: str = "no_sink") -> bool:
    """Whether to leave out the attention sinks."""
    return st.toggle(
        "Leave out the first token and the chat template",
        value=True,
        key=key,
        help="Models put surplus attention on the first token (a sink) and on special tokens. "
        "The rest is scaled so that it adds up to 1.",
    )


def _lens(message: Message, capture: CaptureReport, step: Step) -> None:
    lenses = {one.name: one for one in (step.lens, *step.lenses) if one is not None}
    with layout.section_row("Logit Lens" if len(lenses) < 2 else "Lens", "lens-head"):
        shown = lenses.get(lens_select(list(lenses), "lens_name"))
        view = None if shown is None else layout.choice("Show", TABLES, "lens_view")
    if shown is None:
        if not capture.logit_lens_available:
            st.caption(wording.sentence(f"Not available: {capture.lens_reason}"))
        elif message.status.is_live:
            st.caption("The lens is a few steps behind; it arrives before the reply ends.")
        else:
            st.caption("The reply ended before this step's lens was computed.")
        return
    pinned: list[str] = st.session_state.get("pins") or []
    if view == "changes":
        components.changes(
            data={**lens.changes_data(step, shown), "step": step.step_index},
            key="changes",
        )
        st.caption(
            "Probability at a layer minus that at the layer before. ≥ and ≤ mark a bound: the "
            "token was kept at only one of the two layers."
        )
    else:
        components.lens(
            data={**lens.lens_data(step, shown, pinned), "step": step.step_index},
            key="lens",
            on_pin_change=_pin,
        )
        _lens_notes(message, shown)
    _curves(step, shown)


def _lens_notes(message: Message, shown: Lens) -> None:
    """What the rows of a lens are, and how far they can be trusted."""
    if shown.name != LOGIT:
        st.caption(
            f"The installed lens {wording.escape(shown.name)}: each layer is mapped to the basis "
            "of the last one, and goes through the model's own final norm and head. A layer "
            "without a row has no map. A map is a mean over the texts that it was fitted on."
        )
        return
    error = message.lens_check
    check = "" if error is None else f" Lens check {replies.format_difference(error)}."
    st.caption(
        "The prediction if a layer were the last, through the model's own final norm and head. "
        f"Predictions of early layers are often meaningless.{check}"
    )


def lens_select(offered: Sequence[str], key: str) -> str:
    """A choice among the lenses that have read something, the Logit Lens first."""
    if len(offered) < 2:
        return next(iter(offered), LOGIT)
    name: str = st.selectbox(
        "Lens",
        offered,
        format_func=lambda name: "Logit Lens" if name == LOGIT else name,
        key=key,
        label_visibility="collapsed",
        width=150,
    )
    return name


def _pin() -> None:
    """Pin the clicked token, or unpin it."""
    label = st.session_state["lens"].pin
    if label is None:
        return
    pins = list(st.session_state.get("pins") or [])
    st.session_state["pins"] = [p for p in pins if p != label] if label in pins else [*pins, label]


def _curves(step: Step, shown: Lens) -> None:
    # Imported here: a chat without charts does not wait for Altair.
    from dashboard import charts

    with layout.section_row("By layer", "curves-head"):
        curve = layout.choice("Curve", lens.CURVES, "curve")
    if curve == "entropy and KL":
        rows = lens.layer_rows(shown)
        name = f"layers-step-{step.step_index}"
        layout.chart(charts.entropy_and_kl(rows), rows, "by_layer", name)
        st.caption("In nats. KL is the divergence of the layer's prediction from the final one.")
        return
    kept: list[str] = st.session_state.get("pins") or []
    pinned = st.multiselect(
        "Pinned tokens",
        list(dict.fromkeys([*kept, *lens.pinnable_tokens(step, shown)])),
        key="pins",
        placeholder="Pin a token: type it, or click it above",
        label_visibility="collapsed",
        accept_new_options=True,
    )
    rows = lens.curve_rows(step, shown, pinned)
    drawn = charts.layer_curves(rows, "rank" if curve == "rank" else "prob")
    layout.chart(drawn, rows, "trajectory", f"curves-step-{step.step_index}")
    k = shown.probs.shape[1]
    st.caption(
        f"The {k:d} most likely tokens of each layer are kept; a gap means that a token was not "
        "among them. The chosen token is known at every layer."
    )
