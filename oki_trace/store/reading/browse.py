"""Which conversations a list shows, and what their replies took.

Everything is found through indexes but the text, which is looked for in the
messages themselves; a page of a list costs what is on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Select, exists, func, or_, select

from oki_trace.records import ConversationFilter, ConversationTotals, Status, WorkerState
from oki_trace.store.heartbeat import CLOCK, LIFE, ended, is_gone
from oki_trace.store.schema.models import Conversation, Message, Step, Worker


def narrowed(
    connection: Connection, wanted: Select[Any], by: ConversationFilter, search: str | None
) -> Select[Any]:
    """``wanted``, which selects from conversations, with only those that fit."""
    if search:
        said = select(Message.conversation_id).where(
            Message.content.icontains(search, autoescape=True)
        )
        wanted = wanted.where(
            or_(Conversation.title.icontains(search, autoescape=True), Conversation.id.in_(said))
        )
    if by.since is not None:
        wanted = wanted.where(Conversation.updated_at >= by.since)
    if by.until is not None:
        wanted = wanted.where(Conversation.updated_at < by.until)
    if by.model_id is not None:
        wanted = wanted.where(
            exists().where(
                Message.conversation_id == Conversation.id, Message.model_id == by.model_id
            )
        )
    if by.status is not None:
        wanted = _of_status(connection, wanted, by.status)
    return wanted


def _of_status(connection: Connection, wanted: Select[Any], status: Status) -> Select[Any]:
    """A conversation's status is its last message's, and one without any is complete."""
    last = (
        select(Message.status)
        .where(Message.conversation_id == Conversation.id)
        .order_by(Message.position.desc())
        .limit(1)
        .scalar_subquery()
    )
    holds = func.coalesce(last, Status.COMPLETE.value) == status.value
    if status not in (Status.RUNNING, Status.INTERRUPTED):
        return wanted.where(holds)
    # What a process that is gone left running was interrupted, and not yet marked so.
    running = connection.execute(
        select(Message.conversation_id, *LIFE).where(Message.status == Status.RUNNING.value)
    )
    gone = Conversation.id.in_([row.conversation_id for row in running if is_gone(row)])
    if status is Status.RUNNING:
        return wanted.where(holds, ~gone)
    return wanted.where(or_(holds, gone & (last == Status.RUNNING.value)))


def totals(
    connection: Connection, conversation_ids: Sequence[int]
) -> dict[int, ConversationTotals]:
    """Of each conversation what its replies took; of one that is not there, nothing."""
    seconds = {
        row[0]: (int(row[1]), float(row[2]))
        for row in connection.execute(
            select(
                Message.conversation_id,
                func.sum(_TOKENS),
                func.sum(Message.seconds),
            )
            .where(Message.conversation_id.in_(conversation_ids), Message.seconds > 0)
            .group_by(Message.conversation_id)
        )
    }
    held = {
        row[0]: int(row[1])
        for row in connection.execute(
            select(Message.conversation_id, func.sum(Step.tensor_bytes))
            .join(Step, Step.message_id == Message.id)
            .where(Message.conversation_id.in_(conversation_ids))
            .group_by(Message.conversation_id)
        )
    }
    return {
        one: ConversationTotals(*seconds.get(one, (0, 0.0)), held.get(one, 0))
        for one in conversation_ids
    }


def latest_worker(connection: Connection) -> WorkerState | None:
    """The worker heard of last; None: never any."""
    row = connection.execute(
        select(Worker.__table__, CLOCK).order_by(Worker.heartbeat.desc(), Worker.id.desc()).limit(1)
    ).one_or_none()
    if row is None:
        return None
    gone = ended(row.owner, row.heartbeat, row.clock)
    return WorkerState(
        state="gone" if gone else row.state,
        model_id=None if gone else row.model_id,
        detail=row.detail,
        progress=None if gone else row.progress,
        pid=row.pid,
        updated_at=row.heartbeat,
    )


# Steps are numbered without a gap, so their count is one look into an index.
_TOKENS = (
    select(func.coalesce(func.max(Step.step_index) + 1, 0))
    .where(Step.message_id == Message.id)
    .correlate(Message)
    .scalar_subquery()
)
