"""The Store page without a browser, and what comes in by an upload."""

from __future__ import annotations

import datetime as dt
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest

from dashboard import charts, data
from dashboard.viewdata import storage
from oki_trace.errors import ExchangeError
from oki_trace.exchange.formats import Format
from oki_trace.exchange.importing import import_files
from oki_trace.records import (
    CapturePolicy,
    ChatMessage,
    ModelChoice,
    ReplySize,
    Role,
    Sampling,
    Status,
    TurnEnd,
)
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.writer import TraceWriter
from tests import builders
from tests.dashboard import app_pages, one_text_store, sample_stores

Open = Callable[[str], None]


def store() -> AppTest:
    def page() -> None:
        from dashboard.views import store

        store.page()

    return AppTest.from_function(page, default_timeout=60).run()


def tiles(app: AppTest) -> dict[str, str]:
    return {metric.label: metric.value for metric in app.metric}


def health(app: AppTest) -> dict[str, str]:
    return dict(app_pages.shown(app, "health")["rows"])


def fill(db: str, titles: tuple[str, ...], *, live: bool = False) -> None:
    """A reply of three tokens with tensors under each title; ``live``: the last one goes on."""
    rng = np.random.default_rng(5)
    with TraceWriter(db) as writer:
        for title in titles:
            conversation = writer.create_conversation(title)
            writer.add_message(conversation, ChatMessage(Role.USER, title))
            reply = writer.queue_reply(
                conversation, ModelChoice("tiny/model"), Sampling(), CapturePolicy(), claim=True
            )
            writer.start_reply(reply, builders.turn_start())
            writer.append(reply, [builders.step(i, rng, with_tensors=True) for i in range(3)])
            if not live or title != titles[-1]:
                writer.finish_reply(reply, TurnEnd(Status.COMPLETE, "x", "end of turn", 1.0))


def test_an_empty_store_counts_nothing(empty_store: str) -> None:
    app = store()
    assert not app.exception
    assert tiles(app)["Conversations"] == tiles(app)["Tokens"] == "0"
    assert tiles(app)["Per token"] == "–"
    assert health(app)["Replies"] == "none yet"
    assert app.button(key="verify").disabled


def test_a_store_of_scores_alone_tells_what_is_in_it(tmp_path: Path, open_store: Open) -> None:
    db = str(tmp_path / "store.db")
    one_text_store.build(db, tensors=True)
    open_store(db)
    app = store()
    assert not app.exception and not app.error
    assert (tiles(app)["Conversations"], tiles(app)["Tokens"]) == ("4", "20")
    assert tiles(app)["Per token"] != "–"
    assert health(app)["Replies"] == "4 complete"
    assert storage.growth_rows(data.store().reply_sizes(), 1.0)[-1]["tokens"] == 20
    told = store().button(key="verify").click().run()
    assert not told.exception and "position 1" in " ".join(told.dataframe[0].value["problem"])


def test_a_store_tells_what_is_in_it(filled_store: sample_stores.Samples) -> None:
    app = store()
    assert not app.exception
    with TraceReader(filled_store.db) as reader:
        info = reader.info()
        replies = [m for c in reader.conversations(limit=99) for m in reader.messages(c.id)]
    assert tiles(app)["Conversations"] == f"{info.conversations:,}"
    assert tiles(app)["Per token"] == storage.size(info.bytes_per_token)
    failed = sum(m.status is Status.FAILED for m in replies)
    assert f"{failed} failed" in health(app)["Replies"]
    assert health(app)["Schema"].startswith(info.schema)
    assert filled_store.db in app.text[0].value


def test_what_takes_the_room_is_told_in_bars_and_bytes(filled_store: sample_stores.Samples) -> None:
    room = app_pages.shown(store(), "disk-usage")
    with TraceReader(filled_store.db) as reader:
        info = reader.info()
    sizes = {row["what"]: row["bytes"] for row in room["rows"]}
    assert sizes["full tensors"] == info.tensor_bytes
    assert sizes["rows"] == info.row_bytes
    assert sum(row["share"] for row in room["rows"]) == pytest.approx(1)


def test_the_numbers_on_top_are_saved(filled_store: sample_stores.Samples) -> None:
    info = data.info()
    names, values = app_pages.shown(store(), "save-store")["rows"]
    assert dict(zip(names, values, strict=True)) == {
        "bytes": info.bytes,
        "bytes_per_token": info.bytes_per_token,
        "row_bytes_per_token": info.row_bytes_per_token,
        "tensor_bytes_per_token": info.tensor_bytes_per_token,
        "conversations": info.conversations,
        "messages": info.messages,
        "steps": info.steps,
        "tensor_steps": info.tensor_steps,
    }


