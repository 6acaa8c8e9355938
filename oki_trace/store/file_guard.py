"""Whether a store's file is still the one that was opened.

On POSIX an open SQLite file that is deleted, moved or replaced still takes writes,
which nobody will ever read, and still gives what it held. So the file is checked
before each transaction.
"""

from __future__ import annotations

from pathlib import Path

from oki_trace.errors import StoreError


class Presence:
    """The file as it was when opened. ``file`` is None where a server keeps the store."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._identity = None if file is None else _identity(file)

    def require(self) -> None:
        """Raise StoreError unless it is the same file still; takes microseconds."""
        if self._file is not None and _identity(self._file) != self._identity:
            raise StoreError(
                f"The store {self._file} was deleted, moved or replaced while it was in use: put "
                "it back, or start again with a new one."
            )


def _identity(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
