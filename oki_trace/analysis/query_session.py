"""Answers questions and SQL over one store.

``QuerySession`` synchronises the cache before each question, and keeps a connection until the store
changes. A page keeps a session open; a command opens one for a single question.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import duckdb

from oki_trace.analysis import engine, values
from oki_trace.analysis.cache import CACHED, Cache, live_tables
from oki_trace.analysis.engine import Rows
from oki_trace.analysis.sandbox import MEMORY_BYTES, Contents, Limits, Result, Sandbox, Tick
from oki_trace.errors import QuestionError
from oki_trace.reporting import Progress
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.schema import identity
from oki_trace.store.schema.identity import Db

ROW_LIMIT = 10_000
TIME_LIMIT_S = 30.0


class QuerySession:
    """Queries one store, one question at a time; other threads wait."""

    def __init__(self, db: Db, progress: Progress | None = None) -> None:
        self.reader = TraceReader(db)
        url = identity.address(db)
        self._db = str(identity.file_of(url) or url.render_as_string(hide_password=False))
        self._cache = Cache(db)
        self._progress = progress
        # At most one. Closed before the program ends, even when the session is still referenced:
        # DuckDB complains about connections that outlive it.
        self._open: list[duckdb.DuckDBPyConnection] = []
        weakref.finalize(self, _close, self._open)
        self._now: Contents | None = None
        self._stamp = ""
        self._sandbox = Sandbox()
        self._one_at_a_time = threading.RLock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._sandbox.close()
        self._forget()
        self.reader.close()

    def ask(self, sql: str, parameters: Mapping[str, Any] | None = None) -> Rows:
        """The result of a trusted statement. Raises QuestionError."""
        with self._one_at_a_time:
            try:
                return engine.run(self._current(), sql, parameters)
            except QuestionError:
                if self._files_exist():
                    raise
            self._forget()
            return engine.run(self._current(), sql, parameters)

    def sql(self, sql: str, *, limit: int = ROW_LIMIT, **limits: Any) -> Rows:
        """The result of the user's own SQL, read-only; limits and errors as for ``sql_result``."""
        result = self.sql_result(sql, limit=limit, **limits)
        names = tuple(result.table.schema.names)
        return Rows(names, result.kinds, tuple(values.rows_of(result.table)), result.cut)

    def sql_result(
        self,
        sql: str,
        *,
        limit: int = ROW_LIMIT,
        seconds: float = TIME_LIMIT_S,
        memory_bytes: int = MEMORY_BYTES,
        tick: Tick | None = None,
    ) -> Result:
        """The result as an Arrow table of at most ``limit`` rows.

        The statement runs in a separate process, which is killed after ``seconds``.
        ``memory_bytes`` is the memory it may use beyond that of the process. ``tick`` is called
        while it runs, and an error that it raises ends the question. Raises a one-line
        QuestionError for any other failure.
        """
        limits = Limits(limit, seconds, memory_bytes)
        try:
            return self._sandbox.ask(sql, limits, self._contents, tick)
        except QuestionError:
            if self._files_exist():
                raise
        with self._one_at_a_time:
            self._forget()
        self._sandbox.close()
        return self._sandbox.ask(sql, limits, self._contents, tick)

    def rebuild(self) -> None:
        """Remove the cache, and write it again from the store."""
        with self._one_at_a_time:
            self._forget()
            self._cache.clear()
            self._cache.sync(self.reader, self._progress)

    def _files_exist(self) -> bool:
        """Whether no other process has joined or dropped parts since they were listed."""
        now = self._now
        return now is None or all(
            Path(file).exists() for of_table in now.files.values() for file in of_table
        )

    def _current(self) -> duckdb.DuckDBPyConnection:
        """A connection to the store's present state."""
        now = self._contents()
        if not self._open or self._stamp != now.stamp:
            _close(self._open)
            self._open.append(engine.connect(now.files, now.live, self.reader))
            self._stamp = now.stamp
        return self._open[0]

    def _contents(self) -> Contents:
        """The store's present state, after synchronising the cache."""
        with self._one_at_a_time:
            stamp = self.reader.stamp()
            if self._now is None or self._now.stamp != stamp:
                manifest = self._cache.sync(self.reader, self._progress)
                files = {
                    name: [self._cache.folder.file(part, name) for part in manifest.parts]
                    for name in CACHED
                }
                self._now = Contents(stamp, self._db, files, live_tables(self.reader))
            return self._now

    def _forget(self) -> None:
        self._now = None
        _close(self._open)


def _close(connections: list[duckdb.DuckDBPyConnection]) -> None:
    while connections:
        connections.pop().close()
