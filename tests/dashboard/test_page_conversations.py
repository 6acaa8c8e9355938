"""The list of conversations without a browser: searched, narrowed, changed, exported."""

from __future__ import annotations

import csv
import datetime as dt
import io
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
from streamlit.testing.v1 import AppTest

from dashboard import data
from dashboard.views import conversations as conversations_view
from oki_trace.exchange.formats import Format
from oki_trace.records import (
    CapturePolicy,
    ConversationFilter,
    ModelChoice,
    Sampling,
)
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.writer import TraceWriter
from tests.dashboard import app_pages, sample_stores


def test_conversations_on_an_empty_store_say_so(empty_store: str) -> None:
    app = app_pages.conversations()
    assert not app.exception
    assert "No conversations yet. Start a chat, then find it here." in app.markdown[-1].value


def test_conversations_are_listed_and_searched(filled_store: sample_stores.Samples) -> None:
    app = app_pages.conversations()
    assert not app.exception
    frame = app.dataframe[0].value
    assert list(frame["id"]) == list(range(filled_store.first[0], 0, -1))
    assert frame["title"].iloc[0] == sample_stores.QUESTIONS[0]
    app.text_input(key="search").set_value("WHAT RIVER").run()
    assert list(app.dataframe[0].value["id"]) == [filled_store.first[0]]
    app.text_input(key="search").set_value("no such words").run()
    assert "No conversation matches" in app.caption[0].value
    # Wildcards of the store's own language are text.
    app.text_input(key="search").set_value("%").run()
    assert "No conversation matches" in app.caption[0].value


def test_conversations_are_narrowed_by_model_status_and_date(
    filled_store: sample_stores.Samples,
) -> None:
    def ids(app: AppTest) -> list[int]:
        assert not app.exception
        return list(app.dataframe[0].value["id"]) if app.dataframe else []

    app = app_pages.conversations()
    every = ids(app)
    app.selectbox(key="of_status").set_value("failed").run()
    assert set(ids(app)) == {filled_store.failed[0], filled_store.failed_at_once[0]}
    app.selectbox(key="of_model").set_value("no/such").run()
    assert ids(app) == [filled_store.failed_at_once[0]]
    app.selectbox(key="of_status").set_value("any")
    app.selectbox(key="of_model").set_value("any")
    app.date_input(key="since").set_value(dt.date(2020, 1, 1)).run()
    assert ids(app) == every
    app.date_input(key="until").set_value(dt.date(2020, 1, 2)).run()
    assert "No conversation matches" in app.caption[0].value
    app.date_input(key="until").set_value(dt.datetime.now().astimezone().date()).run()
    assert ids(app) == every


def test_a_conversation_tells_its_speed_and_size(filled_store: sample_stores.Samples) -> None:
    frame = app_pages.conversations().dataframe[0].value.set_index("id")
    bare, full = frame.loc[filled_store.bare[0]], frame.loc[filled_store.first[0]]
    assert (bare["tokens"], bare["tokens/s"]) == (3, 3.0)
    assert np.isnan(bare["tensors"]), "none were kept"
    assert full["tokens/s"] > 0
    assert full["tensors"] > 1_000_000


def test_a_search_that_leaves_fewer_pages_shows_the_last(
    tmp_path: Path, open_store: Callable[[str], None]
) -> None:
    db = str(tmp_path / "many.db")
    open_store(db)
    with TraceWriter(db) as writer:
        for number in range(120):
            writer.create_conversation(f"Number {number}")
    app = app_pages.conversations()
    app.number_input(key="page").set_value(3).run()
    assert not app.exception
    assert list(app.dataframe[0].value["title"]) == [f"Number {n}" for n in range(19, -1, -1)]
    app.text_input(key="search").set_value("Number 1").run()
    assert not app.exception
    assert len(app.dataframe[0].value) == 31


