"""How a store came to its size, and how its replies ended.

From the steps' own numbers: no tensor is read, and 100,000 steps take some
hundredths of a second.
"""

from __future__ import annotations

from sqlalchemy import func, select

from oki_trace.records import ReplySize, Status
from oki_trace.store.heartbeat import LIFE, is_gone
from oki_trace.store.reading.damage import status_of
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.schema.models import Message, Step


def reply_sizes(reader: TraceReader) -> list[ReplySize]:
    """What each reply that has tokens takes, the oldest first."""
    wanted = (
        select(Message.created_at, func.count(), func.sum(Step.tensor_bytes))
        .join(Step, Step.message_id == Message.id)
        .group_by(Message.id)
        .order_by(Message.created_at, Message.id)
    )
    return [ReplySize(when, count, int(held)) for when, count, held in reader.rows(wanted)]


def statuses(reader: TraceReader) -> dict[Status, int]:
    """How many replies are in each state; what a process that is gone was at is interrupted."""
    of_replies = Message.role == "assistant"
    counts = {
        status_of(status): int(count)
        for status, count in reader.rows(
            select(Message.status, func.count()).where(of_replies).group_by(Message.status)
        )
    }
    running = reader.rows(select(*LIFE).where(of_replies, Message.status == Status.RUNNING.value))
    gone = sum(map(is_gone, running))
    if gone:
        counts[Status.RUNNING] -= gone
        counts[Status.INTERRUPTED] = counts.get(Status.INTERRUPTED, 0) + gone
    return {status: counts[status] for status in Status if counts.get(status)}
