"""The cache brought in step by a thread of its own."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from oki_trace.analysis import background_sync, cache
from oki_trace.analysis.background_sync import BackgroundSync
from oki_trace.analysis.folder import folder_of
from oki_trace.errors import StoreError
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.writer import TraceWriter
from tests.analysis import made


def test_it_is_behind_until_it_has_read_what_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How far it is can be asked meanwhile, by whoever comes; it is written once."""
    db = str(tmp_path / "store.db")
    half_way, go_on = threading.Event(), threading.Event()
    write = background_sync.BackgroundSync._progress
    calls = []

    def note(self: BackgroundSync, done: int, of_all: int) -> None:
        write(self, done, of_all)
        calls.append(done)
        if done == 3:
            half_way.set()
            assert go_on.wait(30)

    monkeypatch.setattr(background_sync.BackgroundSync, "_progress", note)
    with TraceWriter(db) as writer, TraceReader(db) as reader:
        for _ in range(3):
            made.whole(writer)
        one = BackgroundSync(db, reader)
        assert one.behind(0.0) is not None
        assert half_way.wait(30)
        assert one.behind(0.0) == one.behind(0.01) == (3, 6)
        go_on.set()
        assert one.behind(30.0) is None
        assert calls == [1, 2, 3, 4, 5, 6]
        assert cache.Cache(db).in_step(reader)
        # A new title alone is also read anew, but nothing is written.
        writer.rename_conversation(1, "Another")
        assert one.behind(30.0) is None
        assert len(calls) == 6


def test_what_goes_wrong_is_told_to_whoever_asks(tmp_path: Path) -> None:
    db = str(tmp_path / "store.db")
    with TraceWriter(db) as writer, TraceReader(db) as reader:
        made.whole(writer)
        folder_of(db).write_text("in the way")
        one = BackgroundSync(db, reader)
        with pytest.raises(StoreError, match="cannot be written"):
            one.behind(30.0)
        folder_of(db).unlink()
        assert one.behind(30.0) is None
