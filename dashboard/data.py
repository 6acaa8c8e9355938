"""Reads and writes the store for the explorer; no other module of the explorer opens it.

Reads use a read-only connection. Queueing or stopping a reply is a small write;
the worker decodes it in a separate process.
"""

from __future__ import annotations

import datetime as dt
import gc
import io
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Concatenate, ParamSpec, TextIO, TypeVar

import streamlit as st

from dashboard import model_defaults as model_defaults_of
from dashboard.viewdata import attention, comparison
from oki_trace import queueing, worker
from oki_trace.analysis.distance import Distance
from oki_trace.analysis.step_distance import step_distances
from oki_trace.errors import NotFound
from oki_trace.exchange.exporting import export
from oki_trace.exchange.formats import Format
from oki_trace.exchange.importing import Imported, import_files
from oki_trace.input_text import require_storable
from oki_trace.records import (
    AttentionPoints,
    Conversation,
    ConversationFilter,
    ConversationTotals,
    LensGrid,
    Message,
    Prompt,
    ReplySize,
    Status,
    Step,
    StepSummary,
    StoreInfo,
    TensorRecord,
    WorkerState,
)
from oki_trace.reporting import Progress
from oki_trace.settings import Settings
from oki_trace.store.maintenance import prune, vacuum
from oki_trace.store.maintenance.verify import Verification
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.schema import migrate
from oki_trace.store.writing.writer import TraceWriter

if TYPE_CHECKING:
    from dashboard.question_state import QuestionState
    from oki_trace.analysis.background_sync import BackgroundSync
    from oki_trace.analysis.query_session import QuerySession
    from oki_trace.analysis.question import Answer, Question
    from oki_trace.analysis.sandbox import Result
    from oki_trace.analysis.tables import Function, Table


def store_name() -> str:
    """The path or URL of the store."""
    return Settings.from_environment().db


def open_store() -> None:
    """Create the store if there is none. Raises StoreError."""
    _opened(store_name())


def reopen() -> None:
    """Reconnect at the next read: the store may have been restored, moved or repaired."""
    _reader.clear()
    _writer.clear()
    _background_sync.clear()
    _query_session.clear()
    st.cache_data.clear()


@st.cache_resource
def _opened(db: str) -> None:
    migrate.ensure(db)
    # Streamlit collects garbage after every run; without freezing, that scans every
    # imported module: 0.1 s in which nothing reaches the browser.
    gc.collect()
    gc.freeze()


@st.cache_resource(on_release=TraceReader.close)
def _reader(db: str) -> TraceReader:
    return TraceReader(db)


@st.cache_resource(on_release=TraceWriter.close)
def _writer(db: str) -> TraceWriter:
    return TraceWriter(db, checkpoint=False)


def _store() -> TraceReader:
    return _reader(store_name())


def version() -> int:
    """The version of the store, which grows with every change."""
    return _store().version()


def recent_conversations(limit: int = 8) -> list[Conversation]:
    """The conversations changed most recently."""
    return _store().conversations(limit=limit)


def find_conversations(
    search: str, by: ConversationFilter, limit: int, offset: int
) -> list[Conversation]:
    """A page of the matching conversations; their title or messages contain ``search``."""
    return _store().conversations(search or None, by=by, limit=limit, offset=offset)


def count_conversations(search: str, by: ConversationFilter) -> int:
    """The number of matching conversations."""
    return _store().conversation_count(search or None, by=by)


def conversation_totals(of: Sequence[Conversation]) -> dict[int, ConversationTotals]:
    """Time and bytes of the replies of each conversation, by its id."""
    return _store().conversation_totals([c.id for c in of])


def rename_conversation(conversation_id: int, title: str) -> None:
    """Change the title of a conversation."""
    _writer(store_name()).rename_conversation(conversation_id, require_storable(title, "The title"))


