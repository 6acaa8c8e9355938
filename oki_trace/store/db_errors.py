"""Database errors, told as one sentence that names the fix.

Nothing that leaves here carries a password, a statement or its parameters:
those hold the user's own text.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from oki_trace.errors import StoreBusy, StoreError

_BUSY = (
    ("database is locked", "another process is writing to it: wait for it to finish, or stop it"),
    ("lock timeout", "another process is using it: wait for it to finish, or stop it"),
)
_KNOWN = (
    ("disk is full", "the disk is full: free some space, or delete conversations"),
    ("readonly database", "it may not be written to: check the permissions of the file and folder"),
    ("unable to open database", "it cannot be opened: check the path and its permissions"),
    ("malformed", "the file is damaged: restore a backup, or export what can still be read"),
    ("not a database", "the file is damaged or not a database: restore a backup"),
    ("no such table", "its tables are missing: run `oki-trace migrate`"),
    ("connection failed", "the server does not answer: check that it runs, and the address"),
)


@contextmanager
def translate_errors(store: str) -> Iterator[None]:
    """Turn what SQLAlchemy raises about ``store`` into a StoreError."""
    try:
        yield
    except DBAPIError as error:
        cause = str(error.orig).strip().splitlines() or [type(error.orig).__name__]
        for kind, known in ((StoreBusy, _BUSY), (StoreError, _KNOWN)):
            for part, explanation in known:
                if part in str(error.orig):
                    raise kind(f"The store {store} failed: {explanation}.") from error
        raise StoreError(
            f"The store {store} failed: {cause[0]}. Run `oki-trace info` to check it."
        ) from error
    except SQLAlchemyError as error:
        raise StoreError(
            f"The store {store} cannot be used: {type(error).__name__}. Check its address."
        ) from error
