"""Giving back to the disk what was deleted.

The store is built anew without the gaps, so this needs room for a copy while it
runs, and nobody can write meanwhile: it is refused while a reply is being
generated. Readers go on. Killed at any moment it leaves the store as it was.
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
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.schema import identity, models
from oki_trace.store.schema.engine import autocommit_engine
from oki_trace.store.schema.files import connect_file
from oki_trace.store.schema.identity import Db
from oki_trace.store.writing import lifecycle
from oki_trace.store.writing.writer import TraceWriter

# How long the log is waited for that a reader holds open.
_READERS_SECONDS = 10.0
_INSTRUCTIONS_A_TICK = 1_000_000


class Vacuumed(NamedTuple):
    """What the store took on disk before and after, in bytes."""

    before: int
    after: int


def vacuum(db: Db, on_tick: Callable[[], None] | None = None) -> Vacuumed:
    """Build the store anew without gaps; returns its sizes.

    Raises StoreError when a reply is being generated, or the disk has no room
    for a copy. ``on_tick`` is called now and then; what it raises ends the
    work, with the store as it was.
    """
    url = identity.address(db)
    path = identity.file_of(url)
    with TraceReader(db) as reader:
        before = reader.info().bytes
    with TraceWriter(db, checkpoint=False) as writer, writer.write() as connection:
        live = lifecycle.written_now(connection)
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
        # This connection folds the log in below, with the writers held off.
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        connection.set_progress_handler(tick, _INSTRUCTIONS_A_TICK)
        try:
            connection.execute("VACUUM")
        except sqlite3.Error as error:
            if raised:
                raise raised[0] from None
            raise StoreError(
                f"The store {path} could not be vacuumed ({error}); it is as it was. Close what "
                "writes to it, see that the disk has room, and try again."
            ) from error
        connection.set_progress_handler(None, 0)
        until = time.monotonic() + _READERS_SECONDS
        # TRUNCATE waits for writers and readers, so it never meets another
        # process's checkpoint; what it cannot get now, the next one folds in.
        while connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
            if time.monotonic() > until:
                return
            time.sleep(0.05)


def _refuse_without_room(path: Path, needed: int) -> None:
    """SQLite writes the copy to a temporary file, and from there through the log."""
    for folder in {path.parent, _temporary_folder()}:
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise StoreError(
                f"A vacuum of {path} needs {needed:,} bytes for a copy in {folder}, which has "
                f"{free:,}: free some space, or name another folder in SQLITE_TMPDIR."
            )


def _temporary_folder() -> Path:
    """Where SQLite puts temporary files (sqlite.org/tempfiles.html, section 5)."""
    named = (os.environ.get(name) for name in ("SQLITE_TMPDIR", "TMPDIR"))
    for folder in (*named, "/var/tmp", "/usr/tmp", "/tmp"):
        if folder and Path(folder).is_dir() and os.access(folder, os.W_OK | os.X_OK):
            return Path(folder)
    return Path.cwd()


def _postgresql(db: Db) -> None:
    engine = autocommit_engine(identity.address(db))
    try:
        with engine.connect() as connection:
            # A table is locked while it is built anew: rather give up than stand in the way.
            connection.exec_driver_sql("SET lock_timeout = '10s'")
            quote = connection.dialect.identifier_preparer.quote
            for name in models.Base.metadata.tables:
                # A name takes no bound parameter, and SQLAlchemy leaves DDL untyped.
                command: DDL = DDL("VACUUM (FULL, ANALYZE) %(table)s", {"table": quote(name)})  # type: ignore[no-untyped-call]
                connection.execute(command)
    finally:
        engine.dispose()
