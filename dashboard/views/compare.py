"""Compare: two replies side by side, and the distance of their distributions at each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import streamlit as st

from dashboard import boundary, charts, components, data, url_state
from dashboard.viewdata import comparison, lens, replies
from dashboard.views import chart_panel, empty_state
from oki_trace.analysis.distance import Distance
from oki_trace.records import Message
from oki_trace.sanitize import inert

SIDES = ("left", "right")


@boundary.page
def page() -> None:
    """Draw the page."""
    url_state.keep("compare", (*SIDES, "pair"))
    st.title("Compare")
    offered = _offered()
    if not offered:
        empty_state.first_trace("No replies yet: begin a conversation in Chat.")
        return
    with st.container(horizontal=True, key="compare-choice"):
        chosen = [_choice(side, offered) for side in SIDES]
    left, right = (data.message(one) if one is not None else None for one in chosen)
    if left is None or right is None:
        st.caption("Choose two replies: of two models, two temperatures, two questions.")
        return
    boundary.part(_replies)(left, right)
    st.markdown("#### Settings")
    components.table(data=comparison.settings(left, right), key="settings")
    st.caption("In bold is what differs.")


def _offered() -> dict[int, str]:
    """The replies to choose from, and how they are called: the address's, and the latest."""
    found = {message.id: _name(title.title, message) for title, message in data.replies()}
    for side in SIDES:
        wanted = _in_address(side)
        message = data.message(wanted) if wanted is not None and wanted not in found else None
        opened = data.conversation(message.conversation_id) if message is not None else None
        if message is not None and opened is not None and message.tokens:
            found[message.id] = _name(opened[0].title, message)
    return found


def _name(title: str, message: Message) -> str:
    sampling = message.generation
    how = (
        f"temperature {sampling.temperature:g}"
        if (sampling is not None and sampling.do_sample and sampling.temperature is not None)
        else "greedy"
    )
    short = replies.clipped(inert(title, keep="").strip() or "Untitled", 40)
    model = (message.model_id or "unknown model").rsplit("/", 1)[-1]
    return f"{message.id} · {short} · {model} · {how} · {message.tokens:,} tokens"


def _choice(side: str, offered: Mapping[int, str]) -> int | None:
    wanted = _in_address(side)
    ids = list(offered)
    picked: int | None = st.selectbox(
        f"{replies.plain(side.capitalize())} reply",
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


def _in_address(side: str) -> int | None:
    value = st.query_params.get(side, "")
    return int(value) if value.isascii() and value.isdecimal() and len(value) < 19 else None


def _replies(left: Message, right: Message) -> None:
    steps = (data.steps(left), data.steps(right))
    pairs = comparison.align(*steps)
    first = comparison.divergence(pairs)
    st.write(comparison.verdict(pairs))
    distances = data.distances(left, right, pairs)
    number = _chosen(pairs)
    components.compare(
        data=comparison.replies_data((left, right), steps, pairs, distances, number),
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


def _chosen(pairs: Sequence[comparison.Pair]) -> int | None:
    """The pair that is looked at: the address's, else where the replies part."""
    wanted = _in_address("pair")
    if wanted is not None and wanted < len(pairs):
        return wanted
    return comparison.first_shown(pairs)


def _pick() -> None:
    pair = st.session_state["compare-replies"].pick
    if pair is not None:
        st.query_params["pair"] = str(int(pair))


def _steps(
    messages: tuple[Message, Message],
    pair: comparison.Pair,
    distance: Distance | None,
) -> None:
    """The two steps of a pair: their numbers, what was considered, what the layers would say."""
    st.markdown("#### Two steps")
    st.caption(
        "At the place outlined above; click a token to choose another. Their total "
        f"variation is {comparison.in_words(distance)}."
    )
    left = None if pair.left is None else data.step(messages[0], pair.left)
    right = None if pair.right is None else data.step(messages[1], pair.right)
    found = (left, right)
    components.table(data=comparison.steps_table(left, right), key="compare-steps")
    with st.container(key="two-steps"):
        columns = st.columns(2, gap="medium")
    for side, column, message, step in zip(SIDES, columns, messages, found, strict=True):
        with column, st.container(key=f"step-{side}"):
            if step is None:
                st.caption(f"The {replies.plain(side)} reply has no step here.")
                continue
            components.bars(data=replies.bars_data(step), key=f"bars-{side}")
            if step.lens is None:
                st.caption("This step has no lens.")
            else:
                shown = lens.lens_data(step, step.lens, None)
                components.lens(data={**shown, "step": step.step_index}, key=f"lens-{side}")
            place = url_state.Place(message.conversation_id, message.id, step.step_index)
            if st.button(
                "Open in chat", icon=":material/chat:", key=f"open-{side}", type="tertiary"
            ):
                st.switch_page(st.session_state["pages"]["chat"], query_params=place.query())


def _distance_chart(
    rows: list[replies.Json], first: int | None, *, exact: bool, one_model: bool
) -> None:
    st.markdown("#### Distance between the distributions")
    if not rows:
        st.caption("No two steps with probabilities lie side by side.")
        return
    drawn = charts.apart(rows, None if first is None else first + 1)
    chart_panel.chart(drawn, rows, "apart", "distances")
    notes = [
        "Total variation of the models' own probabilities: 0 is the same, 1 nothing in common."
    ]
    if exact:
        notes.append("Exact, from the full logits.")
    else:
        notes.append(
            "Where the full logits of a step are missing, the full bar is the least that the "
            "recorded candidates allow, the pale bar the most."
        )
    if not one_model:
        notes.append("Tokens of two vocabularies are matched by their texts.")
    if first is not None:
        notes.append("After the dashed line the models continue different texts.")
    st.caption(" ".join(notes))
