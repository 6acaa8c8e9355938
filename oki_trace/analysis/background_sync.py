"""Synchronises the cache in a background thread, so that a page stays responsive.

Writing the cache of a large store for the first time takes minutes. The thread continues when the
user leaves the page.
"""

from __future__ import annotations

import threading

from oki_trace.analysis.cache import Cache
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.schema.identity import Db


class BackgroundSync:
    """The synchronisation of one store's cache; any thread may read its progress."""

    def __init__(self, db: Db, reader: TraceReader) -> None:
        self._cache = Cache(db)
        self._reader = reader
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._written = (0, 0)
        self._error: Exception | None = None

    def behind(self, wait_s: float) -> tuple[int, int] | None:
        """(messages written, all new messages) after at most ``wait_s``; None: synchronised.

        Raises the error of the thread, StoreError when the folder cannot be written.
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
            self._cache.sync(self._reader, self._progress)
        except Exception as error:  # raised by the next call
            self._error = error

    def _progress(self, done: int, total: int) -> None:
        self._written = (done, total)
