"""Making room: which replies or conversations go, and throwing them away.

A plan says what would go and how much room that frees, and changes nothing.
Carrying it out takes one small transaction after another, so that a reply being
generated at the same time waits for none of them, and can be interrupted at
any point. What a living process is writing is never touched. The disk gets the
room back with ``vacuum``; until then the store uses it for what comes next.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, delete, func, select, update

from oki_trace.errors import NotFound, UsageError
from oki_trace.records import Status
from oki_trace.reporting import Progress
from oki_trace.store.heartbeat import LIFE, is_gone
from oki_trace.store.maintenance.sizes import refresh_statistics
from oki_trace.store.reading.damage import BrokenTime, status_of
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.schema.models import Conversation, Message, Step, Tensor
from oki_trace.store.writing import lifecycle
from oki_trace.store.writing.writer import TraceWriter

# The tensors of one transaction: tens of megabytes, some milliseconds.
_STEPS_AT_ONCE = 128
_STEPS_WHERE_LOW = 16


@dataclass(frozen=True, slots=True)
class Prunable:
    """A reply whose tensors go, or a conversation that goes (``message_id`` None).

    ``bytes`` is what that frees: exact for tensors, estimated for rows.
    """

    conversation_id: int
    message_id: int | None
    title: str
    when: dt.datetime
    bytes: int


@dataclass(frozen=True, slots=True)
class PrunePlan:
    """What would go, the oldest first. ``left_bytes``: the data that stays.

    ``spared``: how many would have gone too, but are being written or have no time.
    """

    tensors_only: bool
    items: tuple[Prunable, ...]
    left_bytes: int
    spared: int

    @property
    def frees_bytes(self) -> int:
        return sum(item.bytes for item in self.items)


def plan(
    reader: TraceReader,
    *,
    older_than: dt.timedelta | None = None,
    max_bytes: int | None = None,
    tensors_only: bool = True,
    now: dt.datetime | None = None,
) -> PrunePlan:
    """What to throw away, the oldest first.

    Goes what is ``older_than`` that, and what it takes besides for the store's
    data to fit into ``max_bytes``. ``tensors_only``: the tensors of replies, by
    the time of the reply, and every row stays; otherwise whole conversations,
    by the time of their last change. Raises UsageError when neither is given.
    """
    if older_than is None and max_bytes is None:
        raise UsageError("Nothing says what to prune: give an age, a size, or both.")
    before = None if older_than is None else (now or lifecycle.now()) - older_than
    with reader.snapshot() as instant:
        info = instant.info()
        found = _replies(instant) if tensors_only else _conversations(instant)
    left = info.row_bytes + info.tensor_bytes
    going: list[Prunable] = []
    spared = 0
    for row in found:
        # Nobody knows how old that is whose time is damaged.
        if isinstance(row.time, BrokenTime):
            spared += 1
            continue
        is_old = before is not None and row.time < before
        if not is_old and (max_bytes is None or left <= max_bytes):
            continue
        if row.live:
            spared += 1
            continue
        rows = 0 if tensors_only else round(row.steps * info.row_bytes_per_token)
        item = Prunable(
            row.conversation_id, row.message_id, row.title, row.time, int(row.bytes) + rows
        )
        left -= item.bytes
        going.append(item)
    return PrunePlan(tensors_only, tuple(going), max(left, 0), spared)


def prune(writer: TraceWriter, plan: PrunePlan, progress: Progress | None = None) -> PrunePlan:
    """Carry the plan out; returns what went. What was changed or begun meanwhile stays."""
    went: list[Prunable] = []
    for number, item in enumerate(plan.items):
        if progress is not None:
            progress(number, len(plan.items))
        if item.message_id is None:
            gone = _delete(writer, item)
        else:
            try:
                gone = prune_tensors(writer, item.message_id) > 0
            except NotFound:  # deleted since the plan
                gone = False
        if gone:
            went.append(item)
    if progress is not None:
        progress(len(plan.items), len(plan.items))
    if went:
        with writer.write() as connection:
            refresh_statistics(connection)
    kept = plan.frees_bytes - sum(item.bytes for item in went)
    spared = plan.spared + len(plan.items) - len(went)
    return PrunePlan(plan.tensors_only, tuple(went), plan.left_bytes + kept, spared)


def prune_tensors(writer: TraceWriter, message_id: int) -> int:
    """Throw a reply's full tensors away, its rows stay; returns the bytes freed.

    A reply that is being written keeps them, and 0 is returned; one that had
    none is not marked.
    """
    with writer.making_room() as low:
        return _prune_tensors(writer, message_id, low=low)


def _prune_tensors(writer: TraceWriter, message_id: int, *, low: bool) -> int:
    freed = 0
    at_once = _STEPS_WHERE_LOW if low else _STEPS_AT_ONCE
    while True:
        with writer.write() as connection:
            status, _ = lifecycle.state_of(connection, message_id)
            if status is Status.RUNNING and lifecycle.written_now(
                connection, Message.id == message_id
            ):
                return freed
            steps = connection.execute(
                select(Step.id, Step.tensor_bytes)
                .where(Step.message_id == message_id, Step.tensor_bytes > 0)
                .order_by(Step.step_index)
                .limit(at_once)
            ).all()
            if steps:
                ids = [step.id for step in steps]
                connection.execute(delete(Tensor).where(Tensor.step_id.in_(ids)))
                connection.execute(update(Step).where(Step.id.in_(ids)).values(tensor_bytes=0))
                connection.execute(
                    update(Message)
                    .where(Message.id == message_id)
                    .values(tensors_pruned_at=lifecycle.now())
                )
        freed += sum(int(step.tensor_bytes) for step in steps)
        if low:
            writer.fold()
        if len(steps) < at_once:
            return freed


def _delete(writer: TraceWriter, item: Prunable) -> bool:
    """Delete a conversation unless it has been changed since the plan, or is gone."""
    with writer.making_room() as low:
        if low:
            # What was changed since is seen by whoever asks before it goes.
            with writer.write() as connection:
                if not _may_go(connection, item):
                    return False
            writer.delete_conversation(item.conversation_id)
            return True
        with writer.write() as connection:
            if not _may_go(connection, item):
                return False
            connection.execute(delete(Conversation).where(Conversation.id == item.conversation_id))
    return True


def _may_go(connection: Connection, item: Prunable) -> bool:
    table = Conversation
    unchanged = connection.execute(
        select(table.id)
        .where(table.id == item.conversation_id, table.updated_at == item.when)
        .with_for_update()
    ).first()
    live = lifecycle.written_now(connection, Message.conversation_id == item.conversation_id)
    return unchanged is not None and not live


@dataclass(frozen=True, slots=True)
class _Found:
    conversation_id: int
    message_id: int | None
    title: str
    time: dt.datetime
    bytes: int
    steps: int
    live: bool


def _replies(instant: TraceReader) -> list[_Found]:
    """The replies that have tensors, the oldest first."""
    kept = (
        select(
            Step.message_id,
            func.sum(Step.tensor_bytes).label("bytes"),
            func.count().label("steps"),
        )
        .where(Step.tensor_bytes > 0)
        .group_by(Step.message_id)
        .subquery()
    )
    rows = instant.rows(
        select(
            Message.conversation_id,
            Message.id.label("message_id"),
            Message.status,
            Conversation.title,
            Message.created_at.label("time"),
            kept.c.bytes,
            kept.c.steps,
            *LIFE,
        )
        .join(kept, kept.c.message_id == Message.id)
        .join(Conversation, Conversation.id == Message.conversation_id)
        .order_by(Message.created_at, Message.id)
    )
    return [
        _Found(
            row.conversation_id,
            row.message_id,
            row.title,
            row.time,
            row.bytes,
            row.steps,
            _is_live(row),
        )
        for row in rows
    ]


def _conversations(instant: TraceReader) -> list[_Found]:
    """All conversations, the one changed longest ago first."""
    held = (
        select(
            Message.conversation_id,
            func.coalesce(func.sum(Step.tensor_bytes), 0).label("bytes"),
            func.count(Step.id).label("steps"),
        )
        .outerjoin(Step, Step.message_id == Message.id)
        .group_by(Message.conversation_id)
        .subquery()
    )
    table = Conversation
    rows = instant.rows(
        select(
            table.id,
            table.title,
            table.updated_at,
            func.coalesce(held.c.bytes, 0).label("bytes"),
            func.coalesce(held.c.steps, 0).label("steps"),
        )
        .outerjoin(held, held.c.conversation_id == table.id)
        .order_by(table.updated_at, table.id)
    )
    running = instant.rows(
        select(Message.conversation_id, Message.status, *LIFE).where(
            Message.status == Status.RUNNING.value
        )
    )
    live = {row.conversation_id for row in running if _is_live(row)}
    return [
        _Found(row.id, None, row.title, row.updated_at, row.bytes, row.steps, row.id in live)
        for row in rows
    ]


def _is_live(row: Row[Any]) -> bool:
    return status_of(row.status) is Status.RUNNING and not is_gone(row)
