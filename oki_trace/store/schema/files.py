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
from oki_trace.store.disk_reserve import Reserve

Mode = Literal["ro", "rw"]

# Waiting is right whatever the reason for a lock: a step is written in
# milliseconds, and only a long migration or vacuum holds it longer.
_BUSY_SECONDS = 30.0
_NO_PLACE = ("SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_IOERR", "SQLITE_FULL")


def connect_file(
    path: Path,
    mode: Mode,
    more: str = "",
    factory: type[sqlite3.Connection] = sqlite3.Connection,
) -> sqlite3.Connection:
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
        factory=factory,
    )


class AsItStands(sqlite3.Connection):
    """A connection to a file that nobody can write, or has open: it looks at no log."""

    seen: tuple[int, ...] = ()


def open_to_read(path: Path, reserve: Reserve) -> sqlite3.Connection:
    """A connection that reads, on a medium that cannot be written and on a full disk too.

    Raises StoreError where the log holds what cannot be read without such a place.
    """
    try:
        return _reading(path)
    except sqlite3.OperationalError as error:
        if not error.sqlite_errorname.startswith(_NO_PLACE):
            raise
        writable = os.access(path.parent, os.W_OK)
        # Also where another process has just deleted what it had beside the file.
        if writable and (reserve.release() or not reserve.is_spent()):
            return _reading(path)
        if not _size(path, "-wal"):
            return _as_it_stands(path)
        if writable:
            raise
        raise StoreError(
            f"The store {path} cannot be read where it is: its last changes are still in "
            f"{path.name}-wal, and the folder cannot be written. Copy both to another folder, "
            "and name the copy with --db."
        ) from error


def is_outdated(connection: object, path: Path) -> bool:
    """Whether a connection looks past what others have done since."""
    return isinstance(connection, AsItStands) and connection.seen != _seen(path)


def _as_it_stands(path: Path) -> sqlite3.Connection:
    seen = _seen(path)
    connection = connect_file(path, "ro", "&immutable=1", AsItStands)
    assert isinstance(connection, AsItStands)
    connection.seen = seen
    return connection


def _seen(path: Path) -> tuple[int, ...]:
    """What changes when another process opens or changes the file."""
    found = path.stat()
    return (found.st_mtime_ns, found.st_size, _size(path, "-wal"), _size(path, "-shm"))


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
