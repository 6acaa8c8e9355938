"""Reads steps: turns rows back into records.

NULL in a measured column stands for NaN, and is NaN in the record.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
from sqlalchemy import ColumnElement, Connection, Row, Select, func, select

from oki_trace import records
from oki_trace.records import (
    LOGIT,
    Candidates,
    FloatArray,
    IntArray,
    LayerAttention,
    LayerRouting,
    Lens,
    StepSummary,
)
from oki_trace.store.reading import documents
from oki_trace.store.reading.connection import ReadConnection
from oki_trace.store.reading.damage import report_damaged_steps
from oki_trace.store.reading.not_found import no_given_step, no_step
from oki_trace.store.schema.models import (
    AttentionEntry,
    AttentionLayer,
    Base,
    LensEntry,
    LensLayer,
    RouterEntry,
    Step,
    TopkEntry,
)

NAN = float("nan")
# Statements on tables alone, without mapped classes, are faster to run.
_STEP = Step.__table__.c
# Steps of a reply that are in memory at once.
BATCH = 64

# The rows of one step in one table, by column.
_Rows = Mapping[str, list[Any]]
_NO_ROWS: _Rows = defaultdict(list)
# The columns of a step that its record copies, and those where NULL is NaN.
_COPIED = (
    *("position", "token_id", "token", "is_special", "rank", "sampled_prob", "origin"),
    *("digest", "tensor_digest"),
)
_MEASURED = ("logit", "prob", "logprob", "entropy", "margin", "elapsed_ms")
_SUMMARY = [_STEP[name] for name in StepSummary.__dataclass_fields__]


def within(
    message_id: int, first: int = 0, end: int | None = None, *, given: bool = False
) -> list[ColumnElement[bool]]:
    """The condition: a step of this reply, from ``first`` up to but not ``end``.

    Generated steps by their step_index; with ``given``, the steps of given tokens by their
    position.
    """
    index = _STEP.position if given else _STEP.step_index
    kind = [_STEP.step_index.is_(None)] if given else []
    upper = [] if end is None else [index < end]
    return [_STEP.message_id == message_id, index >= first, *upper, *kind]


class StepReads(ReadConnection):
    """The read methods about the steps of one reply. All but the last raise DamagedSteps.

    They address generated steps by step_index, and with ``given`` the steps of given tokens
    by position.
    """

    def steps(self, message_id: int, since: int = -1, *, given: bool = False) -> list[StepSummary]:
        """The steps of a reply after ``since``, without candidates, attention and lens."""
        conditions = within(message_id, since + 1, given=given)
        query = select(*_SUMMARY).where(*conditions).order_by(_STEP.position)
        with report_damaged_steps(message_id):
            return [_summary(row) for row in self.rows(query)]

    def step(self, message_id: int, index: int, *, given: bool = False) -> records.Step:
        """One step with its candidates, attention and lens; its tensors are read by name."""
        with self._read() as connection, report_damaged_steps(message_id):
            steps = _read_steps(connection, within(message_id, index, index + 1, given=given))
        if not steps:
            raise no_given_step(message_id, index) if given else no_step(message_id, index)
        return steps[0]

    def iter_steps(
        self, message_id: int, first: int = 0, end: int | None = None, *, given: bool = False
    ) -> Iterator[records.Step]:
        """The steps from ``first`` up to ``end``, a batch in memory at a time.

        Each batch is read from one snapshot.
        """
        while end is None or first < end:
            conditions = within(message_id, first, end, given=given)
            with self._read() as connection, report_damaged_steps(message_id):
                batch = _read_steps(connection, conditions)
            yield from batch
            if len(batch) < BATCH:
                return
            first = (batch[-1].position if given else batch[-1].step_index) + 1

    def candidates(self, message_id: int, *, given: bool = False) -> dict[int, Candidates]:
        """The candidates of each step of a reply, by step_index; nothing else is read.

        With ``given``, those of given tokens, by position.
        """
        column = _STEP.position if given else _STEP.step_index
        entry = TopkEntry.__table__
        query = (
            select(column, entry)
            .join(entry, entry.c.step_id == _STEP.id)
            .where(*within(message_id, given=given))
            .order_by(column, entry.c.rank)
        )
        with self._read() as connection, report_damaged_steps(message_id):
            return {index: _candidates(rows) for index, rows in _grouped(connection, query).items()}

    def step_ids(self, message_id: int, first: int, *, given: bool = False) -> dict[int, int]:
        """The ids of the next few steps of a reply, from ``first`` on, by step_index.

        With ``given``, those of given tokens, by position.
        """
        column = _STEP.position if given else _STEP.step_index
        query = select(column, _STEP.id).where(*within(message_id, first, given=given))
        rows = self.rows(query.order_by(column).limit(BATCH))
        return {row[0]: row[1] for row in rows}

    def given_count(self, message_id: int) -> int:
        """The number of steps of given tokens that belong to the message itself."""
        of_given = within(message_id, given=True)
        return int(self.scalar(select(func.count()).select_from(Step).where(*of_given)))


def _index(row: Row[Any]) -> int:
    """The step_index as records have it: -1 for a given token."""
    return -1 if row.step_index is None else int(row.step_index)


def _summary(row: Row[Any]) -> StepSummary:
    values = row._asdict() | {"step_index": _index(row)}
    for name in ("prob", "logprob", "entropy", "margin"):
        values[name] = _number(values[name])
    return StepSummary(**values)


def _read_steps(
    connection: Connection, conditions: Sequence[ColumnElement[bool]]
) -> list[records.Step]:
    """The first ``BATCH`` steps, in order of position, with everything but their tensors."""
    rows = connection.execute(
        select(Step.__table__).where(*conditions).order_by(_STEP.position).limit(BATCH)
    ).all()
    ids = [row.id for row in rows]

    def children(model: type[Base], *more: str) -> dict[Any, _Rows]:
        """The rows of each step that has any, in the order of their key.

        With the name of a second column, by the pair of step and this column.
        """
        table = model.__table__
        names = ("step_id", *more)
        first = [table.c[name] for name in names]
        others = [column for column in table.c if column.name not in names]
        query = select(*first, *others).where(table.c.step_id.in_(ids))
        return _grouped(connection, query.order_by(*table.primary_key), len(names))

    topk, router = children(TopkEntry), children(RouterEntry)
    attention_layers, attention = children(AttentionLayer), children(AttentionEntry)
    lenses = _lenses(children(LensLayer, "lens"), children(LensEntry, "lens"), rows)
    return [
        records.Step(
            **_values(row),
            token_bytes=bytes(row.token_bytes),
            topk=_candidates(topk.get(row.id, _NO_ROWS)),
            attention=_attention(
                attention_layers.get(row.id, _NO_ROWS), attention.get(row.id, _NO_ROWS)
            ),
            lens=next((one for one in lenses[row.id] if one.name == LOGIT), None),
            lenses=tuple(one for one in lenses[row.id] if one.name != LOGIT),
            router=_router(router.get(row.id, _NO_ROWS)),
            decision=None if row.decision is None else documents.decision(row.decision),
        )
        for row in rows
    ]


def _values(row: Row[Any]) -> dict[str, Any]:
    """The fields of a step that are columns."""
    values = {name: getattr(row, name) for name in _COPIED} | {"step_index": _index(row)}
    return values | {name: _number(getattr(row, name)) for name in _MEASURED}


def _grouped(connection: Connection, query: Select[Any], columns: int = 1) -> dict[Any, _Rows]:
    """The rows of a query by its first columns, by which it is ordered: a list per column."""
    rows = connection.execute(query).all()
    names = rows[0]._fields if rows else ()
    # Column by column: a step has hundreds of rows, and naming each value of each would
    # take longer than reading it.
    return {
        key: dict(zip(names, map(list, zip(*group, strict=True)), strict=True))
        for key, group in groupby(rows, key=itemgetter(*range(columns)))
    }


def _candidates(rows: _Rows) -> Candidates:
    return Candidates(
        token_ids=_ints(rows["token_id"]),
        tokens=tuple(rows["token"]),
        logits=_floats(rows["logit"]),
        probs=_floats(rows["prob"]),
        sampled_probs=_floats_or_none(rows["sampled_prob"]),
        noise=_floats_or_none(rows["noise"]),
    )


def _attention(layers: _Rows, entries: _Rows) -> tuple[LayerAttention, ...]:
    entry_layers = entries["layer"]
    positions, weights = _ints(entries["position"]), _floats(entries["weight"])
    attention = []
    for layer, missing in zip(layers["layer"], layers["missing"], strict=True):
        # The entries are ordered by layer.
        own = slice(bisect_left(entry_layers, layer), bisect_right(entry_layers, layer))
        attention.append(LayerAttention(layer, positions[own], weights[own], _number(missing)))
    return tuple(attention)


def _router(entries: _Rows) -> tuple[LayerRouting, ...]:
    layers = entries["layer"]
    experts, weights = _ints(entries["expert"]), _floats(entries["weight"])
    routing = []
    for layer in dict.fromkeys(layers):
        own = slice(bisect_left(layers, layer), bisect_right(layers, layer))
        routing.append(LayerRouting(layer, experts[own], weights[own]))
    return tuple(routing)


def _lenses(
    layers: Mapping[tuple[int, str], _Rows],
    entries: Mapping[tuple[int, str], _Rows],
    steps: Sequence[Row[Any]],
) -> dict[int, list[Lens]]:
    """The readings of each step, in the order of the lenses' names."""
    lenses: dict[int, list[Lens]] = {row.id: [] for row in steps}
    index = {row.id: _index(row) for row in steps}
    for key in sorted(layers):
        step_id, name = key
        reading = _lens(index[step_id], name, layers[key], entries.get(key, _NO_ROWS))
        lenses[step_id].append(reading)
    return lenses


