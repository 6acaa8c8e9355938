"""Verifies that the data of a store keeps the store's guarantees.

Every problem is a Finding, one line; nothing is changed. A step's rows are compared
with each other and with its full tensors, within the error that the tensors' codec
allows. A few steps are in memory at a time, however large the store. They are read from
one snapshot, so a reply can be generated meanwhile.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, func, select, text

from oki_trace.errors import NotFound, StoreError, TensorError
from oki_trace.records import Message, Role, Status, Step, TensorRecord
from oki_trace.reporting import Progress
from oki_trace.store.digest import BEFORE_DIGESTS, step_changes, tensor_changes
from oki_trace.store.maintenance.invariants import names_agree, rows_agree, tensor_agrees
from oki_trace.store.maintenance.list_checks import broken_lists
from oki_trace.store.reading.reader import Snapshot, TraceReader
from oki_trace.store.reading.steps import within
from oki_trace.store.reading.tensors import TENSOR_COLUMNS, tensor_record
from oki_trace.store.schema import models
from oki_trace.store.schema.column_types import BrokenTime
from oki_trace.store.writing import message_digest

_BATCH = 16
# A process that is killed loses the lens of its last steps.
_COMPLETE = (Status.COMPLETE, Status.STOPPED)
_UNREADABLE = (StoreError, ValueError, TypeError, KeyError)
# The columns of a step that its record does not have.
_STEP = (
    models.Step.id,
    models.Step.step_index,
    models.Step.position,
    models.Step.settle_layer,
    models.Step.tensor_bytes,
    models.Step.greedy_id,
)


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem and its place; None: it concerns the whole store, conversation or message."""

    conversation_id: int | None
    message_id: int | None
    step_index: int | None
    what: str

    def __str__(self) -> str:
        place = {
            "conversation": self.conversation_id,
            "message": self.message_id,
            "step": self.step_index,
        }
        words = [f"{name} {number}" for name, number in place.items() if number is not None]
        return f"{', '.join(words) or 'store'}: {self.what}"


