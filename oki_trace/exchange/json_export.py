"""A conversation as one JSON document.

Shape: ``{"format": "oki-trace", "version": 2, "conversation": {…},
"messages": [{id, role, content, status, trace?}]}``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TextIO

from oki_trace.asking import history
from oki_trace.errors import NotFound
from oki_trace.exchange.trace_object import FORMAT, VERSION, trace_object
from oki_trace.records import Message, Role
from oki_trace.store.reader import TraceReader


def write_conversation(
    reader: TraceReader, conversation_id: int, file: TextIO, message_id: int | None = None
) -> None:
    """Write the whole conversation, or the trace object of one of its replies.

    What is written was true at one instant, while replies go on too. Raises
    NotFound for a conversation or message that is not there.
    """
    with reader.snapshot() as instant:
        if message_id is None:
            document = conversation_object(instant, conversation_id)
        else:
            document = _one_trace(instant, conversation_id, message_id)
    # ASCII, so that it is the same in every encoding and inert in a terminal.
    encoder = json.JSONEncoder(ensure_ascii=True, allow_nan=False, indent=1)
    file.writelines(encoder.iterencode(document))
    file.write("\n")


def _one_trace(reader: TraceReader, conversation_id: int, message_id: int) -> dict[str, Any]:
    messages = reader.messages(conversation_id)
    chosen = next((m for m in messages if m.id == message_id), None)
    trace = chosen and trace_of(reader, messages, chosen)
    if not trace:
        raise NotFound(
            f"Conversation {conversation_id} has no traced message {message_id}. "
            f"See: oki-trace show {conversation_id}"
        )
    return trace


def conversation_object(reader: TraceReader, conversation_id: int) -> dict[str, Any]:
    """The document of a conversation. Raises NotFound."""
    conversation = reader.conversation(conversation_id)
    messages = reader.messages(conversation_id)
    return {
        "format": FORMAT,
        "version": VERSION,
        "conversation": {
            "id": conversation.id,
            "title": conversation.title,
            "created_at": conversation.created_at.isoformat(),
        },
        "messages": [_message(reader, messages, message) for message in messages],
    }


def trace_of(
    reader: TraceReader, messages: Sequence[Message], message: Message
) -> dict[str, Any] | None:
    """The trace object of a reply; None for a message that has none."""
    if message.role is not Role.ASSISTANT or message.generation is None or message.capture is None:
        return None
    return trace_object(
        model_id=message.model_id or "",
        prompt=reader.prompt(message.id),
        generation=message.generation,
        capture=message.capture,
        messages=history(messages, message.id),
        output=message.content,
        status=message.status,
        reason=message.reason,
        steps=reader.iter_steps(message.id),
    )


def _message(reader: TraceReader, messages: Sequence[Message], message: Message) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "id": message.id,
        "role": str(message.role),
        "content": message.content,
        "status": str(message.status),
        "created_at": message.created_at.isoformat(),
    }
    if message.reason is not None:
        plain["reason"] = message.reason
    trace = trace_of(reader, messages, message)
    return plain if trace is None else {**plain, "trace": trace}
