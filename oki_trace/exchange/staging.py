"""What is imported goes into a store of its own first, and from there whole or not at all.

Every check of a file has been made before the target store is touched, however
long the file; then the conversation is copied as any other is (store/copy.py),
in one transaction.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from oki_trace.exchange import incoming
from oki_trace.exchange.fields import Fields, wrong
from oki_trace.records import (
    CapturePolicy,
    ChatMessage,
    ModelChoice,
    Role,
    Sampling,
    Status,
    Step,
    TurnEnd,
    TurnStart,
)
from oki_trace.store.identity import Db
from oki_trace.store.lifecycle import PROCESS_ENDED
from oki_trace.store.writer import TraceWriter

# A step of a large model with its tensors takes megabytes.
_STEPS_AT_ONCE = 64
_TENSOR_BYTES_AT_ONCE = 32_000_000


@dataclass
class Staging:
    """Conversations on their way in."""

    db: Db
    messages: int = 0
    steps: int = 0
    _ids: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._made: TraceWriter | None = None
        self._conversation: int | None = None

    @property
    def began(self) -> bool:
        """Whether there is a conversation, be it an empty one."""
        return self._conversation is not None

    def close(self) -> None:
        if self._made is not None:
            self._made.close()

    @property
    def _writer(self) -> TraceWriter:
        # Made when first needed: most files that are refused are refused before.
        if self._made is None:
            self._made = TraceWriter(self.db)
        return self._made

    def begin(self, conversation: Fields | None, title: str = "Imported") -> None:
        """A new conversation, which what follows belongs to."""
        said = conversation or Fields({}, "conversation")
        title, created_at = said.text("title", title, most=100_000), said.time("created_at")
        self._conversation = self._writer.create_conversation(title, created_at=created_at)
        self._ids.clear()

    def say(self, message: Fields) -> None:
        """A message without a trace: complete as it is, or a reply that came to nothing."""
        role, status = self._counted(message)
        content = message.text("content")
        # Read before anything is written, so that what is wrong costs nothing.
        created_at = message.time("created_at")
        if role is not Role.ASSISTANT or "choice" not in message:
            if status is not Status.COMPLETE and role is not Role.ASSISTANT:
                raise message.wrong("status", f"of a {role} message can only be complete")
            self._writer.add_message(
                self._open(), ChatMessage(role, content), created_at=created_at
            )
            return
        reply = self._queue(message)
        self._writer.finish_reply(reply, _end(message, status, content))

    def reply(
        self, message: Fields, start: TurnStart, steps: Iterable[Step], count: int | None
    ) -> None:
        """A traced reply; ``count``: the steps it said it has."""
        _, status = self._counted(message)
        reply = self._queue(message, start)
        self._writer.start_reply(reply, start)
        seen = 0
        batch: list[Step] = []
        held = 0
        for step in steps:
            seen += 1
            if seen > incoming.MAX_STEPS:
                raise wrong(f"{message.where} has more than {incoming.MAX_STEPS:,} steps")
            batch.append(step)
            held += sum(tensor.array.nbytes for tensor in step.tensors)
            if len(batch) >= _STEPS_AT_ONCE or held > _TENSOR_BYTES_AT_ONCE:
                self._writer.append(reply, batch, faithful=True)
                batch, held = [], 0
        if batch:
            self._writer.append(reply, batch, faithful=True)
        if count is not None and seen != count:
            raise wrong(f"{message.where} has {seen} of its {count} steps")
        self.steps += seen
        self._writer.finish_reply(reply, _end(message, status, message.text("content")))

    def _open(self) -> int:
        assert self._conversation is not None
        return self._conversation

    def _counted(self, message: Fields) -> tuple[Role, Status]:
        self.messages += 1
        if self.messages > incoming.MAX_MESSAGES:
            raise wrong(f"there are more than {incoming.MAX_MESSAGES:,} messages")
        number = message.integer("id", None, high=2**63)
        if number is not None:
            if number in self._ids:
                raise wrong(f"two messages have the id {number}")
            self._ids.add(number)
        try:
            role = Role(message.text("role"))
            status = Status(message.text("status", "complete"))
        except ValueError as error:
            raise wrong(f"{message.where}: {error}") from error
        return role, status

    def _queue(self, message: Fields, start: TurnStart | None = None) -> int:
        asked = message.object("choice")
        wished = message.object("sampling")
        kept = message.object("policy")
        model_id = start.model_id if start else ""
        return self._writer.queue_reply(
            self._open(),
            incoming.choice(asked) if asked else ModelChoice(model_id),
            incoming.sampling(wished) if wished else Sampling(),
            incoming.policy(kept) if kept else start.capture.policy if start else CapturePolicy(),
            claim=True,
            created_at=message.time("created_at"),
        )


def _end(message: Fields, status: Status, content: str) -> TurnEnd:
    """How the reply ended: one that was still going on was broken off by being exported."""
    if status.is_live:
        status = Status.INTERRUPTED
    unknown = PROCESS_ENDED if status is Status.INTERRUPTED else "not recorded"
    reason = message.text("reason", unknown, most=100_000)
    return TurnEnd(status, content, reason, message.number("seconds"))
