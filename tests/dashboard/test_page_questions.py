"""The Questions page without a browser, on any store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from oki_trace.analysis.folder import folder_of
from oki_trace.analysis.questions import QUESTIONS
from oki_trace.records import ChatMessage, Forced, Role
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.schema import migrate
from oki_trace.store.writing.writer import TraceWriter
from tests.analysis import made, test_branch_truth
from tests.dashboard import app_pages, one_text_store, sample_stores
from tests.dashboard.query_pages import address, charts, page, questions, sql
from tests.exchange import stories

# ------------------------------------------------------------------------ first things


@pytest.mark.parametrize("name", ["questions", "sql"])
def test_an_empty_store_leads_to_the_first_trace(
    name: str, tmp_path: Path, open_store: Callable[[str], None]
) -> None:
    db = str(tmp_path / "empty.db")
    migrate.ensure(db)
    open_store(db)
    app = page(name)
    assert not app.exception
    assert any("Start a chat, then query it here" in text.value for text in app.markdown)
    assert not app.dataframe


@pytest.mark.parametrize("name", ["questions", "sql"])
def test_a_cache_that_cannot_be_written_is_told_in_a_line(
    name: str, tmp_path: Path, open_store: Callable[[str], None]
) -> None:
    db = str(tmp_path / "store.db")
    open_store(db)
    with TraceWriter(db) as writer:
        made.whole(writer)
    folder_of(db).write_text("in the way")
    app = page(name)
    assert not app.exception
    assert "cannot be written" in app.error[0].value


def test_a_cache_being_written_shows_how_far_it_is(
    tmp_path: Path, open_store: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dashboard import data

    db = str(tmp_path / "store.db")
    open_store(db)
    with TraceWriter(db) as writer:
        made.whole(writer)
    monkeypatch.setattr(data, "cache_backlog", lambda wait_s: (3, 12))
    app = questions()
    assert not app.exception
    (bar,) = app.get("progress")
    assert "3 of 12 messages" in bar.proto.text
    assert not app.dataframe


# ------------------------------------------------------------------------ the questions


@pytest.mark.parametrize(
    ("question", "view"),
    [
        (question.name, view)
        for question in QUESTIONS.values()
        for view in question.views
        if not question.compares and question.name not in ("prompt", "forks")
    ],
)
def test_every_view_has_a_picture_a_table_and_its_sql(
    filled: sample_stores.Samples, question: str, view: str
) -> None:
    """Over a store that holds hostile texts, tokens without numbers and replies without lens."""
    check_view(question, view)


@pytest.mark.parametrize("view", QUESTIONS["forks"].views)
def test_a_question_about_branches(
    view: str, tmp_path: Path, open_store: Callable[[str], None]
) -> None:
    from dashboard import data

    db = str(tmp_path / "store.db")
    with TraceWriter(db) as writer:
        conversation = writer.create_conversation("Hello")
        asked = writer.add_message(conversation, ChatMessage(Role.USER, "Hello"))
        origin = test_branch_truth.add(writer, conversation, [1, 2, 3], "one")
        fork: dict[str, Any] = {"parent_id": asked, "branch_of": origin, "branch_step": 1}
        forced = Forced((9,))
        test_branch_truth.add(writer, conversation, [9, 3], "two", forced=forced, **fork)
    open_store(db)
    assert data.cache_backlog(60.0) is None
    check_view("forks", view)


@pytest.mark.parametrize("view", QUESTIONS["prompt"].views)
def test_a_question_about_traced_prompts(
    view: str, tmp_path: Path, open_store: Callable[[str], None]
) -> None:
    from dashboard import data

    db = tmp_path / "store.db"
    stories.fill_given(db, tensors="none")
    open_store(str(db))
    assert data.cache_backlog(60.0) is None
    check_view("prompt", view)


@pytest.mark.parametrize(
    ("question", "view"),
    [(question.name, view) for question in QUESTIONS.values() for view in question.offered],
)
def test_a_store_of_scores_alone_has_answers_or_says_what_is_missing(
    question: str, view: str, scores: str
) -> None:
    app = questions(question=question, view=view)
    assert not app.exception and not app.error
    if question == "heads":
        assert "No attention tensors" in app_pages.plainly(app.warning[0].value)
    elif question == "prompt":
        assert len(app.dataframe[0].value)
    elif QUESTIONS[question].views[view].compares:
        assert any(c.value.startswith("Choose two to see how far apart") for c in app.caption)
    else:
        told = [markdown.value for markdown in app.markdown]
        assert "No replies yet. Start a chat, then query it here." in told


def test_given_tokens_are_asked_for_by_their_origin(scores: str) -> None:
    app = questions(question="uncertainty", view="entropy", origin="given")
    assert not app.exception and app.selectbox(key="ask-origin-uncertainty").value == "given"
    table = app.dataframe[0].value
    assert len(table) == 20 and table["step"].isna().all() and table["position"].notna().all()
    app.selectbox(key="ask-origin-uncertainty").set_value("sampled").run()
    assert not app.exception and not app.dataframe
    assert address(app)["origin"] == "sampled"
    assert "No replies yet. Start a chat, then query it here." in [m.value for m in app.markdown]


def test_two_scores_of_one_text_are_compared(scores: str) -> None:
    app = questions(question="compare", view="reply", first="1", second="3")
    assert not app.exception and not app.error
    assert list(app.dataframe[0].value["text"])[:2] == ["␣sky", "␣is"]
    assert any("Aligned by characters" in app_pages.plainly(m.value) for m in app.markdown)


@pytest.fixture(scope="module")
def built_scores(tmp_path_factory: pytest.TempPathFactory) -> str:
    return one_text_store.build(str(tmp_path_factory.mktemp("scores") / "store.db")).db


@pytest.fixture
def scores(built_scores: str, open_store: Callable[[str], None]) -> str:
    """A store with nothing but scored texts."""
    from dashboard import data

    open_store(built_scores)
    assert data.cache_backlog(60.0) is None
    return built_scores


def check_view(question: str, view: str) -> None:
    app = questions(question=question, view=view)
    assert not app.exception
    assert not app.error and not app.warning
    (table,) = app.dataframe
    assert len(table.value)
    assert charts(app) >= 1
    assert len(app.code) == 1
    # What it would ask is what is in the address already.
    assert address(app) == {"question": question, "view": view}


def test_a_question_can_be_narrowed_and_the_address_says_how(filled: sample_stores.Samples) -> None:
    conversation, message = filled.first
    app = questions(question="uncertainty", view="reply")
    every = len(app.dataframe[0].value)
    app.selectbox(key="ask-conversation").set_value(str(conversation)).run()
    assert not app.exception
    assert address(app)["conversation"] == str(conversation)
    assert set(app.dataframe[0].value["conversation"]) == {conversation}
    assert len(app.dataframe[0].value) == 2 < every
    app.selectbox(key=f"ask-message-{conversation}").set_value(message).run()
    assert list(app.dataframe[0].value["message"]) == [message]
    app.text_input(key="ask-text").set_value("no such words").run()
    assert any(text.value == "No steps match." for text in app.markdown)
    (everything,) = [b for b in app.button if b.label == "Ask about all replies"]
    everything.click().run()
    assert address(app) == {"question": "uncertainty", "view": "reply"}
    assert len(app.dataframe[0].value) == every
    assert app.text_input(key="ask-text").value == ""


def test_text_and_who_said_it(filled: sample_stores.Samples) -> None:
    asked = {"question": "uncertainty", "view": "reply", "text": sample_stores.QUESTIONS[0].upper()}
    assert len(questions(**asked, role="user").dataframe[0].value) == 2
    assert not questions(**asked, role="system").dataframe


def test_a_link_opens_the_same_and_another_link_another(filled: sample_stores.Samples) -> None:
    app = questions(question="uncertainty", view="token", least="0.2", top="3", model="smollm2")
    assert not app.exception
    assert app.number_input(key="ask-least-uncertainty").value == 0.2
    assert app.selectbox(key="ask-model").value == "smollm2"
    assert app.button_group(key="ask-view-uncertainty").value == "token"
    assert len(app.dataframe[0].value) <= 3
    # As the browser's own button does.
    app.query_params.clear()
    app.query_params["question"] = "settle"
    app.run()
    assert not app.exception
    assert app.selectbox(key="ask-model").value is None
    assert "settle_layer" in app.code[0].value


@pytest.mark.parametrize(
    ("name", "call", "key", "query"),
    [
        ("questions", "answer_question", "ask-model", {"model": "smollm2"}),
        ("sql", "run_sql", "sql-text", {}),
    ],
)
def test_a_value_of_an_interrupted_run_is_sent_to_the_browser_again(
    name: str,
    call: str,
    key: str,
    query: dict[str, str],
    filled: sample_stores.Samples,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dashboard import data

    def sent(app: AppTest) -> bool:
        (widget,) = (one for one in (*app.selectbox, *app.text_area) if one.key == key)
        return bool(widget.proto.set_value)

    calls = []
    answer = getattr(data, call)

    def once_interrupted(*given: Any, **more: Any) -> Any:
        calls.append(given)
        if len(calls) == 1:
            st.rerun()
        return answer(*given, **more)

    monkeypatch.setattr(data, call, once_interrupted)
    app = page(name, **query)
    assert not app.exception
    assert len(calls) == 2
    assert sent(app), "by the run that was not interrupted"
    assert not sent(app.run())


def test_another_question_is_asked_about_the_same_replies(filled: sample_stores.Samples) -> None:
    app = questions(question="settle", view="class", conversation=filled.first[0])
    app.button(key="ask-attention").click().run()
    assert not app.exception
    assert address(app) == {"question": "attention", "conversation": str(filled.first[0])}
    assert str(filled.first[0]) in app.code[0].value


def test_an_address_that_makes_no_sense_is_the_first_question(
    filled: sample_stores.Samples,
) -> None:
    app = questions(question="<b>", view="x", conversation="-1", top="many", since="yesterday")
    assert not app.exception
    assert len(app.dataframe[0].value)


def test_a_lens_is_named_and_one_that_has_read_nothing_is_told(
    filled: sample_stores.Samples,
) -> None:
    app = questions(question="layers", lens="jlens")
    assert app.text_input(key="ask-lens-layers").value == "jlens"
    (warning,) = app.warning
    assert "No step was read by the lens jlens" in app_pages.plainly(warning.value)
    app.text_input(key="ask-lens-layers").set_value("Not a name").run()
    assert not app.exception and not app.warning
    assert address(app) == {"question": "layers", "view": "layer"}
    assert len(app.dataframe[0].value)


def test_replies_that_kept_no_tensors_have_no_heads(filled: sample_stores.Samples) -> None:
    app = questions(question="heads", conversation=filled.without_tensors[0])
    assert not app.exception
    assert "No attention tensors are stored" in app.warning[0].value
    assert [b for b in app.button if b.label == "Ask about all replies"]


@pytest.mark.parametrize("story", ["hostile", "long", "unknown", "bare", "failed"])
@pytest.mark.parametrize(
    "question", ["settle", "uncertainty", "layers", "rivals", "attention", "reproducibility"]
)
def test_any_conversation_can_be_asked_about(
    filled: sample_stores.Samples, story: str, question: str
) -> None:
    app = questions(question=question, conversation=getattr(filled, story)[0])
    assert not app.exception
    assert not app.error


def test_a_running_reply_is_asked_about_as_far_as_it_is(
    tmp_path: Path, open_store: Callable[[str], None]
) -> None:
    db = str(tmp_path / "live.db")
    open_store(db)
    with TraceWriter(db) as writer:
        _, reply = made.begin(writer, steps=2)
        asked = {"question": "uncertainty", "view": "reply"}
        assert list(questions(**asked).dataframe[0].value["steps"]) == [2]
        made.more(writer, reply, 2, 5)
        assert list(questions(**asked).dataframe[0].value["steps"]) == [5]


def test_several_models_are_told_apart(tmp_path: Path, open_store: Callable[[str], None]) -> None:
    db = str(tmp_path / "models.db")
    open_store(db)
    with TraceWriter(db) as writer:
        made.whole(writer)
        made.whole(writer, model="other/model")
    for question, pictures in (("settle", 1), ("layers", 1), ("rivals", 1), ("attention", 2)):
        app = questions(question=question, view="layer", least=0)
        assert not app.exception
        assert set(app.dataframe[0].value["model"]) == {"tiny/model", "other/model"}
        assert charts(app) == pictures, question


# ---------------------------------------------------------------------- two of a kind


def test_two_are_chosen_before_they_are_compared(filled: sample_stores.Samples) -> None:
    app = questions(question="compare")
    assert not app.exception
    assert app.main.caption[-1].value.startswith("Choose two")
    app.selectbox(key="ask-First-reply").set_value(filled.first[1])
    app.selectbox(key="ask-Second-reply").set_value(filled.second[1]).run()
    assert not app.exception
    assert address(app) == {
        "question": "compare",
        "view": "reply",
        "first": str(filled.first[1]),
        "second": str(filled.second[1]),
    }
    assert any("are the same" in text.value for text in app.markdown)
    assert charts(app) == 1


def test_two_steps_and_two_models_are_compared(filled: sample_stores.Samples) -> None:
    steps = {"first": f"{filled.first[1]}:1", "second": f"{filled.second[1]}:2"}
    app = questions(question="compare", view="step", **steps)
    assert not app.exception
    assert app.number_input(key="ask-Second-step").value == 2
    assert {"both", "first", "second"} >= set(app.dataframe[0].value["listed_in"])
    assert charts(app) == 1
    app.button_group(key="ask-view-compare").set_value("model").run()
    assert not app.exception
    assert "first" not in address(app)
    app = questions(question="compare", view="model", first="smollm2", second="tiny/model")
    assert "No prompt has replies of both" in app_pages.plainly(app.warning[0].value)
    app = questions(question="compare", view="step", first="1:999999", second="nothing")
    assert not app.exception


@pytest.mark.parametrize("story", ["hostile", "long", "unknown", "bare", "failed"])
def test_any_two_replies_can_be_compared(filled: sample_stores.Samples, story: str) -> None:
    pair = {"first": getattr(filled, story)[1], "second": filled.first[1]}
    app = questions(question="compare", view="reply", **pair)
    assert not app.exception
    assert not app.error


def test_the_explorer_changes_nothing_by_asking(filled: sample_stores.Samples) -> None:
    with TraceReader(filled.db) as reader:
        before = reader.stamp()
        questions()
        sql()
        assert reader.stamp() == before
