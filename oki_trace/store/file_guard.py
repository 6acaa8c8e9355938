"""Checks that a store's file is still the one that was opened.

On POSIX, an open SQLite file that is deleted, moved or replaced still accepts writes
that nobody will ever read, and still returns its old content. The file is therefore
checked before each transaction.
"""

from __future__ import annotations

from pathlib import Path

from oki_trace.errors import StoreError


class FileGuard:
    """The identity of a file when it was opened; ``file`` is None on PostgreSQL."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._identity = None if file is None else _identity(file)

    def require(self) -> None:
        """Raise StoreError unless the file is still the same; takes microseconds."""
        if self._file is not None and _identity(self._file) != self._identity:
            raise StoreError(
                f"The store {self._file} was deleted, moved or replaced while it was in use: put "
                "it back, or start again with a new one."
            )


def _identity(file: Path) -> tuple[int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
