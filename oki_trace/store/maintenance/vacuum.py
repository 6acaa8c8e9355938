"""Vacuums a store: reclaims the disk space of deleted rows.

The store is rebuilt without gaps. This needs space for a copy and blocks all writers, so
it is refused while a reply is being generated. Readers continue. If it is killed, the
store stays as it was.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import DDL

from oki_trace.errors import StoreError
from oki_trace.store.db_errors import translate_errors
from oki_trace.store.liveness import running_replies
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.schema import identity, models
from oki_trace.store.schema.engine import autocommit_engine
from oki_trace.store.schema.files import connect_file
from oki_trace.store.schema.identity import Db
from oki_trace.store.writing.writer import TraceWriter

# How long to wait for a reader that holds the log open.
_READERS_SECONDS = 10.0
_INSTRUCTIONS_A_TICK = 1_000_000


class Vacuumed(NamedTuple):
    """The size of the store on disk, in bytes."""

    before: int
    after: int


def vacuum(db: Db, on_tick: Callable[[], None] | None = None) -> Vacuumed:
    """Rebuild the store without gaps; returns its sizes.

    Raises StoreError when a reply is being generated, or the disk has no space for a
    copy. ``on_tick`` is called now and then; an exception that it raises ends the work
    and leaves the store as it was.
    """
    url = identity.address(db)
    path = identity.file_of(url)
    with TraceReader(db) as reader:
        before = reader.info().bytes
    with TraceWriter(db, checkpoint=False) as writer, writer.write() as connection:
        live = running_replies(connection, lock=True).alive
        if live:
            raise StoreError(
                f"The store cannot be vacuumed now: message {live[0].id} is being generated "
                f"({live[0].owner}). Let it finish, or stop it first."
            )
    with translate_errors(identity.shown(url)):
        if path is None:
            _postgresql(db)
        else:
            _refuse_without_room(path, before)
            _sqlite(path, on_tick)
    with TraceReader(db) as reader:
        return Vacuumed(before, reader.info().bytes)


def _sqlite(path: Path, on_tick: Callable[[], None] | None) -> None:
    raised: list[BaseException] = []

    def tick() -> int:
        try:
            if on_tick is not None:
                on_tick()
        except BaseException as error:
            raised.append(error)
            return 1
        return 0

    with closing(connect_file(path, "rw")) as connection:
        # This connection checkpoints below, while the writers wait.
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        connection.set_progress_handler(tick, _INSTRUCTIONS_A_TICK)
        try:
            connection.execute("VACUUM")
        except sqlite3.Error as error:
            if raised:
                raise raised[0] from None
            raise StoreError(
                f"The store {path} could not be vacuumed ({error}); it was not changed. Close "
                "the programs that write to it, free some disk space, and try again."
            ) from error
        connection.set_progress_handler(None, 0)
        until = time.monotonic() + _READERS_SECONDS
        # TRUNCATE waits for writers and readers, so it never coincides with the checkpoint of
        # another process; whatever it leaves in the log, the next checkpoint copies.
        while connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
            if time.monotonic() > until:
                return
            time.sleep(0.05)


def _refuse_without_room(path: Path, needed: int) -> None:
    """SQLite writes the copy to a temporary file, and from that file to the log."""
    for folder in {path.parent, _temporary_folder()}:
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise StoreError(
                f"A vacuum of {path} needs {needed:,} bytes for a copy in {folder}, which has "
                f"{free:,}: free some space, or set SQLITE_TMPDIR to another folder."
            )


def _temporary_folder() -> Path:
    """The folder of SQLite's temporary files (sqlite.org/tempfiles.html, section 5)."""
    named = (os.environ.get(name) for name in ("SQLITE_TMPDIR", "TMPDIR"))
    for folder in (*named, "/var/tmp", "/usr/tmp", "/tmp"):
        if folder and Path(folder).is_dir() and os.access(folder, os.W_OK | os.X_OK):
            return Path(folder)
    return Path.cwd()


def _postgresql(db: Db) -> None:
    engine = autocommit_engine(identity.address(db))
    try:
        with engine.connect() as connection:
            # A table is locked while it is rebuilt: give up rather than block others for long.
            connection.exec_driver_sql("SET lock_timeout = '10s'")
            quote = connection.dialect.identifier_preparer.quote
            for name in models.Base.metadata.tables:
                # A name takes no bound parameter, and SQLAlchemy leaves DDL untyped.
                command: DDL = DDL("VACUUM (FULL, ANALYZE) %(table)s", {"table": quote(name)})  # type: ignore[no-untyped-call]
                connection.execute(command)
    finally:
        engine.dispose()
