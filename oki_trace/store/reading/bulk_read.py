"""Reads many steps of a reply at once, as arrays instead of a record per step.

The rows of a step are clustered by step, so each call reads one range of each table;
no tensor is read. A column has the values as written, in the order of the table's key:
whole numbers are int64 arrays, measured numbers and nullable ones float64 with NaN,
truth values bool; text and times are lists.
"""

from __future__ import annotations

import datetime as dt
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from sqlalchemy import Boolean, Connection, Double, Integer, select

from oki_trace.records import LOGIT, AttentionPoints, LensGrid, Status
from oki_trace.store.liveness import status_of
from oki_trace.store.reading.connection import ReadConnection
from oki_trace.store.reading.damage import report_damaged_steps
from oki_trace.store.reading.steps import within
from oki_trace.store.schema import models
from oki_trace.store.schema.models import AttentionEntry, LensEntry, LensLayer, Message, Step

# Arrays of shape (rows,), and lists of strings.
Columns = dict[str, Any]

# Bytes and documents are read a step at a time.
_LEFT_OUT = frozenset({"token_bytes", "decision", "digest", "tensor_digest"})


@dataclass(frozen=True, slots=True)
class MessageMark:
    """The identity of a message and its stored status: live while it can still change.

    A message that has ended changes only in its ``readings`` by lenses, which are counted.
    """

    id: int
    conversation_id: int
    status: Status
    created_at: dt.datetime
    readings: int = 0


class BulkReads(ReadConnection):
    """The read methods that return arrays. Those of one reply raise DamagedSteps."""

    def lens_grid(
        self,
        message_id: int,
        first: int = 0,
        end: int | None = None,
        *,
        given: bool = False,
        lens: str = LOGIT,
    ) -> LensGrid:
        """A lens at every layer that it reads, at the steps from ``first`` up to ``end``.

        With ``given``, at the steps of given tokens, by position.
        """
        step, layer, entry = Step, LensLayer, LensEntry
        index = step.position if given else step.step_index
        best = (entry.step_id == layer.step_id) & (entry.lens == lens)
        best &= (entry.layer == layer.layer) & (entry.rank == 1)
        query = (
            select(
                *(index, entry.token_id, entry.token, entry.prob, layer.entropy),
                *(layer.chosen_rank, layer.chosen_prob, layer.kl, layer.layer),
            )
            .join(layer, (layer.step_id == step.id) & (layer.lens == lens))
            .join(entry, best)
            .where(*within(message_id, first, end, given=given))
            .order_by(index, layer.layer)
        )
        with report_damaged_steps(message_id):
            rows = self.rows(query)
            columns = list(zip(*rows, strict=True)) or [()] * 9
            steps = np.unique(np.array(columns[0], dtype=np.int64))
            shape = (len(steps), len(rows) // max(len(steps), 1))
            layers = np.array(columns[8][: shape[1]], dtype=np.int64)
            if (np.array(columns[8], dtype=np.int64).reshape(shape) != layers).any():
                raise ValueError("its steps were read at different layers")
            # Thousands of cells hold a few hundred distinct tokens.
            tokens = {token: number for number, token in enumerate(dict.fromkeys(columns[2]))}

            def floats(column: int) -> np.ndarray:
                return np.array(columns[column], dtype=np.float32).reshape(shape)

            def ints(values: Any) -> np.ndarray:
                return np.array(values, dtype=np.int64).reshape(shape)

            return LensGrid(
                step_index=steps,
                tokens=tuple(tokens),
                top=ints([tokens[token] for token in columns[2]]),
                top_id=ints(columns[1]),
                top_prob=floats(3),
                entropy=floats(4),
                chosen_rank=ints(columns[5]),
                chosen_prob=floats(6),
                kl=floats(7),
                layers=layers,
            )

    def attention_points(
        self,
        message_id: int,
        layer: int,
        first: int = 0,
        end: int | None = None,
        *,
        given: bool = False,
    ) -> AttentionPoints:
        """The most attended positions of ``layer``, at the steps from ``first`` up to ``end``.

        With ``given``, at the steps of given tokens, by position.
        """
        index = Step.position if given else Step.step_index
        query = (
            select(index, AttentionEntry.position, AttentionEntry.weight)
            .join(AttentionEntry, AttentionEntry.step_id == Step.id)
            .where(*within(message_id, first, end, given=given), AttentionEntry.layer == layer)
            .order_by(index, AttentionEntry.rank)
        )
        with report_damaged_steps(message_id):
            columns = list(zip(*self.rows(query), strict=True)) or [()] * 3
            return AttentionPoints(
                step_index=np.array(columns[0], dtype=np.int64),
                position=np.array(columns[1], dtype=np.int64),
                weight=np.array(columns[2], dtype=np.float32),
            )

    def message_marks(self) -> list[MessageMark]:
        """The mark of every message of the store, by id."""
        query = select(
            *(Message.id, Message.conversation_id, Message.status, Message.created_at),
            Message.readings,
        ).order_by(Message.id)
        return [
            MessageMark(
                row.id,
                row.conversation_id,
                status_of(row.status),
                row.created_at,
                row.readings,
            )
            for row in self.rows(query)
        ]

    def conversation_columns(self) -> Columns:
        """Every conversation of the store, by id."""
        with self._read() as connection:
            return _columns(connection, models.Conversation)

    def prompt_columns(self, message_id: int) -> Columns:
        """The tokens of a reply's prompt; empty before the reply begins."""
        table = models.PromptToken
        with self._read() as connection, report_damaged_steps(message_id):
            return _columns(connection, table, table.message_id == message_id)

    def step_columns(
        self, message_id: int, first: int, end: int, *, given: bool = False
    ) -> dict[str, Columns]:
        """The steps from ``first`` up to ``end`` with everything but tensors, by table.

        With ``given``, the steps of given tokens, by position.
        """
        conditions = within(message_id, first, end, given=given)
        ids = select(Step.id).where(*conditions)
        with self._read() as connection, report_damaged_steps(message_id):
            tables = {"step": _columns(connection, Step, *conditions, order=Step.position)}
            for model in models.STEP_CHILDREN:
                own = model.__table__.c.step_id.in_(ids)
                tables[model.__tablename__] = _columns(connection, model, own)
        return tables


def _columns(
    connection: Connection, model: type[models.Base], *conditions: Any, order: Any = None
) -> Columns:
    """The rows of a table by column, in the ``order`` given or that of its key."""
    columns = [column for column in model.__table__.columns if column.name not in _LEFT_OUT]
    query = select(*columns).where(*conditions)
    query = query.order_by(*model.__table__.primary_key) if order is None else query.order_by(order)
    with _no_garbage_collection():
        rows = connection.execute(query).all()
        values = zip(*rows, strict=True) if rows else [()] * len(columns)
        result = {
            column.name: _values(column, list(cells))
            for column, cells in zip(columns, values, strict=True)
        }
        # Freed before garbage is collected again.
        del rows, values
        return result


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collecting garbage among new tuples takes most of the time where each row is one."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _values(column: Any, values: list[Any]) -> Any:
    if isinstance(column.type, Double) or (column.nullable and isinstance(column.type, Integer)):
        # NumPy reads None as NaN.
        return np.array(values, dtype=np.float64)
    if isinstance(column.type, Boolean):
        return np.array(values, dtype=np.bool_)
    if isinstance(column.type, Integer):
        return np.array(values, dtype=np.int64)
    return values