def delete_conversation(conversation_id: int) -> None:
    """Delete a conversation. Raises StoreError while it is being written."""
    _writer(store_name()).delete_conversation(conversation_id)


def export_file(conversation_id: int, format: Format) -> bytes:
    """The conversation with all its traces as a file; Parquet tables come in a zip."""
    with tempfile.TemporaryDirectory(prefix="oki-trace-export-") as folder:
        path = Path(folder) / "conversation"
        export(_store(), conversation_id, format, path, io.StringIO())
        if path.is_dir():
            path = Path(shutil.make_archive(str(path), "zip", path))
        return path.read_bytes()


def import_upload(files: Mapping[str, BinaryIO], progress: Progress) -> Imported:
    """Import an uploaded export: a file, and perhaps its safetensors, by their suffix.

    It is atomic. Raises ExchangeError for a file that is no export.
    """
    return import_files(files, store_name(), progress)


def conversation(conversation_id: int) -> tuple[Conversation, list[Message]] | None:
    """The conversation and its messages; None if there is none with this id."""
    with _store().snapshot() as reader:
        try:
            return reader.conversation(conversation_id), reader.messages(conversation_id)
        except NotFound:
            return None


def message(message_id: int) -> Message | None:
    """One message; None if there is none with this id."""
    try:
        return _store().message(message_id)
    except NotFound:
        return None


P = ParamSpec("P")
T = TypeVar("T")


def _cached(
    max_entries: int,
) -> Callable[[Callable[Concatenate[str, int, P], T]], Callable[Concatenate[Message, P], T]]:
    """Caches a read of a reply, ``read(db, message_id, …)``, as a function of the message.

    The number of tokens is part of the key: a live reply is read again as it grows.
    """

    def decorate(
        read: Callable[Concatenate[str, int, P], T],
    ) -> Callable[Concatenate[Message, P], T]:
        def once(db: str, message_id: int, tokens: int, *args: P.args, **kwargs: P.kwargs) -> T:
            return read(db, message_id, *args, **kwargs)

        once.__qualname__ = read.__qualname__  # Streamlit's name of the cache
        cached = st.cache_data(max_entries=max_entries, show_spinner=False)(once)

        def of_message(message: Message, /, *args: P.args, **kwargs: P.kwargs) -> T:
            return cached(store_name(), message.id, message.tokens, *args, **kwargs)

        return of_message

    return decorate


def steps(message: Message) -> list[StepSummary]:
    """The steps of a reply, without their details."""
    return _store().steps(message.id) if message.status.is_live else _finished_steps(message)


@_cached(64)
def _finished_steps(db: str, message_id: int) -> list[StepSummary]:
    return _reader(db).steps(message_id)


def step(message: Message, index: int) -> Step | None:
    """One step with everything but its tensors; None until it is written."""
    try:
        return _store().step(message.id, index)
    except NotFound:
        return None


def prompt(message: Message) -> Prompt | None:
    """The prompt of a reply; None before the reply has begun."""
    return None if message.prompt_len is None else _prompt(message)


@_cached(16)
def _prompt(db: str, message_id: int) -> Prompt:
    return _reader(db).prompt(message_id)


@_cached(64)
def attentions(db: str, message_id: int, index: int) -> TensorRecord | None:
    """The attention of a step, every layer and head; None if it was not kept."""
    try:
        return _reader(db).tensor(message_id, index, "attentions")
    except NotFound:
        return None


def head_count(message: Message, index: int) -> int | None:
    """The heads of a step's full attention, without reading it; None if it was not kept."""
    shape = _store().tensor_shape(message.id, index, "attentions")
    return None if shape is None else shape[1]


@_cached(16)
def lens_grid(db: str, message_id: int, first: int, end: int) -> LensGrid:
    """The lens of every layer from step ``first`` up to ``end``."""
    return _reader(db).lens_grid(message_id, first, end)


