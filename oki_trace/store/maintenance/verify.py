"""Proving a store's promises on the store at hand.

Whatever is found wrong is a Finding, one line; nothing is changed. A step's rows
are held against each other and against its full tensors, within what the
tensors' codec allows. A few steps are in memory at a time, however large the
store; each few were true at one instant, so a reply may go on meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, func, select, text

from oki_trace.errors import NotFound, StoreError, TensorError
from oki_trace.records import Message, Role, Status, Step, Tensor
from oki_trace.reporting import Progress
from oki_trace.store.digest import BEFORE_DIGESTS
from oki_trace.store.maintenance.digest_checks import step_changes, tensor_changes
from oki_trace.store.maintenance.invariants import names_agree, rows_agree, tensor_agrees
from oki_trace.store.maintenance.list_checks import broken_lists
from oki_trace.store.reading.damage import BrokenTime
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.reading.row_mapping import TENSOR_COLUMNS, tensor_record
from oki_trace.store.schema import models
from oki_trace.store.writing import closing

_BATCH = 16
# The lens of the last steps is lost with a process that is killed.
_WHOLE = (Status.COMPLETE, Status.STOPPED)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as promised, and where; None: of the store, message or reply."""

    conversation_id: int | None
    message_id: int | None
    step_index: int | None
    what: str

    def __str__(self) -> str:
        named = zip(
            ("conversation", "message", "step"),
            (self.conversation_id, self.message_id, self.step_index),
            strict=True,
        )
        where = ", ".join(f"{name} {number}" for name, number in named if number is not None)
        return f"{where or 'store'}: {self.what}"


