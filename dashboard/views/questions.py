"""Questions: what happened across steps, replies, conversations and models.

The address holds the question, its view and which replies it is about; the
widgets follow the address, and what they change is written back to it.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pandas as pd
import streamlit as st

from dashboard import boundary, components, data, question_charts, url_state
from dashboard import question_state as asking
from dashboard.question_state import Asked
from dashboard.viewdata import answers, wording
from dashboard.views import cache_progress, question_controls, sql
from oki_trace.errors import OkiTraceError

if TYPE_CHECKING:
    from dashboard.viewdata.answers import Drawing
    from oki_trace.analysis.questions import Answer, Question

# In more rows than fit the screen the table scrolls by itself.
TABLE_HEIGHT = 430
# What a link brings waits for a click where it reads the full tensors of many steps.
READ_TENSORS = frozenset({("heads", ""), ("compare", "reply"), ("compare", "model")})
ALLOWED = "asked-allowed"


@boundary.page
def page() -> None:
    """Draw the page."""
    questions = data.questions()
    url_state.restore("questions", asking.PARAMETERS)
    asked = asking.read(st.query_params.to_dict(), questions)
    question = questions[asked.question]
    _list(asked)
    group = next(group for group, those in asking.GROUPS if asked.question in those)
    st.title(group)
    st.write(_without(question.meaning, group))
    if not cache_progress.ready():
        return
    # What differs from a link on its first drawing is what made no sense in it, not a choice.
    followed = st.session_state.get(question_controls.SEEN) == asked
    chosen = question_controls.draw(asked, question)
    if chosen != asked:
        if followed:
            _allow(chosen)
        st.query_params.from_dict(chosen.query())
    if question.name == "compare" and not (chosen.first and chosen.second):
        st.caption("Choose two, and how far their distributions are apart is here.")
        return
    reads_tensors = not READ_TENSORS.isdisjoint({(question.name, ""), (question.name, chosen.view)})
    if reads_tensors and chosen not in st.session_state.get(ALLOWED, ()):
        _unasked(chosen)
        return
    try:
        with st.spinner("Asking…"):
            answer = data.answer_question(chosen)
    except OkiTraceError as error:
        st.warning(wording.sentence(str(error)), icon=":material/info:")
        _offer_everything(chosen)
        return
    _answer(chosen, question, answer)


def _without(meaning: str, heading: str) -> str:
    """``meaning``, not to say again what stands above it."""
    rest = meaning.removeprefix(f"{heading}: ")
    return rest[:1].upper() + rest[1:]


def _list(asked: Asked) -> None:
    """All questions, in groups; another one is asked about the same replies."""
    with st.sidebar, st.container(key="asks", gap=None):
        for group, those in asking.GROUPS:
            st.caption(group)
            for name, title in those.items():
                if st.button(
                    f"**{title}**" if name == asked.question else title,
                    key=f"ask-{name}",
                    type="tertiary",
                    width="stretch",
                ):
                    _go(asked.instead(name))


def _allow(asked: Asked) -> None:
    """Let this be asked without another click: it was chosen here."""
    st.session_state[ALLOWED] = {*st.session_state.get(ALLOWED, ()), asked}


def _unasked(asked: Asked) -> None:
    with st.container(border=True, key="ask-unasked"):
        st.markdown("This question came with the link. It reads full tensors, which may take long.")
        st.button(
            "Ask it",
            icon=":material/play_arrow:",
            key="ask-link",
            on_click=lambda: _allow(asked),
        )


def _go(asked: Asked) -> None:
    query = asked.query()
    _allow(asking.read(query, data.questions()))
    st.query_params.from_dict(query)
    st.rerun()


def _offer_everything(asked: Asked) -> None:
    if asked.narrowed and st.button("Ask about all replies", icon=":material/filter_alt_off:"):
        _go(asked.everything())


def _answer(asked: Asked, question: Question, answer: Answer) -> None:
    if answer.about:
        st.markdown(wording.sentence(answer.about))
    if not answer.rows:
        st.write("No steps there.")
        _offer_everything(asked)
    else:
        _pictures(asked, answer)
        st.caption(question.reading)
        _table(asked, answer)
    with st.expander("SQL", icon=":material/code:"):
        st.code(answer.sql, language="sql", wrap_lines=True)
        if st.button("Go on from it in SQL", icon=":material/edit:", key="to-sql"):
            sql.allow(answer.sql)
            st.switch_page(st.session_state["pages"]["sql"], query_params={"sql": answer.sql})


# ------------------------------------------------------------------------ pictures


def _pictures(asked: Asked, answer: Answer) -> None:
    offered = answers.drawings(answer)
    with st.container(
        horizontal=True,
        horizontal_alignment="distribute" if len(offered) > 1 else "right",
        vertical_alignment="center",
        key="picture-head",
    ):
        name = next(iter(offered))
        if len(offered) > 1:
            name = st.segmented_control(
                "What is drawn",
                list(offered),
                default=name,
                required=True,
                key=f"drawn-{answer.question}-{answer.view}",
                format_func=answers.spoken,
                label_visibility="collapsed",
            )
        components.picture(
            data={"within": "st-key-picture-0", "name": f"{answer.question}-{answer.view}"},
            key="save-picture",
            width=100,
        )
    drawing = offered[name]
    rows = answers.marks(answer, drawing)
    if not rows:
        st.caption("There are no numbers to draw.")
        return
    places = answers.step_places(answer)
    notes = [_cut(answer, drawing)]
    for number, (model, part) in enumerate(_by_model(answer, drawing, rows)):
        if model:
            st.caption(wording.escape(model))
        if number:  # the first one's stands above
            name = f"{answer.question}-{answer.view}-{number + 1}"
            components.picture(
                data={"within": f"st-key-picture-{number}", "name": name},
                key=f"save-picture-{number}",
            )
        with st.container(key=f"picture-{number}"):
            _chart(asked, answer, drawing, part, places, number)
    if any(notes):
        st.caption(" ".join(note for note in notes if note))


def _by_model(
    answer: Answer, drawing: Drawing, rows: Sequence[wording.Json]
) -> list[tuple[str, list[wording.Json]]]:
    """Shares that add up to 1 have a picture for each model; all else is in one."""
    models = answers.models(answer)[: answers.MOST_MODELS]
    if len(models) < 2:
        return [("", list(rows))]
    if drawing.kind == "stacked":
        return [(m, [row for row in rows if row["model"] == m]) for m in models]
    return [("", [row for row in rows if row["model"] in models])]


def _cut(answer: Answer, drawing: Drawing) -> str:
    if drawing.kind == "ranked" and len(answer.rows) > answers.MOST_BARS:
        return f"The first {answers.MOST_BARS} rows are drawn; the table has all."
    left = len(answers.models(answer)) - answers.MOST_MODELS
    return f"{left} models with fewer steps are in the table alone." if left > 0 else ""


def _chart(
    asked: Asked,
    answer: Answer,
    drawing: Drawing,
    rows: Sequence[wording.Json],
    places: Sequence[dict[str, int] | None],
    number: int,
) -> None:
    leads = drawing.kind == "ranked" and not drawing.spread and places[0] is not None
    drawn = question_charts.chart(answer, drawing, rows, clickable=leads)
    key = f"chart-{answer.question}-{answer.view}-{number}"
    if not leads:
        st.altair_chart(drawn, key=key)
        return
    seen = st.altair_chart(drawn, key=key, on_select="rerun", selection_mode=question_charts.PICK)
    picked = seen.selection.get(question_charts.PICK) or []
    if picked:
        _open(places[int(picked[0]["at"])])


# ------------------------------------------------------------------------- the rows


def _table(asked: Asked, answer: Answer) -> None:
    places = answers.step_places(answer)
    drill = answer.question == "compare" and answer.view == "reply"
    leads = drill or places[0] is not None
    count = "1 row" if len(answer.rows) == 1 else f"{len(answer.rows):,} rows"
    with st.container(
        horizontal=True,
        horizontal_alignment="distribute",
        vertical_alignment="center",
        key="rows-head",
    ):
        told = {
            True: " Click one to compare its two steps.",
            False: " Click one to open it in Chat.",
        }
        st.caption(f"{count}.{told[drill] if leads else ''}", width="stretch")
        if leads and (named := _named(asked, answer)) is not None:
            _follow(asked, answer, named)
        st.download_button(
            "CSV",
            partial(_csv, answer),
            f"{answer.question}-{answer.view}.csv",
            "text/csv",
            key="answer-csv",
            icon=":material/download:",
            on_click="ignore",
            help="All rows, with the tokens' texts as they are",
        )
    frame = pd.DataFrame(answers.table(answer))
    height: Any = "content" if len(frame) <= 11 else TABLE_HEIGHT
    config = _column_config(answer, frame)
    if not leads:
        st.dataframe(frame, hide_index=True, height=height, key="rows", column_config=config)
        return
    seen = st.dataframe(
        frame,
        hide_index=True,
        height=height,
        key=f"rows-{hash(asked)}",
        column_config=config,
        on_select="rerun",
        selection_mode="single-cell",
    )
    if seen.selection.cells:
        _follow(asked, answer, int(seen.selection.cells[0][0]))


def _named(asked: Asked, answer: Answer) -> int | None:
    """The row chosen by its name: in the table, an arrow key would open what it comes to."""
    names = answers.row_names(answer)
    chosen: int | None = st.selectbox(
        "Open a row",
        range(len(names)),
        index=None,
        format_func=lambda at: names[at],
        key=f"named-{hash(asked)}",
        placeholder="Or by its name",
        label_visibility="collapsed",
        width=170,
    )
    return chosen


def _follow(asked: Asked, answer: Answer, row: int) -> None:
    """Open where the row leads."""
    if answer.question == "compare" and answer.view == "reply":
        step = answer.column("step")[row]
        sides = (f"{asked.first}:{step}", f"{asked.second}:{step}")
        _go(replace(asked, view="step", first=sides[0], second=sides[1]))
    _open(answers.step_places(answer)[row])


def _column_config(answer: Answer, frame: pd.DataFrame) -> Any:
    config: dict[str, object] = {}
    for column in answer.columns:
        meaning = column.meaning[:1].upper() + column.meaning[1:]
        kind = frame[column.name].dtype.kind
        if kind == "f":
            whole = frame[column.name].dropna().mod(1).eq(0).all() and column.shown != "share"
            format_ = "%d" if whole else "%.3f"
            config[column.name] = st.column_config.NumberColumn(help=meaning, format=format_)
        elif kind == "i":
            plain = None if column.shown == "name" else "localized"
            config[column.name] = st.column_config.NumberColumn(help=meaning, format=plain)
        else:
            config[column.name] = st.column_config.TextColumn(help=meaning)
    return config


def _csv(answer: Answer) -> str:
    file = io.StringIO()
    data.write_csv(answer, file)
    return file.getvalue()


def _open(place: dict[str, int] | None) -> None:
    if place is not None:
        query = {name: str(value) for name, value in place.items()}
        st.switch_page(st.session_state["pages"]["chat"], query_params=query)
