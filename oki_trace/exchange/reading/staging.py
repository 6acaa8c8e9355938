"""An import goes into a temporary store first, and from there atomically into the target.

Every check of a file has been made before the target store is touched, however
long the file; then the conversation is copied as any other is (store/writing/copy.py),
in one transaction. The staging store grows to ``most_bytes`` and no further.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from oki_trace.exchange import schema
from oki_trace.exchange.reading.replies import reply_checks, reply_parts, template_options
from oki_trace.exchange.refusal import refused
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
from oki_trace.store.digest import is_as_recorded
from oki_trace.store.writing.lifecycle import PROCESS_ENDED
from oki_trace.store.writing.writer import TraceWriter

# Written at once: steps, rows of their lists, bytes of their tensors.
_STEPS_AT_ONCE = 64
_ROWS_AT_ONCE = 50_000
_TENSOR_BYTES_AT_ONCE = 32_000_000


@dataclass
class Staging:
    """Conversations on their way in. ``tick`` is called with each step."""

    path: Path
    most_bytes: int
    tick: Callable[[], None] = lambda: None
    messages: int = 0
    steps: int = 0
    # The messages that are not what the digests in the file say.
    changed: int = 0
    without_digest: int = 0
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
            self._made = None

    def clear(self) -> None:
        """Begin again with nothing."""
        self.close()
        for file in self.path.parent.glob(f"{self.path.name}*"):
            file.unlink()
        self.messages = self.steps = self.changed = self.without_digest = 0
        self._conversation = None

    @property
    def _writer(self) -> TraceWriter:
        # Made when first needed: most files that are refused are refused before.
        if self._made is None:
            self._made = TraceWriter(self.path, keeps_reserve=False)
        return self._made

    def begin(self, conversation: schema.Conversation) -> None:
        """A new conversation, which what follows belongs to."""
        title = conversation.get("title")
        self._conversation = self._writer.create_conversation(
            "Imported" if title is None else title, created_at=conversation.get("created_at")
        )
        self._ids.clear()

    def say(self, message: schema.Message, where: str) -> None:
        """A message without a trace: complete as it is, or a reply that came to nothing."""
        status = self._counted(message, where)
        if message.get("tokens"):
            raise refused(f"{where}: it has {message['tokens']:,} steps, and no trace")
        if message["role"] is Role.ASSISTANT and message.get("choice"):
            number = self._queue(message, where)
            end = _end(message, status, 0, where)
            self._writer.finish_reply(number, end, digest=message.get("digest"))
        elif message["role"] is not Role.ASSISTANT and status is not Status.COMPLETE:
            raise refused(f"{where}: status of a {message['role']} message can only be complete")
        else:
            parts = reply_parts(message.get("parts"), 0, where)
            if parts and message["role"] is not Role.ASSISTANT:
                raise refused(f"{where}: a {message['role']} message has parts of a reply")
            name = message.get("tool_name")
            said = ChatMessage(message["role"], message["content"], parts, name)
            number = self._writer.add_message(
                self._open(),
                said,
                created_at=message.get("created_at"),
                digest=message.get("digest"),
            )
        self._hold_against(number, message, as_recorded=True)
        self._check_size()

    def reply(
        self,
        message: schema.Message,
        start: TurnStart,
        steps: Iterable[Step],
        where: str,
        *,
        tensors: bool,
    ) -> None:
        """A traced reply. ``tensors``: whether the file holds any full tensors of it."""
        status = self._counted(message, where)
        if message["role"] is not Role.ASSISTANT:
            raise refused(f"{where}: a {message['role']} message has a trace")
        start = _with_tensors_told(start, message, tensors)
        reply = self._queue(message, where, start)
        self._writer.start_reply(reply, start)
        seen = rows = held = 0
        batch: list[Step] = []
        as_recorded = True
        for step in steps:
            as_recorded = as_recorded and is_as_recorded(step)
            seen += 1
            if seen > schema.MAX_STEPS:
                raise refused(f"{where} has more than {schema.MAX_STEPS:,} steps")
            batch.append(step)
            rows += _rows_of(step)
            held += sum(tensor.array.nbytes for tensor in step.tensors)
            full = rows > _ROWS_AT_ONCE or held > _TENSOR_BYTES_AT_ONCE
            if full or len(batch) >= _STEPS_AT_ONCE:
                self._append(reply, batch)
                batch, rows, held = [], 0, 0
            self.tick()
        self._append(reply, batch)
        count = message.get("tokens")
        if count is not None and seen != count:
            raise refused(f"{where} has {seen} of its {count} steps")
        self.steps += seen
        self._writer.finish_reply(
            reply,
            _end(message, status, seen, where),
            tensors_pruned_at=message.get("tensors_pruned_at"),
            digest=message.get("digest"),
        )
        self._hold_against(reply, message, as_recorded=as_recorded)

    # ------------------------------------------------------------------- within

    def _append(self, reply: int, steps: list[Step]) -> None:
        if steps:
            self._writer.append(reply, steps, faithful=True)
        self._check_size()

    def _hold_against(self, number: int, message: schema.Message, *, as_recorded: bool) -> None:
        """Count the message if it, or a step of it, is not what its digest says."""
        told = message.get("digest")
        self.without_digest += told is None
        if not as_recorded or (told is not None and told != self._writer.digest_of(number)):
            self.changed += 1

    def _check_size(self) -> None:
        files = (self.path, self.path.with_name(f"{self.path.name}-wal"))
        if sum(file.stat().st_size for file in files if file.exists()) > self.most_bytes:
            raise refused(
                f"it becomes more than {self.most_bytes / 1e6:,.0f} MB in the store, far more than "
                "an export of its size"
            )

    def _open(self) -> int:
        assert self._conversation is not None
        return self._conversation

    def _counted(self, message: schema.Message, where: str) -> Status:
        self.messages += 1
        if self.messages > schema.MAX_MESSAGES:
            raise refused(f"there are more than {schema.MAX_MESSAGES:,} messages")
        number = message.get("id")
        if number is not None:
            if number in self._ids:
                raise refused(f"two messages have the id {number}")
            self._ids.add(number)
        return message.get("status") or Status.COMPLETE

    def _queue(self, message: schema.Message, where: str, start: TurnStart | None = None) -> int:
        kept = start.capture.policy if start else CapturePolicy()
        return self._writer.queue_reply(
            self._open(),
            message.get("choice") or ModelChoice(start.model_id if start else ""),
            message.get("sampling") or Sampling(),
            message.get("policy") or kept,
            claim=True,
            created_at=message.get("created_at"),
            template=template_options(message.get("template"), where),
        )


def _with_tensors_told(start: TurnStart, message: schema.Message, tensors: bool) -> TurnStart:
    """What is not in the file was left out of it, unless it had been pruned before."""
    wanted = start.capture.policy.tensors != "none"
    left_out = wanted and not tensors and message.get("tensors_pruned_at") is None
    return replace(start, capture=replace(start.capture, tensors_left_out=left_out))


def _rows_of(step: Step) -> int:
    lens = 0 if step.lens is None else step.lens.token_ids.size
    return len(step.topk.tokens) + sum(len(one.positions) for one in step.attention) + lens


def _end(message: schema.Message, status: Status, steps: int, where: str) -> TurnEnd:
    """How the reply ended: one that was still going on was broken off by being exported."""
    if status.is_live:
        status = Status.INTERRUPTED
    unknown = PROCESS_ENDED if status is Status.INTERRUPTED else "not recorded"
    reason, seconds = message.get("reason"), message.get("seconds")
    return TurnEnd(
        status,
        message["content"],
        unknown if reason is None else reason,
        float("nan") if seconds is None else seconds,
        reply_checks(message.get("checks")),
        reply_parts(message.get("parts"), steps, where),
    )
