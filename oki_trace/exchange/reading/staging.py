"""The temporary store that an import fills before the target store is touched.

Every value of the file is checked before it is written to this store. The conversations
are then copied to the target store like any others (``store/writing/copy.py``), in one
transaction each. The temporary store grows to at most ``most_bytes``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from oki_trace.exchange.reading import validation
from oki_trace.exchange.reading.replies import reply_parts
from oki_trace.exchange.reading.validation import value_or
from oki_trace.exchange.refusal import refused
from oki_trace.records import (
    NO_PARENT,
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
from oki_trace.store.digest import is_as_recorded
from oki_trace.store.writing.lifecycle import PROCESS_ENDED
from oki_trace.store.writing.writer import TraceWriter

# In one transaction: steps, rows of their lists, bytes of their tensors.
_BATCH_STEPS = 64
_BATCH_ROWS = 50_000
_BATCH_TENSOR_BYTES = 32_000_000


@dataclass
class Staging:
    """Conversations to be imported. ``tick`` is called with each step.

    ``changed`` counts the messages that differ from their digest in the file,
    ``without_digest`` those that have none.
    """

    path: Path
    most_bytes: int
    tick: Callable[[], None] = lambda: None
    messages: int = 0
    steps: int = 0
    changed: int = 0
    without_digest: int = 0
    # The ids of the messages of the conversation in this store, by their ids in the file.
    _ids: dict[int, int | None] = field(default_factory=dict)
    _open_writer: TraceWriter | None = None
    _conversation: int | None = None

    @property
    def began(self) -> bool:
        """Whether there is a conversation, even an empty one."""
        return self._conversation is not None

    def close(self) -> None:
        if self._open_writer is not None:
            self._open_writer.close()
            self._open_writer = None

    def clear(self) -> None:
        """Remove everything, to begin again."""
        self.close()
        for file in self.path.parent.glob(f"{self.path.name}*"):
            file.unlink()
        self.messages = self.steps = self.changed = self.without_digest = 0
        self._conversation = None

    @property
    def _writer(self) -> TraceWriter:
        # Opened when first needed: most files that are refused are refused before.
        if self._open_writer is None:
            self._open_writer = TraceWriter(self.path, keeps_reserve=False)
        return self._open_writer

    def begin(self, conversation: validation.Conversation) -> None:
        """Begin a new conversation, which the messages that follow belong to."""
        self._conversation = self._writer.create_conversation(
            value_or(conversation, "title", "Imported"), created_at=conversation.get("created_at")
        )
        self._ids.clear()

    def add_message(self, message: validation.Message, where: str) -> None:
        """Add a message without a trace, or a reply that failed before its first token."""
        role, status = message["role"], self._checked_status(message, where)
        if message.get("tokens"):
            raise refused(f"{where}: it has {message['tokens']:,} steps, but no trace")
        if role is Role.ASSISTANT and message.get("choice"):
            number = self._queue(message, where)
            end = _end(message, status, 0, where)
            self._writer.finish_reply(number, end, digest=message.get("digest"))
        elif role is not Role.ASSISTANT and status is not Status.COMPLETE:
            raise refused(f"{where}: the status of a {role} message must be complete")
        else:
            parts = reply_parts(message.get("parts"), 0, where)
            if parts and role is not Role.ASSISTANT:
                raise refused(f"{where}: a {role} message has parts of a reply")
            number = self._writer.add_message(
                self._conversation_id(),
                ChatMessage(role, message["content"], parts, message.get("tool_name")),
                parent_id=self._parent(message, where),
                created_at=message.get("created_at"),
                digest=message.get("digest"),
            )
        self._compare_digest(number, message, as_recorded=True)
        self._check_size()

    def add_reply(
        self,
        message: validation.Message,
        start: TurnStart,
        steps: Iterable[Step],
        where: str,
        *,
        has_tensors: bool,
    ) -> None:
        """Add a traced reply. ``has_tensors``: whether the file has any full tensor of it."""
        status = self._checked_status(message, where)
        if message["role"] is not Role.ASSISTANT:
            raise refused(f"{where}: a {message['role']} message has a trace")
        # Tensors that the file does not have were left out of it, unless they were pruned before.
        captured = start.capture.policy.tensors != "none"
        left_out = captured and not has_tensors and message.get("tensors_pruned_at") is None
        start = replace(start, capture=replace(start.capture, tensors_left_out=left_out))
        reply = self._queue(message, where, start)
        self._writer.start_reply(reply, start)
        count = generated = rows = tensor_bytes = 0
        batch: list[Step] = []
        as_recorded = True
        for step in steps:
            as_recorded = as_recorded and is_as_recorded(step)
            count += 1
            generated += step.origin != "given"
            if count > validation.MAX_STEPS:
                raise refused(f"{where} has more than {validation.MAX_STEPS:,} steps")
            batch.append(step)
            rows += _row_count(step)
            tensor_bytes += sum(tensor.array.nbytes for tensor in step.tensors)
            full = rows > _BATCH_ROWS or tensor_bytes > _BATCH_TENSOR_BYTES
            if full or len(batch) >= _BATCH_STEPS:
                self._append(reply, batch)
                batch, rows, tensor_bytes = [], 0, 0
            self.tick()
        self._append(reply, batch)
        if generated != value_or(message, "tokens", generated):
            raise refused(f"{where} has {generated} of its {message['tokens']} steps")
        self.steps += count
        self._writer.finish_reply(
            reply,
            _end(message, status, generated, where),
            tensors_pruned_at=message.get("tensors_pruned_at"),
            digest=message.get("digest"),
        )
        self._compare_digest(reply, message, as_recorded=as_recorded)

    def _append(self, reply: int, steps: list[Step]) -> None:
        if steps:
            self._writer.append(reply, steps, faithful=True)
        self._check_size()

    def _compare_digest(
        self, number: int, message: validation.Message, *, as_recorded: bool
    ) -> None:
        """Count the message if it, or a step of it, differs from its digest."""
        if message.get("id") is not None:
            self._ids[message["id"] or 0] = number
        digest = message.get("digest")
        self.without_digest += digest is None
        if not as_recorded or (digest is not None and digest != self._writer.digest_of(number)):
            self.changed += 1

    def _check_size(self) -> None:
        files = (self.path, self.path.with_name(f"{self.path.name}-wal"))
        if sum(file.stat().st_size for file in files if file.exists()) > self.most_bytes:
            raise refused(
                f"it would take more than {self.most_bytes / 1e6:,.0f} MB in the store, far more "
                "than an export of its size"
            )

    def _conversation_id(self) -> int:
        assert self._conversation is not None
        return self._conversation

    def _checked_status(self, message: validation.Message, where: str) -> Status:
        """The status of the next message, which is counted and has a new id."""
        self.messages += 1
        if self.messages > validation.MAX_MESSAGES:
            raise refused(f"there are more than {validation.MAX_MESSAGES:,} messages")
        number = message.get("id")
        if number is not None:
            if number in self._ids:
                raise refused(f"two messages have the id {number}")
            self._ids[number] = None
        return message.get("status") or Status.COMPLETE

    def _parent(self, message: validation.Message, where: str) -> int | None:
        """The message that this one follows, in this store; by default the one before it."""
        parent = message.get("parent_id")
        if parent is None or parent == NO_PARENT:
            return parent
        known = self._ids.get(parent)
        if known is None:
            raise refused(f"{where}: it follows message {parent}, which does not come before it")
        return known

    def _queue(
        self, message: validation.Message, where: str, start: TurnStart | None = None
    ) -> int:
        of = self._ids.get(message.get("branch_of") or 0)
        return self._writer.queue_reply(
            self._conversation_id(),
            message.get("choice") or ModelChoice(start.model_id if start else ""),
            message.get("sampling") or Sampling(),
            message.get("policy") or (start.capture.policy if start else CapturePolicy()),
            claim=True,
            created_at=message.get("created_at"),
            template=message.get("template"),
            parent_id=self._parent(message, where),
            branch_of=of,
            branch_step=message.get("branch_step"),
            forced=message.get("forced"),
        )


def _row_count(step: Step) -> int:
    lenses = (*step.lenses, *([] if step.lens is None else [step.lens]))
    lists = [
        *(len(one.positions) for one in step.attention),
        *(len(r.experts) for r in step.router),
    ]
    return len(step.topk.tokens) + sum(lists) + sum(lens.token_ids.size for lens in lenses)


def _end(message: validation.Message, status: Status, steps: int, where: str) -> TurnEnd:
    """How the reply ended. One that was running when it was exported was interrupted."""
    if status.is_live:
        status = Status.INTERRUPTED
    unknown = PROCESS_ENDED if status is Status.INTERRUPTED else "not recorded"
    return TurnEnd(
        status,
        message["content"],
        reason=value_or(message, "reason", unknown),
        seconds=value_or(message, "seconds", float("nan")),
        checks=message.get("checks"),
        parts=reply_parts(message.get("parts"), steps, where),
    )
