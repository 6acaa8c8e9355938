"""Reads messages: their content, their state, and the prompt of a reply."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, func, select

from oki_trace import records
from oki_trace.errors import NotFound
from oki_trace.records import Prompt, Status
from oki_trace.store.liveness import CLOCK, effective_status, status_of
from oki_trace.store.reading import documents
from oki_trace.store.reading.connection import ReadConnection
from oki_trace.store.reading.damage import Damage
from oki_trace.store.reading.not_found import no_conversation, no_message
from oki_trace.store.schema.models import Conversation, Message, PromptToken, Step

# Generated steps are numbered without a gap, so their count is one look into an index.
TOKEN_COUNT = (
    select(func.coalesce(func.max(Step.step_index) + 1, 0))
    .where(Step.message_id == Message.id)
    .correlate(Message)
    .scalar_subquery()
)
# The text of the prompt can be long and is read only on demand.
_COLUMNS: tuple[ColumnElement[Any], ...] = (
    *(column for column in Message.__table__.columns if column.name != "prompt"),
    CLOCK,
    TOKEN_COUNT.label("tokens"),
)
_LIVE = [status.value for status in Status if status.is_live]


class MessageReads(ReadConnection):
    """The read methods about messages."""

    def messages(self, conversation_id: int) -> list[records.Message]:
        """The messages of a conversation, in order."""
        query = select(*_COLUMNS).where(Message.conversation_id == conversation_id)
        with self._read() as connection:
            rows = connection.execute(query.order_by(Message.position)).all()
            if not rows and not connection.scalar(
                select(Conversation.id).where(Conversation.id == conversation_id)
            ):
                raise no_conversation(conversation_id)
            return [_message(connection, row) for row in rows]

    def message(self, message_id: int) -> records.Message:
        with self._read() as connection:
            row = connection.execute(
                select(*_COLUMNS).where(Message.id == message_id)
            ).one_or_none()
            if row is None:
                raise no_message(message_id)
            return _message(connection, row)

    def waiting(self) -> list[int]:
        """The ids of the replies stored as queued or running, in the order they are served."""
        return self.scalars(
            select(Message.id).where(Message.status.in_(_LIVE)).order_by(Message.id)
        )

    def stop_requested(self, message_id: int) -> bool:
        """Whether somebody asked to stop a reply; False for one that does not exist any more."""
        return bool(self.scalar(select(Message.stop_requested).where(Message.id == message_id)))

    def message_bytes(self, message_id: int) -> int:
        """The stored size of a reply's tensors, in bytes."""
        return int(
            self.scalar(select(func.sum(Step.tensor_bytes)).where(Step.message_id == message_id))
            or 0
        )

    def logprobs(self, conversation_id: int) -> dict[int, float]:
        """The log-probability of each reply's own tokens together, in nats, by message.

        Of a branch these are the tokens from the fork on. Replies without tokens are left out.
        """
        query = (
            select(Step.message_id, func.sum(Step.logprob))
            .join(Message, Message.id == Step.message_id)
            .where(Message.conversation_id == conversation_id, Step.step_index.is_not(None))
            .group_by(Step.message_id)
        )
        with self._read() as connection:
            rows = connection.execute(query).all()
        return {number: float(total) for number, total in rows if total is not None}

    def prompt(self, message_id: int) -> Prompt:
        """The prompt of a reply. Raises NotFound before the reply has begun."""
        table = PromptToken
        with self._read() as connection:
            text = connection.execute(
                select(Message.prompt).where(Message.id == message_id)
            ).one_or_none()
            if text is None:
                raise no_message(message_id)
            if text.prompt is None:
                raise NotFound(
                    f"Message {message_id} has no prompt: only a reply that has begun has one."
                )
            rows = connection.execute(
                select(table.token_id, table.token, table.segment)
                .where(table.message_id == message_id)
                .order_by(table.position)
            ).all()
        token_ids, tokens, segments = zip(*rows, strict=True) if rows else ((), (), ())
        return Prompt(text.prompt, token_ids, tokens, segments)


def _message(connection: Connection, row: Row[Any]) -> records.Message:
    """A message. While it runs, its content is the text of its tokens so far."""
    damage = Damage()
    damage.status(row.status)
    status = effective_status(row)
    content = damage.text("content", row.content)
    if status_of(row.status) is Status.RUNNING and row.tokens:
        content = text_so_far(connection, row.id)
    message = records.Message(
        id=row.id,
        conversation_id=row.conversation_id,
        position=damage.number("position", row.position, int) or 0,
        role=damage.role(row.role),
        content=content,
        status=status,
        created_at=damage.time("created_at", row.created_at),
        model_id=row.model_id,
        prompt_len=damage.number("prompt_len", row.prompt_len, int),
        reason=row.reason,
        seconds=damage.number("seconds", row.seconds, float),
        tokens=row.tokens,
        score_of=damage.number("score_of", row.score_of, int),
        parent_id=damage.number("parent_id", row.parent_id, int),
        branch_of=damage.number("branch_of", row.branch_of, int),
        branch_step=damage.number("branch_step", row.branch_step, int),
        prefix_len=damage.number("prefix_len", row.prefix_len, int) or 0,
        tensors_pruned_at=damage.time("tensors_pruned_at", row.tensors_pruned_at),
        **{
            name: damage.part(name, read, getattr(row, name))
            for name, read in documents.OF_A_MESSAGE.items()
        },
        parts=damage.part("parts", documents.parts, row.parts) or (),
        tool_name=row.tool_name,
        readings=damage.number("readings", row.readings, int) or 0,
        # Until the message has ended, the column holds the digest of its prompt.
        digest=None if status_of(row.status).is_live else row.digest,
    )
    if not damage:
        return message
    return replace(
        message, status=Status.FAILED, reason=f"damaged: {damage}", damage=damage.sentence
    )


def text_so_far(connection: Connection, message_id: int) -> str:
    """The text of a running reply: its beginning, and then the bytes of its tokens."""
    prefix_text = connection.execute(
        select(Message.content).where(Message.id == message_id)
    ).scalar()
    token_bytes = connection.execute(
        select(Step.token_bytes)
        .where(
            Step.message_id == message_id,
            Step.step_index.is_not(None),
            Step.is_special.is_(False),
        )
        .order_by(Step.step_index)
    ).scalars()
    return str(prefix_text or "") + b"".join(token_bytes).decode("utf-8", errors="replace")
