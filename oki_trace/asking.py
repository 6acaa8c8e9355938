"""Asking for a reply: the request is put into the store, and whoever has the model takes it.

No model is needed to ask, nor loaded by importing this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from oki_trace.given_text import checked
from oki_trace.records import (
    CapturePolicy,
    ChatMessage,
    Message,
    ModelChoice,
    Role,
    Sampling,
    Status,
    TurnEnd,
)
from oki_trace.store.writer import TraceWriter

TITLE_LENGTH = 60


@dataclass(frozen=True)
class Ask:
    """A new message for the assistant, and how it is to be answered.

    Raises UsageError for text that cannot be kept as it is.
    """

    content: str
    choice: ModelChoice
    sampling: Sampling = field(default_factory=Sampling)
    policy: CapturePolicy = field(default_factory=CapturePolicy)
    system: str | None = None

    def __post_init__(self) -> None:
        checked(self.content, "The message")
        checked(self.system or "", "The system message")


def submit(
    writer: TraceWriter, ask: Ask, conversation_id: int | None = None, *, claim: bool = False
) -> tuple[int, int]:
    """Put the message and its queued reply into the store: (conversation id, reply id).

    Without ``conversation_id`` a conversation is begun, with the system
    message where there is one. ``claim``: this process answers, no worker may.
    Raises NotFound for an unknown conversation.
    """
    if conversation_id is None:
        conversation_id = writer.create_conversation(title_of(ask.content))
        if ask.system:
            writer.add_message(conversation_id, ChatMessage(Role.SYSTEM, ask.system))
    writer.add_message(conversation_id, ChatMessage(Role.USER, ask.content))
    reply_id = writer.queue_reply(
        conversation_id, ask.choice, ask.sampling, ask.policy, claim=claim
    )
    return conversation_id, reply_id


def title_of(content: str) -> str:
    """A conversation's title: the first line of its first message, shortened."""
    line = next((line.strip() for line in content.splitlines() if line.strip()), "Untitled")
    return line if len(line) <= TITLE_LENGTH else f"{line[: TITLE_LENGTH - 1].rstrip()}…"


def last_choice(messages: Sequence[Message]) -> ModelChoice | None:
    """The model that last spoke in a conversation; else the one last asked, if any was."""
    replies = [message for message in messages if message.choice is not None]
    spoke = [message for message in replies if message.capture is not None]
    return (spoke or replies)[-1].choice if replies else None


def history(messages: Sequence[Message], reply_id: int) -> list[ChatMessage]:
    """What the model is given for this reply: all that was said before it.

    A question whose reply came to nothing is left out with it. It may be the
    very reason (too long for the model), and many chat templates refuse two
    user messages in a row.
    """
    before: list[ChatMessage] = []
    for message in messages:
        if message.id == reply_id:
            break
        if message.role is not Role.ASSISTANT or message.content:
            before.append(ChatMessage(message.role, message.content))
        elif before and before[-1].role is Role.USER:
            before.pop()
    return before


def fail(writer: TraceWriter, reply_id: int, reason: str) -> None:
    """End a reply that could not even begin, with the reason."""
    writer.finish_reply(reply_id, TurnEnd(Status.FAILED, "", reason, 0.0))