@_cached(32)
def attention_points(db: str, message_id: int, layer: int, first: int, end: int) -> AttentionPoints:
    """The kept attention of ``layer``, heads averaged, from step ``first`` up to ``end``."""
    return _reader(db).attention_points(message_id, layer, first, end)


@_cached(32)
def full_attention(
    db: str, message_id: int, layer: int, head: str, first: int, end: int
) -> AttentionPoints:
    """The same from the full tensors: at every position, of one head or over the heads."""
    tensors = _reader(db).iter_tensors(message_id, "attentions", first, end)
    return attention.full_attention_points(tensors, layer, head)


def distances(
    left: Message, right: Message, pairs: Sequence[comparison.Pair]
) -> list[Distance | None]:
    """The distance of each pair's distributions; None where a reply has no step or no numbers."""
    steps = [(p.left, p.right) for p in pairs if p.left is not None and p.right is not None]
    tokens = (left.tokens, right.tokens)
    known = dict(
        zip(steps, _distances(store_name(), left.id, right.id, tuple(steps), tokens), strict=True)
    )
    return [None if p.left is None or p.right is None else known[p.left, p.right] for p in pairs]


@st.cache_data(max_entries=8, show_spinner="Comparing…")
def _distances(
    db: str, left: int, right: int, steps: tuple[tuple[int, int], ...], tokens: tuple[int, int]
) -> list[Distance | None]:
    measured = step_distances(_reader(db), [(left, one, right, other) for one, other in steps])
    return [None if one is None else one.distance for one in measured]


def recent_replies(limit: int = 25) -> list[tuple[Conversation, Message]]:
    """The replies with tokens in the conversations changed most recently."""
    with _store().snapshot() as reader:
        return [
            (conversation, message)
            for conversation in reader.conversations(limit=limit)
            for message in reversed(reader.messages(conversation.id))
            if message.tokens
        ]


def last_reply(conversation_id: int) -> int | None:
    """The last reply with tokens in a conversation; None if there is none."""
    _, messages = conversation(conversation_id) or (None, [])
    return next((m.id for m in reversed(messages) if m.tokens), None)


def message_bytes(message: Message) -> int:
    """The size of a reply's tensors in the store."""
    return _store().message_bytes(message.id)


def info() -> StoreInfo:
    """Totals of the store."""
    return _store().info()


def reply_sizes() -> list[ReplySize]:
    """The size of each reply in the store, the oldest first."""
    return _store().reply_sizes()


def statuses() -> dict[Status, int]:
    """The number of replies by status."""
    return _store().reply_statuses()


def verification(progress: Progress) -> Verification:
    """The check of the whole store; iterating over it reads the store and yields the findings."""
    return Verification(_store(), progress=progress)


def prune_plan(days: float | None, max_bytes: int | None, *, tensors_only: bool) -> prune.PrunePlan:
    """A plan to prune what is older than ``days``, or until the data fits into ``max_bytes``."""
    age = None if days is None else dt.timedelta(days=days)
    return prune.plan(_store(), older_than=age, max_bytes=max_bytes, tensors_only=tensors_only)


def prune_now(plan: prune.PrunePlan, progress: Progress) -> prune.PrunePlan:
    """Carry out a prune plan; returns what was pruned. It cannot be undone."""
    return prune.prune(_writer(store_name()), plan, progress)


def vacuum_store(on_tick: Callable[[], None]) -> vacuum.Vacuumed:
    """Vacuum the store. Raises StoreError while a reply is being generated."""
    return vacuum.vacuum(store_name(), on_tick)


@st.cache_data(max_entries=32, ttl=60, show_spinner=False)
def model_defaults(model_id: str) -> dict[str, float]:
    """The sampling settings in the model's own generation config, if it is on this machine."""
    return model_defaults_of.sampling_defaults(model_id, Settings.from_environment().models_dir)


@st.cache_data(max_entries=32, ttl=60, show_spinner=False)
def template_switches(model_id: str) -> tuple[str, ...]:
    """The arguments with a field of their own that the model's chat template reads."""
    return model_defaults_of.template_switches(model_id, Settings.from_environment().models_dir)


