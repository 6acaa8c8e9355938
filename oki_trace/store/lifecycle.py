"""What a message goes through, as statements inside a transaction of the writer.

queued → running → complete, stopped, failed or interrupted. A queued reply can
be stopped too; nothing leaves a final state.
"""

from __future__ import annotations

import datetime as dt
from typing import Any

from sqlalchemy import Connection, bindparam, delete, func, insert, select, update

from oki_trace.errors import NotFound, StoreError
from oki_trace.records import Status
from oki_trace.store.models import Base, Conversation, Message, Step, Worker
from oki_trace.store.owner import is_dead, this_process


def now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def no_conversation(conversation_id: int) -> NotFound:
    return NotFound(
        f"There is no conversation {conversation_id} in this store: `oki-trace list` shows them."
    )


def no_message(message_id: int) -> NotFound:
    return NotFound(
        f"There is no message {message_id} in this store: `oki-trace show N` lists a "
        "conversation's."
    )


def new_row(connection: Connection, model: type[Base], **values: Any) -> int:
    """Insert a row into a table with an id of its own; returns the id."""
    key = connection.execute(insert(model).values(**values)).inserted_primary_key
    assert key is not None
    return int(key[0])


def touch(connection: Connection, conversation_id: int, **values: Any) -> None:
    """Mark a conversation as changed now, which puts it on top of the list."""
    found = connection.execute(
        update(Conversation)
        .where(Conversation.id == conversation_id)
        .values(updated_at=now(), **values)
    )
    if not found.rowcount:
        raise no_conversation(conversation_id)


def add(connection: Connection, conversation_id: int, **values: Any) -> int:
    """Put a message at the end of a conversation; returns its id."""
    # First of all, for it locks the conversation on PostgreSQL: two messages
    # added at once do not get one position.
    touch(connection, conversation_id)
    last = connection.execute(
        select(func.max(Message.position)).where(Message.conversation_id == conversation_id)
    ).scalar()
    return new_row(
        connection,
        Message,
        conversation_id=conversation_id,
        position=0 if last is None else last + 1,
        stop_requested=False,
        **values,
    )


_STATE = (
    # Locked (on SQLite by the transaction itself), because what follows depends on it.
    select(Message.status, Message.stop_requested)
    .where(Message.id == bindparam("message_id"))
    .with_for_update()
)


def state_of(connection: Connection, message_id: int) -> tuple[Status, bool]:
    """The status of a message, and whether it was asked to stop."""
    row = connection.execute(_STATE, {"message_id": message_id}).one_or_none()
    if row is None:
        raise no_message(message_id)
    return Status(row.status), row.stop_requested


def require(connection: Connection, message_id: int, *allowed: Status) -> bool:
    """Raise unless the message is in one of the ``allowed`` states; returns whether to stop."""
    status, stop = state_of(connection, message_id)
    if status not in allowed:
        raise StoreError(
            f"Message {message_id} is {status}, so nothing more can be written to it: "
            "ask for a new reply."
        )
    return stop


def end(
    connection: Connection,
    message_id: int,
    status: Status,
    output: str,
    reason: str,
    seconds: float | None,
) -> None:
    """Bring a reply to a final state."""
    conversation_id = connection.execute(
        update(Message)
        .where(Message.id == message_id)
        .values(status=status.value, content=output, reason=reason, seconds=seconds)
        .returning(Message.conversation_id)
    ).scalar_one()
    touch(connection, conversation_id)


def text_so_far(connection: Connection, message_id: int) -> str:
    """What a reply without a final text has said, from its tokens."""
    spoken = connection.execute(
        select(Step.token_bytes)
        .where(Step.message_id == message_id, Step.is_special.is_(False))
        .order_by(Step.step_index)
    ).scalars()
    return b"".join(spoken).decode("utf-8", errors="replace")


def report_worker(
    connection: Connection, state: str, model_id: str | None, detail: str, progress: float | None
) -> bool:
    """Write this process's row among the workers; returns whether it says anything new."""
    me = this_process()
    told = {"state": state, "model_id": model_id, "detail": detail, "progress": progress}
    mine = Worker.owner == str(me)
    before = connection.execute(
        select(Worker.state, Worker.model_id, Worker.detail, Worker.progress).where(mine)
    ).one_or_none()
    if before is not None:
        connection.execute(update(Worker).where(mine).values(heartbeat=now(), **told))
        return bool(before._asdict() != told)
    for row in connection.execute(select(Worker.id, Worker.owner)).all():
        if is_dead(row.owner):
            connection.execute(delete(Worker).where(Worker.id == row.id))
    new_row(connection, Worker, owner=str(me), host=me.host, pid=me.pid, heartbeat=now(), **told)
    return True
