"""Compare: two replies side by side, and the distance of their distributions at each step.

With a scored text among the two, one text under two models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import streamlit as st

from dashboard import boundary, charts, components, data, url_state
from dashboard.viewdata import comparison, lens, one_text, replies, wording
from dashboard.views import layout
from oki_trace.analysis.distance import Distance
from oki_trace.analysis.one_text import OneText
from oki_trace.records import Message, Step, StepSummary
from oki_trace.sanitize import inert

SIDES = ("left", "right")


@boundary.page
def page() -> None:
    """Draw the page."""
    url_state.restore("compare", (*SIDES, "pair"))
    st.title("Compare")
    offered = _offered()
    if not offered:
        layout.empty_state("replies", "compare it with another one")
        return
    with st.container(horizontal=True, key="compare-choice"):
        chosen = [_choice(side, offered) for side in SIDES]
    left, right = (data.message(one) if one is not None else None for one in chosen)
    if left is None or right is None:
        st.caption("Choose two replies or scored texts to compare them here.")
        return
    is_one_text = data.is_score(left) or data.is_score(right)
    boundary.part(_one_text if is_one_text else _replies)(left, right)
    st.markdown("#### Settings")
    components.table(data=comparison.settings(left, right), key="settings")
    st.caption("Settings that differ are bold.")


def _offered() -> dict[int, str]:
    """The replies to choose from, by id with their label: the latest, and those of the URL."""
    offered = {
        message.id: _label(conversation.title, message)
        for conversation, message in data.recent_replies()
    }
    for side in SIDES:
        wanted = url_state.number(side)
        message = data.message(wanted) if wanted is not None and wanted not in offered else None
        opened = data.conversation(message.conversation_id) if message is not None else None
        if message is None or opened is None:
            continue
        if message.tokens or data.is_score(message):
            offered[message.id] = _label(opened[0].title, message)
    return offered


def _label(title: str, message: Message) -> str:
    sampling = message.generation
    how = (
        f"temperature {sampling.temperature:g}"
        if (sampling is not None and sampling.do_sample and sampling.temperature is not None)
        else "greedy"
    )
    short = wording.shorten(inert(title, keep="").strip() or "Untitled", 40)
    model = (message.model_id or "unknown model").rsplit("/", 1)[-1]
    if not message.tokens:
        return f"{message.id} · {short} · {model} · scored text"
    if message.branch_of is not None:
        how += f" · branch of {message.branch_of}"
    return f"{message.id} · {short} · {model} · {how} · {message.tokens:,} tokens"


def _choice(side: str, offered: Mapping[int, str]) -> int | None:
    wanted = url_state.number(side)
    ids = list(offered)
    picked: int | None = st.selectbox(
        f"{wording.escape(side.capitalize())} reply",
        ids,
        index=ids.index(wanted) if wanted is not None and wanted in offered else None,
        format_func=offered.__getitem__,
        key=f"compare-{side}",
        placeholder="Choose a reply",
    )
    if picked is not None and picked != wanted:
        st.query_params[side] = str(picked)
        st.query_params.pop("pair", None)
    return picked


def _replies(left: Message, right: Message) -> None:
    steps = (data.steps(left), data.steps(right))
    pairs = comparison.align(*steps, data.alignment(left, right))
    first = comparison.divergence(pairs)
    st.write(comparison.verdict(pairs))
    distances = data.distances(left, right, pairs)
    number = _chosen(pairs)
    components.compare(
        data=comparison.replies_data(
            (left, right), steps, pairs, distances, number, (_kept(left), _kept(right))
        ),
        key="compare-replies",
        on_pick_change=_pick,
    )
    _distance_chart(
        comparison.rows(pairs, distances, *steps),
        first,
        exact=comparison.is_exact(distances),
        one_model=left.model_id == right.model_id,
    )
    if number is not None:
        _steps((left, right), pairs[number], distances[number])


def _kept(reply: Message) -> str:
    """The text at the end of a branch's prompt that is the beginning of its reply."""
    prompt = data.prompt(reply) if reply.prefix_len else None
    return "" if prompt is None else "".join(prompt.tokens[len(prompt) - reply.prefix_len :])


def _one_text(left: Message, right: Message) -> None:
    """One text under two models, by token or by characters."""
    with layout.errors_shown():
        text, distances = data.one_text(left, right)
        st.write(wording.sentence(text.why))
        wanted = url_state.number("pair")
        in_text = wanted is not None and wanted < len(text.spans)
        number = wanted if wanted is not None and in_text else None
        if number is None:
            number = one_text.most_different(text, distances)
        components.compare(
            data=one_text.text_data((left, right), text, distances, number),
            key="compare-replies",
            on_pick_change=_pick,
        )
        components.table(data=one_text.totals(text), key="compare-totals")
        rows = one_text.rows(text, distances)
        if text.by == "token":
            one_model = left.model_id == right.model_id
            exact = comparison.is_exact(distances)
            _distance_chart(rows, None, exact=exact, one_model=one_model, same_text=True)
        else:
            _surprisal_chart(rows)
        _piece((left, right), text, number, distances)


