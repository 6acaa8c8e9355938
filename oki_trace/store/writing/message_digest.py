"""Computes the digest of a message from its rows, when the message has ended.

While a reply is being written, the column holds the digest of its prompt.
"""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import Connection, select, update

from oki_trace.store.digest import BEFORE_DIGESTS, MessageDigest, PromptDigest
from oki_trace.store.liveness import status_of
from oki_trace.store.schema.models import Conversation, Message, PromptToken, Step

_ROWS = 10_000
# Columns that may change after a message has ended, that belong to one store alone, and the
# digest itself.
NOT_COVERED = frozenset(
    {
        *("id", "conversation_id", "position", "owner", "heartbeat_at", "stop_requested"),
        *("tensors_pruned_at", "score_of", "parent_id", "branch_of", "digest", "readings"),
    }
)
_COVERED = [column for column in Message.__table__.columns if column.name not in NOT_COVERED]


def close(connection: Connection, message_id: int, recorded: str | None = None) -> None:
    """Write the digest of a message that has ended.

    ``recorded``: the digest that an imported message brings from its file; it is kept.
    """
    state = connection.execute(
        select(Message.digest, Message.prompt_len).where(Message.id == message_id)
    ).one()
    begun = state.prompt_len is not None
    if begun and state.digest in (None, BEFORE_DIGESTS) and recorded is None:
        digest = BEFORE_DIGESTS  # it was begun by a program without digests
    else:
        digest = recorded or compute(connection, message_id, state.digest if begun else None)
    connection.execute(update(Message).where(Message.id == message_id).values(digest=digest))


def compute(connection: Connection, message_id: int, prompt: str | None = None) -> str:
    """The digest of a message as it is now; ``prompt`` is that of its prompt, where known."""
    row = connection.execute(
        select(*_COVERED, Conversation.created_at.label("began"))
        .join(Conversation, Conversation.id == Message.conversation_id)
        .where(Message.id == message_id)
    ).one()
    if prompt is None and row.prompt_len is not None:
        prompt = _prompt_digest(connection, message_id)
    fields = row._asdict()
    if isinstance(fields["capture"], dict):
        # An export may leave the tensors out, which changes nothing that was recorded.
        fields["capture"] = {
            name: value for name, value in fields["capture"].items() if name != "tensors_left_out"
        }
    digest = MessageDigest(fields, prompt)
    steps = connection.execute(
        select(Step.digest, Step.tensor_digest)
        .where(Step.message_id == message_id)
        # Given tokens first: a reply's steps are in the order of their numbers.
        .order_by(Step.step_index.is_not(None), Step.step_index, Step.position),
        execution_options={"yield_per": _ROWS},
    )
    for step_digest, tensor_digest in steps:
        digest.add(step_digest, tensor_digest)
    return digest.hex()


def changes(connection: Connection, message_id: int) -> Iterator[str]:
    """A sentence for each difference between a message as a whole and its recorded digest."""
    row = connection.execute(
        select(Message.digest, Message.prompt_len, Message.status).where(Message.id == message_id)
    ).one()
    if row.digest == BEFORE_DIGESTS:
        recorded = select(Step.id).where(Step.message_id == message_id, Step.digest.is_not(None))
        if connection.execute(recorded.limit(1)).first():
            yield "its digest is missing"
    elif not status_of(row.status).is_live:
        if row.digest is None:
            yield "its digest is missing"
        elif row.digest != compute(connection, message_id):
            yield (
                "its text, settings, prompt or list of steps is not what was recorded (the "
                "digest differs)"
            )
    elif row.prompt_len is not None and row.digest != _prompt_digest(connection, message_id):
        yield "its prompt is not what was recorded (the digest differs)"


def _prompt_digest(connection: Connection, message_id: int) -> str:
    """The digest of a prompt's tokens as they are now."""
    digest = PromptDigest()
    rows = connection.execute(
        select(PromptToken.token_id, PromptToken.token, PromptToken.segment)
        .where(PromptToken.message_id == message_id)
        .order_by(PromptToken.position),
        execution_options={"yield_per": _ROWS},
    )
    for batch in rows.partitions():
        digest.add(*map(list, zip(*batch, strict=True)))
    return digest.hex()
