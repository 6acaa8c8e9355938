"""The one file of the explorer that talks to the store.

Reading goes through a read-only connection. Asking for a reply, or for its
stop, is a small write; decoding is the worker's, in a process of its own.
"""

from __future__ import annotations

import datetime as dt
import gc
import io
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TextIO

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
    Tensor,
    WorkerState,
)
from oki_trace.reporting import Progress
from oki_trace.settings import Settings
from oki_trace.store.maintenance import growth, prune, vacuum
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
    """Make the store if there is none. Raises StoreError where that cannot be."""
    _opened(store_name())


def reopen() -> None:
    """Open the store anew at the next reading: it may have been put back, moved or mended."""
    _reader.clear()
    _writer.clear()
    _catch_up.clear()
    _query_session.clear()
    st.cache_data.clear()


@st.cache_resource
def _opened(db: str) -> None:
    migrate.ensure(db)
    # Streamlit collects garbage after every run, through all that was ever
    # imported: a tenth of a second in which nothing reaches the browser.
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
    """A number that grows with every change of the store."""
    return _store().version()


def recent(limit: int = 8) -> list[Conversation]:
    """The conversations changed last."""
    return _store().conversations(limit=limit)


def find(search: str, by: ConversationFilter, limit: int, offset: int) -> list[Conversation]:
    """A page of the conversations that fit, whose title or messages hold ``search``."""
    return _store().conversations(search or None, by=by, limit=limit, offset=offset)


def count(search: str, by: ConversationFilter) -> int:
    """How many conversations fit."""
    return _store().conversation_count(search or None, by=by)


def totals(found: Sequence[Conversation]) -> dict[int, ConversationTotals]:
    """What the replies of each took."""
    return _store().conversation_totals([c.id for c in found])


def rename(conversation_id: int, title: str) -> None:
    """Give a conversation another title."""
    _writer(store_name()).rename_conversation(conversation_id, require_storable(title, "The title"))


def delete(conversation_id: int) -> None:
    """Delete it for good. Raises StoreError while it is being written."""
    _writer(store_name()).delete_conversation(conversation_id)


def exported(conversation_id: int, format: Format) -> bytes:
    """The conversation with all its traces as a file; the tables of parquet in a zip."""
    with tempfile.TemporaryDirectory(prefix="oki-trace-export-") as room:
        path = Path(room) / "conversation"
        export(_store(), conversation_id, format, path, io.StringIO())
        if path.is_dir():
            path = Path(shutil.make_archive(str(path), "zip", path))
        return path.read_bytes()


def bring_in(files: Mapping[str, BinaryIO], progress: Progress) -> Imported:
    """Import an export that was uploaded: a file, and perhaps its safetensors, by their suffix.

    Raises ExchangeError for what is none, and then nothing of it is kept.
    """
    return import_files(files, store_name(), progress)


def conversation(conversation_id: int) -> tuple[Conversation, list[Message]] | None:
    """The conversation and its messages; None when it is not there."""
    with _store().snapshot() as reader:
        try:
            found = reader.conversation(conversation_id)
        except NotFound:
            return None
        return found, reader.messages(conversation_id)


def message(message_id: int) -> Message | None:
    """One message; None when it is not there."""
    try:
        return _store().message(message_id)
    except NotFound:
        return None


def steps(message: Message) -> list[StepSummary]:
    """The reply's steps, light; of a finished reply they are read once."""
    if message.status.is_live:
        return _store().steps(message.id)
    return _finished_steps(store_name(), message.id, message.tokens)


@st.cache_data(max_entries=64, show_spinner=False)
def _finished_steps(db: str, message_id: int, tokens: int) -> list[StepSummary]:
    return _reader(db).steps(message_id)


def step(message: Message, index: int) -> Step | None:
    """One step with everything but its tensors; None while it is not there."""
    try:
        return _store().step(message.id, index)
    except NotFound:
        return None


def prompt(message: Message) -> Prompt | None:
    """What the model was given; None before the reply has begun."""
    return None if message.prompt_len is None else _prompt(store_name(), message.id)


@st.cache_data(max_entries=16, show_spinner=False)
def _prompt(db: str, message_id: int) -> Prompt:
    return _reader(db).prompt(message_id)


