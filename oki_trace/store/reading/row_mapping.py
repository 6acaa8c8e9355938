"""Rows back into the records they were made from.

What is NULL in a measured column was not a number, and is NaN again here.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
from sqlalchemy import JSON, ColumnElement, Connection, Integer, Row, and_, func, or_, select, true

from oki_trace.records import (
    Candidates,
    Conversation,
    FloatArray,
    IntArray,
    LayerAttention,
    Lens,
    Message,
    Status,
    Step,
    StepSummary,
    Tensor,
)
from oki_trace.store.codecs.tensors import EncodedTensor, decode
from oki_trace.store.heartbeat import CLOCK, LIFE, is_gone
from oki_trace.store.reading import documents
from oki_trace.store.reading.damage import Damage, status_of
from oki_trace.store.schema import models
from oki_trace.store.writing.lifecycle import text_so_far

NAN = float("nan")

# The rows of one step in one table, by column.
Columns = Mapping[str, list[Any]]
_NO_ROWS: Columns = defaultdict(list)

# Steps are numbered without a gap, so their count is one look into an index.
_TOKENS = (
    select(func.coalesce(func.max(models.Step.step_index) + 1, 0))
    .where(models.Step.message_id == models.Message.id)
    .correlate(models.Message)
    .scalar_subquery()
    .label("tokens")
)
# All but the prompt's text, which can be long and is asked for by itself.
MESSAGE_COLUMNS: tuple[ColumnElement[Any], ...] = (
    *(column for column in models.Message.__table__.columns if column.name != "prompt"),
    CLOCK,
    _TOKENS,
)
_BRIEF_COLUMNS = (
    models.Message.id,
    models.Message.conversation_id,
    models.Message.role,
    models.Message.created_at,
    models.Message.status,
    models.Message.model_id,
    *LIFE,
    _TOKENS,
)
SUMMARY_COLUMNS = tuple(
    models.Step.__table__.columns[name] for name in StepSummary.__dataclass_fields__
)
TENSOR_COLUMNS = tuple(
    models.Tensor.__table__.columns[name] for name in EncodedTensor.__dataclass_fields__
)


def _documents_valid(connection: Connection) -> ColumnElement[Any]:
    """Whether a message's documents are JSON: SQLite takes any text, PostgreSQL sees to it."""
    if connection.dialect.name != "sqlite":
        return true()
    documents = [column for column in models.Message.__table__.columns if _is_json(column)]
    return and_(
        *(or_(one.is_(None), func.json_valid(one, type_=Integer) == 1) for one in documents)
    )


def _is_json(column: ColumnElement[Any]) -> bool:
    return isinstance(column.type, JSON)


def conversation_records(connection: Connection, rows: Iterable[Row[Any]]) -> list[Conversation]:
    """Conversations with the totals of their messages, in the order given."""
    rows = list(rows)
    messages: dict[int, list[Any]] = {row.id: [] for row in rows}
    for message in connection.execute(
        select(*_BRIEF_COLUMNS, _documents_valid(connection).label("documents_valid"))
        .where(models.Message.conversation_id.in_(list(messages)))
        .order_by(models.Message.conversation_id, models.Message.position)
    ):
        messages[message.conversation_id].append(message)
    return [_conversation(row, messages[row.id]) for row in rows]


def _conversation(row: Row[Any], messages: Sequence[Any]) -> Conversation:
    damage = Damage()
    statuses = []
    for message in messages:
        of_message = Damage()
        statuses.append(_status(message, of_message))
        of_message.role(message.role)
        of_message.time("created_at", message.created_at)
        if not message.documents_valid:
            of_message.add("a document of it is no JSON")
        if of_message.told():
            damage.add(f"message {message.id}: {of_message}")
    return Conversation(
        id=row.id,
        title=damage.text("title", row.title),
        created_at=damage.time("created_at", row.created_at),
        updated_at=damage.time("updated_at", row.updated_at),
        messages=len(messages),
        tokens=sum(message.tokens for message in messages),
        status=statuses[-1] if statuses else Status.COMPLETE,
        model_ids=tuple(
            dict.fromkeys(str(message.model_id) for message in messages if message.model_id)
        ),
        damage=damage.told(),
    )


def message_record(connection: Connection, row: Row[Any]) -> Message:
    """A message. One without a final text has what its tokens say so far."""
    damage = Damage()
    status = _status(row, damage)
    content = damage.text("content", row.content)
    if not content and row.tokens and status in (Status.RUNNING, Status.INTERRUPTED):
        content = text_so_far(connection, row.id)
    made = Message(
        id=row.id,
        conversation_id=row.conversation_id,
        position=damage.whole("position", row.position) or 0,
        role=damage.role(row.role),
        content=content,
        status=status,
        created_at=damage.time("created_at", row.created_at),
        model_id=row.model_id,
        prompt_len=damage.whole("prompt_len", row.prompt_len),
        choice=damage.part("choice", documents.choice, row.choice),
        sampling=damage.part("sampling", documents.sampling, row.sampling),
        policy=damage.part("policy", documents.policy, row.policy),
        generation=damage.part("generation", documents.generation, row.generation),
        capture=damage.part("capture", documents.capture, row.capture),
        reason=row.reason,
        seconds=damage.measured("seconds", row.seconds),
        tokens=row.tokens,
        tensors_pruned_at=damage.time("tensors_pruned_at", row.tensors_pruned_at),
        checks=damage.part("checks", documents.checks, row.checks),
        parts=damage.part("parts", documents.parts, row.parts) or (),
        template=damage.part("template", documents.template, row.template),
        tool_name=row.tool_name,
        # Until it has ended, that of its prompt stands there.
        digest=None if status_of(row.status).is_live else row.digest,
    )
    told = damage.told()
    if told is None:
        return made
    return replace(made, status=Status.FAILED, reason=f"damaged: {told}", damage=told)


