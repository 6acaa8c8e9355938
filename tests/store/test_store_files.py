"""The store's file: whose it is, who may read it, and what is said when it cannot be used."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from oki_trace.errors import StoreError, UsageError
from oki_trace.records import ChatMessage, Role
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.schema import identity
from oki_trace.store.schema.engine import reader_engine
from oki_trace.store.writing.writer import TraceWriter


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}


@pytest.mark.parametrize("kind", ["sqlite", "wal", "text", "folder"])
@pytest.mark.parametrize("open_it", [TraceReader, TraceWriter])
def test_a_file_that_is_not_ours_is_refused_and_untouched(
    tmp_path: Path, kind: str, open_it: type[TraceReader] | type[TraceWriter]
) -> None:
    path = tmp_path / "theirs" / "theirs.db"
    path.parent.mkdir()
    if kind == "text":
        path.write_text("not a database, and longer than the header of one " * 4)
    elif kind == "folder":
        path = path.parent
    else:
        with closing(sqlite3.connect(path)) as connection:
            if kind == "wal":
                connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("CREATE TABLE conversation (id)")
            connection.commit()
    before = state(tmp_path / "theirs")
    with pytest.raises(StoreError, match=r"not an oki-trace store|cannot be read"):
        open_it(path)
    after = {k: v for k, v in state(tmp_path / "theirs").items() if not k.endswith(".lock")}
    assert after == before


@pytest.mark.parametrize("name", ["a b.db", "100%20.db", "käse🙂.db", "what?x=1&mode=rw#y.db"])
def test_paths_with_any_characters(tmp_path: Path, name: str) -> None:
    path = tmp_path / "fold % er" / name
    with TraceWriter(str(path)) as writer:
        writer.create_conversation("x")
    with TraceReader(path) as reader:
        assert reader.info().conversations == 1
        assert reader.info().url == str(path)
    assert path.is_file()


def test_only_the_user_can_read_what_is_made(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        path = tmp_path / "new" / "folder" / "store.db"
        with TraceWriter(path) as writer:
            writer.create_conversation("x")
            for made in path.parent.iterdir():
                assert made.stat().st_mode & 0o777 == 0o600, made.name
    finally:
        os.umask(before)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path.parent.parent.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_exists_keeps_its_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with TraceWriter(tmp_path / "store.db"):
        assert tmp_path.stat().st_mode & 0o777 == 0o755


def test_a_reader_does_not_make_a_store(file: Path) -> None:
    with pytest.raises(StoreError, match="oki-trace demo"):
        TraceReader(file)
    assert list(file.parent.iterdir()) == []


def test_a_reader_cannot_write(file: Path) -> None:
    with TraceWriter(file):
        engine = reader_engine(identity.address(file))
        with (
            pytest.raises(OperationalError, match="readonly"),
            engine.connect() as connection,
        ):
            connection.execute(text("DELETE FROM conversation"))
        engine.dispose()


@pytest.mark.parametrize(
    "db",
    ["sqlite://", "sqlite:///:memory:", "sqlite:///file:x?uri=true", "mysql://u:pw@h/d", "://"],
)
def test_an_address_that_makes_no_sense_is_refused(db: str) -> None:
    with pytest.raises(UsageError) as caught:
        TraceReader(db)
    assert "pw" not in str(caught.value)


def test_a_url_names_the_same_store_as_its_path(file: Path) -> None:
    with TraceWriter(f"sqlite:///{file}") as writer:
        writer.create_conversation("x")
    with TraceReader(file) as reader:
        assert reader.info().conversations == 1


def test_a_password_is_never_shown() -> None:
    with pytest.raises(StoreError) as caught:
        TraceReader("postgresql://someone:s3cret@127.0.0.1:9/nothing")
    assert "***" in str(caught.value) and "s3cret" not in str(caught.value)
    assert "the server does not answer" in str(caught.value)


def test_a_full_disk_ends_a_write_and_leaves_the_store_whole(file: Path) -> None:
    with TraceWriter(file) as writer:
        conversation = writer.create_conversation("x")
        with writer._transaction() as connection:
            # Less than there is: SQLite takes what there is.
            connection.execute(text("PRAGMA max_page_count = 1"))
        with pytest.raises(StoreError, match="disk is full"):
            writer.add_message(conversation, ChatMessage(Role.USER, "x" * 1_000_000))
        writer.add_message(conversation, ChatMessage(Role.USER, "small"))
    with TraceReader(file) as reader:
        assert [m.content for m in reader.messages(conversation)] == ["small"]
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.parametrize("marked", [False, True])
def test_a_store_whose_making_was_cut_off_is_finished(file: Path, marked: bool) -> None:
    """Killed before the mark, or before the write-ahead log: readers must not block later on."""
    identity.create_file(file)
    if marked:
        with closing(sqlite3.connect(file, isolation_level=None)) as connection:
            identity.mark(connection)
    with TraceWriter(file), closing(sqlite3.connect(file)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        mark = connection.execute("PRAGMA application_id").fetchone()
        assert mark == (identity.APPLICATION_ID,)


def test_a_damaged_file_is_a_clear_error(file: Path) -> None:
    with TraceWriter(file) as writer:
        for _ in range(50):
            writer.create_conversation("x" * 500)
    content = bytearray(file.read_bytes())
    content[8192:] = bytes(len(content) - 8192)
    file.write_bytes(content)
    with pytest.raises(StoreError, match="damaged"), TraceReader(file) as reader:
        reader.conversations()


def test_one_writer_checkpoints_and_another_takes_over(file: Path) -> None:
    def pages(writer: TraceWriter) -> int:
        with writer._transaction() as connection:
            return int(connection.execute(text("PRAGMA wal_autocheckpoint")).scalar_one())

    with TraceWriter(file) as first, TraceWriter(file) as second:
        with TraceWriter(file, checkpoint=False) as third:
            assert (pages(first), pages(second), pages(third)) == (8192, 0, 0)
        first.close()
        second.become_checkpointer()
        assert pages(second) == 8192


def test_lists_are_read_through_an_index(file: Path) -> None:
    with TraceWriter(file) as writer, writer._transaction() as connection:
        for query, index in (
            (
                "SELECT id FROM conversation ORDER BY updated_at DESC, id DESC LIMIT 50",
                "ix_conversation_updated_at_id",
            ),
            (
                "SELECT id FROM message WHERE status = 'queued' ORDER BY id LIMIT 1",
                "ix_message_status_id",
            ),
            (
                "SELECT max(step_index) FROM step WHERE message_id = 1",
                "sqlite_autoindex_step",
            ),
        ):
            plan = " ".join(
                row.detail for row in connection.execute(text("EXPLAIN QUERY PLAN " + query))
            )
            assert index in plan, plan
            assert "TEMP B-TREE" not in plan, plan
