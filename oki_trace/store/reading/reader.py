"""Reading a store: plain records out, nothing in.

The guarantees: a reader cannot change the store; what one call returns, and all
that is read within one ``snapshot()``, was true at one instant; a step is never
seen without what belongs to it (its lens, which may trail by a few steps, comes
whole). No transaction outlives its call, so the write-ahead log is never held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

from sqlalchemy import Connection, Engine, Executable, func, select

from oki_trace.errors import NotFound, StoreError
from oki_trace.records import (
    AttentionPoints,
    Candidates,
    Conversation,
    ConversationFilter,
    ConversationTotals,
    LensGrid,
    Message,
    Prompt,
    Status,
    Step,
    StepSummary,
    StoreInfo,
    Tensor,
    WorkerState,
)
from oki_trace.store.codecs.tensors import TensorHead
from oki_trace.store.db_errors import translate_errors
from oki_trace.store.disk_reserve import Reserve
from oki_trace.store.file_guard import Presence
from oki_trace.store.maintenance.sizes import measure
from oki_trace.store.reading import browse, columnar, grids
from oki_trace.store.reading.columnar import Columns, MessageMark
from oki_trace.store.reading.damage import steps_told
from oki_trace.store.reading.row_mapping import (
    MESSAGE_COLUMNS,
    SUMMARY_COLUMNS,
    TENSOR_COLUMNS,
    conversation_records,
    message_record,
    read_candidates,
    read_steps,
    summary_record,
    tensor_record,
)
from oki_trace.store.schema import identity, models
from oki_trace.store.schema.engine import reader_engine
from oki_trace.store.schema.identity import Db
from oki_trace.store.writing.lifecycle import no_conversation, no_message, no_tensor

_T = TypeVar("_T")

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
        self._presence = Presence(path)
        self._reserve = Reserve(path)
        self._engine: Engine = reader_engine(url, self._reserve)
        self._pinned: Connection | None = None
        try:
            with self._read() as connection:
                identity.refuse_other(identity.schema_of(connection), self._store)
        except BaseException:
            self.close()
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
        self._reserve.restore()

    @contextmanager
    def snapshot(self) -> Iterator[TraceReader]:
        """A reader whose calls all see the same instant. Keep it short, and in one thread."""
        with self._read() as connection:
            pinned = object.__new__(TraceReader)
            pinned._store, pinned._url, pinned._engine = self._store, self._url, self._engine
            pinned._pinned = connection
            yield pinned

    @property
    def is_file(self) -> bool:
        """Whether the store is a SQLite file."""
        return identity.file_of(self._url) is not None

    # -------------------------------------------------------------------- lists

    def version(self) -> int:
        """A number that grows whenever anything in the store changes."""
        with self._read() as connection:
            return connection.execute(select(models.StoreState.version)).scalar_one()

    def stamp(self) -> str:
        """The version, and what tells this store from another that is put in its place."""
        path = identity.file_of(self._url)
        with self._read() as connection:
            version = connection.execute(select(models.StoreState.version)).scalar_one()
            latest = connection.execute(select(func.max(models.Message.created_at))).scalar()
        which = path.stat().st_ino if path else 0
        return f"{version} {which} {latest}"

    def conversations(
        self,
        search: str | None = None,
        *,
        by: ConversationFilter | None = None,
        limit: int = 50,
        offset: int = 0,
    ) -> list[Conversation]:
        """The conversations changed last, first; ``search`` looks in titles and messages."""
        table = models.Conversation
        wanted = select(table).order_by(table.updated_at.desc(), table.id.desc())
        with self._read() as connection:
            wanted = browse.narrowed(connection, wanted, by or ConversationFilter(), search)
            rows = connection.execute(wanted.limit(limit).offset(offset)).all()
            return conversation_records(connection, rows)

    def conversation_count(
        self, search: str | None = None, *, by: ConversationFilter | None = None
    ) -> int:
        """How many conversations fit."""
        wanted = select(func.count(models.Conversation.id))
        with self._read() as connection:
            wanted = browse.narrowed(connection, wanted, by or ConversationFilter(), search)
            return connection.execute(wanted).scalar_one()

    def conversation_totals(self, conversation_ids: Sequence[int]) -> dict[int, ConversationTotals]:
        """What the replies of these conversations took; reads no tensor."""
        with self._read() as connection:
            return browse.totals(connection, conversation_ids)

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

    def waiting(self) -> list[int]:
        """The replies that are queued or running, in the order in which they are served."""
        table = models.Message
        live = [status.value for status in Status if status.is_live]
        with self._read() as connection:
            return list(
                connection.execute(
                    select(table.id).where(table.status.in_(live)).order_by(table.id)
                ).scalars()
            )

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
        with self._read() as connection, steps_told(message_id):
            rows = connection.execute(
                select(*SUMMARY_COLUMNS)
                .where(table.message_id == message_id, table.step_index > since)
                .order_by(table.step_index)
            ).all()
        return [summary_record(row) for row in rows]

    def step_ids(self, message_id: int, first: int) -> dict[int, int]:
        """The ids of a few steps of a reply, from ``first`` on, by step_index."""
        with self._read() as connection:
            rows = connection.execute(
                select(models.Step.step_index, models.Step.id)
                .where(*grids.within(message_id, first, first + _BATCH))
                .order_by(models.Step.step_index)
            )
            return {row.step_index: row.id for row in rows}

    def step(self, message_id: int, step_index: int) -> Step:
        """One step with its candidates, attention and lens; its tensors are read by name."""
        with self._read() as connection, steps_told(message_id):
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
            with self._read() as connection, steps_told(message_id):
                batch = read_steps(connection, message_id, first, until)
            yield from batch
            if len(batch) < until - first:
                return
            first = until

    # ---------------------------------------------------------------- one reply

    def candidates(self, message_id: int) -> dict[int, Candidates]:
        """What was considered at each step of a reply, by step_index."""
        with self._read() as connection, steps_told(message_id):
            return read_candidates(connection, message_id)

    def lens_grid(self, message_id: int, first: int = 0, end: int | None = None) -> LensGrid:
        """What every layer would have said, at the steps from ``first`` up to ``end``."""
        with self._read() as connection, steps_told(message_id):
            return grids.lens(connection, message_id, first, end)

    def attention_points(
        self, message_id: int, layer: int, first: int = 0, end: int | None = None
    ) -> AttentionPoints:
        """Where ``layer`` looked, at the steps from ``first`` up to ``end``; reads no tensor."""
        with self._read() as connection, steps_told(message_id):
            return grids.attention(connection, message_id, layer, first, end)

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

    def tensor_heads(self, message_id: int) -> Iterator[tuple[int, TensorHead]]:
        """(step_index, tensor) of all full tensors of a reply, in order; no blob is touched."""
        table, first = models.Tensor, 0
        columns = [table.__table__.columns[name] for name in TensorHead.__dataclass_fields__]
        while ids := self.step_ids(message_id, first):
            with self._read() as connection:
                rows = connection.execute(
                    select(models.Step.step_index, *columns)
                    .join(models.Step, models.Step.id == table.step_id)
                    .where(*grids.within(message_id, first, max(ids) + 1))
                    .order_by(models.Step.step_index, table.name)
                ).all()
            for index, name, dtype, shape, layers, key_offset in rows:
                yield index, TensorHead(name, dtype, tuple(shape), tuple(layers), key_offset)
            first = max(ids) + 1

    def replies_with(self, name: str) -> set[int]:
        """The replies whose first step has this full tensor; no blob is touched."""
        with self._read() as connection:
            found = connection.execute(
                select(models.Step.message_id)
                .join(models.Tensor, models.Step.id == models.Tensor.step_id)
                .where(models.Step.step_index == 0, models.Tensor.name == name)
            ).scalars()
            return set(found)

    def tensor_shape(self, message_id: int, step_index: int, name: str) -> tuple[int, ...] | None:
        """The shape of a full tensor, or None where it was not kept; its blob is not read."""
        with self._read() as connection:
            shape = connection.execute(
                select(models.Tensor.shape)
                .join(models.Step, models.Step.id == models.Tensor.step_id)
                .where(
                    models.Step.message_id == message_id,
                    models.Step.step_index == step_index,
                    models.Tensor.name == name,
                )
            ).scalar()
        return None if shape is None else tuple(shape)

    def iter_tensors(
        self, message_id: int, name: str, first: int = 0, end: int | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """(step_index, tensor) of the steps from ``first`` up to ``end`` that have it, checked.

        One at a time, and a transaction each: it may take as long as its reader does.
        """
        wanted = (
            select(models.Step.step_index)
            .join(models.Tensor, models.Step.id == models.Tensor.step_id)
            .where(*grids.within(message_id, first, end), models.Tensor.name == name)
            .order_by(models.Step.step_index)
        )
        with self._read() as connection:
            found = list(connection.execute(wanted).scalars())
        for index in found:
            yield index, self.tensor(message_id, index, name)

    def tensors(self, message_id: int, name: str, steps: Sequence[int]) -> dict[int, Tensor]:
        """Those of these steps that have it, by step_index, checked: one query, all in memory."""
        with self._read() as connection:
            rows = connection.execute(
                select(models.Step.step_index, *TENSOR_COLUMNS)
                .join(models.Step, models.Step.id == models.Tensor.step_id)
                .where(
                    models.Step.message_id == message_id,
                    models.Step.step_index.in_(steps),
                    models.Tensor.name == name,
                )
            ).all()
        return {row.step_index: tensor_record(row) for row in rows}

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
            raise no_tensor(self.message(message_id), step_index, name)
        return tensor_record(row)

    # ------------------------------------------------------------------ columns

    def message_marks(self) -> list[MessageMark]:
        """Every message, as briefly as it can be told from any other."""
        with self._read() as connection:
            return columnar.message_marks(connection)

    def conversation_columns(self) -> Columns:
        """Every conversation, a column at a time."""
        with self._read() as connection:
            return columnar.conversation_columns(connection)

    def prompt_columns(self, message_id: int) -> Columns:
        """The tokens a reply's model was given, a column at a time; empty before it begins."""
        with self._read() as connection, steps_told(message_id):
            return columnar.prompt_columns(connection, message_id)

    def step_columns(self, message_id: int, first: int, end: int) -> dict[str, Columns]:
        """Some steps of a reply with all that hangs on them but tensors: table, then column."""
        with self._read() as connection, steps_told(message_id):
            return columnar.step_columns(connection, message_id, first, end)

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
        with self._read() as connection:
            sizes = measure(connection, identity.file_of(self._url))
            counts = [
                connection.execute(select(func.count()).select_from(table)).scalar_one()
                for table in (models.Conversation, models.Message, models.Step)
            ]
        return StoreInfo(
            url=self._store,
            schema=identity.HISTORY[-1],
            bytes=sizes.disk,
            conversations=counts[0],
            messages=counts[1],
            steps=counts[2],
            tensor_bytes=sizes.tensors,
            tensor_steps=sizes.tensor_steps,
            row_bytes=sizes.rows,
            log_bytes=sizes.log,
            free_bytes=sizes.free,
        )

    def stop_requested(self, message_id: int) -> bool:
        """Whether a reply was asked to stop; False for one that is not there any more."""
        query = select(models.Message.stop_requested).where(models.Message.id == message_id)
        with self._read() as connection:
            return bool(connection.execute(query).scalar())

    def worker(self) -> WorkerState | None:
        """The worker heard of last; "gone" when its process has ended. None: never any."""
        with self._read() as connection:
            return browse.latest_worker(connection)

    # ------------------------------------------------------------------- within

    def rows(self, query: Executable) -> Sequence[Any]:
        """The rows of a question of the store's own modules."""
        with self._read() as connection:
            return connection.execute(query).all()

    def ask(self, question: Callable[[Connection], Iterable[_T]]) -> list[_T]:
        """The answer to a question of the store's own modules that takes several queries."""
        with self._read() as connection:
            return list(question(connection))

    def row_batches(self, query: Executable, size: int) -> Iterator[Sequence[Any]]:
        """The same, so many at a time, however many there are."""
        with self._read() as connection:
            found = connection.execute(query, execution_options={"yield_per": size})
            yield from found.partitions()

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        if self._pinned is not None:
            with translate_errors(self._store):
                yield self._pinned
            return
        self._presence.require()
        with translate_errors(self._store), self._engine.connect() as connection:
            yield connection
