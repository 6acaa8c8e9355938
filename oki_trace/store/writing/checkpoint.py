"""Lets one process at a time checkpoint a store: copy the write-ahead log into the file.

SQLite before 3.51.3 can damage a file when two connections checkpoint at the same
instant. A process that writes traces therefore checkpoints only while it holds a lock
file next to the store, and another process takes over when it ends.
"""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout


class Checkpointer:
    """The lock of the process that checkpoints; ``file`` is None on PostgreSQL."""

    def __init__(self, file: Path | None, *, wanted: bool) -> None:
        self._lock: FileLock | None = None
        if file is not None and wanted:
            # Held by the process, whichever of its threads took it.
            self._lock = FileLock(
                file.with_name(file.name + ".checkpoint.lock"), mode=0o600, thread_local=False
            )

    def elect(self) -> bool:
        """Take the lock if it is free; True if this call took it."""
        if self._lock is None or self._lock.is_locked:
            return False
        try:
            self._lock.acquire(blocking=False)
        except (Timeout, OSError):
            # Where no lock can be created, SQLite reports that the store cannot be written.
            return False
        return True

    def resign(self) -> None:
        if self._lock is not None:
            self._lock.release(force=True)
