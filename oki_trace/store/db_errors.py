"""Translates database errors into one sentence that names the fix.

No message contains a password, a statement or its parameters: those hold the user's
own text.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from oki_trace.errors import StoreBusy, StoreError

_LOCKED = "another process is writing to it. Wait for it to finish, or stop it"
_IN_USE = "another process is using it. Wait for it to finish, or stop it"
_FULL = "the disk is full. Free some space, or delete conversations"
_READ_ONLY = "it is not writable. Check the permissions of the file and folder"
_NO_TABLES = "its tables are missing. Run `oki-trace migrate`"
_NO_ANSWER = "the server does not answer. Check that it runs, and the address"

# By SQLite's primary result code.
_SQLITE = {
    sqlite3.SQLITE_BUSY: _LOCKED,
    sqlite3.SQLITE_LOCKED: _LOCKED,
    sqlite3.SQLITE_FULL: _FULL,
    sqlite3.SQLITE_READONLY: _READ_ONLY,
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened. Check the path and its permissions",
    sqlite3.SQLITE_CORRUPT: (
        "the file is damaged. Restore a backup, or export what can still be read"
    ),
    sqlite3.SQLITE_NOTADB: "the file is damaged or not a database. Restore a backup",
}
# By the beginning of the SQLSTATE (PostgreSQL manual, appendix A).
_POSTGRESQL = {
    "55P03": _IN_USE,  # lock_not_available
    "53100": _FULL,  # disk_full
    "25006": _READ_ONLY,  # read_only_sql_transaction
    "42P01": _NO_TABLES,  # undefined_table
    "08": _NO_ANSWER,  # connection exceptions
    "57P": _NO_ANSWER,  # the server shuts down or starts
}


@contextmanager
def translate_errors(store: str) -> Iterator[None]:
    """Turn SQLAlchemy's errors about ``store`` into a StoreError."""
    try:
        yield
    except DBAPIError as error:
        explanation = _explanation(error.orig)
        if explanation is not None:
            kind = StoreBusy if explanation in (_LOCKED, _IN_USE) else StoreError
            raise kind(f"The store {store} cannot be used: {explanation}.") from error
        cause = str(error.orig).strip().splitlines() or [type(error.orig).__name__]
        raise StoreError(
            f"The store {store} failed: {cause[0]}. Run `oki-trace info` to check it."
        ) from error
    except SQLAlchemyError as error:
        raise StoreError(
            f"The store {store} cannot be used: {type(error).__name__}. Check its address."
        ) from error


def _explanation(error: object) -> str | None:
    """The reason and the fix, or None for an error that is not among the known ones."""
    if isinstance(error, sqlite3.Error):
        # An error of the driver itself, such as a closed connection, has no code.
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        # SQLite has no code of its own for a missing table.
        if code == sqlite3.SQLITE_ERROR and "no such table" in str(error):
            return _NO_TABLES
        return _SQLITE.get(code)
    state = getattr(error, "sqlstate", None)
    if state is None:
        # The server gave no answer, so there is no code either.
        return _NO_ANSWER if type(error).__name__ == "OperationalError" else None
    return next((text for key, text in _POSTGRESQL.items() if state.startswith(key)), None)
