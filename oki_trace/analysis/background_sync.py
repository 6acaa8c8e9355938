"""The cache brought in step by a thread of its own, for a page that must not stand still.

A first question about a large store has minutes of writing before it. Whoever
waits may leave: the writing goes on, and the next who asks finds it further.
"""

from __future__ import annotations

import threading

from oki_trace.analysis.cache import Cache
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.schema.identity import Db


class BackgroundSync:
    """How far the cache of one store is behind it, asked by any thread."""

    def __init__(self, db: Db, reader: TraceReader) -> None:
        self._cache = Cache(db)
        self._reader = reader
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._written = (0, 0)
        self._error: Exception | None = None

    def behind(self, wait_s: float) -> tuple[int, int] | None:
        """(messages written, of all that are new) after at most ``wait_s``; None: in step.

        Raises what went wrong, StoreError when the folder cannot be written.
        """
        with self._lock:
            if self._thread is None:
                if self._cache.in_step(self._reader):
                    return None
                self._written, self._error = (0, 0), None
                self._thread = threading.Thread(target=self._write, daemon=True)
                self._thread.start()
            thread = self._thread
        thread.join(wait_s)
        if thread.is_alive():
            return self._written
        with self._lock:
            if self._thread is thread:
                self._thread = None
            error = self._error
        if error is not None:
            raise error
        return None

    def _write(self) -> None:
        try:
            self._cache.sync(self._reader, self._note)
        except Exception as error:  # told to whoever asks next
            self._error = error

    def _note(self, done: int, of_all: int) -> None:
        self._written = (done, of_all)