def builtin_model_fetched() -> bool:
    """Whether the built-in model has been fetched."""
    return (Settings.from_environment().models_dir / "smollm2").is_dir()


def worker_state() -> WorkerState | None:
    """The state of the worker; None if none was ever started."""
    return _store().worker()


def models_used() -> list[str]:
    """The models of the latest conversations, the latest first."""
    used = [model for c in _store().conversations(limit=100) for model in c.model_ids]
    return list(dict.fromkeys(used))


def submit_message(request: queueing.ReplyRequest, conversation_id: int | None) -> int:
    """Queue a reply; returns the conversation's id. ``ensure_worker`` starts the worker for it."""
    conversation, _ = queueing.submit(_writer(store_name()), request, conversation_id)
    return conversation


def add_tool_result(conversation_id: int, tool: str, content: str) -> None:
    """Add the result of a tool while the results of others are still missing."""
    queueing.add_tool_result(_writer(store_name()), conversation_id, tool, content)


def waiting_replies() -> list[int]:
    """The queued and running replies of the whole store, in the order they are served."""
    return _store().waiting()


def stop_reply(message: Message) -> None:
    """Stop a reply after its current token."""
    _writer(store_name()).request_stop(message.id)


def ensure_worker() -> None:
    """Start the worker, unless it runs."""
    worker.ensure_running(store_name())


# Questions load DuckDB inside their functions: no other page waits for it.


@st.cache_resource(on_release=lambda session: session.close())
def _query_session(db: str) -> QuerySession:
    from oki_trace.analysis.query_session import QuerySession

    return QuerySession(db)


@st.cache_resource
def _background_sync(db: str) -> BackgroundSync:
    from oki_trace.analysis.background_sync import BackgroundSync

    return BackgroundSync(db, _reader(db))


def questions() -> Mapping[str, Question]:
    """All built-in questions, by name."""
    from oki_trace.analysis.questions import QUESTIONS

    return QUESTIONS


def cache_backlog(wait_s: float) -> tuple[int, int] | None:
    """The progress of the cache's sync: (messages written, of all); None if it is up to date.

    A thread syncs it; this waits for it for up to ``wait_s``. Raises StoreError.
    """
    return _background_sync(store_name()).behind(wait_s)


def answer_question(state: QuestionState) -> Answer:
    """The answer to a built-in question. Raises UsageError, QuestionError or NotFound."""
    return _answer(store_name(), _store().stamp(), state)


@st.cache_data(max_entries=32, show_spinner=False)
def _answer(db: str, stamp: str, state: QuestionState) -> Answer:
    from oki_trace.analysis import questions

    subjects = (state.first, state.second)
    return questions.answer(
        _query_session(db),
        state.question,
        subjects if questions.QUESTIONS[state.question].compares else (),
        scope=state.scope(),
        view=state.view,
        **dict(state.options),
    )


def write_csv(answer: Answer, file: TextIO) -> None:
    """The rows of an answer, safe to open in a spreadsheet."""
    from oki_trace.analysis.results import write_csv as write

    write([column.name for column in answer.columns], answer.rows, file)


def functions() -> Sequence[Function]:
    """The SQL functions that read full tensors."""
    from oki_trace.analysis.tables import FUNCTIONS

    return FUNCTIONS


def tables() -> Sequence[Table]:
    """The tables that SQL can read."""
    from oki_trace.analysis.tables import TABLES

    return TABLES


def run_sql(query: str, limit: int, seconds: float, tick: Callable[[], None]) -> Result:
    """The result of a user's SQL as an Arrow table. ``tick`` is called while it runs.

    Raises QuestionError, and any error of ``tick``, which ends the query.
    """
    return _query_session(store_name()).sql_result(query, limit=limit, seconds=seconds, tick=tick)
