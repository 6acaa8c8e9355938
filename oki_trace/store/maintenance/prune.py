"""Prunes a store: deletes old conversations, or the full tensors of old replies.

A plan lists the data to be deleted and the space that this frees, and changes nothing.
It is carried out in small transactions, so a reply that is being generated does not
wait, and pruning can be interrupted at any point. A reply that a live process writes is
never touched. ``vacuum`` reclaims the disk space; until then the store reuses it.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from dataclasses import dataclass, replace

from sqlalchemy import DDL, Connection, delete, func, select, update

from oki_trace.errors import NotFound, UsageError
from oki_trace.records import Status
from oki_trace.reporting import Progress
from oki_trace.store.liveness import LIFE, effective_status, running_replies
from oki_trace.store.reading.reader import Snapshot, TraceReader
from oki_trace.store.schema.column_types import BrokenTime
from oki_trace.store.schema.models import Base, Conversation, Message, Step, Tensor
from oki_trace.store.writing import lifecycle
from oki_trace.store.writing.writer import TraceWriter

# The tensors of one transaction: tens of megabytes, some milliseconds.
_STEPS_AT_ONCE = 128
_STEPS_ON_A_FULL_DISK = 16


@dataclass(frozen=True, slots=True)
class Prunable:
    """A reply whose tensors are deleted, or a conversation (``message_id`` None).

    ``bytes`` is the space that this frees: exact for tensors, estimated for rows.
    """

    conversation_id: int
    message_id: int | None
    title: str
    when: dt.datetime
    bytes: int


@dataclass(frozen=True, slots=True)
class PrunePlan:
    """The items to delete, the oldest first. ``left_bytes``: the data that stays.

    ``spared``: the number that also qualify, but are being written or have no readable time.
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
    """Choose what to prune, the oldest first.

    The plan has everything older than ``older_than``, and as much more as needed for the
    store's data to fit into ``max_bytes``. ``tensors_only``: the tensors of replies, by
    the time of the reply, and all rows stay; otherwise whole conversations, by the time
    of their last change. Raises UsageError when both limits are None.
    """
    if older_than is None and max_bytes is None:
        raise UsageError("Pruning needs a limit: give an age, a size, or both.")
    before = None if older_than is None else (now or lifecycle.now()) - older_than
    with reader.snapshot() as instant:
        info = instant.info()
        candidates = list(_replies(instant) if tensors_only else _conversations(instant))
    left = info.row_bytes + info.tensor_bytes
    items: list[Prunable] = []
    spared = 0
    for item, steps, is_live in candidates:
        # Nobody knows the age of an item whose time is damaged.
        if isinstance(item.when, BrokenTime):
            spared += 1
            continue
        is_old = before is not None and item.when < before
        if not is_old and (max_bytes is None or left <= max_bytes):
            continue
        if is_live:
            spared += 1
            continue
        if not tensors_only:
            item = replace(item, bytes=item.bytes + round(steps * info.row_bytes_per_token))
        left -= item.bytes
        items.append(item)
    return PrunePlan(tensors_only, tuple(items), max(left, 0), spared)


def prune(writer: TraceWriter, plan: PrunePlan, progress: Progress | None = None) -> PrunePlan:
    """Carry out the plan; returns the deleted items. Items changed or begun meanwhile stay."""
    pruned: list[Prunable] = []
    for number, item in enumerate(plan.items):
        if progress is not None:
            progress(number, len(plan.items))
        if _prune_item(writer, item):
            pruned.append(item)
    if progress is not None:
        progress(len(plan.items), len(plan.items))
    if pruned:
        with writer.making_room(), writer.write() as connection:
            _refresh_planner_statistics(connection)
    kept_bytes = plan.frees_bytes - sum(item.bytes for item in pruned)
    spared = plan.spared + len(plan.items) - len(pruned)
    return PrunePlan(plan.tensors_only, tuple(pruned), plan.left_bytes + kept_bytes, spared)


def prune_tensors(writer: TraceWriter, message_id: int) -> int:
    """Delete a reply's full tensors and keep its rows; returns the bytes freed.

    0 for a reply that is being written, which keeps them, or that has none.
    """
    with writer.making_room() as low:
        freed = 0
        at_once = _STEPS_ON_A_FULL_DISK if low else _STEPS_AT_ONCE
        while True:
            with writer.write() as connection:
                sizes = _delete_tensors(connection, message_id, at_once)
            freed += sum(sizes)
            if low:
                writer.truncate_log()
            if len(sizes) < at_once:
                return freed


