"""What a message goes through, as statements inside a transaction of the writer.

queued → running → complete, stopped, failed or interrupted. A queued reply can
be stopped too; nothing leaves a final state.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    bindparam,
    delete,
    func,
    insert,
    select,
    update,
)

from oki_trace import records
from oki_trace.errors import NotFound, StoreError
from oki_trace.records import Status
from oki_trace.store.heartbeat import CLOCK, LIFE, ended, is_gone
from oki_trace.store.owner import this_process
from oki_trace.store.reading.damage import status_of
from oki_trace.store.schema.models import Base, Conversation, Message, PromptToken, Step, Worker
from oki_trace.store.writing import closing

# What goes at a time where there is little room for the log: steps, tokens of a prompt.
_FEW = 16
_FEW_TOKENS = 5_000

PROCESS_ENDED = "the process that generated it ended"


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


def no_tensor(message: records.Message, step_index: int, name: str) -> NotFound:
    """The error for a full tensor that a reply does not have, with the reason."""
    what = f"Step {step_index} of message {message.id} has no tensor {name}"
    if message.tensors_pruned_at is not None:
        return NotFound(
            f"{what} any more: its tensors were pruned on {message.tensors_pruned_at:%Y-%m-%d}. "
            "Generate the reply again to have them."
        )
    if message.capture is not None and message.capture.tensors_left_out:
        return NotFound(
            f"{what}: the tensors were left out of the export that it was imported from. Export "
            "it with --tensors and import that."
        )
    return NotFound(f"{what}: generate with --tensors half, compact or exact to keep them.")


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


def add(
    connection: Connection, conversation_id: int, recorded: str | None = None, **values: Any
) -> int:
    """Put a message at the end of a conversation; returns its id.

    ``recorded``: the digest that its file gives one that is imported.
    """
    # First of all, for it locks the conversation on PostgreSQL: two messages
    # added at once do not get one position.
    touch(connection, conversation_id)
    last = connection.execute(
        select(func.max(Message.position)).where(Message.conversation_id == conversation_id)
    ).scalar()
    message_id = new_row(
        connection,
        Message,
        conversation_id=conversation_id,
        position=0 if last is None else last + 1,
        stop_requested=False,
        **values,
    )
    if not Status(values["status"]).is_live:
        closing.close(connection, message_id, recorded)
    return message_id


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
    return status_of(row.status), row.stop_requested


def require(connection: Connection, message_id: int, *allowed: Status) -> bool:
    """Raise unless the message is in one of the ``allowed`` states; returns whether to stop."""
    status, stop = state_of(connection, message_id)
    if status not in allowed:
        raise StoreError(
            f"Message {message_id} is {status}, so nothing more can be written to it: "
            "ask for a new reply."
        )
    return stop


def take(connection: Connection, message_id: int) -> str:
    """Make a live reply this process's own; returns the owner's name."""
    require(connection, message_id, Status.QUEUED, Status.RUNNING)
    row = connection.execute(select(*LIFE).where(Message.id == message_id)).one()
    me = str(this_process())
    if row.owner not in (None, me) and not is_gone(row):
        raise StoreError(
            f"Message {message_id} is being generated by another process ({row.owner}): let it "
            "finish, or stop it first."
        )
    return me


def written_now(connection: Connection, *those: ColumnElement[bool]) -> Sequence[Row[Any]]:
    """The replies (id, conversation_id, owner) that a living process is generating.

    ``those`` narrow it down. On PostgreSQL nobody can claim or end one of them
    before this transaction ends.
    """
    rows = connection.execute(
        select(Message.id, Message.conversation_id, *LIFE)
        .where(Message.status == Status.RUNNING.value, *those)
        .order_by(Message.id)
        .with_for_update()
    ).all()
    return [row for row in rows if not is_gone(row)]


def refuse_written(connection: Connection, doing: str, *those: ColumnElement[bool]) -> None:
    """Raise when one of ``those`` replies is being generated. ``doing``: "deleted", say."""
    live = written_now(connection, *those)
    if live:
        raise StoreError(
            f"Conversation {live[0].conversation_id} cannot be {doing} now: its message "
            f"{live[0].id} is being generated ({live[0].owner}). Let it finish, or stop it first."
        )


def delete_conversation(connection: Connection, conversation_id: int) -> None:
    """Delete a conversation with all that hangs on it, unless it is being written."""
    those = Message.conversation_id == conversation_id
    refuse_written(connection, "deleted", those)
    # Messages of a conversation that is gone: what damaged the store left them.
    gone = select(Conversation.id).where(Conversation.id == conversation_id)
    if not connection.execute(gone).first():
        if not connection.execute(delete(Message).where(those)).rowcount:
            raise no_conversation(conversation_id)
        return
    # From here on, PostgreSQL lets nobody add a reply to it; one may just have been.
    touch(connection, conversation_id)
    refuse_written(connection, "deleted", those)
    connection.execute(delete(Conversation).where(Conversation.id == conversation_id))


def thin_out(connection: Connection, conversation_id: int) -> bool:
    """Delete a few of the last steps of a conversation, or of its prompts' tokens.

    Returns whether there were any. Raises StoreError when a process is writing to it.
    """
    those = Message.conversation_id == conversation_id
    refuse_written(connection, "deleted", those)
    ids = select(Message.id).where(those)
    steps = select(Step.id).where(Step.message_id.in_(ids)).order_by(Step.id.desc()).limit(_FEW)
    if connection.execute(delete(Step).where(Step.id.in_(steps))).rowcount:
        return True
    (last,) = connection.execute(
        select(func.max(PromptToken.position)).where(PromptToken.message_id.in_(ids))
    ).one()
    if last is None:
        return False
    tokens = PromptToken.position > last - _FEW_TOKENS
    connection.execute(delete(PromptToken).where(PromptToken.message_id.in_(ids), tokens))
    return True


def end(
    connection: Connection,
    message_id: int,
    status: Status,
    output: str,
    reason: str,
    seconds: float | None,
    recorded: str | None = None,
    **values: Any,
) -> None:
    """Bring a reply to a final state, and close it with its digest (see ``add``)."""
    conversation_id = connection.execute(
        update(Message)
        .where(Message.id == message_id)
        .values(status=status.value, content=output, reason=reason, seconds=seconds, **values)
        .returning(Message.conversation_id)
    ).scalar_one()
    closing.close(connection, message_id, recorded)
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
        connection.execute(update(Worker).where(mine).values(heartbeat=_time(connection), **told))
        return bool(before._asdict() != told)
    for row in connection.execute(select(Worker.id, Worker.owner, Worker.heartbeat, CLOCK)).all():
        if ended(row.owner, row.heartbeat, row.clock):
            connection.execute(delete(Worker).where(Worker.id == row.id))
    new_row(
        connection,
        Worker,
        owner=str(me),
        host=me.host,
        pid=me.pid,
        heartbeat=_time(connection),
        **told,
    )
    return True


def _time(connection: Connection) -> Any:
    """Now, by the server's clock where there is one; SQLite's counts whole seconds only."""
    return now() if connection.dialect.name == "sqlite" else func.now()
