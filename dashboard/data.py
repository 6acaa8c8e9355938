"""Reads and writes the store for the explorer; no other module of the explorer opens it.

Reads use a read-only connection. Queueing or stopping a reply is a small write;
the worker decodes it in a separate process.
"""

from __future__ import annotations

import gc
import io
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import streamlit as st

from dashboard import model_defaults as model_defaults_of
from dashboard.viewdata import attention, comparison
from oki_trace import child_process, worker
from oki_trace.analysis.distance import Distance
from oki_trace.analysis.one_text import OneText, has_given_text
from oki_trace.analysis.one_text import one_text as align_texts
from oki_trace.analysis.reply_alignment import Alignment, align_replies
from oki_trace.analysis.step_distance import StepKey, step_distances
from oki_trace.errors import ModelError, NotFound
from oki_trace.exchange.exporting import export
from oki_trace.exchange.formats import Format
from oki_trace.records import (
    LOGIT,
    AttentionPoints,
    Conversation,
    LensGrid,
    Message,
    Prompt,
    Step,
    StepSummary,
    StoreInfo,
    TensorRecord,
    WorkerState,
)
from oki_trace.settings import Settings
from oki_trace.store.reading.prompt_steps import PromptStep
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.schema import migrate
from oki_trace.store.writing.writer import TraceWriter

if TYPE_CHECKING:
    from dashboard.question_state import QuestionState
    from oki_trace.analysis.background_sync import BackgroundSync
    from oki_trace.analysis.query_session import QuerySession
    from oki_trace.analysis.question import Answer, Question
    from oki_trace.analysis.sandbox import Result


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


def store() -> TraceReader:
    """The store to read."""
    return _reader(store_name())


def writer() -> TraceWriter:
    """The store to write to."""
    return _writer(store_name())


def recent_conversations(limit: int = 8) -> list[Conversation]:
    """The conversations changed most recently."""
    return store().conversations(limit=limit)


# A model's files hold code from others, which may never end.
TOKENIZE_SECONDS = 60


@st.cache_data(max_entries=64, show_spinner="Splitting the text into tokens…")
def typed_tokens(model_id: str, text: str) -> list[tuple[int, str]]:
    """The id and text of each token of a typed text. Raises OkiTraceError where it has none."""
    process = child_process.start("oki_trace.token_process")
    request = json.dumps({"model": model_id, "text": text}).encode()
    try:
        output, _ = process.communicate(request, TOKENIZE_SECONDS)
        answer = json.loads(output)
    except (subprocess.TimeoutExpired, ValueError) as error:
        raise ModelError(f"The tokenizer of {model_id} did not answer. Choose a token.") from error
    finally:
        process.kill()
    if isinstance(answer, dict):
        raise ModelError(str(answer["error"]))
    return [(int(number), str(piece)) for number, piece in answer]


def logprobs(conversation_id: int) -> dict[int, float]:
    """The log-probability of each reply's own tokens together, in nats, by message."""
    return store().logprobs(conversation_id)


def export_file(conversation_id: int, format: Format) -> bytes:
    """The conversation with all its traces as a file; Parquet tables come in a zip."""
    with tempfile.TemporaryDirectory(prefix="oki-trace-export-") as folder:
        path = Path(folder) / "conversation"
        export(store(), conversation_id, format, path, io.StringIO())
        if path.is_dir():
            path = Path(shutil.make_archive(str(path), "zip", path))
        return path.read_bytes()


def conversation(conversation_id: int) -> tuple[Conversation, list[Message]] | None:
    """The conversation and its messages; None if there is none with this id."""
    with store().snapshot() as reader:
        try:
            return reader.conversation(conversation_id), reader.messages(conversation_id)
        except NotFound:
            return None


def message(message_id: int) -> Message | None:
    """One message; None if there is none with this id."""
    try:
        return store().message(message_id)
    except NotFound:
        return None


Read = TypeVar("Read", bound=Callable[..., Any])


def _cached(max_entries: int, spinner: str | bool = False) -> Callable[[Read], Read]:
    """Caches a read of replies, by what of them can change: their tokens and their readings."""

    def key(message: Message) -> tuple[str, int, int, int]:
        return store_name(), message.id, message.tokens, message.readings

    cached = st.cache_data(max_entries=max_entries, show_spinner=spinner, hash_funcs={Message: key})
    return cast("Callable[[Read], Read]", cached)


def steps(message: Message) -> list[StepSummary]:
    """The steps of a reply, without their details."""
    return store().steps(message.id) if message.status.is_live else _finished_steps(message)


@_cached(64)
def _finished_steps(message: Message) -> list[StepSummary]:
    return store().steps(message.id)


def prompt_steps(message: Message) -> dict[int, PromptStep]:
    """The traced tokens of a reply's prompt, by position; empty until the reply has begun.

    A branch has the steps of its beginning among them.
    """
    if message.prompt_len is None:
        return {}
    if message.status.is_live:
        return _live_prompt_steps(store_name(), message.id) if message.tokens else {}
    untraced = message.policy is not None and message.policy.trace_prompt is None
    traced = {} if untraced else _prompt_steps(message)
    if message.branch_of is None:
        return traced
    return dict(sorted((traced | prefix_steps(message)).items()))


@st.cache_data(ttl=5, max_entries=8, show_spinner=False)
def _live_prompt_steps(db: str, message_id: int) -> dict[int, PromptStep]:
    # All are written before the reply's own steps, and their lenses soon after.
    return store().prompt_steps(message_id)


@_cached(32)
def prefix_steps(message: Message) -> dict[int, PromptStep]:
    """The steps of a branch's beginning, by position: those of the reply it departs from."""
    return store().prefix_steps(message.id)


