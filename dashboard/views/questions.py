"""Questions: answers over many steps, replies, conversations and models.

The address holds the question, its view and the replies it is about; the widgets follow the
address, and a change of a widget is written back to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import pandas as pd
import streamlit as st

from dashboard import boundary, components, data, question_charts, question_state, url_state
from dashboard.question_state import QuestionState
from dashboard.viewdata import answers, sql_table, wording
from dashboard.views import cache_progress, layout, question_controls, sql
from oki_trace.analysis.question import Answer, Drawing, Question
from oki_trace.errors import OkiTraceError

# A table with more rows than fit the screen scrolls by itself.
TABLE_HEIGHT = 430
# Where the session keeps the questions that may read tensors without a click.
ALLOWED = "questions-allowed"


@boundary.page
def page() -> None:
    """Draw the page."""
    questions = data.questions()
    url_state.restore("questions", question_state.parameters(questions))
    state = question_state.read(st.query_params.to_dict(), questions)
    question = questions[state.question]
    _list(state)
    st.title(question.group)
    st.write(question.meaning)
    if not cache_progress.ready():
        return
    # On the first drawing, a difference from the link is what made no sense in it, not a choice.
    followed = st.session_state.get(question_controls.SHOWN) == state
    chosen = question_controls.draw(state, question)
    if chosen != state:
        if followed:
            _allow(chosen)
        st.query_params.from_dict(chosen.query())
    view = question.views[chosen.view]
    if view.compares and not (chosen.first and chosen.second):
        st.caption("Choose two to see how far apart their distributions are.")
        return
    if view.reads_tensors and chosen not in st.session_state.get(ALLOWED, ()):
        note = "It reads full tensors, which may take a while."
        layout.wait_for_click("question", note, "ask-link", on_click=lambda: _allow(chosen))
        return
    try:
        with st.spinner("Querying…"):
            answer = data.answer_question(chosen)
    except OkiTraceError as error:
        st.warning(wording.sentence(str(error)), icon=":material/info:")
        _offer_everything(chosen)
        return
    _answer(chosen, question, answer)


def _list(state: QuestionState) -> None:
    """All questions, in groups; a click asks another about the same replies."""
    with st.sidebar, st.container(key="asks", gap=None):
        for group, questions in groupby(data.questions().values(), key=lambda one: one.group):
            st.caption(group)
            for question in questions:
                title = question.title
                if st.button(
                    f"**{title}**" if question.name == state.question else title,
                    key=f"ask-{question.name}",
                    type="tertiary",
                    width="stretch",
                ):
                    _go(state.another(question.name))


def _allow(state: QuestionState) -> None:
    """Run this without another click: it was chosen on the page."""
    st.session_state[ALLOWED] = {*st.session_state.get(ALLOWED, ()), state}


def _go(state: QuestionState) -> None:
    query = state.query()
    _allow(question_state.read(query, data.questions()))
    st.query_params.from_dict(query)
    st.rerun()


def _offer_everything(state: QuestionState) -> None:
    if state.is_narrowed and st.button("Ask about all replies", icon=":material/filter_alt_off:"):
        _go(state.without_scope())


def _answer(state: QuestionState, question: Question, answer: Answer) -> None:
    if answer.about:
        st.markdown(wording.sentence(answer.about))
    if not answer.rows:
        _nothing(state)
    else:
        _charts(answer)
        st.caption(question.reading)
        _table(state, answer, _step_view(question, answer.view))
    with st.expander("SQL", icon=":material/code:"):
        st.code(answer.sql, language="sql", wrap_lines=True)
        if st.button("Edit in SQL", icon=":material/edit:", key="to-sql"):
            sql.allow(answer.sql)
            layout.open_page("sql", {"sql": answer.sql})


def _nothing(state: QuestionState) -> None:
    if state.is_narrowed or any(message.tokens for _, message in data.recent_replies()):
        st.write("No steps match.")
        _offer_everything(state)
    elif "segment" in data.questions()[state.question].options:
        st.write("No traced prompts yet. Start a chat with *Trace the prompt*, then query it here.")
    else:
        layout.empty_state("replies", "query it")


def _step_view(question: Question, view: str) -> str | None:
    """The view that compares two steps of the replies that ``view`` compares."""
    if question.views[view].compares != "reply":
        return None
    return next((name for name, view in question.views.items() if view.compares == "step"), None)


# -------------------------------------------------------------------------- charts


def _charts(answer: Answer) -> None:
    offered = answers.drawings(answer)
    file = f"{answer.question}-{answer.view}"
    with layout.row("picture-head", place="distribute"):
        name = next(iter(offered))
        if len(offered) > 1:
            name = layout.choice("Chart", list(offered), f"drawn-{file}")
        else:
            st.space("stretch")
        picture = {"within": "st-key-picture-0", "name": file}
        components.picture(data=picture, key="save-picture", width=100)
    drawing = offered[name]
    rows = answers.marks(answer, drawing)
    if not rows:
        st.caption("Nothing to plot.")
        return
    places = answers.step_places(answer)
    notes = [_cut(answer, drawing)]
    for number, (model, part) in enumerate(_by_model(answer, drawing, rows)):
        if model:
            st.caption(wording.escape(model))
        if number:  # the button of the first chart is above
            picture = {"within": f"st-key-picture-{number}", "name": f"{file}-{number + 1}"}
            components.picture(data=picture, key=f"save-picture-{number}")
        with st.container(key=f"picture-{number}"):
            _chart(answer, drawing, part, places, number)
    if any(notes):
        st.caption(" ".join(note for note in notes if note))


def _by_model(
    answer: Answer, drawing: Drawing, rows: Sequence[wording.Json]
) -> list[tuple[str, list[wording.Json]]]:
    """The marks of each chart: stacked shares have one for each model, others one in all."""
    models = answers.models(answer)[: answers.MOST_MODELS]
    if len(models) < 2:
        return [("", list(rows))]
    if drawing.kind == "stacked":
        return [(m, [row for row in rows if row["model"] == m]) for m in models]
    return [("", [row for row in rows if row["model"] in models])]


def _cut(answer: Answer, drawing: Drawing) -> str:
    if drawing.kind == "ranked" and len(answer.rows) > answers.MOST_BARS:
        return f"The first {answers.MOST_BARS} rows are drawn; the table has all of them."
    left = len(answers.models(answer)) - answers.MOST_MODELS
    return f"{left} models with fewer steps are only in the table." if left > 0 else ""


def _chart(
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
    shown = st.altair_chart(drawn, key=key, on_select="rerun", selection_mode=question_charts.PICK)
    picked = shown.selection.get(question_charts.PICK) or []
    if picked:
        _open(places[int(picked[0]["at"])])


# ------------------------------------------------------------------------- the rows


def _table(state: QuestionState, answer: Answer, step_view: str | None) -> None:
    leads = step_view is not None or answers.step_places(answer)[0] is not None
    count = wording.counted(len(answer.rows), "row")
    with layout.row("rows-head", place="distribute"):
        goal = "compare its two steps" if step_view else "open it in Chat"
        st.caption(f"{count}. Click one to {goal}." if leads else f"{count}.", width="stretch")
        if leads and (named := _named(state, answer)) is not None:
            _follow(state, answer, step_view, named)
        layout.export_button(
            "CSV",
            lambda: sql_table.csv_text([c.name for c in answer.columns], answer.rows),
            f"{answer.question}-{answer.view}.csv",
            "answer-csv",
            mime="text/csv",
            help="All rows, with the exact text of the tokens",
        )
    frame = pd.DataFrame(answers.table(answer))
    shown: Any = st.dataframe(
        frame,
        hide_index=True,
        height="content" if len(frame) <= 11 else TABLE_HEIGHT,
        key=f"rows-{hash(state)}",
        column_config=_column_config(answer, frame),
        on_select="rerun" if leads else "ignore",
        selection_mode="single-cell",
    )
    if leads and shown.selection.cells:
        _follow(state, answer, step_view, int(shown.selection.cells[0][0]))


def _named(state: QuestionState, answer: Answer) -> int | None:
    """A row chosen by its name, for the keyboard: in the table, an arrow key opens a row."""
    return layout.pick(
        "Open a row", answers.row_names(answer), f"named-{hash(state)}", "Open by name", 170
    )


def _follow(state: QuestionState, answer: Answer, step_view: str | None, row: int) -> None:
    """Open the step of a row in Chat, or compare its two steps."""
    if step_view is not None:
        step = answer.column("step")[row]
        first, second = f"{state.first}:{step}", f"{state.second}:{step}"
        _go(replace(state, view=step_view, first=first, second=second))
    _open(answers.step_places(answer)[row])


def _column_config(answer: Answer, frame: pd.DataFrame) -> Any:
    config: dict[str, object] = {}
    for column in answer.columns:
        meaning = column.description[:1].upper() + column.description[1:]
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


def _open(place: dict[str, int] | None) -> None:
    if place is not None:
        layout.open_page("chat", place)
