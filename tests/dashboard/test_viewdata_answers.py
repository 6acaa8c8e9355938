"""Questions, answers and results of SQL without a page."""

from __future__ import annotations

import datetime as dt
import json
import math
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashboard import question_charts, question_state
from dashboard.question_state import QuestionState
from dashboard.viewdata import answers, sql_table
from oki_trace.analysis.question import Answer, Question, View
from oki_trace.analysis.questions import QUESTIONS
from oki_trace.analysis.scope import ORIGINS
from oki_trace.errors import QuestionError
from oki_trace.records import Role
from oki_trace.sanitize import visible

HOSTILE = "<img src=x>\u202e\x1b[31m\n"

# ------------------------------------------------------------------------- the address

numbers = st.none() | st.integers(0, 10**9)


@given(
    st.builds(
        QuestionState,
        question=st.just("uncertainty"),
        view=st.sampled_from(list(QUESTIONS["uncertainty"].views)),
        model=st.none() | st.text(min_size=1),
        conversation=numbers,
        message=numbers,
        since=st.none() | st.dates(),
        until=st.none() | st.dates(),
        role=st.none() | st.sampled_from(Role),
        text=st.text(),
        options=st.fixed_dictionaries(
            {},
            optional={
                "top": st.integers(1, 10**6),
                "origin": st.sampled_from(ORIGINS),
                "least": st.floats(0, 1),
            },
        ).map(
            lambda given: tuple(
                (name, given[name]) for name in ("top", "origin", "least") if name in given
            )
        ),
        first=st.text(),
    )
)
def test_an_address_says_again_what_was_asked(asked: QuestionState) -> None:
    assert question_state.read(asked.query(), QUESTIONS) == asked


def test_what_makes_no_sense_in_an_address_counts_as_absent() -> None:
    junk = dict.fromkeys(
        ("question", "view", "conversation", "since", "role", "top", "least", "sample"), "²<b>"
    )
    assert question_state.read(junk, QUESTIONS) == QuestionState("settle", "layer")
    odd = {"question": "heads", "top": "0", "least": "7", "sample": "9" * 20}
    assert question_state.read(odd, QUESTIONS) == QuestionState("heads", "head")
    odd = {"question": "rivals", "from_layer": "0", "least": "nan"}
    assert question_state.read(odd, QUESTIONS).options == (("from_layer", 0),)


def test_everything_is_the_same_question_about_all_replies() -> None:
    scope = ("m", 1, 2, dt.date(2026, 1, 1), None, Role.USER, "x")
    asked = QuestionState("uncertainty", "reply", *scope, options=(("top", 3),))
    assert asked.is_narrowed
    everything = asked.without_scope()
    assert everything == QuestionState("uncertainty", "reply", options=(("top", 3),))
    assert not everything.is_narrowed


def test_the_scope_takes_both_days_whole() -> None:
    day = dt.date(2026, 1, 31)
    scope = QuestionState(since=day, until=day).scope()
    assert scope.since is not None and scope.until is not None
    assert scope.until - scope.since == dt.timedelta(days=1)


def test_questions_of_a_group_stand_together() -> None:
    groups = [question.group for question in QUESTIONS.values()]
    assert [group for group, _ in groupby(groups)] == list(dict.fromkeys(groups))


@pytest.mark.parametrize(
    ("question", "view"), [(q, view) for q in QUESTIONS.values() for view in q.views.values()]
)
def test_every_drawing_uses_columns_of_its_view(question: Question, view: View) -> None:
    names = {column.name for column in view.columns}
    assert view.drawings
    assert view.bar in {*names, ""}
    for drawing in view.drawings.values():
        rest = (drawing.line, drawing.colour, drawing.across, drawing.spread)
        assert {*drawing.x, *drawing.y, *filter(None, rest)} <= names
    assert all(
        option.parse(str(option.default)) is not None for option in question.options.values()
    )


# ------------------------------------------------------------------------- the answers