def test_a_store_is_verified(tmp_path: Path, open_store: Open) -> None:
    db = str(tmp_path / "store.db")
    open_store(db)
    with TraceWriter(db) as writer:
        conversation = writer.create_conversation("Good")
        writer.add_message(conversation, ChatMessage(Role.USER, "Hello"))
    app = store().button(key="verify").click().run()
    assert not app.exception
    told = app_pages.plainly(app.success[0].value)
    assert "Checked 1 message, 0 steps, 0 tensors" in told
    assert told.endswith("No problems found.")


def test_what_is_wrong_is_listed(tmp_path: Path, open_store: Open) -> None:
    db = str(tmp_path / "store.db")
    open_store(db)
    fill(db, ("One",))
    with TraceWriter(db) as writer, writer.write() as connection:
        connection.exec_driver_sql("UPDATE tensor SET data = zeroblob(length(data))")
    app = store().button(key="verify").click().run()
    assert not app.exception
    assert "problem" in app.error[0].value
    assert "checksum" in " ".join(app.dataframe[0].value["problem"])


def test_tensors_are_pruned_and_the_room_given_back(tmp_path: Path, open_store: Open) -> None:
    db = str(tmp_path / "store.db")
    open_store(db)
    fill(db, sample_stores.HOSTILE, live=True)
    app = store()
    assert not app.exception
    assert "1 running" in health(app)["Replies"]
    app.number_input(key="prune-size").set_value(0.0).run()
    assert not app.exception
    plan = app.dataframe[0].value
    # What is being written stays, and titles are shown as text.
    assert len(plan) == len(sample_stores.HOSTILE) - 1
    assert sample_stores.HOSTILE[0] in list(plan["title"])
    assert any(
        "1 reply being written stays" in app_pages.plainly(text.value) for text in app.markdown
    )
    app.button(key="prune").click().run()
    assert not app.exception
    assert "Freed" in app.success[0].value
    with TraceReader(db) as reader:
        assert reader.info().tensor_steps == 3
    app.button(key="vacuum").click().run()
    assert "cannot be vacuumed now" in app_pages.plainly(app.error[0].value)


def test_a_large_store_is_shown_in_few_points(tmp_path: Path, open_store: Open) -> None:
    db = str(tmp_path / "store.db")
    open_store(db)
    titles = tuple(f"Conversation {n}" for n in range(storage.LISTED + 5))
    fill(db, titles)
    app = store()
    app.number_input(key="prune-days").set_value(0.0).run()
    assert not app.exception
    assert len(app.dataframe[0].value) == storage.LISTED
    assert any(caption.value == "And 5 more." for caption in app.caption)


# --- viewdata


def test_growth_ends_with_all_there_is() -> None:
    start = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    sizes = [ReplySize(start + dt.timedelta(days=n), 10, 1000) for n in range(1001)]
    rows = storage.growth_rows(sizes, 5.0)
    assert len(rows) <= 2 * storage.POINTS + 2
    assert [row["bytes"] for row in rows[-2:]] == [1_001_000, 50_050]
    assert rows[-1]["when"] == sizes[-1].created_at
    assert [row["bytes"] for row in rows[::2]] == sorted(row["bytes"] for row in rows[::2])
    assert charts.growth_chart(rows).to_dict()
    assert storage.growth_rows([], 0.0) == []


@pytest.mark.parametrize(
    ("count", "told"),
    [(0, "0 B"), (999, "999 B"), (999_960, "1.0 MB"), (1.5e9, "1.5 GB"), (2e15, "2,000.0 TB")],
)
def test_sizes_as_people_say_them(count: float, told: str) -> None:
    assert storage.size(count) == told


def test_what_is_left_is_told_once_it_can_be() -> None:
    assert storage.time_left(1.0, 10, 100) == ""
    assert storage.time_left(10.0, 0, 100) == ""
    assert storage.time_left(10.0, 50, 100) == "about 10 s left"
    assert storage.time_left(60.0, 10, 100) == "about 9 min left"


# ------------------------------------------------------------------- in and out


@pytest.mark.parametrize(
    ("format", "suffix"),
    [(Format.JSON, ".json"), (Format.JSONL, ".jsonl"), (Format.PARQUET, ".zip")],
)
def test_what_is_exported_can_be_uploaded(
    tmp_path: Path, open_store: Open, format: Format, suffix: str
) -> None:
    db = str(tmp_path / "store.db")
    open_store(db)
    fill(db, sample_stores.HOSTILE[:1])
    exported = data.export_file(1, format)
    seen: list[tuple[int, int]] = []
    done = import_files({suffix: io.BytesIO(exported)}, db, lambda *progress: seen.append(progress))
    assert done.steps == 3
    assert seen
    with TraceReader(db) as reader:
        (number,) = done.conversations
        assert reader.conversation(number).title == sample_stores.HOSTILE[0]


def test_an_upload_that_is_none_leaves_nothing(empty_store: str) -> None:
    with pytest.raises(ExchangeError):
        import_files({".json": io.BytesIO(b"Dear diary")}, empty_store)
    with TraceReader(empty_store) as reader:
        assert reader.conversation_count() == 0
