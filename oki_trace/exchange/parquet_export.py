"""Exports a conversation as a folder of Parquet tables, which any data frame library opens.

Rows are in the order of messages and steps, so a reader can read them step by step.
At any time, a few megabytes of each table are in memory, including the tensors.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from oki_trace.exchange.selection import Selection
from oki_trace.exchange.tables import SUFFIX, TABLES
from oki_trace.exchange.tensor_file import ITEMS
from oki_trace.exchange.trace_object import decision_object, part_objects, plain
from oki_trace.records import Message, Step
from oki_trace.store.schema.arrow import ParquetTable, to_arrow

_STEPS_AT_ONCE = 64
# A row group is written when the rows of all tables together, or the tensors, have these bytes.
_GROUP_BYTES = 8_000_000

# Of a message that has no trace, these say nothing.
_OF_TRACED = ("prompt_len", "prefix_len", "tokens", "generation", "capture", "checks")
# Of a step, they are not among the columns that are read in bulk.
_BYTES = ("token_bytes", "digest", "tensor_digest")
_OF_TENSOR = ("name", "dtype", "layers", "key_offset")

_Files = dict[str, ParquetTable]


def write_tables(chosen: Selection, folder: Path) -> None:
    """Write the tables of a conversation, or of one of its replies, into ``folder``."""
    with ExitStack() as opened:
        files = {
            name: opened.enter_context(ParquetTable(folder / f"{name}{SUFFIX}", schema))
            for name, schema in TABLES.items()
        }
        _add_row(files, "conversation", asdict(chosen.conversation))
        for message in chosen.messages:
            _add_row(files, "message", _message(chosen, message))
            if message.id in chosen.traced:
                _add_reply(chosen, message, files)
        _flush(files)


def _add_reply(chosen: Selection, reply: Message, files: _Files) -> None:
    prompt = chosen.reader.prompt_columns(reply.id)
    files["prompt_token"].add(to_arrow(prompt, TABLES["prompt_token"]))
    _add_steps(chosen, reply, files, given=True)
    _add_steps(chosen, reply, files, given=False)


def _add_steps(chosen: Selection, reply: Message, files: _Files, *, given: bool) -> None:
    remaining = chosen.iter_steps(reply, given=given)
    while steps := list(islice(remaining, _STEPS_AT_ONCE)):
        indices = [step.position if given else step.step_index for step in steps]
        batch = chosen.reader.step_columns(reply.id, indices[0], indices[-1] + 1, given=given)
        batch["step"] |= {
            "decision": [_decision(step) for step in steps],
            **{name: [getattr(step, name) for step in steps] for name in _BYTES},
        }
        for name, columns in batch.items():
            files[name].add(to_arrow(columns, TABLES[name]))
        for index, step_id in zip(indices, batch["step"]["id"].tolist(), strict=True):
            _add_tensors(chosen, reply, index, step_id, files, given=given)
        if sum(file.bytes for file in files.values()) >= _GROUP_BYTES:
            _flush(files)


def _add_tensors(
    chosen: Selection, reply: Message, index: int, step_id: int, files: _Files, *, given: bool
) -> None:
    for name in chosen.reader.tensor_names(reply.id, index, given=given):
        tensor = chosen.reader.tensor(reply.id, index, name, given=given)
        array = tensor.array.astype(ITEMS[tensor.dtype], copy=False)
        values = {"step_id": step_id, "shape": array.shape, "data": array.tobytes()}
        values |= {
            name: getattr(tensor, name) for name in ("name", "dtype", "layers", "key_offset")
        }
        _add_row(files, "tensor", values)
        if files["tensor"].bytes >= _GROUP_BYTES:
            files["tensor"].flush()


def _add_row(files: _Files, table: str, values: dict[str, Any]) -> None:
    """Add one row; ``values`` may have more than its columns."""
    files[table].add(pa.Table.from_pylist([values], schema=TABLES[table]))


def _flush(files: _Files) -> None:
    for file in files.values():
        file.flush()


def _message(chosen: Selection, message: Message) -> dict[str, Any]:
    traced = message.id in chosen.traced
    values = asdict(message) | {
        "prompt": chosen.reader.prompt(message.id).text if traced else None,
        "parts": part_objects(message.parts) or None,
        "digest": message.digest or None,
        **({} if traced else dict.fromkeys(_OF_TRACED)),
    }
    return {name: _text(value) for name, value in values.items()}


def _text(value: Any) -> Any:
    """A document as JSON; a role and a status as text."""
    if isinstance(value, dict | list):
        return json.dumps(plain(value))
    return str(value) if isinstance(value, StrEnum) else value


def _decision(step: Step) -> str | None:
    return json.dumps(decision_object(step, step.decision)) if step.decision else None
