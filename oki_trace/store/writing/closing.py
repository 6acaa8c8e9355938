"""Closing a message: its digest, made of its rows when nothing more is written to it.

While a reply is being written, its place holds the digest of its prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sqlalchemy import Connection, select, update

from oki_trace.store.digest import BEFORE_DIGESTS, MessageDigest, PromptDigest
from oki_trace.store.reading.damage import status_of
from oki_trace.store.schema.models import Conversation, Message, PromptToken, Step

_ROWS = 10_000
# What may change after a message has ended, is of one store alone, or is the digest itself.
NOT_COVERED = frozenset(
    {
        *("id", "conversation_id", "position", "owner", "seen_at", "stop_requested"),
        *("tensors_pruned_at", "digest"),
    }
)
_COVERED = [column for column in Message.__table__.columns if column.name not in NOT_COVERED]


def close(connection: Connection, message_id: int, recorded: str | None = None) -> None:
    """Write the digest of a message that has come to its end.

    ``recorded`` is what its file says of one that is imported, and is kept.
    """
    state = connection.execute(
        select(Message.digest, Message.prompt_len).where(Message.id == message_id)
    ).one()
    begun = state.prompt_len is not None
    if begun and state.digest in (None, BEFORE_DIGESTS) and recorded is None:
        # It was begun by a program that knew no digests.
        digest = BEFORE_DIGESTS
    else:
        digest = recorded or closing_digest(connection, message_id, state.digest if begun else None)
    connection.execute(update(Message).where(Message.id == message_id).values(digest=digest))


def closing_digest(connection: Connection, message_id: int, prompt: str | None = None) -> str:
    """The digest of a message as it is now; ``prompt`` is that of its prompt, where known."""
    row = connection.execute(
        select(*_COVERED, Conversation.created_at.label("began"))
        .join(Conversation, Conversation.id == Message.conversation_id)
        .where(Message.id == message_id)
    ).one()
    if prompt is None and row.prompt_len is not None:
        prompt = prompt_digest(connection, message_id)
    fields = row._asdict()
    fields["capture"] = _without_fate(fields["capture"])
    made = MessageDigest(fields, prompt)
    steps = connection.execute(
        select(Step.digest, Step.tensor_digest)
        .where(Step.message_id == message_id)
        .order_by(Step.step_index),
        execution_options={"yield_per": _ROWS},
    )
    for digest, tensor_digest in steps:
        made.add(digest, tensor_digest)
    return made.hex()


def changes(connection: Connection, message_id: int) -> Iterator[str]:
    """What is not as it was recorded in a message, its steps looked at as a whole."""
    row = connection.execute(
        select(Message.digest, Message.prompt_len, Message.status).where(Message.id == message_id)
    ).one()
    if row.digest == BEFORE_DIGESTS:
        recorded = select(Step.id).where(Step.message_id == message_id, Step.digest.is_not(None))
        if connection.execute(recorded.limit(1)).first():
            yield "its digest is missing"
        return
    if not status_of(row.status).is_live:
        if row.digest is None:
            yield "its digest is missing"
        elif row.digest != closing_digest(connection, message_id):
            yield (
                "its text, settings, prompt or list of steps is not what was recorded (another "
                "digest)"
            )
    elif row.prompt_len is not None and row.digest != prompt_digest(connection, message_id):
        yield "its prompt is not what was recorded (another digest)"


def prompt_digest(connection: Connection, message_id: int) -> str:
    """The digest of a prompt's tokens as they are now."""
    made = PromptDigest()
    rows = connection.execute(
        select(PromptToken.token_id, PromptToken.token, PromptToken.segment)
        .where(PromptToken.message_id == message_id)
        .order_by(PromptToken.position),
        execution_options={"yield_per": _ROWS},
    )
    for some in rows.partitions():
        made.add(*map(list, zip(*some, strict=True)))
    return made.hex()


def _without_fate(capture: dict[str, Any] | None) -> dict[str, Any] | None:
    """A report but for what became of the tensors, which an export may leave out."""
    if not isinstance(capture, dict):
        return capture
    return {name: value for name, value in capture.items() if name != "tensors_left_out"}
