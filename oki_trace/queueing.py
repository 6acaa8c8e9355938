"""Queues a reply: writes the request to the store, from which a process with the model takes it.

Importing this loads no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from oki_trace.errors import UsageError
from oki_trace.input_text import require_storable
from oki_trace.message_tree import path_to
from oki_trace.records import (
    NO_PARENT,
    CapturePolicy,
    ChatMessage,
    Forced,
    Message,
    ModelChoice,
    Part,
    Role,
    Sampling,
    Status,
    TemplateOptions,
    TurnEnd,
)

if TYPE_CHECKING:
    from oki_trace.store.reading.reader import Reader
    from oki_trace.store.writing.writer import TraceWriter

TITLE_LENGTH = 60


@dataclass(frozen=True)
class ReplyRequest:
    """New messages of a conversation, and how the assistant's reply to them is generated.

    ``template`` goes to the chat template; ``forced`` are the reply's first tokens. Raises
    UsageError for text that cannot be stored unchanged.
    """

    messages: Sequence[ChatMessage]
    choice: ModelChoice
    sampling: Sampling = field(default_factory=Sampling)
    policy: CapturePolicy = field(default_factory=CapturePolicy)
    template: TemplateOptions | None = None
    forced: Forced | None = None

    def __post_init__(self) -> None:
        for message in self.messages:
            name = "The system message" if message.role is Role.SYSTEM else "The message"
            require_storable(message.content, name)
        _require_storable_text(self.forced)


def _require_storable_text(forced: Forced | None) -> None:
    if forced is not None and forced.text is not None:
        require_storable(forced.text, "The beginning of the reply")


def new_messages(
    content: str, *, system: str | None = None, tool: str | None = None
) -> tuple[ChatMessage, ...]:
    """A user's message, or the result of ``tool``, after the system message if there is one."""
    role = Role.USER if tool is None else Role.TOOL
    message = ChatMessage(role, content, tool_name=tool)
    return (ChatMessage(Role.SYSTEM, system), message) if system else (message,)


def submit(
    writer: TraceWriter,
    request: ReplyRequest,
    conversation_id: int | None = None,
    *,
    parent_id: int | None = None,
    claim: bool = False,
) -> tuple[int, int]:
    """Write the messages and their queued reply to the store: (conversation id, reply id).

    Without ``conversation_id`` a new conversation begins, titled after the last message.
    The messages follow ``parent_id``, by default the newest message of the conversation.
    ``claim``: this process generates the reply, no worker may. Raises NotFound for an
    unknown conversation.
    """
    if conversation_id is None:
        conversation_id = writer.create_conversation(title_of(request.messages[-1].content))
    for message in request.messages:
        parent_id = writer.add_message(conversation_id, message, parent_id=parent_id)
    reply_id = writer.queue_reply(
        conversation_id,
        request.choice,
        request.sampling,
        request.policy,
        claim=claim,
        template=request.template,
        parent_id=parent_id,
        forced=request.forced,
    )
    return conversation_id, reply_id


def submit_branch(
    writer: TraceWriter,
    origin: Message,
    step: int,
    sampling: Sampling,
    policy: CapturePolicy,
    *,
    forced: Forced | None = None,
    choice: ModelChoice | None = None,
    claim: bool = False,
) -> int:
    """Queue a reply that departs from ``origin`` at a step; returns its id.

    Without ``forced`` the model chooses at that step too: step 0 regenerates the reply, and
    a step as large as the number of its tokens continues it. Raises UsageError if the message
    has no such step, and for a text that cannot be stored unchanged.
    """
    require_fork(origin, step)
    _require_storable_text(forced)
    return writer.queue_reply(
        origin.conversation_id,
        choice or origin.choice or ModelChoice(origin.model_id or ""),
        sampling,
        policy,
        claim=claim,
        template=origin.template,
        parent_id=origin.parent_id or NO_PARENT,
        branch_of=origin.id,
        branch_step=step,
        forced=forced,
    )


class Candidate(NamedTuple):
    """A token that a branch may go on with, and the model's probability of it."""

    token_id: int
    token: str
    prob: float


def fork_candidates(reader: Reader, origin: Message, step: int, ranks: range) -> list[Candidate]:
    """The stored candidates of these ranks, from 1 on, at a step of ``origin``.

    Raises UsageError if the step has not as many.
    """
    require_fork(origin, step)
    if step == origin.tokens:
        raise UsageError(
            f"Message {origin.id} ends before step {step}, so it has no candidates there. Give a "
            "token, or leave the choice to the model."
        )
    top = reader.step(origin.id, step).topk
    stored = zip(top.token_ids.tolist(), top.tokens, top.probs.tolist(), strict=True)
    known = [Candidate(*one) for one in stored if one[0] >= 0]
    if ranks.stop - 1 > len(known):
        raise UsageError(
            f"Step {step} of message {origin.id} has {len(known)} stored candidates. Choose among "
            "these, or give the token itself."
        )
    return [known[rank - 1] for rank in ranks]


