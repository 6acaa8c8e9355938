"""A file next to the store that reserves disk space for deletions on a full disk.

Every change to a store, including a deletion, is first written to its log, and even
reading needs a little shared memory next to the file. On a full disk neither is
possible, so nothing could be deleted. A writer therefore keeps a file of zeros, which
is removed before a deletion and created again afterwards.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

SUFFIX = ".reserve"
# The reserve is half the size of the store, within these bounds: space for the log while a few
# steps at a time are deleted.
_LEAST = 512 * 1024
_MOST = 8 * 1024 * 1024
_GRAIN = 64 * 1024
# With less free space than this, deletions are done a few steps at a time.
LOW = 16 * 1024 * 1024


class Reserve:
    """The reserve of a store's file; ``file`` is None on PostgreSQL."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._own = None if file is None else file.with_name(file.name + SUFFIX)
        self._released = False

    def is_low(self) -> bool:
        """Whether the disk has so little space that a deletion needs the reserve."""
        return self._has_less_than(LOW)

    def is_spent(self) -> bool:
        """Whether the disk has no space for the shared memory of a reader, and no reserve."""
        return self._own is not None and not self._own.exists() and self._has_less_than(_GRAIN)

    def release(self) -> bool:
        """Free the space of the reserve; returns whether there was any."""
        with suppress(OSError):
            if self._own is not None:
                self._own.unlink()
                self._released = True
                return True
        return False

    def restore(self) -> None:
        """Reserve the space again, if it was released here."""
        if self._released:
            self._released = False
            self.keep(above=None)

    def keep(self, *, above: int | None = LOW) -> None:
        """Create a reserve in proportion to the store, if ``above`` bytes stay free.

        None: as large as the disk allows. A store without a reserve works too, until
        the disk is full.
        """
        if self._file is None or self._own is None:
            return
        with suppress(OSError):
            size = min(max(self._file.stat().st_size // 2, _LEAST), _MOST)
            present = self._own.stat().st_size if self._own.exists() else 0
            free = present + shutil.disk_usage(self._file.parent).free
            if above is None:
                size = min(size, free // _GRAIN * _GRAIN)
            if present >= size or (above is not None and free < size + above):
                return
            try:
                _allocate(self._own, size)
            except OSError:
                self._own.unlink(missing_ok=True)

    def _has_less_than(self, size: int) -> bool:
        with suppress(OSError):
            return self._file is not None and shutil.disk_usage(self._file.parent).free < size
        return False


def _allocate(path: Path, size: int) -> None:
    """Create a file whose blocks the disk has allocated: a sparse file would reserve nothing."""
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:
            os.write(descriptor, bytes(size))
    finally:
        os.close(descriptor)
