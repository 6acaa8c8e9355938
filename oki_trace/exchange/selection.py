"""What of a conversation is exported, the same for every format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from oki_trace.errors import NotFound
from oki_trace.exchange.trace_object import TraceHead
from oki_trace.queueing import history
from oki_trace.records import Conversation, Message, Role
from oki_trace.store.reading.reader import TraceReader


@dataclass(frozen=True)
class Selection:
    """A conversation at one instant: its messages, and which of them go with their trace.

    ``reader`` sees that instant alone; it is good within ``selected`` only.
    """

    reader: TraceReader
    conversation: Conversation
    messages: Sequence[Message]
    traced: frozenset[int]

    @property
    def replies(self) -> list[Message]:
        """The messages that go with their trace, in order."""
        return [message for message in self.messages if message.id in self.traced]

    @property
    def steps(self) -> int:
        return sum(message.tokens for message in self.replies)

    def head(self, reply: Message, *, tensors: bool = True) -> TraceHead:
        """The trace of a reply but for its steps. ``tensors``: whether they go with it."""
        assert reply.generation is not None and reply.capture is not None
        capture = reply.capture
        if not tensors and self.reader.message_bytes(reply.id):
            capture = replace(capture, tensors_left_out=True)
        return TraceHead(
            model_id=reply.model_id or "",
            prompt=self.reader.prompt(reply.id),
            generation=reply.generation,
            capture=capture,
            messages=history(self.messages, reply.id),
            output=reply.content,
            status=reply.status,
            reason=reply.reason,
            checks=reply.checks,
            parts=reply.parts,
            template=reply.template,
        )

    def has_tensors(self) -> bool:
        """Whether any full tensor is kept of what is exported."""
        return any(self.reader.message_bytes(reply.id) for reply in self.replies)


@contextmanager
def selected(
    reader: TraceReader, conversation_id: int, message_id: int | None = None
) -> Iterator[Selection]:
    """The whole conversation, or up to one of its replies, with the trace of that one alone.

    What is read is of one instant, while replies go on too. Raises NotFound for
    a conversation that is not there, or a message that is no traced reply of it.
    """
    with reader.snapshot() as instant:
        conversation = instant.conversation(conversation_id)
        messages = instant.messages(conversation_id)
        traced = frozenset(message.id for message in messages if is_traced(message))
        if message_id is not None:
            if message_id not in traced:
                raise NotFound(
                    f"Conversation {conversation_id} has no traced message {message_id}. "
                    f"See: oki-trace show {conversation_id}"
                )
            traced = frozenset({message_id})
            end = next(m.position for m in messages if m.id == message_id)
            messages = [m for m in messages if m.position <= end]
        yield Selection(instant, conversation, messages, traced)


def is_traced(message: Message) -> bool:
    """Whether a message has a trace: a reply that has begun."""
    return (
        message.role is Role.ASSISTANT
        and message.generation is not None
        and message.capture is not None
    )