class Verification:
    """The check of a store, or of one conversation: iterate for what is found.

    ``messages``, ``steps`` and ``tensors`` count what has been looked at so far,
    ``without_digest`` the messages that were recorded before there were digests.
    Raises NotFound for a conversation that is not there.
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
            self._conversations = [
                row.id for row in reader.rows(select(models.Conversation.id).order_by("id"))
            ]
            self._total = reader.rows(select(func.count(models.Step.id)))[0][0]
        else:
            self._conversations = [conversation_id]
            self._total = reader.conversation(conversation_id).tokens

    def __iter__(self) -> Iterator[Finding]:
        if self._whole_store:
            yield from self._file()
        for conversation_id in self._conversations:
            # One that was deleted meanwhile has nothing wrong with it.
            with suppress(NotFound):
                yield from self._conversation(conversation_id)

    # ------------------------------------------------------------------- within

    def _file(self) -> Iterator[Finding]:
        """What SQLite itself says of its file; a PostgreSQL server sees to its own."""
        if not self._reader.is_file:
            return
        try:
            damage = self._reader.rows(text("PRAGMA integrity_check"))
            orphans = self._reader.rows(text("PRAGMA foreign_key_check"))
        except StoreError as error:
            yield Finding(None, None, None, f"the file is damaged ({error})")
            return
        for row in damage:
            if row[0] != "ok":
                yield Finding(None, None, None, f"the file is damaged ({row[0]})")
        for row in orphans:
            yield Finding(
                None, None, None, f"a row of {row[0]} belongs to a row of {row[2]} that is gone"
            )

    def _conversation(self, conversation_id: int) -> Iterator[Finding]:
        try:
            messages = self._reader.messages(conversation_id)
        except NotFound:
            raise
        except (StoreError, ValueError, TypeError, KeyError) as error:
            yield Finding(conversation_id, None, None, f"it cannot be read ({error})")
            return
        for name in ("created_at", "updated_at"):
            when = getattr(models.Conversation, name)
            for row in self._reader.rows(
                select(when).where(models.Conversation.id == conversation_id)
            ):
                if isinstance(row[0], BrokenTime):
                    what = f"its {name} is {row[0].told!r}"
                    yield Finding(conversation_id, None, None, what)
        for place, message in enumerate(messages):
            self.messages += 1
            if message.position != place:
                what = f"it stands at position {message.position}, not {place}"
                yield Finding(conversation_id, message.id, None, what)
            if message.damage is not None:
                yield Finding(conversation_id, message.id, None, message.damage)
            try:
                for what in self._as_recorded(message):
                    yield Finding(conversation_id, message.id, None, what)
                if message.role is Role.ASSISTANT:
                    yield from self._reply(message)
            except NotFound:
                return
            except (StoreError, ValueError, TypeError, KeyError) as error:
                what = f"it cannot be read further ({error})"
                yield Finding(conversation_id, message.id, None, what)

    def _as_recorded(self, message: Message) -> Iterator[str]:
        """A message as a whole against its digest: what is said of each step comes later."""
        with self._reader.snapshot() as instant:
            yield from instant.ask(lambda connection: closing.changes(connection, message.id))
        if message.digest == BEFORE_DIGESTS:
            self.without_digest += 1

    def _reply(self, message: Message) -> Iterator[Finding]:
        def found(what: str, step: int | None = None) -> Finding:
            return Finding(message.conversation_id, message.id, step, what)

        if message.capture is None or message.prompt_len is None:
            # One that no model was asked for was said by hand.
            asked = message.choice is not None
            if message.tokens or (asked and message.status is Status.COMPLETE):
                yield found("nothing says how it was generated")
            return
        prompt = self._reader.rows(
            select(
                func.count(),
                func.min(models.PromptToken.position),
                func.max(models.PromptToken.position),
            ).where(models.PromptToken.message_id == message.id)
        )[0]
        if prompt[0] and (prompt[1], prompt[2]) != (0, prompt[0] - 1):
            yield found(f"the tokens of its prompt are at {prompt[1]} to {prompt[2]}")
        if prompt[0] != message.prompt_len:
            yield found(f"its prompt has {prompt[0]} tokens instead of {message.prompt_len}")
        expected, after = 0, -1
        while True:
            with self._reader.snapshot() as instant:
                rows = instant.rows(
                    select(*_STEP)
                    .where(models.Step.message_id == message.id, models.Step.step_index > after)
                    .order_by(models.Step.step_index)
                    .limit(_BATCH)
                )
                if not rows:
                    return
                # It may have gone on, ended or been pruned since the batch before.
                message = instant.message(message.id)
                ranks = broken_lists(instant, [row.id for row in rows])
                for row in rows:
                    faults = ranks.get(row.id, [])
                    if row.step_index != expected:
                        faults.append(f"it follows where step {expected} should")
                    expected = row.step_index + 1
                    faults.extend(self._step(instant, message, row))
                    for what in faults:
                        yield found(what, row.step_index)
                after = rows[-1].step_index
            self.steps += len(rows)
            if self._progress is not None:
                self._progress(self.steps, max(self._total, self.steps))

    def _step(self, instant: TraceReader, message: Message, row: Row[Any]) -> Iterator[str]:
        try:
            step = instant.step(message.id, row.step_index)
        except StoreError as error:
            yield f"its rows do not fit together ({error.__cause__ or error})"
            return
        if step.lens is not None and step.lens.settle_layer != row.settle_layer:
            yield f"it does not settle at layer {row.settle_layer}"
        greedy = None if step.decision is None else step.decision.greedy.token_id
        if greedy != row.greedy_id:
            yield f"its greedy token is {row.greedy_id}, its decision says {greedy}"
        yield from rows_agree(message, step, whole=message.status in _WHOLE)
        yield from step_changes(message, step)
        yield from self._tensors(instant, message, step, row)

    def _tensors(
        self, instant: TraceReader, message: Message, step: Step, row: Row[Any]
    ) -> Iterator[str]:
        """Each of the step's tensors by itself, and against the step's rows."""
        total = 0
        names: set[str] = set()
        whole: list[Tensor] = []
        table = models.Tensor
        of_step = select(table.name).where(table.step_id == row.id).order_by(table.name)
        for (name,) in instant.rows(of_step):
            one = select(*TENSOR_COLUMNS).where(table.step_id == row.id, table.name == name)
            (stored,) = instant.rows(one)
            self.tensors += 1
            total += len(stored.data)
            names.add(name)
            try:
                tensor = tensor_record(stored)
            except (TensorError, TypeError, ValueError) as error:
                yield str(error)
                continue
            whole.append(tensor)
            if len(tensor.array.data.cast("B")) != stored.raw_bytes:
                yield f"its {name} take {stored.raw_bytes} bytes, it is said, and do not"
            yield from tensor_agrees(message, step, tensor, stored.codec)
        if whole and len(whole) == len(names):
            yield from tensor_changes(message, step, whole)
        if total != row.tensor_bytes:
            yield f"its tensors take {total} bytes, and {row.tensor_bytes} are told of"
        yield from names_agree(message, step.step_index, names)


# What of a step its record does not say.
_STEP = (
    models.Step.id,
    models.Step.step_index,
    models.Step.settle_layer,
    models.Step.tensor_bytes,
    models.Step.greedy_id,
)
