"""Exports a conversation as a folder of Parquet tables, which any data frame library opens.

Rows are in the order of messages and steps, so a reader can read them step by step.
At any time, a few megabytes of each table are in memory, including the tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Any

import pyarrow as pa

from oki_trace.exchange.selection import Selection, selected
from oki_trace.exchange.tables import SUFFIX, TABLES
from oki_trace.exchange.tensor_file import ITEMS
from oki_trace.exchange.trace_object import decision_object, part_objects, plain
from oki_trace.records import Message, Step
from oki_trace.reporting import Progress
from oki_trace.store.reading.reader import Reader
from oki_trace.store.schema.arrow import ParquetTable

# Steps whose rows are tuples at a time.
_STEPS_AT_ONCE = 16
# A row group is written when the rows of all tables together, or the tensors, have these bytes.
_GROUP_BYTES = 8_000_000

# Of a message that has no trace, these say nothing.
_OF_TRACED = ("prompt_len", "tokens", "generation", "capture", "checks")


def write_tables(
    reader: Reader,
    conversation_id: int,
    folder: Path,
    message_id: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the tables into ``folder``. Raises NotFound."""
    with selected(reader, conversation_id, message_id) as chosen, ExitStack() as open_files:
        tables = {
            name: open_files.enter_context(_RowTable(folder / f"{name}{SUFFIX}", schema))
            for name, schema in TABLES.items()
        }
        _write(chosen, tables, progress)


class _RowTable(ParquetTable):
    """A Parquet file that takes rows as tuples, in the order of its schema."""

    def __init__(self, path: Path, schema: Any) -> None:
        super().__init__(path, schema)
        self._tuples: list[tuple[Any, ...]] = []

    def extend(self, rows: Iterable[tuple[Any, ...]]) -> None:
        self._tuples.extend(rows)

    def pack(self) -> None:
        """Convert the tuples into Arrow rows, which are a tenth of the size."""
        if self._tuples:
            columns = zip(self.schema, zip(*self._tuples, strict=True), strict=True)
            arrays = [pa.array(values, type=field.type) for field, values in columns]
            self.add(pa.Table.from_arrays(arrays, schema=self.schema))
            self._tuples.clear()

    def flush(self) -> None:
        self.pack()
        super().flush()


class _StepIds:
    """The ids of a reply's steps by index, some of them in memory at a time."""

    def __init__(self, reader: Reader, message_id: int) -> None:
        self._reader = reader
        self._message_id = message_id
        self._known: dict[int, int] = {}

    def __getitem__(self, index: int) -> int:
        if index not in self._known:
            self._known = self._reader.step_ids(self._message_id, index)
        return self._known[index]


def _write(chosen: Selection, tables: dict[str, _RowTable], progress: Progress | None) -> None:
    said = chosen.conversation
    tables["conversation"].extend([(said.id, said.title, said.created_at)])
    done = 0
    for message in chosen.messages:
        tables["message"].extend([_message(chosen, message)])
        if message.id not in chosen.traced:
            continue
        prompt = chosen.reader.prompt(message.id)
        tokens = zip(prompt.token_ids, prompt.tokens, prompt.segments, strict=True)
        tables["prompt_token"].extend((message.id, at, *token) for at, token in enumerate(tokens))
        ids = _StepIds(chosen.reader, message.id)
        for step in chosen.reader.iter_steps(message.id):
            _add_step(tables, ids[step.step_index], message.id, step)
            done += 1
            if done % _STEPS_AT_ONCE == 0:
                _pack(tables)
            if progress is not None:
                progress(done, chosen.steps)
        _add_tensors(chosen, tables["tensor"], message.id, ids)
    for table in tables.values():
        table.flush()


def _pack(tables: dict[str, _RowTable]) -> None:
    for table in tables.values():
        table.pack()
    if sum(table.bytes for table in tables.values()) >= _GROUP_BYTES:
        for table in tables.values():
            table.flush()


def _message(chosen: Selection, message: Message) -> tuple[Any, ...]:
    traced = message.id in chosen.traced
    values = asdict(message) | {
        "prompt": chosen.reader.prompt(message.id).text if traced else None,
        "parts": part_objects(message.parts) or None,
        "digest": message.digest or None,
        **({} if traced else dict.fromkeys(_OF_TRACED)),
    }
    return tuple(_text(values[name]) for name in TABLES["message"].names)


def _text(value: Any) -> Any:
    """A document as JSON; a role and a status as text."""
    if isinstance(value, dict | list):
        return json.dumps(plain(value))
    return str(value) if isinstance(value, StrEnum) else value


def _add_step(tables: dict[str, _RowTable], step_id: int, message_id: int, step: Step) -> None:
    tables["step"].extend([_step(step_id, message_id, step)])
    top = step.topk
    nothing = [None] * len(top.tokens)
    rows = zip(
        range(1, len(top.tokens) + 1),
        top.token_ids.tolist(),
        top.tokens,
        _numbers(top.logits),
        _numbers(top.probs),
        nothing if top.sampled_probs is None else _numbers(top.sampled_probs),
        nothing if top.noise is None else _numbers(top.noise),
        strict=True,
    )
    tables["topk_entry"].extend((step_id, *row) for row in rows)
    for one in step.attention:
        tables["attention_layer"].extend([(step_id, one.layer, _number(one.missing))])
        pairs = zip(one.positions.tolist(), _numbers(one.weights), strict=True)
        tables["attention_entry"].extend(
            (step_id, one.layer, rank, *pair) for rank, pair in enumerate(pairs, start=1)
        )
    if step.lens is None:
        return
    lens = step.lens
    layers = zip(
        _numbers(lens.entropy),
        lens.chosen_rank.tolist(),
        _numbers(lens.chosen_prob),
        _numbers(lens.kl),
        strict=True,
    )
    tables["lens_layer"].extend((step_id, layer, *row) for layer, row in enumerate(layers))
    for layer, tokens in enumerate(lens.tokens):
        entries = zip(
            lens.token_ids[layer].tolist(),
            tokens,
            _numbers(lens.logits[layer]),
            _numbers(lens.probs[layer]),
            strict=True,
        )
        tables["lens_entry"].extend(
            (step_id, layer, rank, *entry) for rank, entry in enumerate(entries, start=1)
        )


def _step(step_id: int, message_id: int, step: Step) -> tuple[Any, ...]:
    decision = step.decision
    derived = {
        "id": step_id,
        "message_id": message_id,
        "settle_layer": step.lens and step.lens.settle_layer,
        "greedy_id": decision and decision.greedy.token_id,
        "decision": decision and json.dumps(decision_object(step, decision)),
    }
    values = (
        derived[name] if name in derived else getattr(step, name) for name in TABLES["step"].names
    )
    return tuple(_number(value) if isinstance(value, float) else value for value in values)


def _add_tensors(chosen: Selection, table: _RowTable, message_id: int, ids: _StepIds) -> None:
    for index, head in chosen.reader.tensor_heads(message_id):
        tensor = chosen.reader.tensor(message_id, index, head.name)
        data = tensor.array.astype(ITEMS[tensor.dtype], copy=False).tobytes()
        shape = list(tensor.array.shape)
        layers = list(tensor.layers)
        row = (ids[index], tensor.name, tensor.dtype, shape, layers, tensor.key_offset, data)
        table.extend([row])
        table.pack()
        if table.bytes >= _GROUP_BYTES:
            table.flush()


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _numbers(values: Any) -> Sequence[float | None]:
    return [_number(value) for value in values.tolist()]