def answer(name: str, view: str, rows: list[tuple[Any, ...]]) -> Answer:
    of = QUESTIONS[name].views[view]
    assert all(len(row) == len(of.columns) for row in rows)
    return Answer(name, view, of.columns, tuple(rows), of.drawings, of.bar, "SELECT 1")


SETTLED = answer(
    "settle",
    "layer",
    [("m", 2, 3, 0.3, 0.3, 0.5), ("m", 5, 6, 0.6, 0.9, 0.7), ("m", None, 1, 0.1, 1.0, None)],
)


def test_a_token_that_never_settles_has_a_place_beside_the_layers() -> None:
    columns, lines = answers.drawings(SETTLED).values()
    marks = answers.marks(SETTLED, columns)
    assert [(m["x"], m["y"], m["line"]) for m in marks] == [
        ("2", 0.3, 0.3),
        ("5", 0.6, 0.9),
        ("never", 0.1, 1.0),
    ]
    assert [m["x"] for m in answers.marks(SETTLED, lines)] == ["2", "5"]
    drawn = question_charts.chart(SETTLED, columns, marks).to_dict()
    # Also the layers at which nothing settles are there, in their order.
    assert drawn["layer"][0]["encoding"]["x"]["sort"] == ["0", "1", "2", "3", "4", "5", "never"]
    line = drawn["datasets"][drawn["layer"][1]["data"]["name"]]
    assert [row["x"] for row in line] == ["2", "5"]


def test_bars_of_the_same_name_are_told_apart() -> None:
    rows = [(7, 8, 3, " a", 0.5, 1.0, 0.1, [" b"], [0.25], 9) for _ in range(2)]
    found = answer("uncertainty", "entropy", rows)
    (drawing,) = answers.drawings(found).values()
    labels = [mark["x"] for mark in answers.marks(found, drawing)]
    assert labels == ["␣a", "␣a (2)"]
    assert answers.step_places(found)[1] == {"conversation": 7, "message": 8, "step": 3}
    rows.append((7, 9, None, " a", 0.5, 1.0, 0.1, None, None, 4))
    found = answer("uncertainty", "entropy", rows)
    labels = [mark["x"] for mark in answers.marks(found, drawing)]
    assert labels == ["␣a · 8:3", "␣a · 8:3 (2)", "␣a · 9 · position 4"]
    assert answers.step_places(found)[2] == {"conversation": 7, "message": 9, "position": 4}


def test_what_a_model_wrote_is_shown_as_text_and_what_is_no_number_is_left_out() -> None:
    nan = math.nan
    rows = [
        (1, 2, 0, HOSTILE, nan, 1.5, nan, [HOSTILE], [nan], 5),
        (1, 2, 1, "b", 0.1, nan, 0.1, None, None, 6),
    ]
    found = answer("uncertainty", "entropy", rows)
    (drawing,) = answers.drawings(found).values()
    (mark,) = answers.marks(found, drawing)
    assert mark["y"] == 1.5
    assert mark["x"].startswith(visible(HOSTILE)[:10])
    table = answers.table(found)
    assert table["chosen"] == [visible(HOSTILE), "b"]
    assert table["prob"] == [None, 0.1]
    assert table["alternatives"] == [visible(HOSTILE), None]
    json.dumps(question_charts.chart(found, drawing, [mark], clickable=True).to_dict())
    assert "\x1b" not in json.dumps(table, ensure_ascii=False)


def test_several_models_have_a_colour_each() -> None:
    rows = [(model, layer, 9, 0.1, 0.2, 1.0, 2.0) for model in "ab" for layer in range(3)]
    found = answer("layers", "layer", rows)
    assert answers.models(found) == ["a", "b"]
    drawing = answers.drawings(found)["agreement"]
    drawn = question_charts.chart(found, drawing, answers.marks(found, drawing)).to_dict()
    assert drawn["layer"][0]["encoding"]["color"]["sort"] == ["a", "b"]
    (data,) = drawn["datasets"].values()
    assert {row["y"] for row in data} == {0.1}


