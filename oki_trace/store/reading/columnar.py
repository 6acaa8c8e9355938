"""A reply's rows, a column at a time, for what computes over many of them.

The guarantee: a column holds the values that were written, in the order of the
table's key. Whole numbers are int64 arrays, measured numbers and those that may
be absent float64 with NaN, truth values bool; text and times are lists.
"""

from __future__ import annotations

import datetime as dt
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from sqlalchemy import Boolean, Column, Connection, Double, Integer, Table, select

from oki_trace.records import Status
from oki_trace.store.reading.damage import status_of
from oki_trace.store.schema import models

# Arrays of shape (rows,), and lists of strings.
Columns = dict[str, Any]

_CHILDREN: tuple[type[models.Base], ...] = (
    models.TopkEntry,
    models.AttentionLayer,
    models.AttentionEntry,
    models.LensLayer,
    models.LensEntry,
)
# Bytes and documents are read a step at a time.
_LEFT_OUT = frozenset({"token_bytes", "decision", "digest", "tensor_digest"})


@dataclass(frozen=True, slots=True)
class MessageMark:
    """What tells a message from any other, and whether it is still being written."""

    id: int
    conversation_id: int
    status: Status
    created_at: dt.datetime


def message_marks(connection: Connection) -> list[MessageMark]:
    """Every message of the store, by id."""
    table = models.Message
    rows = connection.execute(
        select(table.id, table.conversation_id, table.status, table.created_at).order_by(table.id)
    )
    return [MessageMark(row[0], row[1], status_of(row[2]), row[3]) for row in rows]


def conversation_columns(connection: Connection) -> Columns:
    """Every conversation of the store, by id."""
    return _read(connection, models.Conversation, order=(models.Conversation.id,))


def step_columns(
    connection: Connection, message_id: int, first: int, end: int
) -> dict[str, Columns]:
    """The steps from ``first`` up to ``end`` and all that hangs on them, by table."""
    step = models.Step
    these = (step.message_id == message_id, step.step_index >= first, step.step_index < end)
    ids = select(step.id).where(*these)
    found = {"step": _read(connection, step, *these, order=(step.step_index,))}
    for child in _CHILDREN:
        table = _table(child)
        found[table.name] = _read(
            connection, child, table.c.step_id.in_(ids), order=tuple(table.primary_key)
        )
    return found


def prompt_columns(connection: Connection, message_id: int) -> Columns:
    """The tokens that a reply's model was given."""
    token = models.PromptToken
    return _read(connection, token, token.message_id == message_id, order=(token.position,))


def _read(
    connection: Connection, model: type[models.Base], *where: Any, order: tuple[Any, ...]
) -> Columns:
    columns = [column for column in _table(model).columns if column.name not in _LEFT_OUT]
    query = select(*columns).where(*where).order_by(*order)
    with _no_garbage_collection():
        rows = connection.execute(query).all()
        values = zip(*rows, strict=True) if rows else [()] * len(columns)
        found = {
            column.name: _values(column, list(of_column))
            for column, of_column in zip(columns, values, strict=True)
        }
        # Gone before the next look for cycles.
        del rows, values
        return found


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Looking for cycles among new tuples takes most of the time, where each row is one."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _values(column: Column[Any], found: list[Any]) -> Any:
    if isinstance(column.type, Double) or (column.nullable and isinstance(column.type, Integer)):
        # NumPy reads None as NaN.
        return np.array(found, dtype=np.float64)
    if isinstance(column.type, Boolean):
        return np.array(found, dtype=np.bool_)
    if isinstance(column.type, Integer):
        return np.array(found, dtype=np.int64)
    return found


def _table(model: type[models.Base]) -> Table:
    table = model.__table__
    assert isinstance(table, Table)
    return table
