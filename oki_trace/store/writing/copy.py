"""Copies conversations from one store to another, on either engine.

Guarantees: a conversation is copied in one transaction; rows and blobs are the same,
and only the ids belong to the target; a conversation that the target already has (by
its ``uid``) is not copied again, so repeating an interrupted copy finishes it; a
conversation that is being written is skipped; and only a few steps are in memory at a
time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, Row, Select, func, insert, select

from oki_trace.errors import NotFound, StoreError
from oki_trace.records import Status
from oki_trace.reporting import Progress
from oki_trace.store.liveness import LIFE, effective_status
from oki_trace.store.reading.reader import Snapshot, TraceReader
from oki_trace.store.schema import identity, models
from oki_trace.store.schema.identity import Db
from oki_trace.store.writing import lifecycle, message_digest
from oki_trace.store.writing.rows import Bulk
from oki_trace.store.writing.writer import TraceWriter

_BATCH = 64
_ROWS = 10_000
# JSON is passed to the driver as text.
_JSON = {"shape", "layers"}


class Fate(StrEnum):
    """The outcome for a conversation that was to be copied."""

    COPIED = "copied"
    THERE = "already there"
    CHANGED = "already there, but changed since"
    DAMAGED = "damaged, so not copied"
    LIVE = "being written, so not copied"


@dataclass(frozen=True, slots=True)
class Copied:
    """A conversation of the source, and its id in the target (None: it has none)."""

    conversation_id: int
    new_id: int | None
    fate: Fate
    steps: int


def copy(
    source: Db,
    target: Db,
    conversation_ids: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Iterator[Copied]:
    """Copy these conversations, or all, oldest first; the target is created when needed.

    Raises StoreError when the two are the same store, NotFound for an id that
    the source does not have.
    """
    if _place(source) == _place(target):
        raise StoreError("A store cannot be copied into itself: give another one with --to.")
    with TraceReader(source) as reader:
        ids = list(conversation_ids or ())
        chosen = [reader.conversation(number) for number in ids]
        total = sum(c.tokens for c in chosen) if ids else reader.info().steps
        if conversation_ids is None:
            ids = reader.scalars(select(models.Conversation.id).order_by(models.Conversation.id))
        with TraceWriter(target) as writer:
            copier = _Copier(reader, writer, total, progress)
            for conversation_id in ids:
                try:
                    copied = copier.copy(conversation_id)
                except NotFound:
                    if conversation_ids is not None:
                        raise
                    continue  # it was deleted after the list was read
                yield copied


def _readings(conversation_id: int) -> Select[Any]:
    """How many readings were added to the replies of a conversation after they had ended."""
    own = models.Message.conversation_id == conversation_id
    return select(func.coalesce(func.sum(models.Message.readings), 0)).where(own)


def _place(db: Db) -> str:
    url = identity.address(db)
    path = identity.file_of(url)
    return str(path.resolve()) if path else url.render_as_string(hide_password=False)


class _Copier:
    def __init__(
        self, reader: TraceReader, writer: TraceWriter, total: int, progress: Progress | None
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._total = total
        self._progress = progress
        self._done = 0
        # The ids of the messages that were copied, by their ids in the source.
        self._messages: dict[int, int] = {}

    def copy(self, conversation_id: int) -> Copied:
        """One conversation, as it was at one instant."""
        with self._reader.snapshot() as instant:
            tokens = instant.conversation(conversation_id).tokens
            new_id, fate = self._conversation(instant, conversation_id)
        if fate is not Fate.COPIED:
            self._advance(tokens)
        return Copied(conversation_id, new_id, fate, tokens)

    def _advance(self, steps: int) -> None:
        self._done += steps
        if self._progress is not None:
            self._progress(self._done, max(self._total, self._done))

    def _conversation(self, instant: Snapshot, conversation_id: int) -> tuple[int | None, Fate]:
        table = models.Conversation
        messages = instant.rows(
            select(models.Message.id, *LIFE).where(
                models.Message.conversation_id == conversation_id
            )
        )
        damages = [instant.conversation(conversation_id).damage]
        damages += [message.damage for message in instant.messages(conversation_id)]
        if any(damages):
            return None, Fate.DAMAGED
        if any(effective_status(row).is_live for row in messages):
            return None, Fate.LIVE
        (row,) = instant.rows(select(table.__table__).where(table.id == conversation_id))
        with self._writer.write() as connection:
            existing = connection.execute(
                select(table.id, table.updated_at).where(table.uid == row.uid)
            ).one_or_none()
            if existing is not None:
                same = existing.updated_at == row.updated_at
                # A lens that is applied later leaves the time of the conversation as it is.
                same &= instant.scalar(_readings(row.id)) == connection.scalar(
                    _readings(existing.id)
                )
                return existing.id, Fate.THERE if same else Fate.CHANGED
            new_id = lifecycle.new_row(connection, table, **_values(row))
            for message in messages:
                self._message(instant, connection, message.id, new_id)
        return new_id, Fate.COPIED

    def _message(
        self, instant: Snapshot, connection: Connection, message_id: int, conversation_id: int
    ) -> None:
        table = models.Message
        (row,) = instant.rows(select(table.__table__).where(table.id == message_id))
        # In another store these messages have other ids, or none if they are not copied.
        links = ("score_of", "parent_id", "branch_of")
        ids = {name: self._messages.get(getattr(row, name) or 0) for name in links}
        values = {**_values(row), **ids, "conversation_id": conversation_id}
        is_abandoned = row.status == Status.RUNNING.value
        if is_abandoned:
            # Its process is dead, so nothing will be added.
            values |= {
                "status": Status.INTERRUPTED.value,
                "content": instant.message(message_id).content,
                "reason": lifecycle.PROCESS_ENDED,
            }
        new_id = self._messages[message_id] = lifecycle.new_row(connection, table, **values)
        self._prompt(instant, connection, message_id, new_id)
        after = -1
        while steps := instant.rows(
            select(models.Step.__table__)
            .where(models.Step.message_id == message_id, models.Step.position > after)
            .order_by(models.Step.position)
            .limit(_BATCH)
        ):
            after = steps[-1].position
            self._steps(instant, connection, steps, new_id)
            self._advance(len(steps))
        if is_abandoned:
            message_digest.close(connection, new_id)

    def _prompt(
        self, instant: Snapshot, connection: Connection, message_id: int, new_id: int
    ) -> None:
        table = models.PromptToken.__table__
        bulk = Bulk(models.PromptToken, connection.dialect)
        query = select(table).where(table.c.message_id == message_id).order_by(table.c.position)
        for rows in instant.row_batches(query, _ROWS):
            bulk.insert(connection, [(new_id, *row[1:]) for row in rows])

    def _steps(
        self, instant: Snapshot, connection: Connection, steps: Sequence[Row[Any]], message_id: int
    ) -> None:
        inserted = connection.execute(
            insert(models.Step).returning(models.Step.id, sort_by_parameter_order=True),
            [{**_values(step), "message_id": message_id} for step in steps],
        )
        new_ids = dict(zip((step.id for step in steps), inserted.scalars(), strict=True))
        for model in models.STEP_CHILDREN:
            table = model.__table__
            bulk = Bulk(model, connection.dialect)
            query = select(table).where(table.c.step_id.in_(list(new_ids)))
            # In the order of the key, in which the rows are stored. A step may have any number.
            for rows in instant.row_batches(query.order_by(*table.primary_key), _ROWS):
                bulk.insert(connection, [(new_ids[row.step_id], *row[1:]) for row in rows])
        self._tensors(instant, connection, new_ids)

    def _tensors(self, instant: Snapshot, connection: Connection, new_ids: dict[int, int]) -> None:
        """One blob after another: each may be large."""
        table = models.Tensor.__table__
        bulk = Bulk(models.Tensor, connection.dialect)
        query = select(table.c.id).where(table.c.step_id.in_(list(new_ids))).order_by(table.c.id)
        for tensor_id in instant.scalars(query):
            (row,) = instant.rows(select(table).where(table.c.id == tensor_id))
            values = {**_values(row), "step_id": new_ids[row.step_id]}
            cells = (json.dumps(cell) if name in _JSON else cell for name, cell in values.items())
            bulk.insert(connection, [tuple(cells)])


def _values(row: Row[Any]) -> dict[str, Any]:
    """All columns of a row but its id."""
    return {name: value for name, value in row._asdict().items() if name != "id"}
