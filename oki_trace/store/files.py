"""Connections to a store's file, also where it cannot be read as usual.

A store is read beside its writers through shared memory, which SQLite makes beside
the file. A medium that cannot be written has no place for it, nor has a full disk.
Without a log nothing is missing from the file itself, and it is read as it stands.
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Literal

from oki_trace.errors import StoreError
from oki_trace.store.reserve import Reserve

Mode = Literal["ro", "rw"]

# Waiting is right whatever the reason for a lock: a step is written in
# milliseconds, and only a long migration or vacuum holds it longer.
_BUSY_SECONDS = 30.0
_NO_PLACE = ("SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_IOERR", "SQLITE_FULL")


def connect_file(path: Path, mode: Mode, more: str = "") -> sqlite3.Connection:
    """A plain SQLite connection. Neither mode creates the file; ``more`` options of the URI."""
    # As a URI, because only so can a file be opened without creating it; it
    # is quoted, so that a path may hold spaces, % and ?.
    return sqlite3.connect(
        f"{path.as_uri()}?mode={mode}{more}",
        uri=True,
        timeout=_BUSY_SECONDS,
        # Transactions are begun by the engine's event, not guessed by the driver.
        isolation_level=None,
        # The pool lends a connection to one thread at a time.
        check_same_thread=False,
        # A driver's statement cache is keyed by text; a bulk insert of each
        # number of rows is a text of its own.
        cached_statements=256,
    )


def open_to_read(path: Path, reserve: Reserve) -> sqlite3.Connection:
    """A connection that reads, on a medium that cannot be written and on a full disk too.

    Raises StoreError where the log holds what cannot be read without such a place.
    """
    try:
        return _reading(path)
    except sqlite3.OperationalError as error:
        if not error.sqlite_errorname.startswith(_NO_PLACE):
            raise
        if _size(path, "-wal") == 0 and _size(path, "-shm") == 0:
            # Nobody else has it open, or their shared memory would be there to be used.
            return connect_file(path, "ro", "&immutable=1")
        if not os.access(path.parent, os.W_OK):
            raise StoreError(
                f"The store {path} cannot be read where it is: its last changes are still in "
                f"{path.name}-wal, and the folder cannot be written. Copy both to another folder, "
                "and name the copy with --db."
            ) from error
        if not reserve.release():
            raise
    return _reading(path)


def _reading(path: Path) -> sqlite3.Connection:
    connection = connect_file(path, "ro")
    try:
        # The first look at the file makes the shared memory.
        connection.execute("PRAGMA schema_version").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def _size(path: Path, suffix: str) -> int:
    try:
        return path.with_name(path.name + suffix).stat().st_size
    except OSError:
        return 0