def _status(row: Row[Any], damage: Damage) -> Status:
    """The stored status, but a reply whose process is gone cannot be running."""
    status = damage.status(row.status)
    if status is Status.RUNNING and is_gone(row):
        return Status.INTERRUPTED
    return status


def summary_record(row: Row[Any]) -> StepSummary:
    values = row._asdict()
    for name in ("prob", "logprob", "entropy", "margin"):
        if values[name] is None:
            values[name] = NAN
    return StepSummary(**values)


def tensor_record(row: Row[Any]) -> Tensor:
    return decode(
        EncodedTensor(
            **{
                **{name: getattr(row, name) for name in EncodedTensor.__dataclass_fields__},
                "shape": tuple(row.shape),
                "layers": tuple(row.layers),
                "data": bytes(row.data),
            }
        )
    )


def read_steps(connection: Connection, message_id: int, first: int, after: int) -> list[Step]:
    """The steps from ``first`` up to but not ``after``, each with its children but its tensors."""
    table = models.Step.__table__
    rows = connection.execute(
        select(table)
        .where(
            table.c.message_id == message_id,
            table.c.step_index >= first,
            table.c.step_index < after,
        )
        .order_by(table.c.step_index)
    ).all()
    ids = [row.id for row in rows]
    topk = _children(connection, models.TopkEntry, ids)
    attention_layers = _children(connection, models.AttentionLayer, ids)
    attention = _children(connection, models.AttentionEntry, ids)
    lens_layers = _children(connection, models.LensLayer, ids)
    lens = _children(connection, models.LensEntry, ids)
    return [
        Step(
            step_index=row.step_index,
            position=row.position,
            token_id=row.token_id,
            token=row.token,
            token_bytes=bytes(row.token_bytes),
            is_special=row.is_special,
            logit=_number(row.logit),
            prob=_number(row.prob),
            logprob=_number(row.logprob),
            entropy=_number(row.entropy),
            rank=row.rank,
            margin=_number(row.margin),
            sampled_prob=row.sampled_prob,
            elapsed_ms=_number(row.elapsed_ms),
            topk=_candidates(topk.get(row.id)),
            attention=_attention(attention_layers.get(row.id), attention.get(row.id)),
            lens=_lens(row.step_index, lens_layers.get(row.id), lens.get(row.id)),
            decision=documents.decision(row.decision),
            digest=row.digest,
            tensor_digest=row.tensor_digest,
        )
        for row in rows
    ]


def read_candidates(connection: Connection, message_id: int) -> dict[int, Candidates]:
    """What was considered at each step of a reply, by step_index; nothing else is read."""
    step, entry = models.Step.__table__, models.TopkEntry.__table__
    rows = connection.execute(
        select(step.c.step_index, entry)
        .join(entry, entry.c.step_id == step.c.id)
        .where(step.c.message_id == message_id)
        .order_by(step.c.step_index, entry.c.rank)
    ).all()
    names = ["step_index", *entry.columns.keys()]
    return {
        index: _candidates(dict(zip(names, map(list, zip(*group, strict=True)), strict=True)))
        for index, group in groupby(rows, key=itemgetter(0))
    }


def _children(
    connection: Connection, model: type[models.Base], step_ids: list[int]
) -> dict[int, Columns]:
    """The rows of each step that has any, in the order of their key, a list a column."""
    table = model.__table__
    rows = connection.execute(
        select(table).where(table.c.step_id.in_(step_ids)).order_by(*table.primary_key)
    ).all()
    names = table.columns.keys()
    # Column by column: a step has hundreds of rows, and naming each value of
    # each would take longer than reading it.
    return {
        step_id: dict(zip(names, map(list, zip(*group, strict=True)), strict=True))
        for step_id, group in groupby(rows, key=itemgetter(0))
    }


def _candidates(rows: Columns | None) -> Candidates:
    rows = rows or _NO_ROWS
    return Candidates(
        token_ids=_ints(rows["token_id"]),
        tokens=tuple(rows["token"]),
        logits=_floats(rows["logit"]),
        probs=_floats(rows["prob"]),
        sampled_probs=_floats_or_none(rows["sampled_prob"]),
        noise=_floats_or_none(rows["noise"]),
    )


def _floats_or_none(values: list[float | None]) -> FloatArray | None:
    return None if all(value is None for value in values) else _floats(values)


def _attention(layers: Columns | None, entries: Columns | None) -> tuple[LayerAttention, ...]:
    layers, entries = layers or _NO_ROWS, entries or _NO_ROWS
    of_layer = entries["layer"]
    positions, weights = _ints(entries["position"]), _floats(entries["weight"])
    found = []
    for layer, missing in zip(layers["layer"], layers["missing"], strict=True):
        # The rows are ordered by layer.
        rows = slice(bisect_left(of_layer, layer), bisect_right(of_layer, layer))
        found.append(LayerAttention(layer, positions[rows], weights[rows], _number(missing)))
    return tuple(found)


def _lens(step_index: int, layers: Columns | None, entries: Columns | None) -> Lens | None:
    if layers is None:
        return None
    entries = entries or _NO_ROWS
    count = len(layers["layer"])
    k = len(entries["token"]) // count
    tokens = entries["token"]
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
    )


def _number(value: float | None) -> float:
    return NAN if value is None else value


def _floats(values: list[float | None]) -> FloatArray:
    # NumPy reads None as NaN.
    return np.array(values, dtype=np.float32)


def _ints(values: list[int]) -> IntArray:
    return np.array(values, dtype=np.int64)
