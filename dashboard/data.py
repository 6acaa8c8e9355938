"""The one file of the explorer that talks to the store.

Reading goes through a read-only connection. Asking for a reply, or for its
stop, is a small write; decoding is the worker's, in a process of its own.
"""

from __future__ import annotations

import numpy as np
import streamlit as st

from oki_trace import asking, worker
from oki_trace.errors import NotFound, OkiTraceError
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
from oki_trace.settings import Settings
from oki_trace.store import migrate
from oki_trace.store.reader import TraceReader
from oki_trace.store.writer import TraceWriter


def store_name() -> str:
    """The path or URL of the store."""
    return Settings.from_environment().db


def open_store() -> None:
    """Make the store if there is none; on failure the page says why and ends."""
    try:
        _opened(store_name())
    except OkiTraceError as error:
        st.error(str(error), icon=":material/error:")
        st.stop()


@st.cache_resource
def _opened(db: str) -> None:
    migrate.ensure(db)


@st.cache_resource
def _reader(db: str) -> TraceReader:
    return TraceReader(db)


@st.cache_resource
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


def find(search: str, limit: int, offset: int) -> list[Conversation]:
    """A page of the conversations whose title or messages hold ``search``."""
    return _store().conversations(search=search or None, limit=limit, offset=offset)


def conversation(conversation_id: int) -> tuple[Conversation, list[Message]] | None:
    """The conversation and its messages; None when it is not there."""
    with _store().snapshot() as reader:
        try:
            found = reader.conversation(conversation_id)
        except NotFound:
            return None
        return found, reader.messages(conversation_id)


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


@st.cache_data(max_entries=32, show_spinner=False)
def _attentions(db: str, message_id: int, index: int) -> Tensor | None:
    try:
        return _reader(db).tensor(message_id, index, "attentions")
    except NotFound:
        return None


def attentions(message: Message, index: int) -> Tensor | None:
    """Every layer's and head's weights of a step; None where they were not kept."""
    return _attentions(store_name(), message.id, index)


def step_range(message: Message, first: int, end: int) -> list[Step]:
    """The steps from ``first`` up to ``end``; of a finished reply they are read once."""
    if message.status.is_live:
        return list(_store().iter_steps(message.id, first, end))
    return _finished_range(store_name(), message.id, first, end)


@st.cache_data(max_entries=16, show_spinner=False)
def _finished_range(db: str, message_id: int, first: int, end: int) -> list[Step]:
    return list(_reader(db).iter_steps(message_id, first, end))


def message_bytes(message: Message) -> int:
    """What the reply's tensors take in the store."""
    return _store().message_bytes(message.id)


def info() -> StoreInfo:
    """Totals over the store."""
    return _store().info()


def worker_state() -> WorkerState | None:
    """What the process that owns the model is doing; None when there never was one."""
    return _store().worker()


def models_used() -> list[str]:
    """The models of the latest conversations, the latest first."""
    used = [model for c in _store().conversations(limit=100) for model in c.model_ids]
    return list(dict.fromkeys(used))


def ask(request: asking.Ask, conversation_id: int | None) -> int:
    """Queue a reply and see that a worker is there; returns the conversation's id."""
    conversation, _ = asking.submit(_writer(store_name()), request, conversation_id)
    worker.ensure_running(store_name())
    return conversation


def stop(message: Message) -> None:
    """Ask for a reply to end after the token under way."""
    _writer(store_name()).request_stop(message.id)


def see_to_worker() -> None:
    """Start a worker again if a reply is waiting and the last one is gone."""
    worker.ensure_running(store_name())


def full_weights(tensor: Tensor, layer: int, head: int | str) -> tuple[np.ndarray, int]:
    """One layer's weights by position from ``key_offset`` on: (keys,), and that offset.

    ``head`` is a number, "mean" or "max".
    """
    heads = tensor.array[tensor.layers.index(layer)].astype(np.float32)
    if head == "mean":
        weights = heads.mean(0)
    elif head == "max":
        weights = heads.max(0)
    else:
        weights = heads[int(head)]
    return weights, tensor.key_offset
