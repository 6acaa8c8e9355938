"""Imports a conversation from a folder of Parquet tables, step by step.

The rows of each table are in the order of messages and steps, so one cursor per
table is enough; a row that belongs to no step, or is out of order, is an
ExchangeError. Rows become the fields of a trace object, which are then read in the
same way as those of a JSON file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from typing_extensions import TypedDict

from oki_trace.exchange.reading import validation
from oki_trace.exchange.reading.json_stream import loads
from oki_trace.exchange.reading.replies import TokenIds, turn_start
from oki_trace.exchange.reading.staging import Staging
from oki_trace.exchange.reading.steps import StepReader, check_tensors
from oki_trace.exchange.reading.table_cursor import Row, TableCursor
from oki_trace.exchange.refusal import refused
from oki_trace.exchange.tables import TABLES
from oki_trace.exchange.tensor_file import Layers, Shape, byte_count, decode
from oki_trace.exchange.trace_object import BLANK, known_id
from oki_trace.records import LOGIT, NO_PARENT, Step, TensorRecord
from oki_trace.store.codecs.tensors import MAX_RAW_BYTES, TensorName

Cursors = dict[str, TableCursor]

_KEYS = {
    "conversation": "id",
    "message": "conversation_id",
    "step": "message_id",
    "prompt_token": "message_id",
}
# The columns of a message that are JSON text.
_DOCUMENTS = (
    *("choice", "sampling", "policy", "generation", "capture", "checks", "parts", "template"),
    "forced",
)
# The columns whose field in a trace object has another name.
_RENAMED = {
    "step": "step_index",
    "chosen_token": "token",
    "chosen_id": "token_id",
    "chosen_bytes": "token_bytes",
}


class _TensorRow(TypedDict):
    name: TensorName
    dtype: Literal["float64", "float32", "float16", "bfloat16"]
    shape: Shape
    layers: Layers | None
    key_offset: validation.Large | None
    data: bytes


def import_tables(folder: Path, staging: Staging, pulse: Callable[[], None] = lambda: None) -> None:
    """Read the tables of ``folder`` into ``staging``. Raises ExchangeError."""
    with ExitStack() as closing:
        cursors: Cursors = {}
        for name in TABLES:
            cursors[name] = TableCursor(folder, name, _KEYS.get(name, "step_id"), pulse)
            closing.callback(cursors[name].close)
        conversation = _conversation(cursors["conversation"])
        staging.begin(validation.read(validation.Conversation, conversation, "the conversation"))
        for place, row in enumerate(cursors["message"].of(conversation["id"])):
            where = f"message {staging.messages + 1}"
            if row["position"] not in (None, place):
                raise refused(f"{where}: position is not {place}")
            if row["parent_id"] is None and cursors["message"].has("parent_id"):
                row["parent_id"] = NO_PARENT
            _message(row, cursors, staging, where)
        for cursor in cursors.values():
            cursor.end()


def _conversation(cursor: TableCursor) -> Row:
    row = next(cursor.of(cursor.next_owner()), None)
    if row is None or cursor.next_owner() is not None:
        raise refused(f"the table conversation has {'no row' if row is None else 'several rows'}")
    return row


def _message(row: Row, cursors: Cursors, staging: Staging, where: str) -> None:
    for name in _DOCUMENTS:
        row[name] = _document(row[name], f"{where}, {name}")
    message = validation.read(validation.Message, row, where)
    if row["capture"] is None:
        staging.add_message(message, where)
        return
    number = message.get("id")
    if number is None:
        raise refused(f"{where}: id is missing")
    at = f"{where}, trace"
    prompt = _prompt(cursors["prompt_token"].of(number), where)
    trace = validation.read(validation.Trace, {"version": None, **row, **prompt}, at)
    ids = TokenIds()
    start = turn_start(trace, ids, None, at)
    left_out = start.capture.tensors_left_out

    reader = StepReader(start, ids, 0, where)

    def steps() -> Iterator[Step]:
        for values in cursors["step"].of(number):
            given = values["origin"] == "given"
            here = reader.name_of_next(given=given)
            fields = validation.read(validation.Step, _step(values, cursors, here), here)
            step = reader.read(fields, given=given)
            rows = cursors["tensor"].take(values["id"], len(get_args(TensorName)), here)
            tensors = tuple(_tensor(row, here) for row in rows)
            if tensors and left_out:
                raise refused(f"{here}: it has tensors that capture says were left out")
            yield replace(step, tensors=check_tensors(tensors, step, start.capture, here))

    staging.add_reply(message, start, steps(), where, has_tensors=not left_out)


def _prompt(rows: Iterator[Row], where: str) -> dict[str, list[Any]]:
    ids: list[int | None] = []
    tokens: list[str] = []
    segments: list[str] = []
    for position, row in enumerate(rows):
        if position >= validation.MAX_PROMPT:
            raise refused(f"{where}: its prompt has more than {validation.MAX_PROMPT:,} tokens")
        if row["position"] != position:
            raise refused(f"{where}: the tokens of its prompt are out of order")
        ids.append(known_id(row["token_id"]))
        tokens.append(row["token"])
        segments.append(row["segment"])
    return {"prompt_token_ids": ids, "prompt_tokens": tokens, "prompt_segments": segments}


def _step(row: Row, cursors: Cursors, where: str) -> Row:
    """The fields of a step of a trace object."""
    lenses = {
        name: [{**layer, "chosen_rank": layer["chosen_rank"] or None} for layer in layers]
        for name, layers in _by_layer(cursors, "lens", row["id"], where).items()
    }
    candidates = cursors["topk_entry"].take(row["id"], validation.MAX_ENTRIES, where)
    return {
        **row,
        **{name: row[column] for name, column in _RENAMED.items()},
        "chosen_id": known_id(row["token_id"]),
        "rank": row["rank"] or None,
        "decision": _document(row["decision"], f"{where}, decision"),
        "logits_topk": _entries(candidates),
        "attention": _by_layer(cursors, "attention", row["id"], where).get(LOGIT, []),
        "logit_lens": lenses.pop(LOGIT, []),
        "lenses": lenses,
        "router": _router(cursors, row["id"], where),
    }


def _by_layer(cursors: Cursors, kind: str, step: int, where: str) -> dict[str, list[Row]]:
    """The rows of the layers of a step by lens, each with its entries as ``topk``.

    All rows of an older file, which has no column ``lens``, are of the Logit Lens.
    """
    most = (validation.MAX_LAYERS + 1) * (validation.MAX_LENSES + 1)
    layers = cursors[f"{kind}_layer"].take(step, most, where)
    entries: dict[tuple[str, int], list[Row]] = {_place(row): [] for row in layers}
    for entry in _entries(cursors[f"{kind}_entry"].take(step, validation.MAX_CELLS, where)):
        if _place(entry) not in entries:
            raise refused(
                f"{where}: the table {kind}_entry has a layer that {kind}_layer does not have"
            )
        entries[_place(entry)].append(entry)
    lenses: dict[str, list[Row]] = {}
    for row in layers:
        lenses.setdefault(_place(row)[0], []).append({**row, "topk": entries[_place(row)]})
    return lenses


def _place(row: Row) -> tuple[str, int]:
    """The lens and the layer of a row; attention is of one kind."""
    return row.get("lens") or LOGIT, row["layer"]


def _router(cursors: Cursors, step: int, where: str) -> list[Row]:
    layers: dict[int, list[Row]] = {}
    for row in cursors["router_entry"].take(step, validation.MAX_CELLS, where):
        layers.setdefault(row["layer"], []).append(row)
    return [{"layer": layer, "topk": rows} for layer, rows in layers.items()]


def _entries(rows: list[Row]) -> list[Row]:
    """The entries without the blanks that fill up shorter lists; ids below those are unknown."""
    entries = []
    for row in rows:
        token_id = row.get("token_id")
        if token_id is not None and token_id < 0:
            if token_id == BLANK:
                continue
            row["token_id"] = None
        entries.append(row)
    return entries


def _tensor(row: Row, where: str) -> TensorRecord:
    fields = validation.read(_TensorRow, row, f"{where}, tensor")
    dtype, shape, data = fields["dtype"], fields["shape"], fields["data"]
    if not len(data) == byte_count(dtype, shape) <= MAX_RAW_BYTES:
        raise refused(f"{where}: the size of a tensor does not match its shape")
    layers, key_offset = fields["layers"] or (), fields["key_offset"] or 0
    return decode(fields["name"], dtype, shape, data, layers, key_offset)


def _document(text: str | None, where: str) -> Any:
    try:
        return None if text is None else loads(text)
    except (ValueError, RecursionError) as error:
        raise refused(f"{where} is not a JSON object") from error
