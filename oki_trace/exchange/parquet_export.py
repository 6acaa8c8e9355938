"""A conversation as a folder of Parquet tables, which any data frame opens.

Rows stand in the order of messages and steps, so a reader can take them step by
step. Of each table a few megabytes are in memory at a time, of the tensors too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from oki_trace.exchange.selection import Selection, selected
from oki_trace.exchange.tables import SUFFIX, TABLES
from oki_trace.exchange.tensor_file import ITEMS
from oki_trace.exchange.trace_object import decision_object, part_objects, plain
from oki_trace.records import Message, Step
from oki_trace.reporting import Progress
from oki_trace.store.reading.reader import TraceReader

# Rows are Python's for a few steps, then Arrow's, which are a tenth of the size.
_STEPS_AT_ONCE = 16
# Of the rows of all tables together, and of tensors: then a row group of each is written.
_GROUP_BYTES = 8_000_000
# What does not come back is not worth a dictionary, which is held until the row group ends.
_PLAIN = {"data"}


def write_tables(
    reader: TraceReader,
    conversation_id: int,
    folder: Path,
    message_id: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the tables into ``folder``. Raises NotFound."""
    with selected(reader, conversation_id, message_id) as chosen, ExitStack() as open_files:
        tables = {
            name: open_files.enter_context(_Table(folder / f"{name}{SUFFIX}", schema))
            for name, schema in TABLES.items()
        }
        _write(chosen, tables, progress)


class _Table:
    """One file: rows in, a row group out now and then."""

    def __init__(self, path: Path, schema: Any) -> None:
        self._schema = schema
        self._rows: list[tuple[Any, ...]] = []
        self._packed: list[Any] = []
        self.bytes = 0
        # The same bytes for the same rows: nothing of the machine or the moment is in it.
        self._writer = pq.ParquetWriter(
            path,
            schema,
            compression="zstd",
            use_dictionary=[name for name in schema.names if name not in _PLAIN],
        )

    def __enter__(self) -> _Table:
        return self

    def __exit__(self, *raised: object) -> None:
        self._writer.close()

    def add(self, rows: Iterable[tuple[Any, ...]]) -> None:
        self._rows.extend(rows)

    def pack(self) -> None:
        """Take the rows added since into the row group under way."""
        if not self._rows:
            return
        columns = zip(*self._rows, strict=True)
        arrays = [
            pa.array(values, type=field.type)
            for values, field in zip(columns, self._schema, strict=True)
        ]
        self._rows.clear()
        batch = pa.RecordBatch.from_arrays(arrays, schema=self._schema)
        self._packed.append(batch)
        self.bytes += batch.nbytes

    def flush(self) -> None:
        """Write the row group, if there is anything in it."""
        self.pack()
        if self._packed:
            self._writer.write_table(pa.Table.from_batches(self._packed, schema=self._schema))
            self._packed.clear()
            self.bytes = 0


class _StepIds:
    """The ids of a reply's steps by index, some of them in memory at a time."""

    def __init__(self, reader: TraceReader, message_id: int) -> None:
        self._reader = reader
        self._message_id = message_id
        self._known: dict[int, int] = {}

    def __getitem__(self, index: int) -> int:
        if index not in self._known:
            self._known = self._reader.step_ids(self._message_id, index)
        return self._known[index]


def _write(chosen: Selection, tables: dict[str, _Table], progress: Progress | None) -> None:
    said = chosen.conversation
    tables["conversation"].add([(said.id, said.title, said.created_at)])
    done = 0
    for message in chosen.messages:
        tables["message"].add([_message(chosen, message)])
        if message.id not in chosen.traced:
            continue
        prompt = chosen.reader.prompt(message.id)
        tokens = zip(prompt.token_ids, prompt.tokens, prompt.segments, strict=True)
        tables["prompt_token"].add((message.id, at, *token) for at, token in enumerate(tokens))
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


def _pack(tables: dict[str, _Table]) -> None:
    for table in tables.values():
        table.pack()
    if sum(table.bytes for table in tables.values()) >= _GROUP_BYTES:
        for table in tables.values():
            table.flush()


def _message(chosen: Selection, message: Message) -> tuple[Any, ...]:
    traced = message.id in chosen.traced
    documents = (message.choice, message.sampling, message.policy)
    reports = (message.generation, message.capture, message.checks) if traced else (None,) * 3
    return (
        message.id,
        message.conversation_id,
        message.position,
        str(message.role),
        message.content,
        str(message.status),
        message.created_at,
        message.model_id,
        message.prompt_len if traced else None,
        message.tokens if traced else None,
        message.reason,
        message.seconds,
        message.tensors_pruned_at,
        *(None if one is None else json.dumps(plain(asdict(one))) for one in documents),
        *(None if one is None else json.dumps(plain(asdict(one))) for one in reports),
        json.dumps(part_objects(message.parts)) if message.parts else None,
        None if message.template is None else json.dumps(plain(asdict(message.template))),
        message.tool_name,
        message.digest or None,
        chosen.reader.prompt(message.id).text if traced else None,
    )


def _add_step(tables: dict[str, _Table], step_id: int, message_id: int, step: Step) -> None:
    tables["step"].add([_step(step_id, message_id, step)])
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
    tables["topk_entry"].add((step_id, *row) for row in rows)
    for seen in step.attention:
        tables["attention_layer"].add([(step_id, seen.layer, _number(seen.missing))])
        pairs = zip(seen.positions.tolist(), _numbers(seen.weights), strict=True)
        tables["attention_entry"].add(
            (step_id, seen.layer, rank, *pair) for rank, pair in enumerate(pairs, start=1)
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
    tables["lens_layer"].add((step_id, layer, *row) for layer, row in enumerate(layers))
    for layer, tokens in enumerate(lens.tokens):
        entries = zip(
            lens.token_ids[layer].tolist(),
            tokens,
            _numbers(lens.logits[layer]),
            _numbers(lens.probs[layer]),
            strict=True,
        )
        tables["lens_entry"].add(
            (step_id, layer, rank, *entry) for rank, entry in enumerate(entries, start=1)
        )


def _step(step_id: int, message_id: int, step: Step) -> tuple[Any, ...]:
    decision = step.decision
    return (
        step_id,
        message_id,
        step.step_index,
        step.position,
        step.token_id,
        step.token,
        step.token_bytes,
        step.is_special,
        _number(step.logit),
        _number(step.prob),
        _number(step.logprob),
        _number(step.entropy),
        step.rank,
        _number(step.margin),
        None if step.sampled_prob is None else _number(step.sampled_prob),
        _number(step.elapsed_ms),
        None if step.lens is None else step.lens.settle_layer,
        None if decision is None else decision.greedy.token_id,
        None if decision is None else json.dumps(decision_object(step, decision)),
        step.digest,
        step.tensor_digest,
    )


def _add_tensors(chosen: Selection, table: _Table, message_id: int, ids: _StepIds) -> None:
    for index, head in chosen.reader.tensor_heads(message_id):
        tensor = chosen.reader.tensor(message_id, index, head.name)
        data = tensor.array.astype(ITEMS[tensor.dtype], copy=False).tobytes()
        shape = list(tensor.array.shape)
        table.add(
            [
                (
                    *(ids[index], tensor.name, tensor.dtype, shape),
                    *(list(tensor.layers), tensor.key_offset, data),
                )
            ]
        )
        table.pack()
        if table.bytes >= _GROUP_BYTES:
            table.flush()


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _numbers(values: Any) -> Sequence[float | None]:
    return [_number(value) for value in values.tolist()]