def _delete_tensors(connection: Connection, message_id: int, limit: int) -> list[int]:
    """Delete the tensors of the first ``limit`` steps that have any; returns their bytes."""
    lifecycle.state_of(connection, message_id)
    if running_replies(connection, Message.id == message_id, lock=True).alive:
        return []
    steps = connection.execute(
        select(Step.id, Step.tensor_bytes)
        .where(Step.message_id == message_id, Step.tensor_bytes > 0)
        .order_by(Step.step_index.nulls_last())
        .limit(limit)
    ).all()
    if steps:
        ids = [step.id for step in steps]
        connection.execute(delete(Tensor).where(Tensor.step_id.in_(ids)))
        connection.execute(update(Step).where(Step.id.in_(ids)).values(tensor_bytes=0))
        lifecycle.set_values(connection, message_id, tensors_pruned_at=lifecycle.now())
    return [int(step.tensor_bytes) for step in steps]


def _prune_item(writer: TraceWriter, item: Prunable) -> bool:
    """Prune one item of a plan, unless it was changed since or is gone."""
    if item.message_id is not None:
        try:
            return prune_tensors(writer, item.message_id) > 0
        except NotFound:  # deleted since the plan
            return False
    with writer.making_room() as low:
        with writer.write() as connection:
            if not _may_go(connection, item):
                return False
            if not low:
                own = Conversation.id == item.conversation_id
                connection.execute(delete(Conversation).where(own))
        if low:
            writer.delete_conversation(item.conversation_id)
    return True


def _may_go(connection: Connection, item: Prunable) -> bool:
    unchanged = connection.execute(
        select(Conversation.id)
        .where(Conversation.id == item.conversation_id, Conversation.updated_at == item.when)
        .with_for_update()
    ).first()
    own = Message.conversation_id == item.conversation_id
    return unchanged is not None and not running_replies(connection, own, lock=True).alive


def _replies(instant: Snapshot) -> Iterator[tuple[Prunable, int, bool]]:
    """The replies that have tensors, the oldest first, with their steps and whether they run."""
    sizes = (
        select(
            Step.message_id, func.sum(Step.tensor_bytes).label("bytes"), func.count().label("steps")
        )
        .where(Step.tensor_bytes > 0)
        .group_by(Step.message_id)
        .subquery()
    )
    query = (
        select(
            *(Message.id, Message.conversation_id, Conversation.title, Message.created_at),
            *(sizes.c.bytes, sizes.c.steps, *LIFE),
        )
        .join(sizes, sizes.c.message_id == Message.id)
        .join(Conversation, Conversation.id == Message.conversation_id)
        .order_by(Message.created_at, Message.id)
    )
    for row in instant.rows(query):
        item = Prunable(row.conversation_id, row.id, row.title, row.created_at, int(row.bytes))
        yield item, row.steps, effective_status(row) is Status.RUNNING


def _conversations(instant: Snapshot) -> Iterator[tuple[Prunable, int, bool]]:
    """All conversations, the one changed longest ago first, with their steps; see _replies."""
    sizes = (
        select(
            Message.conversation_id,
            func.coalesce(func.sum(Step.tensor_bytes), 0).label("bytes"),
            func.count(Step.id).label("steps"),
        )
        .outerjoin(Step, Step.message_id == Message.id)
        .group_by(Message.conversation_id)
        .subquery()
    )
    query = (
        select(
            *(Conversation.id, Conversation.title, Conversation.updated_at),
            func.coalesce(sizes.c.bytes, 0).label("bytes"),
            func.coalesce(sizes.c.steps, 0).label("steps"),
        )
        .outerjoin(sizes, sizes.c.conversation_id == Conversation.id)
        .order_by(Conversation.updated_at, Conversation.id)
    )
    live = {row.conversation_id for row in instant.ask(lambda c: running_replies(c).alive)}
    for row in instant.rows(query):
        item = Prunable(row.id, None, row.title, row.updated_at, int(row.bytes))
        yield item, row.steps, row.id in live


def _refresh_planner_statistics(connection: Connection) -> None:
    """Let PostgreSQL count the rows in use again, after many were deleted."""
    if connection.dialect.name == "postgresql":
        for name in Base.metadata.tables:
            quoted = connection.dialect.identifier_preparer.quote(name)
            # A name takes no bound parameter, and SQLAlchemy leaves DDL untyped.
            analyze: DDL = DDL("ANALYZE %(table)s", {"table": quoted})  # type: ignore[no-untyped-call]
            connection.execute(analyze)
