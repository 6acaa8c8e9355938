"""A conversation from its folder of Parquet tables, read step by step.

Each table is in the order of messages and steps, so a cursor a table is enough;
a row that belongs to no step, or stands out of order, is an ExchangeError. Rows
become what a trace object says, and are then read as one of JSON is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np

from oki_trace.exchange import schema
from oki_trace.exchange.reading.json_stream import loads
from oki_trace.exchange.reading.replies import TokenIds, turn_start
from oki_trace.exchange.reading.staging import Staging
from oki_trace.exchange.reading.steps import step_record, tensor_records
from oki_trace.exchange.reading.table_cursor import Row, TableCursor
from oki_trace.exchange.refusal import refused
from oki_trace.exchange.tables import TABLES
from oki_trace.exchange.tensor_file import ITEMS
from oki_trace.exchange.trace_object import BLANK
from oki_trace.records import Step, TensorRecord
from oki_trace.store.codecs.tensors import MAX_RAW_BYTES, TensorName

Cursors = dict[str, TableCursor]

_KEYS = {
    "conversation": "id",
    "message": "conversation_id",
    "step": "message_id",
    "prompt_token": "message_id",
}
_DOCUMENTS = (
    "choice",
    "sampling",
    "policy",
    "generation",
    "capture",
    "checks",
    "parts",
    "template",
)
# A step of a trace object calls these otherwise.
_RENAMED = {
    "step": "step_index",
    "chosen_token": "token",
    "chosen_id": "token_id",
    "chosen_bytes": "token_bytes",
}


def import_tables(folder: Path, staging: Staging, pulse: Callable[[], None] = lambda: None) -> None:
    """Read the tables of ``folder`` into ``staging``. Raises ExchangeError."""
    with ExitStack() as closing:
        cursors: Cursors = {}
        for name in TABLES:
            cursors[name] = TableCursor(folder, name, _KEYS.get(name, "step_id"), pulse)
            closing.callback(cursors[name].close)
        said = _conversation(cursors["conversation"])
        staging.begin(schema.read(schema.Conversation, said, "the conversation"))
        for place, row in enumerate(cursors["message"].of(said["id"])):
            where = f"message {staging.messages + 1}"
            if row["position"] not in (None, place):
                raise refused(f"{where}: position is not {place}")
            _message(row, cursors, staging, where)
        for cursor in cursors.values():
            cursor.end()


def _conversation(cursor: TableCursor) -> Row:
    number = cursor.next_owner()
    row = next(cursor.of(number), None)
    if row is None or cursor.next_owner() is not None:
        raise refused(f"the table conversation has {'no row' if row is None else 'several rows'}")
    return row


def _message(row: Row, cursors: Cursors, staging: Staging, where: str) -> None:
    for name in _DOCUMENTS:
        row[name] = _document(row[name], f"{where}, {name}")
    message = schema.read(schema.Message, row, where)
    if row["capture"] is None:
        staging.say(message, where)
        return
    number = message.get("id")
    if number is None:
        raise refused(f"{where}: id is missing")
    at = f"{where}, trace"
    prompt = _prompt(cursors["prompt_token"].of(number), where)
    trace = schema.read(schema.Trace, {"version": None, **row, **prompt}, at)
    ids = TokenIds()
    start = turn_start(trace, ids, None, at)

    def steps() -> Iterator[Step]:
        for index, values in enumerate(cursors["step"].of(number)):
            here = f"{where}, step {index}"
            read = schema.read(schema.Step, _step(values, cursors, here), here)
            step = step_record(read, index, start, ids, 0, here)
            found = cursors["tensor"].take(values["id"], len(get_args(TensorName)), here)
            tensors = tuple(_tensor(tensor, here) for tensor in found)
            if tensors and left_out:
                raise refused(f"{here}: it has tensors that it says were left out")
            yield replace(step, tensors=tensor_records(tensors, step, start.capture, here))

    left_out = start.capture.tensors_left_out
    staging.reply(message, start, steps(), where, tensors=not left_out)


def _prompt(rows: Iterator[Row], where: str) -> dict[str, list[Any]]:
    ids: list[int | None] = []
    tokens: list[str] = []
    segments: list[str] = []
    for position, row in enumerate(rows):
        if position >= schema.MAX_PROMPT:
            raise refused(f"{where}: its prompt has more than {schema.MAX_PROMPT:,} tokens")
        if row["position"] != position:
            raise refused(f"{where}: the tokens of its prompt are out of order")
        ids.append(_known(row["token_id"]))
        tokens.append(row["token"])
        segments.append(row["segment"])
    return {"prompt_token_ids": ids, "prompt_tokens": tokens, "prompt_segments": segments}


def _step(row: Row, cursors: Cursors, where: str) -> Row:
    """A step as a trace object has it."""
    number = row["id"]
    weights = _by_layer(cursors, "attention", number, where)
    read = _by_layer(cursors, "lens", number, where)
    made = {**row, **{name: row[column] for name, column in _RENAMED.items()}}
    candidates = cursors["topk_entry"].take(number, schema.MAX_ENTRIES, where)
    return {
        **made,
        "chosen_id": _known(row["token_id"]),
        "rank": row["rank"] or None,
        "decision": _document(row["decision"], f"{where}, decision"),
        "logits_topk": _entries(candidates),
        "attention": weights,
        "logit_lens": [{**layer, "chosen_rank": layer["chosen_rank"] or None} for layer in read],
    }


def _by_layer(cursors: Cursors, kind: str, step: int, where: str) -> list[Row]:
    """The rows of the layers of a step, each with its entries as ``topk``."""
    layers = cursors[f"{kind}_layer"].take(step, schema.MAX_LAYERS + 1, where)
    found: dict[int, list[Row]] = {row["layer"]: [] for row in layers}
    for entry in _entries(cursors[f"{kind}_entry"].take(step, schema.MAX_CELLS, where)):
        if entry["layer"] not in found:
            raise refused(f"{where}: the table {kind}_entry has a layer that is not there")
        found[entry["layer"]].append(entry)
    return [{**row, "topk": found[row["layer"]]} for row in layers]


def _entries(rows: list[Row]) -> list[Row]:
    """Without the blanks that fill up a shorter list; an id below them is not known."""
    made = []
    for row in rows:
        token_id = row.get("token_id")
        if token_id is not None and token_id < 0:
            if token_id == BLANK:
                continue
            row["token_id"] = None
        made.append(row)
    return made


def _tensor(row: Row, where: str) -> TensorRecord:
    dtype, data = ITEMS.get(row["dtype"] or ""), row["data"]
    shape, layers, key_offset = row["shape"], row["layers"] or [], row["key_offset"] or 0
    if row["name"] not in get_args(TensorName) or dtype is None or data is None or not shape:
        raise refused(f"{where}: a tensor has an unknown name or dtype")
    good = len(shape) <= 3 and all(type(n) is int and n >= 0 for n in (*shape, *layers, key_offset))
    size = math.prod(shape) * np.dtype(dtype).itemsize if good else -1
    if size != len(data) or size > MAX_RAW_BYTES:
        raise refused(f"{where}: a tensor is not as large as its shape says")
    array = np.frombuffer(data, dtype=dtype).reshape(shape)
    return TensorRecord(
        name=cast("TensorName", row["name"]),
        array=array.astype(array.dtype.newbyteorder("="), copy=False),
        dtype=row["dtype"],
        layers=tuple(layers),
        key_offset=key_offset,
    )


def _document(text: str | None, where: str) -> Any:
    try:
        return None if text is None else loads(text)
    except (ValueError, RecursionError) as error:
        raise refused(f"{where} is no JSON object") from error


def _known(token_id: int | None) -> int | None:
    return token_id if token_id is not None and token_id >= 0 else None