@_cached(32)
def _prompt_steps(message: Message) -> dict[int, PromptStep]:
    return store().prompt_steps(message.id)


def step(message: Message, index: int, *, given: bool = False) -> Step | None:
    """One step with everything but its tensors, if ``given`` by position; None until written."""
    try:
        return store().step(message.id, index, given=given)
    except NotFound:
        return None


def prompt(message: Message) -> Prompt | None:
    """The prompt of a reply; None before the reply has begun."""
    return None if message.prompt_len is None else _prompt(message)


@_cached(16)
def _prompt(message: Message) -> Prompt:
    return store().prompt(message.id)


@_cached(64)
def attentions(message: Message, index: int, *, given: bool = False) -> TensorRecord | None:
    """The attention of a step, every layer and head; None if it was not kept."""
    try:
        return store().tensor(message.id, index, "attentions", given=given)
    except NotFound:
        return None


def head_count(message: Message, index: int, *, given: bool = False) -> int | None:
    """The heads of a step's full attention, without reading it; None if it was not kept."""
    shape = store().tensor_shape(message.id, index, "attentions", given=given)
    return None if shape is None else shape[1]


@_cached(16)
def lens_grid(
    message: Message, first: int, end: int, *, given: bool = False, lens: str = LOGIT
) -> LensGrid:
    """A lens at every layer from step ``first`` up to ``end``; if ``given`` by position."""
    return store().lens_grid(message.id, first, end, given=given, lens=lens)


@_cached(64)
def lens_names(message: Message) -> tuple[str, ...]:
    """The lenses that have read any step of a reply, the Logit Lens first."""
    return store().lens_names(message.id)


@_cached(32)
def attention_points(
    message: Message, layer: int, first: int, end: int, *, given: bool = False
) -> AttentionPoints:
    """The kept attention of ``layer``, heads averaged, from step ``first`` up to ``end``."""
    return store().attention_points(message.id, layer, first, end, given=given)


@_cached(32)
def full_attention(
    message: Message, layer: int, head: str, first: int, end: int, *, given: bool = False
) -> AttentionPoints:
    """The same from the full tensors: at every position, of one head or over the heads."""
    tensors = store().iter_tensors(message.id, "attentions", first, end, given=given)
    return attention.full_attention_points(tensors, layer, head)


def alignment(left: Message, right: Message) -> Alignment:
    """Which steps of two replies stand beside each other."""
    return align_replies(store(), left, right)


def distances(
    left: Message, right: Message, pairs: Sequence[comparison.Pair]
) -> list[Distance | None]:
    """The distance of each pair's distributions; None where a reply has no step or no numbers."""
    both = [(p.left, p.right) for p in pairs if p.left is not None and p.right is not None]
    measured = iter(_distances(left, right, both))
    return [None if p.left is None or p.right is None else next(measured) for p in pairs]


@_cached(8, "Comparing…")
def _distances(
    left: Message, right: Message, steps: list[tuple[int, int]]
) -> list[Distance | None]:
    pairs = [(StepKey(left.id, one), StepKey(right.id, other)) for one, other in steps]
    return _measured(pairs)


def _measured(pairs: Sequence[tuple[StepKey, StepKey]]) -> list[Distance | None]:
    measured = step_distances(store(), pairs)
    return [None if one is None else one.distance for one in measured]


def is_score(message: Message) -> bool:
    """Whether a message is a scored text that has steps."""
    return has_given_text(store(), message)


def one_text(left: Message, right: Message) -> tuple[OneText, list[Distance | None]]:
    """Two messages with one text: its spans, and by token the distance of each.

    Raises QuestionError if they have different texts.
    """
    live = left.status.is_live or right.status.is_live
    return _read_one_text(left, right) if live else _one_text(left, right)


@_cached(8, "Comparing…")
def _one_text(left: Message, right: Message) -> tuple[OneText, list[Distance | None]]:
    return _read_one_text(left, right)


def _read_one_text(left: Message, right: Message) -> tuple[OneText, list[Distance | None]]:
    text = align_texts(store(), left, right)
    if text.by == "character":
        return text, []

    def key(message: Message, step: StepSummary) -> StepKey:
        given = step.step_index < 0
        return StepKey(message.id, step.position if given else step.step_index, given)

    pairs = [
        (key(left, text.left[span.left[0]]), key(right, text.right[span.right[0]]))
        for span in text.spans
    ]
    return text, _measured(pairs)


def recent_replies(limit: int = 25) -> list[tuple[Conversation, Message]]:
    """The replies with tokens, and scored texts, in the conversations changed most recently."""
    with store().snapshot() as reader:
        return [
            (conversation, message)
            for conversation in reader.conversations(limit=limit)
            for message in reversed(reader.messages(conversation.id))
            if message.tokens or has_given_text(reader, message)
        ]


def last_reply(conversation_id: int) -> int | None:
    """The last reply with tokens in a conversation; None if there is none."""
    _, messages = conversation(conversation_id) or (None, [])
    return next((m.id for m in reversed(messages) if m.tokens), None)


def info() -> StoreInfo:
    """Totals of the store."""
    return store().info()


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
    return store().worker()


def models_used() -> list[str]:
    """The models of the latest conversations, the latest first."""
    used = [model for c in store().conversations(limit=100) for model in c.model_ids]
    return list(dict.fromkeys(used))


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
    return _answer(store_name(), store().stamp(), state)


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


def run_sql(query: str, limit: int, seconds: float, tick: Callable[[], None]) -> Result:
    """The result of a user's SQL as an Arrow table. ``tick`` is called while it runs.

    Raises QuestionError, and any error of ``tick``, which ends the query.
    """
    return _query_session(store_name()).sql_result(query, limit=limit, seconds=seconds, tick=tick)
