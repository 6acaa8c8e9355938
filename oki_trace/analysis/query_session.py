"""All that a store holds, open for questions.

``QuerySession`` keeps the cache in step, and a connection to it for as long as the
store has not changed: a page keeps one open, a command opens one and asks once.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

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

_T = TypeVar("_T")


class QuerySession:
    """A store under question. One question at a time; others wait for it."""

    def __init__(self, db: Db, progress: Progress | None = None) -> None:
        self.reader = TraceReader(db)
        url = identity.address(db)
        self._db = str(identity.file_of(url) or url.render_as_string(hide_password=False))
        self._cache = Cache(db)
        self._progress = progress
        # One, or none. Let go of before the program ends, whoever still holds the trove:
        # DuckDB complains of what outlives it.
        self._open: list[duckdb.DuckDBPyConnection] = []
        weakref.finalize(self, _close, self._open)
        self._now: Contents | None = None
        self._stamp = ""
        self._sandbox = Sandbox()
        self._one_at_a_time = threading.RLock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._sandbox.close()
        self._forget()
        self.reader.close()

    def ask(self, sql: str, parameters: Mapping[str, Any] | None = None) -> Rows:
        """The answer to one of our own questions."""
        return self._with_connection(lambda c: engine.run(c, sql, parameters))

    def sql(self, sql: str, *, limit: int = ROW_LIMIT, **limits: Any) -> Rows:
        """The answer to somebody's own SQL: read-only, at most ``limit`` rows.

        Limits and errors as for ``sql_result``.
        """
        found = self.sql_result(sql, limit=limit, **limits)
        names = tuple(found.table.schema.names)
        return Rows(names, found.kinds, tuple(values.rows_of(found.table)), found.cut)

    def sql_result(
        self,
        sql: str,
        *,
        limit: int = ROW_LIMIT,
        seconds: float = TIME_LIMIT_S,
        memory_bytes: int = MEMORY_BYTES,
        tick: Tick | None = None,
    ) -> Result:
        """The same as an Arrow table: within ``seconds``, in a process that is ended then.

        ``memory_bytes`` is what the statement may take beyond that process itself. ``tick`` is
        called meanwhile, and what it raises ends the question. Raises QuestionError, in one
        line, for whatever else the statement tries.
        """
        limits = Limits(limit, seconds, memory_bytes)
        try:
            return self._sandbox.ask(sql, limits, self._contents, tick)
        except QuestionError:
            if self._are_there():
                raise
        # Another process has joined or dropped parts since they were listed.
        with self._one_at_a_time:
            self._forget()
        self._sandbox.close()
        return self._sandbox.ask(sql, limits, self._contents, tick)

    def rebuild(self) -> None:
        """Throw the cache away and write it anew from the store."""
        with self._one_at_a_time:
            self._forget()
            self._cache.clear()
            self._cache.sync(self.reader, self._progress)

    def _with_connection(self, ask: Callable[[duckdb.DuckDBPyConnection], _T]) -> _T:
        with self._one_at_a_time:
            connection = self._current()
            try:
                return ask(connection)
            except QuestionError:
                if self._are_there():
                    raise
            # Another process has joined or dropped parts since they were listed.
            self._forget()
            return ask(self._current())

    def _are_there(self) -> bool:
        now = self._now
        return now is None or all(
            Path(file).exists() for of_table in now.files.values() for file in of_table
        )

    def _current(self) -> duckdb.DuckDBPyConnection:
        """The connection, in step with the store."""
        now = self._contents()
        if not self._open or self._stamp != now.stamp:
            _close(self._open)
            self._open.append(engine.connect(now.files, now.live, self.reader))
            self._stamp = now.stamp
        return self._open[0]

    def _contents(self) -> Contents:
        """What the store holds now; the cache is brought in step for it."""
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
