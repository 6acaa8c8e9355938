"""Connections to a store's file, also on read-only media and full disks.

To read alongside writers, SQLite needs shared memory, a file next to the store. A read-only
medium or a full disk has no space for it. If there is no write-ahead log, the store's
file is complete and is read without shared memory.
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Literal

from oki_trace.errors import StoreError
from oki_trace.store.disk_reserve import Reserve

Mode = Literal["ro", "rw"]

# A step is written in milliseconds; only a long migration or vacuum holds a lock longer.
_BUSY_SECONDS = 30.0
_NO_SHARED_MEMORY = ("SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_IOERR", "SQLITE_FULL")


def connect_file(
    path: Path, mode: Mode, more: str = "", factory: type[sqlite3.Connection] = sqlite3.Connection
) -> sqlite3.Connection:
    """A plain SQLite connection; ``more`` are options of the URI. Never creates the file."""
    # Only with a URI can a file be opened without creating it. The URI is quoted, because a
    # path may contain spaces, % and ?.
    return sqlite3.connect(
        f"{path.as_uri()}?mode={mode}{more}",
        uri=True,
        timeout=_BUSY_SECONDS,
        # The engine begins transactions, not the driver.
        isolation_level=None,
        # The pool lends a connection to one thread at a time.
        check_same_thread=False,
        # The driver caches statements by their text; a bulk insert has another text for each
        # number of rows.
        cached_statements=256,
        factory=factory,
    )


class ImmutableConnection(sqlite3.Connection):
    """A connection to a file that nobody can write or has open: it reads no log."""

    version: tuple[int, ...] = ()


def open_to_read(path: Path, reserve: Reserve) -> sqlite3.Connection:
    """A connection that reads, also on a read-only medium or a full disk.

    Raises StoreError where a log exists that cannot be read without shared memory.
    """
    try:
        return _open_shared(path)
    except sqlite3.OperationalError as error:
        if not error.sqlite_errorname.startswith(_NO_SHARED_MEMORY):
            raise
        writable = os.access(path.parent, os.W_OK)
        # Also when another process has just deleted its shared memory.
        if writable and (reserve.release() or not reserve.is_spent()):
            return _open_shared(path)
        if not _size(path, "-wal"):
            return _open_immutable(path)
        if writable:
            raise
        raise StoreError(
            f"The store {path} cannot be read in place: its last changes are still in "
            f"{path.name}-wal, and the folder cannot be written. Copy both to another folder, "
            "and open the copy with --db."
        ) from error


def is_outdated(connection: object, path: Path) -> bool:
    """Whether a connection misses changes that another process has made since it was opened."""
    return isinstance(connection, ImmutableConnection) and connection.version != _version(path)


def _open_immutable(path: Path) -> sqlite3.Connection:
    version = _version(path)
    connection = connect_file(path, "ro", "&immutable=1", ImmutableConnection)
    assert isinstance(connection, ImmutableConnection)
    connection.version = version
    return connection


def _version(path: Path) -> tuple[int, ...]:
    """Numbers that change when another process opens or changes the file."""
    status = path.stat()
    return (status.st_mtime_ns, status.st_size, _size(path, "-wal"), _size(path, "-shm"))


def _open_shared(path: Path) -> sqlite3.Connection:
    connection = connect_file(path, "ro")
    try:
        # The first query creates the shared memory.
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
