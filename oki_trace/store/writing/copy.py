"""Copying conversations from one store to another, whatever engine each is on.

The guarantees: a conversation is copied in one transaction;
its rows and blobs are the same, and only its ids are the target's own; one that
is there already (by its ``uid``) is not copied again, so a copy that was broken
off is finished by copying again; one that is being written is left for later;
and a few steps are in memory at a time, however large it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, Row, insert, select

from oki_trace.errors import NotFound, StoreError
from oki_trace.records import Status
from oki_trace.reporting import Progress
from oki_trace.store.heartbeat import LIFE, is_gone
from oki_trace.store.reading.damage import status_of
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.schema import identity, models
from oki_trace.store.schema.identity import Db
from oki_trace.store.writing import closing, lifecycle
from oki_trace.store.writing.rows import Bulk
from oki_trace.store.writing.writer import TraceWriter

_BATCH = 64
_ROWS = 10_000
_CHILDREN = (
    models.TopkEntry,
    models.AttentionLayer,
    models.AttentionEntry,
    models.LensLayer,
    models.LensEntry,
)
# JSON is handed to the driver as text.
_JSON = {"shape", "layers"}


class Fate(StrEnum):
    """What became of a conversation that was to be copied."""

    COPIED = "copied"
    THERE = "already there"
    CHANGED = "already there, but changed since"
    DAMAGED = "damaged, so not copied"
    LIVE = "being written, so not copied"


@dataclass(frozen=True, slots=True)
class Copied:
    """A conversation of the source, and its id in the target (None: it is not there)."""

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
    """Copy these conversations, or all, oldest first; the target is made when needed.

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
            ids = [
                row.id
                for row in reader.rows(
                    select(models.Conversation.id).order_by(models.Conversation.id)
                )
            ]
        with TraceWriter(target) as writer:
            copier = _Copier(reader, writer, total, progress)
            for conversation_id in ids:
                try:
                    copied = copier.copy(conversation_id)
                except NotFound:
                    if conversation_ids is not None:
                        raise
                    continue  # deleted since all were listed
                yield copied


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

    def copy(self, conversation_id: int) -> Copied:
        """One conversation, as it was at one instant."""
        with self._reader.snapshot() as instant:
            messages = instant.rows(
                select(models.Message.id, models.Message.status, *LIFE).where(
                    models.Message.conversation_id == conversation_id
                )
            )
            tokens = instant.conversation(conversation_id).tokens
            if any(message.damage for message in instant.messages(conversation_id)) or (
                instant.conversation(conversation_id).damage
            ):
                return self._told(Copied(conversation_id, None, Fate.DAMAGED, tokens))
            if any(status_of(row.status).is_live and not is_gone(row) for row in messages):
                return self._told(Copied(conversation_id, None, Fate.LIVE, tokens))
            table = models.Conversation
            (row,) = instant.rows(select(table.__table__).where(table.id == conversation_id))
            with self._writer.write() as connection:
                there = connection.execute(
                    select(table.id, table.updated_at).where(table.uid == row.uid)
                ).one_or_none()
                if there is not None:
                    same = there.updated_at == row.updated_at
                    fate = Fate.THERE if same else Fate.CHANGED
                    return self._told(Copied(conversation_id, there.id, fate, tokens))
                new_id = lifecycle.new_row(connection, table, **_values(row, "id"))
                for message in messages:
                    self._message(instant, connection, message, new_id)
        return Copied(conversation_id, new_id, Fate.COPIED, tokens)

    def _told(self, copied: Copied) -> Copied:
        self._advance(copied.steps)
        return copied

    def _advance(self, steps: int) -> None:
        self._done += steps
        if self._progress is not None:
            self._progress(self._done, max(self._total, self._done))

    def _message(
        self, instant: TraceReader, connection: Connection, brief: Row[Any], conversation_id: int
    ) -> None:
        table = models.Message
        (row,) = instant.rows(select(table.__table__).where(table.id == brief.id))
        values = {**_values(row, "id"), "conversation_id": conversation_id}
        if row.status == Status.RUNNING.value:
            # Its process is gone: what it left is all there will be.
            now = instant.message(brief.id)
            values |= {
                "status": Status.INTERRUPTED.value,
                "content": now.content,
                "reason": lifecycle.PROCESS_ENDED,
            }
        new_id = lifecycle.new_row(connection, table, **values)
        self._prompt(instant, connection, brief.id, new_id)
        after = -1
        while steps := instant.rows(
            select(models.Step.__table__)
            .where(models.Step.message_id == brief.id, models.Step.step_index > after)
            .order_by(models.Step.step_index)
            .limit(_BATCH)
        ):
            after = steps[-1].step_index
            self._steps(instant, connection, steps, new_id)
            self._advance(len(steps))
        if row.status == Status.RUNNING.value:
            closing.close(connection, new_id)

    def _prompt(
        self, instant: TraceReader, connection: Connection, message_id: int, new_id: int
    ) -> None:
        table = models.PromptToken.__table__
        bulk = Bulk(models.PromptToken, connection.dialect)
        after = -1
        while rows := instant.rows(
            select(table)
            .where(table.c.message_id == message_id, table.c.position > after)
            .order_by(table.c.position)
            .limit(_BATCH * 64)
        ):
            after = rows[-1].position
            bulk.insert(connection, [(new_id, *row[1:]) for row in rows])

    def _steps(
        self,
        instant: TraceReader,
        connection: Connection,
        steps: Sequence[Row[Any]],
        message_id: int,
    ) -> None:
        returned = connection.execute(
            insert(models.Step).returning(models.Step.id, sort_by_parameter_order=True),
            [{**_values(step, "id"), "message_id": message_id} for step in steps],
        )
        new_ids = dict(zip((step.id for step in steps), returned.scalars(), strict=True))
        for model in _CHILDREN:
            table = model.__table__
            bulk = Bulk(model, connection.dialect)
            # In the order of the key, which is the order they are kept in. A step may
            # have any number of rows.
            for rows in instant.row_batches(
                select(table)
                .where(table.c.step_id.in_(list(new_ids)))
                .order_by(*table.primary_key),
                _ROWS,
            ):
                bulk.insert(connection, [(new_ids[row.step_id], *row[1:]) for row in rows])
        self._tensors(instant, connection, new_ids)

    def _tensors(
        self, instant: TraceReader, connection: Connection, new_ids: dict[int, int]
    ) -> None:
        """One blob after another: each may be large."""
        table = models.Tensor.__table__
        bulk = Bulk(models.Tensor, connection.dialect)
        wanted = select(table.c.id).where(table.c.step_id.in_(list(new_ids))).order_by(table.c.id)
        for (tensor_id,) in instant.rows(wanted):
            (row,) = instant.rows(select(table).where(table.c.id == tensor_id))
            values = {**_values(row, "id"), "step_id": new_ids[row.step_id]}
            one = tuple(
                json.dumps(value) if name in _JSON else value for name, value in values.items()
            )
            bulk.insert(connection, [one])


def _values(row: Row[Any], *less: str) -> dict[str, Any]:
    return {name: value for name, value in row._asdict().items() if name not in less}
