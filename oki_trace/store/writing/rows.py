"""Inserts steps, lenses and prompts as rows, in bulk.

One step is about five hundred rows. Python releases its lock around each call into the
database, and in a process that decodes at the same time it may wait milliseconds to
get it back. So all rows of a table are inserted with one statement.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from itertools import chain, islice, repeat
from typing import Any, NamedTuple

import numpy as np
from sqlalchemy import Connection, Dialect, Table, bindparam, insert, update

from oki_trace.records import (
    LOGIT,
    Candidates,
    FloatArray,
    LayerAttention,
    LayerRouting,
    Lens,
    Prompt,
    Step,
    TensorMode,
)
from oki_trace.store.codecs.tensors import EncodedTensor, keep
from oki_trace.store.digest import of_step, of_tensors
from oki_trace.store.reading import documents
from oki_trace.store.schema import models
from oki_trace.store.schema.column_types import storable

Row = tuple[Any, ...]

# SQLite accepts 32,766 values in a statement, PostgreSQL 65,535.
_MAX_VALUES = 32_000
_PROMPT_ROWS = 10_000

_COPIED = ("origin", "position", "token_id", "token", "token_bytes", "is_special", "rank")
_MEASURED = ("logit", "prob", "logprob", "entropy", "margin", "sampled_prob", "elapsed_ms")

_INSERT_STEP = insert(models.Step).returning(models.Step.id)
_ADD_LENS = (
    update(models.Step)
    .where(models.Step.id == bindparam("of_step"))
    .values(settle_layer=bindparam("layer"), digest=bindparam("whole"))
)


class Bulk:
    """Inserts rows: tuples in the order of the table's columns without its own ``id``.

    The values are passed to the driver as they are, so text must be storable.
    """

    def __init__(self, model: type[models.Base], dialect: Dialect) -> None:
        table = model.__table__
        assert isinstance(table, Table)
        names = [column.name for column in table.columns if column.name != "id"]
        one = insert(table).values({name: bindparam(name) for name in names})
        single = str(one.inline().compile(dialect=dialect))  # inline: without RETURNING
        self._before, _, self._row = single.partition(" VALUES ")
        self._rows_at_once = _MAX_VALUES // len(names)

    def insert(self, connection: Connection, rows: Sequence[Row]) -> None:
        """Insert all rows; when it raises, the transaction must be rolled back."""
        for start in range(0, len(rows), self._rows_at_once):
            block = rows[start : start + self._rows_at_once]
            statement = " VALUES ".join((self._before, ", ".join(repeat(self._row, len(block)))))
            connection.exec_driver_sql(statement, tuple(chain.from_iterable(block)))


class EncodedStep(NamedTuple):
    """A step with its encoded tensors, and the digests of its rows and its tensors."""

    step: Step
    tensors: Sequence[EncodedTensor]
    digest: bytes
    tensor_digest: bytes | None


class StepRows:
    """The bulk inserts of everything that belongs to a step or a prompt."""

    def __init__(self, dialect: Dialect) -> None:
        tables: tuple[type[models.Base], ...]
        tables = (*models.STEP_CHILDREN, models.PromptToken, models.Tensor)
        self._bulk = {model: Bulk(model, dialect) for model in tables}

    def insert_steps(
        self, connection: Connection, message_id: int, steps: Sequence[EncodedStep]
    ) -> dict[int, int]:
        """Insert steps with everything but their lens; returns their ids by position."""
        ids: dict[int, int] = {}
        topk: list[Row] = []
        attention_layers: list[Row] = []
        attention: list[Row] = []
        router: list[Row] = []
        blobs: list[Row] = []
        for encoded in steps:
            step = encoded.step
            step_id = connection.execute(_INSERT_STEP, _step(message_id, encoded)).scalar_one()
            ids[step.position] = step_id
            topk += _topk(step_id, step.topk)
            for of_layer in step.attention:
                missing = number(float(of_layer.missing))
                attention_layers.append((step_id, of_layer.layer, missing))
                attention += _attention(step_id, of_layer)
            for routing in step.router:
                router += _routing(step_id, routing)
            blobs += (_tensor(step_id, tensor) for tensor in encoded.tensors)
        self._bulk[models.TopkEntry].insert(connection, topk)
        self._bulk[models.AttentionLayer].insert(connection, attention_layers)
        self._bulk[models.AttentionEntry].insert(connection, attention)
        self._bulk[models.RouterEntry].insert(connection, router)
        self._bulk[models.Tensor].insert(connection, blobs)
        return ids

    def insert_lenses(
        self, connection: Connection, lenses: Sequence[tuple[int, Lens, bytes | None]]
    ) -> None:
        """Insert lenses, each with the id of its step and the step's new digest.

        The Logit Lens also gives the step its ``settle_layer``; the digest covers no other.
        """
        if not lenses:
            return
        layers: list[Row] = []
        entries: list[Row] = []
        changes: list[dict[str, Any]] = []
        for step_id, lens, digest in lenses:
            layers += _lens_layers(step_id, lens)
            entries += _lens(step_id, lens)
            if lens.name == LOGIT:
                changes.append({"of_step": step_id, "layer": lens.settle_layer, "whole": digest})
        self._bulk[models.LensLayer].insert(connection, layers)
        self._bulk[models.LensEntry].insert(connection, entries)
        if changes:
            connection.execute(_ADD_LENS, changes)

    def insert_prompt(self, connection: Connection, message_id: int, prompt: Prompt) -> None:
        tokens = zip(prompt.token_ids, prompt.tokens, prompt.segments, strict=True)
        rows = (
            (message_id, position, token_id, storable(token), segment)
            for position, (token_id, token, segment) in enumerate(tokens)
        )
        # A prompt may have a million tokens, too many to be rows at once.
        while batch := list(islice(rows, _PROMPT_ROWS)):
            self._bulk[models.PromptToken].insert(connection, batch)


def encode(step: Step, mode: TensorMode, *, faithful: bool = False) -> EncodedStep:
    """Encode a step's tensors in ``mode`` and compute the digests of what will be read.

    A digest that the step brings along is kept.
    """
    digest = step.digest or of_step(step)
    if mode == "none":
        return EncodedStep(step, (), digest, step.tensor_digest)
    kept = [keep(tensor, mode, faithful=faithful) for tensor in step.tensors]
    tensor_digest = step.tensor_digest or of_tensors(one.content for one in kept)
    return EncodedStep(step, [one.row for one in kept], digest, tensor_digest)


def _step(message_id: int, encoded: EncodedStep) -> dict[str, Any]:
    step = encoded.step
    return {
        **{name: getattr(step, name) for name in _COPIED},
        **{name: number(getattr(step, name)) for name in _MEASURED},
        "message_id": message_id,
        "step_index": None if step.step_index < 0 else step.step_index,
        "tensor_bytes": sum(len(tensor.data) for tensor in encoded.tensors),
        "greedy_id": None if step.decision is None else step.decision.greedy.token_id,
        "decision": documents.to_document(step.decision),
        "digest": encoded.digest,
        "tensor_digest": encoded.tensor_digest,
    }


def _tensor(step_id: int, tensor: EncodedTensor) -> Row:
    shape, layers = json.dumps(tensor.shape), json.dumps(tensor.layers)
    head = (step_id, tensor.name, tensor.dtype, shape, layers, tensor.key_offset)
    return (*head, tensor.codec, tensor.checksum, tensor.raw_bytes, tensor.data)


def number(value: float | None) -> float | None:
    """``value`` as a column holds it: NULL for NaN."""
    return None if value is None or math.isnan(value) else value


def _numbers(array: FloatArray) -> Sequence[float | None]:
    values = array.ravel().tolist()
    return list(map(number, values)) if np.isnan(array).any() else values


def _topk(step_id: int, topk: Candidates) -> Iterator[Row]:
    k = len(topk.tokens)
    drawn = (topk.sampled_probs, topk.noise)
    return zip(
        repeat(step_id, k),
        range(1, k + 1),
        topk.token_ids.tolist(),
        map(storable, topk.tokens),
        _numbers(topk.logits),
        _numbers(topk.probs),
        *(repeat(None, k) if array is None else _numbers(array) for array in drawn),
        strict=True,
    )


def _attention(step_id: int, attention: LayerAttention) -> Iterator[Row]:
    k = len(attention.positions)
    return zip(
        repeat(step_id, k),
        repeat(attention.layer, k),
        range(1, k + 1),
        attention.positions.tolist(),
        _numbers(attention.weights),
        strict=True,
    )


def _routing(step_id: int, routing: LayerRouting) -> Iterator[Row]:
    k = len(routing.experts)
    return zip(
        repeat(step_id, k),
        repeat(routing.layer, k),
        range(1, k + 1),
        routing.experts.tolist(),
        _numbers(routing.weights),
        strict=True,
    )


def _lens_layers(step_id: int, lens: Lens) -> Iterator[Row]:
    layers = len(lens.entropy)
    return zip(
        repeat(step_id, layers),
        repeat(lens.name, layers),
        lens.layer_numbers.tolist(),
        _numbers(lens.entropy),
        lens.chosen_rank.tolist(),
        _numbers(lens.chosen_prob),
        _numbers(lens.kl),
        strict=True,
    )


def _lens(step_id: int, lens: Lens) -> Iterator[Row]:
    layers, k = lens.token_ids.shape
    return zip(
        repeat(step_id, layers * k),
        repeat(lens.name, layers * k),
        chain.from_iterable(repeat(layer, k) for layer in lens.layer_numbers.tolist()),
        chain.from_iterable(repeat(range(1, k + 1), layers)),
        lens.token_ids.ravel().tolist(),
        map(storable, chain.from_iterable(lens.tokens)),
        _numbers(lens.logits),
        _numbers(lens.probs),
        strict=True,
    )
