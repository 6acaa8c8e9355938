"""All that a store holds, open for questions.

``Trove`` keeps the cache in step, and a connection to it for as long as the
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

from oki_trace.analysis import engine, gate
from oki_trace.analysis.cache import CACHED, Cache, Progress, live_tables
from oki_trace.analysis.engine import Rows
from oki_trace.errors import QuestionError
from oki_trace.store.identity import Db
from oki_trace.store.reader import TraceReader

ROW_LIMIT = 10_000
TIME_LIMIT_S = 30.0

_T = TypeVar("_T")


class Trove:
    """A store under question. One question at a time; others wait for it."""

    def __init__(self, db: Db, progress: Progress | None = None) -> None:
        self.reader = TraceReader(db)
        self._cache = Cache(db)
        self._progress = progress
        # One, or none. Let go of before the program ends, whoever still holds the trove:
        # DuckDB complains of what outlives it.
        self._open: list[duckdb.DuckDBPyConnection] = []
        weakref.finalize(self, _close, self._open)
        self._files: list[str] = []
        self._stamp = ""
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
        self._forget()
        self.reader.close()

    def ask(self, sql: str, parameters: Mapping[str, Any] | None = None) -> Rows:
        """The answer to one of our own questions."""
        return self._with_connection(lambda c: engine.run(c, sql, parameters))

    def sql(
        self, sql: str, *, limit: int | None = ROW_LIMIT, seconds: float | None = TIME_LIMIT_S
    ) -> Rows:
        """The answer to somebody's own SQL: read-only, at most ``limit`` rows, within ``seconds``.

        Raises QuestionError, in one line, for whatever else it tries.
        """

        def run(connection: duckdb.DuckDBPyConnection) -> Rows:
            gate.check(connection, sql)
            return engine.run(connection, sql, limit=limit, seconds=seconds)

        return self._with_connection(run)

    def sql_arrow(
        self, sql: str, *, limit: int = ROW_LIMIT, seconds: float = TIME_LIMIT_S
    ) -> tuple[Any, bool]:
        """The same as an Arrow table, and whether there were more rows."""

        def run(connection: duckdb.DuckDBPyConnection) -> tuple[Any, bool]:
            gate.check(connection, sql)
            return engine.run_arrow(connection, sql, limit=limit, seconds=seconds)

        return self._with_connection(run)

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
                if all(Path(file).exists() for file in self._files):
                    raise
            # Another process has joined or dropped parts since they were listed.
            self._forget()
            return ask(self._current())

    def _current(self) -> duckdb.DuckDBPyConnection:
        """The connection, in step with the store."""
        stamp = self.reader.stamp()
        if not self._open or self._stamp != stamp:
            self._forget()
            manifest = self._cache.sync(self.reader, self._progress)
            files = {
                name: [self._cache.folder.file(part, name) for part in manifest.parts]
                for name in CACHED
            }
            self._files = [file for of_table in files.values() for file in of_table]
            self._open.append(engine.connect(files, live_tables(self.reader), self.reader))
            self._stamp = stamp
        return self._open[0]

    def _forget(self) -> None:
        _close(self._open)


def _close(connections: list[duckdb.DuckDBPyConnection]) -> None:
    while connections:
        connections.pop().close()