def _lens(step_index: int, name: str, layers: _Rows, entries: _Rows) -> Lens:
    count = len(layers["layer"])
    tokens = entries["token"]
    k = len(tokens) // count
    is_whole = layers["layer"] == list(range(count))
    return Lens(
        step_index=step_index,
        token_ids=_ints(entries["token_id"]).reshape(count, k),
        tokens=tuple(tuple(tokens[i * k : (i + 1) * k]) for i in range(count)),
        logits=_floats(entries["logit"]).reshape(count, k),
        probs=_floats(entries["prob"]).reshape(count, k),
        entropy=_floats(layers["entropy"]),
        chosen_rank=_ints(layers["chosen_rank"]),
        chosen_prob=_floats(layers["chosen_prob"]),
        kl=_floats(layers["kl"]),
        name=name,
        layers=None if is_whole else _ints(layers["layer"]),
    )


def _number(value: float | None) -> float:
    return NAN if value is None else value


def _floats(values: list[float | None]) -> FloatArray:
    # NumPy reads None as NaN.
    return np.array(values, dtype=np.float32)


def _floats_or_none(values: list[float | None]) -> FloatArray | None:
    return None if all(value is None for value in values) else _floats(values)


def _ints(values: list[int]) -> IntArray:
    return np.array(values, dtype=np.int64)
