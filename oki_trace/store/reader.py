"""Reading a store: plain records out, nothing in.

The guarantees: a reader cannot change the store; what one call returns, and all
that is read within one ``snapshot()``, was true at one instant; a step is never
seen without what belongs to it (its lens, which may trail by a few steps, comes
whole). No transaction outlives its call, so the write-ahead log is never held.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from sqlalchemy import Connection, Engine, func, or_, select

from oki_trace.errors import NotFound, StoreError
from oki_trace.records import (
    Conversation,
    Message,
    Prompt,
    Step,
    StepSummary,
    StoreInfo,
    Tensor,
    WorkerState,
)
from oki_trace.store import identity, models
from oki_trace.store.engine import reader_engine
from oki_trace.store.faults import told_plainly
from oki_trace.store.identity import Db
from oki_trace.store.lifecycle import no_conversation, no_message
from oki_trace.store.owner import is_dead
from oki_trace.store.readback import (
    MESSAGE_COLUMNS,
    SUMMARY_COLUMNS,
    TENSOR_COLUMNS,
    conversation_records,
    message_record,
    read_steps,
    summary_record,
    tensor_record,
)

# Steps of an export that are in memory at once.
_BATCH = 64


class TraceReader:
    """A store open for reading. Any number of them, in any process, at any time."""

    def __init__(self, db: Db) -> None:
        url = identity.address(db)
        self._store = identity.shown(url)
        self._url = url
        path = identity.file_of(url)
        if path is not None and not identity.is_ours(path):
            raise StoreError(
                f"There is no trace store at {self._store}: run `oki-trace demo`, or name one "
                "with --db."
            )
        self._engine: Engine = reader_engine(url)
        self._pinned: Connection | None = None
        try:
            with self._read() as connection:
                identity.refuse_other(identity.schema_of(connection), self._store)
        except BaseException:
            self._engine.dispose()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def snapshot(self) -> Iterator[TraceReader]:
        """A reader whose calls all see the same instant. Keep it short, and in one thread."""
        with self._read() as connection:
            pinned = object.__new__(TraceReader)
            pinned._store, pinned._url, pinned._engine = self._store, self._url, self._engine
            pinned._pinned = connection
            yield pinned

    # -------------------------------------------------------------------- lists

    def version(self) -> int:
        """A number that grows whenever anything in the store changes."""
        with self._read() as connection:
            return connection.execute(select(models.StoreState.version)).scalar_one()

    def conversations(
        self, search: str | None = None, *, limit: int = 50, offset: int = 0
    ) -> list[Conversation]:
        """The conversations changed last, first; ``search`` looks in titles and messages."""
        table = models.Conversation
        wanted = select(table).order_by(table.updated_at.desc(), table.id.desc())
        if search:
            said = select(models.Message.conversation_id).where(
                models.Message.content.icontains(search, autoescape=True)
            )
            wanted = wanted.where(
                or_(table.title.icontains(search, autoescape=True), table.id.in_(said))
            )
        with self._read() as connection:
            rows = connection.execute(wanted.limit(limit).offset(offset)).all()
            return conversation_records(connection, rows)

    def conversation(self, conversation_id: int) -> Conversation:
        table = models.Conversation
        with self._read() as connection:
            rows = connection.execute(select(table).where(table.id == conversation_id)).all()
            if not rows:
                raise no_conversation(conversation_id)
            return conversation_records(connection, rows)[0]

    def messages(self, conversation_id: int) -> list[Message]:
        """The messages of a conversation, in order."""
        table = models.Message
        with self._read() as connection:
            rows = connection.execute(
                select(*MESSAGE_COLUMNS)
                .where(table.conversation_id == conversation_id)
                .order_by(table.position)
            ).all()
            if (
                not rows
                and not connection.execute(
                    select(models.Conversation.id).where(models.Conversation.id == conversation_id)
                ).first()
            ):
                raise no_conversation(conversation_id)
            return [message_record(connection, row) for row in rows]

    def message(self, message_id: int) -> Message:
        with self._read() as connection:
            row = connection.execute(
                select(*MESSAGE_COLUMNS).where(models.Message.id == message_id)
            ).one_or_none()
            if row is None:
                raise no_message(message_id)
            return message_record(connection, row)

    # -------------------------------------------------------------- one message

    def prompt(self, message_id: int) -> Prompt:
        """What the model was given for a reply. NotFound before the reply has begun."""
        table = models.PromptToken
        with self._read() as connection:
            text = connection.execute(
                select(models.Message.prompt).where(models.Message.id == message_id)
            ).one_or_none()
            if text is None:
                raise no_message(message_id)
            if text.prompt is None:
                raise NotFound(
                    f"Message {message_id} has no prompt: only a reply that has begun has one."
                )
            rows = connection.execute(
                select(table.token_id, table.token, table.segment)
                .where(table.message_id == message_id)
                .order_by(table.position)
            ).all()
        return Prompt(
            text=text.prompt,
            token_ids=tuple(row.token_id for row in rows),
            tokens=tuple(row.token for row in rows),
            segments=tuple(row.segment for row in rows),
        )

    def steps(self, message_id: int, since: int = -1) -> list[StepSummary]:
        """The steps of a reply after ``since``, without what hangs on them."""
        table = models.Step
        with self._read() as connection:
            rows = connection.execute(
                select(*SUMMARY_COLUMNS)
                .where(table.message_id == message_id, table.step_index > since)
                .order_by(table.step_index)
            ).all()
        return [summary_record(row) for row in rows]

    def step(self, message_id: int, step_index: int) -> Step:
        """One step with its candidates, attention and lens; its tensors are read by name."""
        with self._read() as connection:
            found = read_steps(connection, message_id, step_index, step_index + 1)
        if not found:
            raise NotFound(
                f"Message {message_id} has no step {step_index}: `oki-trace show` lists its steps."
            )
        return found[0]

    def iter_steps(self, message_id: int, first: int = 0, end: int | None = None) -> Iterator[Step]:
        """The steps from ``first`` up to ``end``, a batch in memory at a time.

        Each batch is one instant.
        """
        while end is None or first < end:
            until = first + _BATCH if end is None else min(first + _BATCH, end)
            with self._read() as connection:
                batch = read_steps(connection, message_id, first, until)
            yield from batch
            if len(batch) < until - first:
                return
            first = until

    # ------------------------------------------------------------------ tensors

    def tensor_names(self, message_id: int, step_index: int) -> list[str]:
        """Which full tensors the step has."""
        with self._read() as connection:
            names = connection.execute(
                select(models.Tensor.name)
                .join(models.Step, models.Step.id == models.Tensor.step_id)
                .where(models.Step.message_id == message_id, models.Step.step_index == step_index)
                .order_by(models.Tensor.name)
            ).scalars()
            return list(names)

    def tensor(self, message_id: int, step_index: int, name: str) -> Tensor:
        """One full tensor, checked; no other blob is touched."""
        with self._read() as connection:
            row = connection.execute(
                select(*TENSOR_COLUMNS)
                .join(models.Step, models.Step.id == models.Tensor.step_id)
                .where(
                    models.Step.message_id == message_id,
                    models.Step.step_index == step_index,
                    models.Tensor.name == name,
                )
            ).one_or_none()
        if row is None:
            raise NotFound(
                f"Step {step_index} of message {message_id} has no tensor {name}: generate with "
                "--tensors half or exact to keep them."
            )
        return tensor_record(row)

    # ------------------------------------------------------------------- totals

    def message_bytes(self, message_id: int) -> int:
        """What the tensors of a reply take in the store."""
        with self._read() as connection:
            total = select(func.coalesce(func.sum(models.Step.tensor_bytes), 0))
            return int(
                connection.execute(total.where(models.Step.message_id == message_id)).scalar_one()
            )

    def info(self) -> StoreInfo:
        """Totals over the whole store; reads no tensor."""
        path = identity.file_of(self._url)
        with self._read() as connection:
            if path is None:
                size = connection.execute(
                    select(func.pg_database_size(func.current_database()))
                ).scalar_one()
            else:
                log = path.with_name(path.name + "-wal")
                size = sum(file.stat().st_size for file in (path, log) if file.exists())
            counts = [
                connection.execute(select(func.count()).select_from(table)).scalar_one()
                for table in (models.Conversation, models.Message, models.Step)
            ]
            tensor_bytes = connection.execute(
                select(func.coalesce(func.sum(models.Step.tensor_bytes), 0))
            ).scalar_one()
        return StoreInfo(
            url=self._store,
            schema=identity.HISTORY[-1],
            bytes=size,
            conversations=counts[0],
            messages=counts[1],
            steps=counts[2],
            tensor_bytes=int(tensor_bytes),
        )

    def worker(self) -> WorkerState | None:
        """The worker heard of last; "gone" when its process has ended. None: never any."""
        table = models.Worker
        with self._read() as connection:
            row = connection.execute(
                select(table.__table__).order_by(table.heartbeat.desc(), table.id.desc()).limit(1)
            ).one_or_none()
        if row is None:
            return None
        gone = is_dead(row.owner)
        return WorkerState(
            state="gone" if gone else row.state,
            model_id=None if gone else row.model_id,
            detail=row.detail,
            progress=None if gone else row.progress,
            pid=row.pid,
            updated_at=row.heartbeat,
        )

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        if self._pinned is not None:
            with told_plainly(self._store):
                yield self._pinned
            return
        with told_plainly(self._store), self._engine.connect() as connection:
            yield connection
