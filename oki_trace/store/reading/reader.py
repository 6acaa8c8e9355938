"""Reads a store and returns records.

Guarantees: a reader cannot change the store; one call, or everything read through one
Snapshot, sees a single state of the store; a step always has its candidates and
attention, and its lens, which may follow a few steps later, is complete or missing.
No transaction outlives its call, so the write-ahead log is never held open.

The methods are grouped by subject: ``conversations``, ``messages``, ``steps``,
``prompt_steps``, ``lenses``, ``tensors``, ``bulk_read`` (many steps as arrays) and ``statistics``
(the whole store).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from sqlalchemy import Connection
from sqlalchemy.engine import URL

from oki_trace.errors import StoreError
from oki_trace.records import Conversation
from oki_trace.store.db_errors import translate_errors
from oki_trace.store.disk_reserve import Reserve
from oki_trace.store.file_guard import FileGuard
from oki_trace.store.reading.bulk_read import BulkReads
from oki_trace.store.reading.conversations import ConversationReads
from oki_trace.store.reading.lenses import LensReads
from oki_trace.store.reading.prompt_steps import PromptReads
from oki_trace.store.reading.statistics import StoreReads
from oki_trace.store.reading.tensors import TensorReads
from oki_trace.store.schema import identity
from oki_trace.store.schema.engine import reader_engine
from oki_trace.store.schema.identity import Db


class Reader(ConversationReads, PromptReads, LensReads, TensorReads, BulkReads, StoreReads):
    """All read methods."""

    def scored_tokens(self, conversation: Conversation) -> int:
        """The scored tokens of a conversation that generated none, such as a scored text."""
        if conversation.tokens or conversation.damage:
            return 0
        messages = self.messages(conversation.id)
        return sum(self.given_count(message.id) for message in messages if message.is_score)

    @contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        """The store at this instant. Keep it short, and in one thread."""
        with self._read() as connection:
            yield Snapshot(self._url, connection)


class Snapshot(Reader):
    """The store at one instant: every call reads through the one connection it owns."""

    def __init__(self, url: URL, connection: Connection) -> None:
        super().__init__(url)
        self._connection = connection

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        with translate_errors(self._store):
            yield self._connection


class TraceReader(Reader):
    """A store open for reading; each call is a transaction of its own.

    Any number of readers may be open, in any process, at any time.
    """

    def __init__(self, db: Db) -> None:
        super().__init__(identity.address(db))
        if self.file is not None and not identity.is_ours(self.file):
            raise StoreError(
                f"There is no trace store at {self._store}: run `oki-trace demo`, or name one "
                "with --db."
            )
        self._file_guard = FileGuard(self.file)
        self._reserve = Reserve(self.file)
        self._engine = reader_engine(self._url, self._reserve)
        try:
            with self._read() as connection:
                identity.refuse_other(identity.schema_of(connection), self._store)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._engine.dispose()
        self._reserve.restore()

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        self._file_guard.require()
        with translate_errors(self._store), self._engine.connect() as connection:
            yield connection