@st.cache_data(max_entries=64, show_spinner=False)
def _attentions(db: str, message_id: int, index: int) -> Tensor | None:
    try:
        return _reader(db).tensor(message_id, index, "attentions")
    except NotFound:
        return None


def attentions(message: Message, index: int) -> Tensor | None:
    """Every layer's and head's weights of a step; None where they were not kept."""
    return _attentions(store_name(), message.id, index)


def head_count(message: Message, index: int) -> int | None:
    """How many heads the step's full attention has; None where it was not kept. Reads no tensor."""
    shape = _store().tensor_shape(message.id, index, "attentions")
    return None if shape is None else shape[1]


# Of a finished reply all that follows is read once. ``tokens`` is part of what
# it is kept under, so what was read of a reply that went on is not kept for it.


def lens_grid(message: Message, first: int, end: int) -> LensGrid:
    """What every layer would have said, from step ``first`` up to ``end``."""
    return _lens_grid(store_name(), message.id, message.tokens, first, end)


@st.cache_data(max_entries=16, show_spinner=False)
def _lens_grid(db: str, message_id: int, tokens: int, first: int, end: int) -> LensGrid:
    return _reader(db).lens_grid(message_id, first, end)


def attention_points(message: Message, layer: int, first: int, end: int) -> AttentionPoints:
    """Where ``layer`` looked, heads averaged, from step ``first`` up to ``end``."""
    return _attention_points(store_name(), message.id, message.tokens, layer, first, end)


@st.cache_data(max_entries=32, show_spinner=False)
def _attention_points(
    db: str, message_id: int, tokens: int, layer: int, first: int, end: int
) -> AttentionPoints:
    return _reader(db).attention_points(message_id, layer, first, end)


def full_attention(
    message: Message, layer: int, head: str, first: int, end: int
) -> AttentionPoints:
    """The same of one head, or over heads, at every position: from the full tensors."""
    return _full_attention(store_name(), message.id, message.tokens, layer, head, first, end)


@st.cache_data(max_entries=32, show_spinner=False)
def _full_attention(
    db: str, message_id: int, tokens: int, layer: int, head: str, first: int, end: int
) -> AttentionPoints:
    tensors = _reader(db).iter_tensors(message_id, "attentions", first, end)
    return attention.full_points(tensors, layer, head)


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
    found = step_distances(_reader(db), [(left, one, right, other) for one, other in steps])
    return [None if one is None else one.distance for one in found]


def replies(limit: int = 25) -> list[tuple[Conversation, Message]]:
    """The replies that have tokens, of the conversations changed last."""
    with _store().snapshot() as reader:
        return [
            (found, message)
            for found in reader.conversations(limit=limit)
            for message in reversed(reader.messages(found.id))
            if message.tokens
        ]


def last_reply(conversation_id: int) -> int | None:
    """The last reply of a conversation that has tokens."""
    opened = conversation(conversation_id)
    ids = [m.id for m in opened[1] if m.tokens] if opened else []
    return ids[-1] if ids else None


def message_bytes(message: Message) -> int:
    """What the reply's tensors take in the store."""
    return _store().message_bytes(message.id)


def info() -> StoreInfo:
    """Totals over the store."""
    return _store().info()


def reply_sizes() -> list[ReplySize]:
    """What each reply takes in the store, the oldest first."""
    return growth.reply_sizes(_store())


def statuses() -> dict[Status, int]:
    """How many replies are in each state."""
    return growth.statuses(_store())


def verification(progress: Progress) -> Verification:
    """The check of the whole store: iterate for what is found. Reads all of it."""
    return Verification(_store(), progress=progress)


def prune_plan(days: float | None, max_bytes: int | None, *, tensors_only: bool) -> prune.PrunePlan:
    """What would go that is older than ``days``, or for the data to fit into ``max_bytes``."""
    age = None if days is None else dt.timedelta(days=days)
    return prune.plan(_store(), older_than=age, max_bytes=max_bytes, tensors_only=tensors_only)


def carry_out(plan: prune.PrunePlan, progress: Progress) -> prune.PrunePlan:
    """Throw away what is planned; returns what went. There is no way back."""
    return prune.prune(_writer(store_name()), plan, progress)


def build_anew(on_tick: Callable[[], None]) -> vacuum.Vacuumed:
    """Vacuum the store. Raises StoreError while a reply is being generated."""
    return vacuum.vacuum(store_name(), on_tick)