def _surprisal_chart(rows: list[wording.Json]) -> None:
    st.markdown("#### Surprisal of the text")
    if not rows:
        st.caption("Not available: no piece of the text has probabilities on both sides.")
        return
    layout.chart(charts.surprisal_chart(rows), rows, "apart", "surprisal")
    st.caption(
        "Each bar is the text between two places where tokens of both models end. Its surprisal "
        "is the sum over its tokens, in bits."
    )


def _piece(
    messages: tuple[Message, Message],
    text: OneText,
    number: int,
    distances: Sequence[Distance | None],
) -> None:
    """The tokens of one span in both messages, and the first of each in detail."""
    span = text.spans[number]
    st.markdown("#### Two steps" if text.by == "token" else "#### A piece of the text")
    more = (
        f"The total variation of this one is {comparison.in_words(distances[number])}."
        if text.by == "token"
        else "Below the table are the candidates for the first token on each side."
    )
    st.caption(f"Click a token above to select another. {more}")
    components.table(data=one_text.span_table(text, number), key="compare-steps")
    left, right = text.left[span.left[0]], text.right[span.right[0]]
    steps = [
        _step_of(message, summary) for message, summary in zip(messages, (left, right), strict=True)
    ]
    _side_by_side(messages, steps)


def _step_of(message: Message, summary: StepSummary) -> Step | None:
    given = summary.step_index < 0
    return data.step(message, summary.position if given else summary.step_index, given=given)


def _chosen(pairs: Sequence[comparison.Pair]) -> int | None:
    """The selected pair: that of the URL, else the one where the replies diverge."""
    wanted = url_state.number("pair")
    if wanted is not None and wanted < len(pairs):
        return wanted
    return comparison.first_shown(pairs)


def _pick() -> None:
    pair = st.session_state["compare-replies"].pick
    if pair is not None:
        st.query_params["pair"] = str(int(pair))


def _steps(
    messages: tuple[Message, Message], pair: comparison.Pair, distance: Distance | None
) -> None:
    """The two steps of a pair: numbers, candidates and lens."""
    st.markdown("#### Two steps")
    st.caption(
        "Click a token above to select another pair. The total variation of this one is "
        f"{comparison.in_words(distance)}."
    )
    left = None if pair.left is None else data.step(messages[0], pair.left)
    right = None if pair.right is None else data.step(messages[1], pair.right)
    components.table(data=comparison.steps_table(left, right), key="compare-steps")
    _side_by_side(messages, (left, right))


def _side_by_side(messages: tuple[Message, Message], steps: Sequence[Step | None]) -> None:
    """The candidates and the lens of a step of each message, with links to Chat."""
    with st.container(key="two-steps"):
        columns = st.columns(2, gap="medium")
    for side, column, message, step in zip(SIDES, columns, messages, steps, strict=True):
        with column, st.container(key=f"step-{side}"):
            if step is None:
                st.caption(f"The {wording.escape(side)} reply has no step here.")
                continue
            components.bars(data=replies.candidates_data(step), key=f"bars-{side}")
            if step.lens is None:
                st.caption("This step has no lens.")
            else:
                shown = lens.lens_data(step, step.lens, None)
                components.lens(data={**shown, "step": step.step_index}, key=f"lens-{side}")
            given = step.origin == "given"
            place = {"position": step.position} if given else {"step": step.step_index}
            layout.open_in_chat(
                url_state.Location(message.conversation_id, message.id, **place), side
            )


def _distance_chart(
    rows: list[wording.Json],
    first: int | None,
    *,
    exact: bool,
    one_model: bool,
    same_text: bool = False,
) -> None:
    st.markdown("#### Distance between the distributions")
    if not rows:
        st.caption("Not available: no pair has probabilities on both sides.")
        return
    layout.chart(charts.distance_chart(rows, first), rows, "apart", "distances")
    notes = [
        "Total variation of the models' own probabilities: 0 if equal, 1 if nothing is in common.",
        "Exact, from the full logits."
        if exact
        else "Where the full logits of a step are missing, the solid bar is the lower bound that "
        "the kept candidates allow, the pale bar the upper bound.",
    ]
    if not one_model and not same_text:
        notes.append("Tokens of different vocabularies are matched by their text.")
    if first is not None:
        notes.append("After the dashed line the models continue different texts.")
    st.caption(" ".join(notes))
