"""Each page without a browser: it runs, and says what it should, on any store."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import streamlit as st
from explorers import HOME, ROOT
from stories import HOSTILE, QUESTIONS, Stories
from streamlit.testing.v1 import AppTest

from oki_trace.records import CapturePolicy, Sampling
from oki_trace.store import migrate
from oki_trace.store.writer import TraceWriter


@pytest.fixture
def open_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Makes a store the explorer's, and gives its connections back in the end."""
    from dashboard import data

    opened: list[str] = []

    def use(db: str) -> None:
        monkeypatch.setenv("OKI_TRACE_DB", db)
        opened.append(db)

    yield use
    for db in opened:
        data._reader(db).close()
    st.cache_resource.clear()
    st.cache_data.clear()


@pytest.fixture
def empty_store(tmp_path: Path, open_store: Callable[[str], None]) -> str:
    db = str(tmp_path / "empty.db")
    migrate.ensure(db)
    open_store(db)
    return db


@pytest.fixture
def filled_store(stories: Stories, open_store: Callable[[str], None]) -> Stories:
    open_store(stories.db)
    return stories


def chat(**query: int) -> AppTest:
    app = AppTest.from_file(str(HOME), default_timeout=60)
    for name, value in query.items():
        app.query_params[name] = str(value)
    return app.run()


# AppTest follows no navigation: a page beside the first is run by itself.
def conversations() -> AppTest:
    def page() -> None:
        from dashboard.views import conversations

        conversations.page()

    return AppTest.from_function(page, default_timeout=60).run()


def store() -> AppTest:
    def page() -> None:
        from dashboard.views import store

        store.page()

    return AppTest.from_function(page, default_timeout=60).run()


def drawn(app: AppTest) -> int:
    """How many of the explorer's own elements are on the page; AppTest knows them not."""
    return sum(type(element).__name__ == "UnknownElement" for element in app.main)


# ---------------------------------------------------------------- an empty store


def test_chat_on_an_empty_store_asks_for_a_question(empty_store: str) -> None:
    app = chat()
    assert not app.exception
    assert len(app.chat_input) == 1
    assert not app.chat_input[0].disabled
    assert app.sidebar.selectbox(key="model").value == "smollm2"


def test_conversations_on_an_empty_store_say_so(empty_store: str) -> None:
    app = conversations()
    assert not app.exception
    assert "No conversations yet" in app.caption[0].value


def test_store_page_on_an_empty_store_counts_nothing(empty_store: str) -> None:
    app = store()
    assert not app.exception
    metrics = {metric.label: metric.value for metric in app.metric}
    assert metrics["Conversations"] == metrics["Messages"] == metrics["Steps"] == "0"


def test_the_store_is_made_when_there_is_none(
    tmp_path: Path, open_store: Callable[[str], None]
) -> None:
    db = tmp_path / "new folder" / "store.db"
    open_store(str(db))
    assert not chat().exception
    assert db.is_file()


# ---------------------------------------------------------------- a filled store


def test_every_conversation_can_be_opened(filled_store: Stories) -> None:
    for conversation in range(1, filled_store.first[0] + 1):
        app = chat(conversation=conversation)
        assert not app.exception, conversation
        assert drawn(app), conversation


def test_chat_shows_a_step(filled_store: Stories) -> None:
    conversation, message = filled_store.first
    app = chat(conversation=conversation, message=message, step=2)
    assert not app.exception
    assert app.text[0].value == QUESTIONS[0]
    with_evidence = app.selectbox(key="evidence_head")
    assert with_evidence.value == "mean"
    with_evidence.set_value("max").run()
    assert not app.exception
    app.selectbox(key="evidence_layer").set_value(1).run()
    assert not app.exception
    app.toggle(key="no_sink").set_value(False).run()
    assert not app.exception


@pytest.mark.parametrize("colour", ["surprisal", "entropy", "margin", "settle layer"])
def test_chat_in_every_colour(filled_store: Stories, colour: str) -> None:
    app = chat(conversation=filled_store.first[0])
    app.button_group(key="colour").set_value(colour).run()
    assert not app.exception


def test_the_title_as_a_button_is_no_markup(filled_store: Stories) -> None:
    labels = [button.label for button in chat().sidebar.button]
    assert HOSTILE[0] not in labels
    assert any("script" in label for label in labels)


def test_conversations_are_listed_and_searched(filled_store: Stories) -> None:
    app = conversations()
    assert not app.exception
    frame = app.dataframe[0].value
    assert list(frame["id"]) == list(range(filled_store.first[0], 0, -1))
    assert frame["title"].iloc[0] == QUESTIONS[0]
    app.text_input(key="search").set_value("WHAT RIVER").run()
    assert list(app.dataframe[0].value["id"]) == [filled_store.first[0]]
    app.text_input(key="search").set_value("no such words").run()
    assert "Nothing found" in app.caption[0].value
    # Wildcards of the store's own language are text.
    app.text_input(key="search").set_value("%").run()
    assert "Nothing found" in app.caption[0].value


def test_a_page_past_the_end_is_no_failure(filled_store: Stories) -> None:
    app = conversations()
    app.number_input(key="page").set_value(9).run()
    assert not app.exception
    assert not [c for c in app.caption if "No conversations yet" in c.value]


def test_store_page_counts(filled_store: Stories) -> None:
    app = store()
    assert not app.exception
    metrics = {metric.label: metric.value for metric in app.metric}
    assert metrics["Conversations"] == str(filled_store.first[0])
    assert filled_store.db in app.code[0].value


def test_what_comes_in_from_elsewhere_is_seen(
    tmp_path: Path, open_store: Callable[[str], None]
) -> None:
    """The command line writes into the same store while the explorer is open."""
    db = str(tmp_path / "store.db")
    open_store(db)
    app = chat()
    assert not [b for b in app.sidebar.button if b.label == "From a terminal"]
    with TraceWriter(db, checkpoint=False) as writer:
        writer.create_conversation("From a terminal")
    app.run()
    assert [b for b in app.sidebar.button if b.label == "From a terminal"]


def test_the_sidebar_begins_with_the_defaults(empty_store: str) -> None:
    """The same as those of the command line and of Python."""
    app = chat()
    assert app.selectbox(key="tensors").value == CapturePolicy().tensors
    assert app.number_input(key="max_new_tokens").value == Sampling().max_new_tokens
    assert app.slider(key="temperature").value == 0


def test_settings_that_make_no_sense_cannot_be_sent(empty_store: str) -> None:
    """What the sidebar offers is within what the model can be asked for."""
    app = chat()
    for key in ("temperature", "penalty"):
        app.slider(key=key).set_value(app.slider(key=key).max).run()
        assert not app.exception
        assert not app.error
    app.slider(key="top_p").set_value(app.slider(key="top_p").min).run()
    assert not app.exception
    assert not app.error
    assert not app.chat_input[0].disabled


# ------------------------------------------------------------------------- start


def test_pages_load_neither_torch_nor_transformers() -> None:
    """So that they come up at once, also on a machine without a model library."""
    code = (
        "import sys\n"
        "from dashboard import data, charts, components\n"
        "from dashboard.views import chat, conversations, store\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'bitsandbytes', 'duckdb'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"
