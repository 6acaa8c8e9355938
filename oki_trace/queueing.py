"""Asking for a reply: the request is put into the store, and whoever has the model takes it.

No model is needed to ask, nor loaded by importing this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from oki_trace.errors import UsageError
from oki_trace.input_text import checked
from oki_trace.records import (
    CapturePolicy,
    ChatMessage,
    Message,
    ModelChoice,
    Part,
    Role,
    Sampling,
    Status,
    TemplateOptions,
    TurnEnd,
)
from oki_trace.store.writing.writer import TraceWriter

TITLE_LENGTH = 60


@dataclass(frozen=True)
class Ask:
    """A new message for the assistant, and how it is to be answered.

    ``template`` is given to the chat template. ``role``: a user's, or the answer of
    the tool ``tool_name``. Raises UsageError for text that cannot be kept as it is.
    """

    content: str
    choice: ModelChoice
    sampling: Sampling = field(default_factory=Sampling)
    policy: CapturePolicy = field(default_factory=CapturePolicy)
    system: str | None = None
    template: TemplateOptions | None = None
    role: Role = Role.USER
    tool_name: str | None = None

    def __post_init__(self) -> None:
        checked(self.content, "The message")
        checked(self.system or "", "The system message")


def add_answer(writer: TraceWriter, conversation_id: int, tool: str, content: str) -> int:
    """Add a tool's answer without asking for a reply yet: others are still awaited."""
    return writer.add_message(conversation_id, ChatMessage(Role.TOOL, content, tool_name=tool))


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
    writer.add_message(conversation_id, ChatMessage(ask.role, ask.content, tool_name=ask.tool_name))
    reply_id = writer.queue_reply(
        conversation_id, ask.choice, ask.sampling, ask.policy, claim=claim, template=ask.template
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


def last_template(messages: Sequence[Message]) -> TemplateOptions | None:
    """What the chat template of a conversation was last given beside the messages."""
    replies = [message for message in messages if message.role is Role.ASSISTANT]
    return replies[-1].template if replies else None


def unanswered_calls(messages: Sequence[Message]) -> list[Part]:
    """The tool calls at the end of a conversation that have no answer yet, in order."""
    answered: list[str | None] = []
    for message in reversed(messages):
        if message.role is Role.TOOL:
            answered.append(message.tool_name)
        elif message.role is Role.ASSISTANT and not message.status.is_live:
            calls = [part for part in message.parts if part.kind == "tool_call"]
            for name in reversed(answered):
                # One without a name answers the first that waits.
                at = next((i for i, part in enumerate(calls) if name in (None, part.name)), None)
                if at is not None:
                    calls.pop(at)
            return calls
        else:
            break
    return []


def refuse_unasked_answer(messages: Sequence[Message], tool: str) -> None:
    """Raise UsageError when no call of this tool waits for an answer."""
    waiting = [part.name or "" for part in unanswered_calls(messages)]
    if not waiting:
        raise UsageError(
            "The last reply has no tool call that waits for an answer. Send it as a message."
        )
    if tool not in waiting:
        raise UsageError(f"The last reply did not call {tool!r}. It called {', '.join(waiting)}.")


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
        said = ChatMessage(message.role, message.content, message.parts, message.tool_name)
        if said.role is not Role.ASSISTANT:
            before.append(said)
        elif said.content or any(p.text or p.kind == "tool_call" for p in said.parts):
            if before and before[-1].role is Role.ASSISTANT:
                # It went on with words that were put into its mouth: both are one turn.
                before.append(_joined(before.pop(), said))
            else:
                before.append(said)
        elif before and before[-1].role is Role.USER:
            before.pop()
    return before


def _joined(begun: ChatMessage, rest: ChatMessage) -> ChatMessage:
    """A reply that was begun for the model, and what the model went on with."""
    whole = [part.kind for part in rest.parts] == ["answer"]
    # As the model wrote it: what a tokenizer decodes may lack the space before it.
    text = rest.parts[0].text if whole else rest.content
    content = begun.content + text
    parts = [part for part in (*begun.parts, *rest.parts) if part.kind != "answer"]
    if parts:
        parts.append(Part("answer", content))
    return ChatMessage(Role.ASSISTANT, content, tuple(parts))


def fail(writer: TraceWriter, reply_id: int, reason: str) -> None:
    """End a reply that could not even begin, with the reason."""
    writer.finish_reply(reply_id, TurnEnd(Status.FAILED, "", reason, 0.0))