def require_fork(origin: Message, step: int) -> None:
    """Raise UsageError unless a reply can depart from ``origin`` at this step."""
    if origin.role is not Role.ASSISTANT or origin.prompt_len is None:
        raise UsageError(f"Message {origin.id} is no generated reply, so nothing branches from it.")
    if origin.sampling is not None and not origin.tokens and origin.reason == "scored":
        raise UsageError(f"Message {origin.id} is a scored text, so nothing branches from it.")
    if not 0 <= step <= origin.tokens:
        raise UsageError(
            f"Message {origin.id} has {origin.tokens} tokens. Choose a step from 0 to "
            f"{origin.tokens}."
        )


def add_tool_result(writer: TraceWriter, conversation_id: int, tool: str, content: str) -> int:
    """Add the result of one tool without queueing a reply: other calls still have none."""
    return writer.add_message(conversation_id, *new_messages(content, tool=tool))


def title_of(content: str) -> str:
    """A conversation's title: the first line of its first message, shortened."""
    line = next((line.strip() for line in content.splitlines() if line.strip()), "Untitled")
    return line if len(line) <= TITLE_LENGTH else f"{line[: TITLE_LENGTH - 1].rstrip()}…"


def last_choice(messages: Sequence[Message]) -> ModelChoice | None:
    """The model of the last reply that began; else the model that was last requested."""
    replies = [message for message in messages if message.choice is not None]
    begun = [message for message in replies if message.capture is not None]
    return (begun or replies)[-1].choice if replies else None


def last_template(messages: Sequence[Message]) -> TemplateOptions | None:
    """The template options of the last reply."""
    replies = [message for message in messages if message.role is Role.ASSISTANT]
    return replies[-1].template if replies else None


def unanswered_calls(messages: Sequence[Message]) -> list[Part]:
    """The tool calls at the end of a conversation that have no result yet, in order."""
    results: list[str | None] = []
    for message in reversed(messages):
        if message.role is Role.TOOL:
            results.append(message.tool_name)
        elif message.role is Role.ASSISTANT and not message.status.is_live:
            calls = [part for part in message.parts if part.kind == "tool_call"]
            for name in reversed(results):
                # A result without a name belongs to the first open call.
                at = next((i for i, part in enumerate(calls) if name in (None, part.name)), None)
                if at is not None:
                    calls.pop(at)
            return calls
        else:
            break
    return []


def require_call(messages: Sequence[Message], tool: str) -> None:
    """Raise UsageError unless a call of this tool waits for its result."""
    waiting = [part.name or "" for part in unanswered_calls(messages)]
    if not waiting:
        raise UsageError(
            "The last reply has no tool call that waits for a result. Send the text as a message."
        )
    if tool not in waiting:
        raise UsageError(f"The last reply did not call {tool!r}. It called {', '.join(waiting)}.")


def history(messages: Sequence[Message], reply_id: int) -> list[ChatMessage]:
    """The messages on the path to this reply, as the model gets them.

    A user message whose reply is empty is left out together with that reply: it may be
    the cause (too long for the model), and many chat templates refuse two user messages
    in a row.
    """
    before: list[ChatMessage] = []
    for message in path_to(messages, reply_id)[:-1]:
        turn = ChatMessage(message.role, message.content, message.parts, message.tool_name)
        if turn.role is not Role.ASSISTANT:
            before.append(turn)
        elif turn.content or any(p.text or p.kind == "tool_call" for p in turn.parts):
            if before and before[-1].role is Role.ASSISTANT:
                # The model continued a prefilled message: both are one turn.
                turn = _joined(before.pop(), turn)
            before.append(turn)
        elif before and before[-1].role is Role.USER:
            before.pop()
    return before


def _joined(prefill: ChatMessage, rest: ChatMessage) -> ChatMessage:
    """A prefilled message and the model's continuation, as one message."""
    is_plain = [part.kind for part in rest.parts] == ["answer"]
    # The part keeps the space before the first word, which ``content`` may lack.
    content = prefill.content + (rest.parts[0].text if is_plain else rest.content)
    parts = [part for part in (*prefill.parts, *rest.parts) if part.kind != "answer"]
    if parts:
        parts.append(Part("answer", content))
    return ChatMessage(Role.ASSISTANT, content, tuple(parts))


def fail(writer: TraceWriter, reply_id: int, reason: str) -> None:
    """End a reply that could not begin, with the reason."""
    writer.finish_reply(reply_id, TurnEnd(Status.FAILED, "", reason, 0.0))
