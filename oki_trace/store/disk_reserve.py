"""Room kept back for the day on which the disk is full: a file beside the store.

Whatever changes a store, deleting included, is first written to its log, and even
reading it takes a little shared memory beside it. On a disk without a byte left
none of the two can be had, and nothing could be thrown away. So a writer keeps a
file of zeros, which gives way to what makes room, and is made again afterwards.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

SUFFIX = ".reserve"
# Half of the store, within these: the log of what is thrown away a few steps at a time.
_LEAST = 512 * 1024
_GRAIN = 64 * 1024
_MOST = 8 * 1024 * 1024
# With less than this free, room is made a few steps at a time.
LOW = 16 * 1024 * 1024


class Reserve:
    """The reserve of a store's file; ``file`` is None where a server keeps the store."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._own = None if file is None else file.with_name(file.name + SUFFIX)
        self._released = False

    def is_low(self) -> bool:
        """Whether the disk has so little room that what is done needs the reserve."""
        if self._file is None:
            return False
        with suppress(OSError):
            return shutil.disk_usage(self._file.parent).free < LOW
        return False

    def is_spent(self) -> bool:
        """Whether the disk has no room for what is read through, and there is no reserve."""
        if self._file is None or self._own is None or self._own.exists():
            return False
        with suppress(OSError):
            return shutil.disk_usage(self._file.parent).free < _GRAIN
        return False

    def release(self) -> bool:
        """Give the room to whatever comes next; returns whether there was any."""
        if self._own is None:
            return False
        with suppress(OSError):
            self._own.unlink()
            self._released = True
            return True
        return False

    def restore(self) -> None:
        """Keep the room again, if it was given away here."""
        if self._released:
            self._released = False
            self.keep(above=None)

    def keep(self, *, above: int | None = LOW) -> None:
        """See that there is one in proportion to the store, where ``above`` stays free.

        None: as large as there is room for. A store on a disk that has no room for
        one works as well, until it is full.
        """
        if self._file is None or self._own is None:
            return
        with suppress(OSError):
            wanted = min(max(self._file.stat().st_size // 2, _LEAST), _MOST)
            has = self._own.stat().st_size if self._own.exists() else 0
            free = has + shutil.disk_usage(self._file.parent).free
            if above is None:
                wanted = min(wanted, free // _GRAIN * _GRAIN)
            elif free < wanted + above:
                return
            if has >= wanted:
                return
            try:
                _fill(self._own, wanted)
            except OSError:
                self._own.unlink(missing_ok=True)


def _fill(path: Path, size: int) -> None:
    """Blocks that the disk has given: a file with a hole would be a promise, not room."""
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:
            os.write(descriptor, bytes(size))
    finally:
        os.close(descriptor)