@st.cache_data(max_entries=32, ttl=60, show_spinner=False)
def model_defaults(model_id: str) -> dict[str, float]:
    """What the model's own generation config says of sampling, where it is known here."""
    return model_defaults_of.read(model_id, Settings.from_environment().models_dir)


@st.cache_data(max_entries=32, ttl=60, show_spinner=False)
def template_switches(model_id: str) -> tuple[str, ...]:
    """The arguments with a field of their own that the model's chat template reads."""
    return model_defaults_of.switches(model_id, Settings.from_environment().models_dir)


def builtin_is_here() -> bool:
    """Whether the built-in model has been fetched."""
    return (Settings.from_environment().models_dir / "smollm2").is_dir()


def worker_state() -> WorkerState | None:
    """What the process that owns the model is doing; None when there never was one."""
    return _store().worker()


def models_used() -> list[str]:
    """The models of the latest conversations, the latest first."""
    used = [model for c in _store().conversations(limit=100) for model in c.model_ids]
    return list(dict.fromkeys(used))


def ask(request: queueing.ReplyRequest, conversation_id: int | None) -> int:
    """Queue a reply; returns the conversation's id. ``see_to_worker`` finds who answers."""
    conversation, _ = queueing.submit(_writer(store_name()), request, conversation_id)
    return conversation


def answer_for_tool(conversation_id: int, tool: str, content: str) -> None:
    """Add a tool's answer while others are still awaited."""
    queueing.add_tool_result(_writer(store_name()), conversation_id, tool, content)


def waiting() -> list[int]:
    """The replies queued or under way in the whole store, in the order they are served."""
    return _store().waiting()


def stop(message: Message) -> None:
    """Ask for a reply to end after the token under way."""
    _writer(store_name()).request_stop(message.id)


def see_to_worker() -> None:
    """Start the process that answers, unless there is one."""
    worker.ensure_running(store_name())


# ------------------------------------------------------- questions across steps
# The engine is loaded by the first of them: no other page waits for it.


@st.cache_resource(on_release=lambda session: session.close())
def _query_session(db: str) -> QuerySession:
    from oki_trace.analysis.query_session import QuerySession

    return QuerySession(db)


@st.cache_resource
def _catch_up(db: str) -> BackgroundSync:
    from oki_trace.analysis.background_sync import BackgroundSync

    return BackgroundSync(db, _reader(db))


def questions() -> Mapping[str, Question]:
    """All built-in questions, by name."""
    from oki_trace.analysis.catalog import QUESTIONS

    return QUESTIONS


def behind(wait_s: float) -> tuple[int, int] | None:
    """How far the cache is behind the store: messages written, of all; None when it is not.

    It is brought in step meanwhile, and waited for so long. Raises StoreError.
    """
    return _catch_up(store_name()).behind(wait_s)


def answer(state: QuestionState) -> Answer:
    """The answer to a built-in question. Raises UsageError, QuestionError or NotFound."""
    return _answer(store_name(), _store().stamp(), state)


@st.cache_data(max_entries=32, show_spinner=False)
def _answer(db: str, stamp: str, state: QuestionState) -> Answer:
    from oki_trace.analysis import catalog

    subjects = (state.first, state.second)
    return catalog.answer(
        _query_session(db),
        state.question,
        subjects if catalog.QUESTIONS[state.question].compares else (),
        scope=state.scope(),
        view=state.view,
        **dict(state.options),
    )


def write_csv(found: Answer, file: TextIO) -> None:
    """An answer's rows, safe to be opened as a spreadsheet."""
    from oki_trace.analysis.results import write_csv as write

    write([column.name for column in found.columns], found.rows, file)


def functions() -> Sequence[Function]:
    """What SQL can ask of the full tensors."""
    from oki_trace.analysis.tables import FUNCTIONS

    return FUNCTIONS


def tables() -> Sequence[Table]:
    """What SQL can read."""
    from oki_trace.analysis.tables import TABLES

    return TABLES


def sql(query: str, limit: int, seconds: float, tick: Callable[[], None]) -> Result:
    """The answer to somebody's own SQL as an Arrow table. ``tick`` is called meanwhile.

    Raises QuestionError, and what ``tick`` raises: the question is ended then.
    """
    return _query_session(store_name()).sql_result(query, limit=limit, seconds=seconds, tick=tick)