def test_shares_are_stacked_without_those_that_cannot_be_seen() -> None:
    row = ("m", 1, 9, 0.5, 0.0, 0.2, 0.001, 0.1, 0.2, 0.0, 1e-9)
    found = answer("attention", "layer", [row])
    (drawing,) = answers.drawings(found).values()
    drawn = question_charts.chart(found, drawing, answers.marks(found, drawing)).to_dict()
    domain = drawn["encoding"]["color"]["scale"]["domain"]
    assert domain == ["reply", "user", "template", "first token"]


def test_steps_of_a_reply_are_told_as_ranges() -> None:
    assert answers.buckets([0, 1, 2, 512]) == ["0", "1", "2–3", "512–1,023"]


# ------------------------------------------------------------------------ SQL's results

RESULT = pa.table(
    [
        pa.array([1, 2]),
        pa.array([0.5, math.nan]),
        pa.array(["=x", None]),
        pa.array([[1, 2], None]),
        pa.array([b"\x00\xff", None]),
        pa.array([dt.datetime(2026, 1, 1), None]),
    ],
    names=["x", "x", HOSTILE, "list", "bytes", "when"],
)
NAMES = ["x", "x_2", "<img src=x><U+202E>␛[31m␊", "list", "bytes", "when"]


def test_any_result_can_be_shown() -> None:
    frame = sql_table.frame(RESULT)
    assert list(frame.columns) == NAMES
    assert frame["list"].tolist()[0] == "[1, 2]"
    assert frame["bytes"].tolist()[0] == "00ff"
    assert sql_table.numeric_columns(frame) == ["x", "x_2"]
    assert sql_table.frame(pa.table({})).empty


def test_a_result_can_be_saved() -> None:
    lines = sql_table.as_csv(RESULT).splitlines()
    assert lines[1:] == ['1,0.5,\'=x,"[1, 2]",00ff,2026-01-01T00:00:00', "2,,,,,"]
    first, second = json.loads(sql_table.as_json(RESULT))
    assert first["x_2"] == 0.5 and second["x_2"] is None
    assert first["list"] == [1, 2]
    back = pa.parquet.read_table(pa.BufferReader(sql_table.as_parquet(RESULT)))
    assert back.column_names == NAMES and back["list"].to_pylist() == [[1, 2], None]


def test_what_parquet_cannot_hold_is_told() -> None:
    interval = pa.array([pa.MonthDayNano([0, 1, 0])])
    with pytest.raises(QuestionError, match="cast such a column to VARCHAR"):
        sql_table.as_parquet(pa.table({"a": interval}))


@pytest.mark.parametrize("kind", sql_table.CHARTS)
@pytest.mark.parametrize("colour", [None, "image"])
def test_no_name_of_a_column_means_something_in_a_chart(kind: str, colour: str | None) -> None:
    """Under ``image`` a tooltip would fetch an address."""
    table = pa.table({"image": ["http://evil.test/x"], "a.b[0]": [1.5], "title": [2]})
    frame = sql_table.frame(table)
    drawn = sql_table.chart(frame, "image", "a.b[0]", colour, kind).to_dict()
    titles = [one["title"] for one in drawn["encoding"]["tooltip"]]
    assert not {"image", "title"} & set(titles)
    (data,) = drawn["datasets"].values()
    assert data[0].keys() <= {"x", "y", "what"}


def test_more_colours_than_can_be_told_apart_are_one() -> None:
    frame = sql_table.frame(pa.table({"x": list(range(9)), "c": list("abcdefghi")}))
    drawn = sql_table.chart(frame, "x", "x", "c", "points").to_dict()
    assert drawn["encoding"]["color"]["scale"]["domain"][-1] == "other"
    assert len(drawn["encoding"]["color"]["scale"]["domain"]) == 7


@pytest.mark.parametrize(
    ("values", "kind"), [([1, 2], "lines"), ([2, 1], "points"), (["a", "b"], "bars")]
)
def test_the_usual_chart(values: list[object], kind: str) -> None:
    assert sql_table.default_chart(sql_table.frame(pa.table({"x": values})), "x") == kind
