"""Runs the queries of all read methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Executable
from sqlalchemy.engine import URL

from oki_trace.store.schema import identity

_T = TypeVar("_T")


class ReadConnection(ABC):
    """A store to read; a subclass chooses the connection, and so the snapshot, of a call.

    Only modules of the store pass queries to ``rows``, ``ask`` and ``row_batches``.
    """

    def __init__(self, url: URL) -> None:
        self._url = url
        self._store = identity.shown(url)

    @property
    def file(self) -> Path | None:
        """The SQLite file of the store; None on PostgreSQL."""
        return identity.file_of(self._url)

    @abstractmethod
    def _read(self) -> AbstractContextManager[Connection]:
        """A connection on which all queries see one snapshot. Raises StoreError."""

    def rows(self, query: Executable) -> Sequence[Any]:
        """All rows of one query."""
        with self._read() as connection:
            return connection.execute(query).all()

    def scalar(self, query: Executable) -> Any:
        """The first column of the first row; None where there is no row."""
        with self._read() as connection:
            return connection.execute(query).scalar()

    def scalars(self, query: Executable) -> list[Any]:
        """The first column of all rows."""
        with self._read() as connection:
            return list(connection.execute(query).scalars())

    def ask(self, question: Callable[[Connection], Iterable[_T]]) -> list[_T]:
        """The result of a function that runs several queries, all on one snapshot."""
        with self._read() as connection:
            return list(question(connection))

    def row_batches(self, query: Executable, size: int) -> Iterator[Sequence[Any]]:
        """The rows of one query, ``size`` of them in memory at a time."""
        with self._read() as connection:
            result = connection.execute(query, execution_options={"yield_per": size})
            yield from result.partitions()
