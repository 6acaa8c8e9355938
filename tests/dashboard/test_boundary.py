"""What a page does when it cannot be drawn: a sentence, a button, the details; nothing else."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest

from dashboard import boundary, data
from oki_trace.errors import StoreBusy, StoreError
from oki_trace.records import (
    CapturePolicy,
    ChatMessage,
    ModelChoice,
    Role,
    Sampling,
    Status,
    TurnEnd,
)
from oki_trace.store.writing.writer import TraceWriter
from tests import builders
from tests.dashboard import app_pages

PAGES = ("chat", "reply_map", "tree", "conversations", "compare", "questions", "sql", "store")
SECRET = "www.evil.test/?q=secret [x](http://evil.test)"


def page(name: str, **query: int) -> AppTest:
    def draw(name: str) -> None:
        import importlib

        importlib.import_module(f"dashboard.views.{name}").page()

    app = AppTest.from_function(draw, default_timeout=60, args=(name,))
    app.query_params.update({key: str(value) for key, value in query.items()})
    return app


def again(app: AppTest) -> AppTest:
    (button,) = [one for one in app.button if one.label == "Try again"]
    return button.click().run()


def broken(app: AppTest, sentence: str) -> None:
    """The page has this one sentence, the button, and no traceback."""
    assert not app.exception
    (error,) = app.error
    assert sentence in app_pages.plainly(error.value)
    assert "\n" not in error.value
    assert [one.label for one in app.button].count("Try again") == 1
    assert "Traceback" not in error.value


def whole(app: AppTest) -> None:
    assert not app.exception
    assert not app.error
    assert "Try again" not in [one.label for one in app.button]


@pytest.fixture
def store(tmp_path: Path, open_store: Callable[[str], None]) -> Path:
    """A store with one reply of three steps, opened by the explorer."""
    path = tmp_path / "store.db"
    rng = np.random.default_rng(3)
    with TraceWriter(str(path)) as writer:
        conversation = writer.create_conversation("A title")
        writer.add_message(conversation, ChatMessage(Role.USER, "Say it."))
        reply = writer.queue_reply(
            conversation, ModelChoice("tiny/model"), Sampling(), CapturePolicy(), claim=True
        )
        writer.start_reply(reply, builders.turn_start())
        steps = [builders.step(i, rng, with_lens=True, with_tensors=True) for i in range(3)]
        writer.append(reply, steps)
        writer.finish_reply(reply, TurnEnd(Status.COMPLETE, "x", "end of turn", 1.0))
    open_store(str(path))
    return path


# ------------------------------------------------------------------ a store that cannot be read


@pytest.mark.parametrize("name", PAGES)
def test_a_store_that_was_deleted_is_a_sentence_until_it_is_back(name: str, store: Path) -> None:
    app = page(name, conversation=1, message=2, step=1, left=2, right=2).run()
    whole(app)
    aside = store.with_name("aside")
    shutil.move(store, aside)
    app.run()
    broken(app, "was deleted, moved or replaced")
    broken(again(app), "There is no trace store")
    assert not store.exists(), "no new one is made in its place"
    shutil.move(aside, store)
    whole(again(app))


def newer(path: Path) -> str:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")
    return "newer oki-trace"


def damaged(path: Path) -> str:
    path.with_name(path.name + "-wal").unlink(missing_ok=True)
    path.write_bytes(path.read_bytes()[:100] + bytes(200_000))
    return "damaged"


def not_ours(path: Path) -> str:
    path.unlink()
    path.write_text("Dear diary", encoding="utf-8")
    return "is not an oki-trace store"


@pytest.mark.parametrize("spoil", [newer, damaged, not_ours])
@pytest.mark.parametrize("name", PAGES)
def test_a_store_that_cannot_be_opened_is_a_sentence(
    name: str, spoil: Callable[[Path], str], store: Path
) -> None:
    sentence = spoil(store)
    app = page(name, conversation=1, message=2, left=2, right=2).run()
    broken(app, sentence)
    broken(again(app), sentence)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="nothing is shut to root")
def test_a_store_that_may_not_be_read_is_a_sentence(store: Path) -> None:
    store.chmod(0)
    broken(page("store").run(), "permissions")


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("error", [StoreBusy, StoreError])
def test_a_store_that_fails_on_the_way_is_a_sentence(
    name: str, error: type[StoreError], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise error(f"The store {SECRET} failed: wait for it to finish.")

    with monkeypatch.context() as patch:
        patch.setattr(data, "store", fail)
        app = page(name, conversation=1, message=2, left=2, right=2).run()
        broken(app, "wait for it to finish")
        assert "www." not in app.error[0].value, "no address that a browser would follow"
    whole(again(app))


# ------------------------------------------------------------------------ what nobody expected


@pytest.mark.parametrize("name", PAGES)
def test_an_unexpected_error_is_a_sentence_with_details(
    name: str, store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise KeyError(SECRET)

    with monkeypatch.context() as patch:
        patch.setattr(data, "store", fail)
        app = page(name, conversation=1, message=2, left=2, right=2).run()
    broken(app, "a bug in oki-trace (KeyError)")
    assert SECRET not in app.error[0].value
    (details,) = app.code
    assert "Traceback" in details.value and SECRET in details.value
    assert "streamlit 1." in details.value and "oki-trace " in details.value
    assert [record.exc_info for record in caplog.records if record.name == boundary.__name__]
    caplog.clear()
    whole(again(app))


PARTS = ("step", "prompt", "lens_grid", "steps", "recent_conversations", "worker_state")


@pytest.mark.parametrize("function", PARTS)
def test_a_part_that_fails_is_told_once_by_its_page(
    function: str,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each of the parts that are drawn by themselves, in the chat."""

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError(SECRET)

    with monkeypatch.context() as patch:
        patch.setattr(data, function, fail)
        app = page("chat", conversation=1, message=2, step=1).run()
    broken(app, "ZeroDivisionError")
    caplog.clear()
    whole(again(app))


def test_the_details_of_a_deep_recursion_are_short() -> None:
    def deeper(depth: int) -> None:
        if not depth:
            raise ValueError("x" * 100_000)
        deeper(depth - 1)

    try:
        deeper(200)
    except ValueError as error:
        told = boundary.details(error)
    assert "Traceback" in told and len(told) < 25_000


def test_details_hold_no_control_characters() -> None:
    told = boundary.details(ValueError("\x1b[31m\u202e"))
    assert "\x1b" not in told and "\u202e" not in told


# ------------------------------------------------------------------------- no way around it


def test_no_part_of_a_page_is_outside_the_boundary() -> None:
    views = Path(boundary.__file__).parent / "views"
    pages = 0
    for path in views.glob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert "st.fragment" not in source, path.name
        assert "st.exception" not in source, path.name
        if "\ndef page() -> None:" in source:
            assert "@boundary.page\ndef page() -> None:" in source, path.name
            pages += 1
    assert pages == len(PAGES)
