"""Reads conversations: lists, searches, and the time and space of their replies.

All queries except the text search use an index, so a page of a list reads only its rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import sqlalchemy as sa

from oki_trace import records
from oki_trace.records import ConversationFilter, ConversationTotals, Status
from oki_trace.store.liveness import LIFE, effective_status, running_replies
from oki_trace.store.reading.connection import ReadConnection
from oki_trace.store.reading.damage import Damage
from oki_trace.store.reading.messages import TOKEN_COUNT
from oki_trace.store.reading.not_found import no_conversation
from oki_trace.store.schema.models import Conversation, Message, Step

_BRIEF = (
    *(Message.id, Message.conversation_id, Message.role, Message.created_at, Message.model_id),
    *(*LIFE, TOKEN_COUNT.label("tokens")),
)
# Whether the documents of a message are JSON: SQLite stores any text, PostgreSQL checks it.
_DOCUMENTS_VALID = {
    "postgresql": sa.true(),
    "sqlite": sa.and_(
        *(
            sa.or_(column.is_(None), sa.func.json_valid(column, type_=sa.Integer) == 1)
            for column in Message.__table__.columns
            if isinstance(column.type, sa.JSON)
        )
    ),
}


class ConversationReads(ReadConnection):
    """The read methods about conversations."""

    def conversations(
        self,
        search: str | None = None,
        *,
        by: ConversationFilter | None = None,
        limit: int = 50,
        offset: int = 0,
    ) -> list[records.Conversation]:
        """Conversations, the last changed first; ``search`` looks in titles and messages."""
        query = sa.select(Conversation).order_by(
            Conversation.updated_at.desc(), Conversation.id.desc()
        )
        with self._read() as connection:
            query = _narrowed(connection, query, by or ConversationFilter(), search)
            rows = connection.execute(query.limit(limit).offset(offset)).all()
            return _conversations(connection, rows)

    def conversation_count(
        self, search: str | None = None, *, by: ConversationFilter | None = None
    ) -> int:
        """The number of conversations that match, whatever the limit of a list."""
        query = sa.select(sa.func.count(Conversation.id))
        with self._read() as connection:
            query = _narrowed(connection, query, by or ConversationFilter(), search)
            return connection.execute(query).scalar_one()

    def conversation(self, conversation_id: int) -> records.Conversation:
        with self._read() as connection:
            rows = connection.execute(
                sa.select(Conversation).where(Conversation.id == conversation_id)
            ).all()
            if not rows:
                raise no_conversation(conversation_id)
            return _conversations(connection, rows)[0]

    def conversation_totals(self, conversation_ids: Sequence[int]) -> dict[int, ConversationTotals]:
        """The time and space of the replies of these conversations, by id; reads no tensor."""
        own = Message.conversation_id.in_(conversation_ids)
        timed = (
            sa.select(
                Message.conversation_id, sa.func.sum(TOKEN_COUNT), sa.func.sum(Message.seconds)
            )
            .where(own, Message.seconds > 0)
            .group_by(Message.conversation_id)
        )
        sizes = (
            sa.select(Message.conversation_id, sa.func.sum(Step.tensor_bytes))
            .join(Step, Step.message_id == Message.id)
            .where(own)
            .group_by(Message.conversation_id)
        )
        with self._read() as connection:
            times = {row[0]: (int(row[1]), float(row[2])) for row in connection.execute(timed)}
            tensor_bytes = {row[0]: int(row[1]) for row in connection.execute(sizes)}
        return {
            number: ConversationTotals(*times.get(number, (0, 0.0)), tensor_bytes.get(number, 0))
            for number in conversation_ids
        }


def _narrowed(
    connection: sa.Connection, query: sa.Select[Any], by: ConversationFilter, search: str | None
) -> sa.Select[Any]:
    """``query``, which selects from conversations, limited to those that match."""
    if search:
        matching = sa.select(Message.conversation_id).where(
            Message.content.icontains(search, autoescape=True)
        )
        in_title = Conversation.title.icontains(search, autoescape=True)
        query = query.where(sa.or_(in_title, Conversation.id.in_(matching)))
    if by.since is not None:
        query = query.where(Conversation.updated_at >= by.since)
    if by.until is not None:
        query = query.where(Conversation.updated_at < by.until)
    if by.model_id is not None:
        query = query.where(
            sa.exists().where(
                Message.conversation_id == Conversation.id, Message.model_id == by.model_id
            )
        )
    if by.status is not None:
        query = query.where(_has_status(connection, by.status))
    return query


def _has_status(connection: sa.Connection, status: Status) -> sa.ColumnElement[bool]:
    """A conversation has the status of its last message; an empty one is complete."""
    last = (
        sa.select(Message.status)
        .where(Message.conversation_id == Conversation.id)
        .order_by(Message.position.desc())
        .limit(1)
        .scalar_subquery()
    )
    stored = sa.func.coalesce(last, Status.COMPLETE.value) == status.value
    if status not in (Status.RUNNING, Status.INTERRUPTED):
        return stored
    # Replies of a dead process are interrupted although they are stored as running.
    dead = Conversation.id.in_([row.conversation_id for row in running_replies(connection).dead])
    if status is Status.RUNNING:
        return sa.and_(stored, ~dead)
    return sa.or_(stored, dead & (last == Status.RUNNING.value))


def _conversations(
    connection: sa.Connection, rows: Iterable[sa.Row[Any]]
) -> list[records.Conversation]:
    """Conversations with the totals of their messages, in the order of ``rows``."""
    rows = list(rows)
    messages: dict[int, list[Any]] = {row.id: [] for row in rows}
    for message in connection.execute(
        sa.select(*_BRIEF, _DOCUMENTS_VALID[connection.dialect.name].label("documents_valid"))
        .where(Message.conversation_id.in_(list(messages)))
        .order_by(Message.conversation_id, Message.position)
    ):
        messages[message.conversation_id].append(message)
    return [_conversation(row, messages[row.id]) for row in rows]


def _conversation(row: sa.Row[Any], messages: Sequence[Any]) -> records.Conversation:
    damage = Damage()
    for message in messages:
        of_message = Damage()
        of_message.status(message.status)
        of_message.role(message.role)
        of_message.time("created_at", message.created_at)
        if not message.documents_valid:
            of_message.add("one of its documents is not JSON")
        if of_message:
            damage.add(f"message {message.id}: {of_message}")
    return records.Conversation(
        id=row.id,
        title=damage.text("title", row.title),
        created_at=damage.time("created_at", row.created_at),
        updated_at=damage.time("updated_at", row.updated_at),
        messages=len(messages),
        tokens=sum(message.tokens for message in messages),
        status=effective_status(messages[-1]) if messages else Status.COMPLETE,
        model_ids=tuple(
            dict.fromkeys(str(message.model_id) for message in messages if message.model_id)
        ),
        damage=damage.sentence,
    )