def test_conversations_are_renamed_exported_and_deleted(
    tmp_path: Path, open_store: Callable[[str], None]
) -> None:
    db = str(tmp_path / "store.db")
    open_store(db)
    with TraceWriter(db) as writer, TraceReader(db) as reader:
        for title in sample_stores.HOSTILE:
            writer.create_conversation(title)
        for number in range(1, len(sample_stores.HOSTILE) + 1):
            assert not app_pages.acting(number).exception
        app = app_pages.acting(1)
        app.text_input(key="title-1").set_value("  Another  ").run()
        app.button(key="rename").click().run()
        assert not app.exception
        assert reader.conversation(1).title == "Another"
        document = json.loads(data.export_file(1, Format.JSON))
        assert document["conversation"]["title"] == "Another"
        app = app_pages.acting(1, 2)
        assert "Delete 2 conversations" in app.markdown[0].value
        assert len(reader.conversations()) == len(sample_stores.HOSTILE)
        app.button(key="delete").click().run()
        assert not app.exception
        assert {c.id for c in reader.conversations()} == set(
            range(3, len(sample_stores.HOSTILE) + 1)
        )


def test_a_conversation_that_is_being_written_is_not_deleted(
    tmp_path: Path, open_store: Callable[[str], None]
) -> None:
    db = str(tmp_path / "store.db")
    open_store(db)
    with TraceWriter(db) as writer, TraceReader(db) as reader:
        conversation = writer.create_conversation("Live")
        writer.queue_reply(
            conversation, ModelChoice("tiny/model"), Sampling(), CapturePolicy(), claim=True
        )
        app = app_pages.acting(conversation)
        app.button(key="delete").click().run()
        assert not app.exception
        assert "cannot be deleted now" in app.error[0].value
        assert reader.conversation(conversation).title == "Live"


def test_all_that_is_found_is_saved_not_one_page_of_it(
    tmp_path: Path, open_store: Callable[[str], None]
) -> None:
    db = str(tmp_path / "many.db")
    open_store(db)
    with TraceWriter(db) as writer:
        for number in range(70):
            writer.create_conversation(f"=SUM({number})" if number else "Zero")
    buttons = app_pages.conversations().get("download_button")
    assert [button.label for button in buttons] == ["Export CSV"]
    found = conversations_view._csv("SUM", ConversationFilter(), 69)
    rows = list(csv.DictReader(io.StringIO(found)))
    assert [row["title"] for row in rows] == [f"'=SUM({n})" for n in range(69, 0, -1)]


def test_one_is_chosen_by_its_name(filled_store: sample_stores.Samples) -> None:
    """Where arrows would open what they come to, and hostile titles are text too."""
    app = app_pages.conversations()
    by_name = next(box for box in app.selectbox if box.label == "Choose a conversation")
    assert by_name.options[0] == f"{filled_store.first[0]} · {sample_stores.QUESTIONS[0]}"
    assert f"{filled_store.hostile[0]} · {sample_stores.HOSTILE[0]}" in by_name.options
    assert all(len(name) < 80 for name in by_name.options)
    assert "open" not in [button.key for button in app.button]
    by_name.select_index(0).run()
    assert not app.exception
    assert "open" in [button.key for button in app.button]


def test_a_damaged_conversation_is_marked_and_the_others_are_shown(
    samples: sample_stores.Samples, open_store: Callable[[str], None], tmp_path: Path
) -> None:
    number, message = samples.first
    damaged = str(tmp_path / "damaged.db")
    with (
        closing(sqlite3.connect(samples.db)) as whole,
        closing(sqlite3.connect(damaged)) as connection,
        connection,
    ):
        whole.backup(connection)
        connection.execute("UPDATE message SET status = 'dancing' WHERE id = ?", (message,))
    open_store(damaged)
    app = app_pages.conversations()
    assert not app.exception
    frame = app.dataframe[0].value
    marked = dict(zip(frame["id"], frame["status"], strict=True))
    assert marked.pop(number) == "damaged"
    assert marked and "damaged" not in marked.values()