class Verification:
    """The check of a store, or of one conversation: iterate over its findings.

    ``messages``, ``steps`` and ``tensors`` count what has been checked so far,
    ``without_digest`` the messages that were recorded by a program without digests.
    Raises NotFound for a conversation that does not exist.
    """

    def __init__(
        self,
        reader: TraceReader,
        conversation_id: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._reader = reader
        self._progress = progress
        self.messages = self.steps = self.tensors = self.without_digest = 0
        self._whole_store = conversation_id is None
        if conversation_id is None:
            self._conversations = reader.scalars(select(models.Conversation.id).order_by("id"))
            self._total = reader.scalar(select(func.count(models.Step.id)))
        else:
            self._conversations = [conversation_id]
            self._total = reader.conversation(conversation_id).tokens

    def __iter__(self) -> Iterator[Finding]:
        if self._whole_store:
            for problem in self._file():
                yield Finding(None, None, None, problem)
        for conversation_id in self._conversations:
            # A conversation that was deleted meanwhile has no problem.
            with suppress(NotFound):
                yield from self._conversation(conversation_id)

    def _file(self) -> Iterator[str]:
        """SQLite's own checks of its file; a PostgreSQL server checks its own."""
        if self._reader.file is None:
            return
        try:
            damage = self._reader.scalars(text("PRAGMA integrity_check"))
            orphans = self._reader.rows(text("PRAGMA foreign_key_check"))
        except StoreError as error:
            yield f"the file is damaged ({error})"
            return
        for problem in damage:
            if problem != "ok":
                yield f"the file is damaged ({problem})"
        for row in orphans:
            yield f"a row of {row[0]} belongs to a row of {row[2]} that is missing"

    def _conversation(self, conversation_id: int) -> Iterator[Finding]:
        try:
            messages = self._reader.messages(conversation_id)
        except NotFound:
            raise
        except _UNREADABLE as error:
            yield Finding(conversation_id, None, None, f"it cannot be read ({error})")
            return
        for problem in self._times(conversation_id):
            yield Finding(conversation_id, None, None, problem)
        earlier: set[int] = set()
        for place, message in enumerate(messages):
            self.messages += 1
            try:
                for problem in self._message(message, place, earlier):
                    yield Finding(conversation_id, message.id, None, problem)
                if message.role is Role.ASSISTANT:
                    for step_index, problem in self._reply(message):
                        yield Finding(conversation_id, message.id, step_index, problem)
            except NotFound:
                return
            except _UNREADABLE as error:
                problem = f"it cannot be read further ({error})"
                yield Finding(conversation_id, message.id, None, problem)
            earlier.add(message.id)

    def _times(self, conversation_id: int) -> Iterator[str]:
        table = models.Conversation
        for name in ("created_at", "updated_at"):
            time = self._reader.scalar(
                select(getattr(table, name)).where(table.id == conversation_id)
            )
            if isinstance(time, BrokenTime):
                yield f"its {name} is {time.stored!r}"

    def _message(self, message: Message, place: int, earlier: Collection[int]) -> Iterator[str]:
        """Compare a message as a whole with its place and its digest."""
        if message.position != place:
            yield f"it is at position {message.position} instead of {place}"
        if message.parent_id is not None and message.parent_id not in earlier:
            yield f"it follows message {message.parent_id}, which does not come before it"
        if message.damage is not None:
            yield message.damage
        yield from self._reader.ask(
            lambda connection: message_digest.changes(connection, message.id)
        )
        if message.digest == BEFORE_DIGESTS:
            self.without_digest += 1

    def _reply(self, message: Message) -> Iterator[tuple[int | None, str]]:
        """The problems of a reply, each with its step (None: the reply as a whole)."""
        if message.capture is None or message.prompt_len is None:
            # A reply that no model was asked for was written by hand.
            requested = message.choice is not None
            if message.tokens or (requested and message.status is Status.COMPLETE):
                yield None, "its capture report or the length of its prompt is missing"
            return
        for problem in self._prompt(message.id, message.prompt_len):
            yield None, problem
        for given in (True, False):
            for row, problem in self._steps(message, given=given):
                # A given token has no step_index, its position names it.
                place = f"position {row.position}: " if given else ""
                yield row.step_index, place + problem

    def _steps(self, message: Message, *, given: bool) -> Iterator[tuple[Row[Any], str]]:
        """The problems of a reply's generated steps, or those of its given tokens."""
        index = models.Step.position if given else models.Step.step_index
        expected = first = 0
        while True:
            query = select(*_STEP).where(*within(message.id, first, given=given)).order_by(index)
            with self._reader.snapshot() as instant:
                rows = instant.rows(query.limit(_BATCH))
                if not rows:
                    return
                # It may have gone on, ended or been pruned since the batch before.
                message = instant.message(message.id)
                lists = broken_lists(instant, [row.id for row in rows])
                for row in rows:
                    problems = lists.get(row.id, [])
                    if not given and row.step_index != expected:
                        problems.append(f"step {expected} is missing before it")
                    expected = 0 if given else row.step_index + 1
                    problems.extend(self._step(instant, message, row))
                    for problem in problems:
                        yield row, problem
                first = (rows[-1].position if given else rows[-1].step_index) + 1
            self.steps += len(rows)
            if self._progress is not None:
                self._progress(self.steps, max(self._total, self.steps))

    def _prompt(self, message_id: int, prompt_len: int) -> Iterator[str]:
        position = models.PromptToken.position
        ((count, first, last),) = self._reader.rows(
            select(func.count(), func.min(position), func.max(position)).where(
                models.PromptToken.message_id == message_id
            )
        )
        if count and (first, last) != (0, count - 1):
            yield f"the tokens of its prompt are at {first} to {last}"
        if count != prompt_len:
            yield f"its prompt has {count} tokens instead of {prompt_len}"

    def _step(self, instant: Snapshot, message: Message, row: Row[Any]) -> Iterator[str]:
        try:
            if row.step_index is None:
                step = instant.step(message.id, row.position, given=True)
            else:
                step = instant.step(message.id, row.step_index)
        except StoreError as error:
            yield f"its rows do not fit together ({error.__cause__ or error})"
            return
        if step.lens is not None and step.lens.settle_layer != row.settle_layer:
            yield f"its lens does not settle at layer {row.settle_layer}"
        greedy = None if step.decision is None else step.decision.greedy.token_id
        if greedy != row.greedy_id:
            yield f"its greedy token is {row.greedy_id}, but {greedy} in its decision"
        yield from rows_agree(message, step, complete=message.status in _COMPLETE)
        yield from step_changes(message, step)
        yield from self._tensors(instant, message, step, row)

    def _tensors(
        self, instant: Snapshot, message: Message, step: Step, row: Row[Any]
    ) -> Iterator[str]:
        """Each tensor of a step by itself, and compared with the step's rows."""
        total = 0
        table = models.Tensor
        names = instant.scalars(
            select(table.name).where(table.step_id == row.id).order_by(table.name)
        )
        tensors: list[TensorRecord] = []
        for name in names:
            query = select(*TENSOR_COLUMNS).where(table.step_id == row.id, table.name == name)
            (stored,) = instant.rows(query)
            self.tensors += 1
            total += len(stored.data)
            try:
                tensor = tensor_record(stored)
            except (TensorError, TypeError, ValueError) as error:
                yield str(error)
                continue
            tensors.append(tensor)
            if tensor.array.nbytes != stored.raw_bytes:
                yield f"its {name} have {tensor.array.nbytes} bytes instead of {stored.raw_bytes}"
            yield from tensor_agrees(message, step, tensor, stored.codec)
        if tensors and len(tensors) == len(names):
            yield from tensor_changes(message, step, tensors)
        if total != row.tensor_bytes:
            yield f"its tensors have {total} bytes instead of {row.tensor_bytes}"
        yield from names_agree(message, step, set(names))
