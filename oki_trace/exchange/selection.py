"""The part of a conversation that is exported, the same for every format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

from oki_trace.errors import NotFound
from oki_trace.exchange.trace_object import TraceHead
from oki_trace.message_tree import newest_path, path_to
from oki_trace.queueing import history
from oki_trace.records import Conversation, Message, Role, Step, TurnEnd, TurnStart
from oki_trace.reporting import Progress
from oki_trace.store.reading.reader import Reader


@dataclass
class Selection:
    """A snapshot of a conversation: its messages, of which ``traced`` are exported with traces.

    ``reader`` reads that snapshot, and only within ``selected``. ``single`` is the
    reply whose trace is exported alone; None for a whole conversation. ``tensors``: whether
    the full tensors are exported as well; a trace without them says so. ``given``: whether
    the steps of given tokens are exported.
    """

    reader: Reader
    conversation: Conversation
    messages: Sequence[Message]
    traced: frozenset[int]
    single: Message | None = None
    tensors: bool = True
    given: bool = True
    progress: Progress = lambda done, total: None
    _done: int = 0

    @cached_property
    def replies(self) -> list[Message]:
        """The messages that are exported with their traces, in order."""
        return [message for message in self.messages if message.id in self.traced]

    @cached_property
    def steps(self) -> int:
        """The number of steps that are exported, generated and given."""
        return sum(reply.tokens for reply in self.replies) + (self.given_steps * self.given)

    @cached_property
    def given_steps(self) -> int:
        """The number of steps of given tokens, whether or not they are exported."""
        return sum(self.reader.given_count(reply.id) for reply in self.replies)

    def iter_steps(self, reply: Message, *, given: bool = False) -> Iterator[Step]:
        """The generated steps of a reply, or its given ones, as they are read.

        ``progress`` is called after each.
        """
        for step in self.reader.iter_steps(reply.id, given=given):
            yield step
            self._done += 1
            self.progress(self._done, self.steps)

    def head(self, reply: Message) -> TraceHead:
        """The trace of a reply without its steps."""
        assert reply.generation is not None and reply.capture is not None
        capture = reply.capture
        if not self.tensors and self.reader.message_bytes(reply.id):
            capture = replace(capture, tensors_left_out=True)
        start = TurnStart(
            reply.model_id or "",
            self.reader.prompt(reply.id),
            reply.generation,
            capture,
            reply.prefix_len,
        )
        end = TurnEnd(
            *(reply.status, reply.content, reply.reason or "", reply.seconds or 0.0),
            *(reply.checks, reply.parts),
        )
        return TraceHead(start, end, history(self.messages, reply.id), reply.template)

    def has_tensors(self) -> bool:
        """Whether the store has any full tensor of the exported replies."""
        return any(self.reader.message_bytes(reply.id) for reply in self.replies)


@contextmanager
def selected(
    reader: Reader,
    conversation_id: int,
    message_id: int | None = None,
    progress: Progress | None = None,
    *,
    branch: int | None = None,
    tensors: bool = True,
    given: bool = True,
) -> Iterator[Selection]:
    """A conversation, or its messages up to one reply with the trace of that reply alone.

    ``branch``: only the newest path through this message, of all branches.

    Everything is read from one snapshot, while replies may be running. Raises
    NotFound if the conversation, or its traced message, does not exist.
    """
    with reader.snapshot() as instant:
        conversation = instant.conversation(conversation_id)
        messages = instant.messages(conversation_id)
        if branch is not None:
            if branch not in {message.id for message in messages}:
                raise NotFound(
                    f"Conversation {conversation_id} has no message {branch}. "
                    f"See: oki-trace show {conversation_id} --tree"
                )
            messages = _numbered(newest_path(messages, through=branch))
        traced = {message.id: message for message in messages if is_traced(message)}
        single = None
        if message_id is not None:
            single = traced.get(message_id)
            if single is None:
                raise NotFound(
                    f"Conversation {conversation_id} has no traced message {message_id}. "
                    f"See: oki-trace show {conversation_id}"
                )
            traced = {message_id: single}
            messages = _numbered(path_to(messages, single.id))
        report = progress or (lambda done, total: None)
        chosen = (instant, conversation, messages, frozenset(traced), single)
        yield Selection(*chosen, tensors=tensors, given=given, progress=report)


def _numbered(path: Sequence[Message]) -> list[Message]:
    """The messages of one branch, numbered as in a conversation that has no other."""
    return [replace(message, position=position) for position, message in enumerate(path)]


def is_traced(message: Message) -> bool:
    """Whether a message has a trace: a reply that has begun."""
    return (
        message.role is Role.ASSISTANT
        and message.generation is not None
        and message.capture is not None
    )
