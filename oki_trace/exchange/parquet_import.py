"""A conversation from its folder of Parquet tables, read step by step.

Each table is in the order of messages and steps, so a cursor a table is enough;
a row that belongs to no step, or stands out of order, is an ExchangeError.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from oki_trace.errors import ExchangeError
from oki_trace.exchange import incoming
from oki_trace.exchange.fields import Fields, wrong
from oki_trace.exchange.json_stream import loads
from oki_trace.exchange.staging import Staging
from oki_trace.exchange.tables import SUFFIX, TABLES
from oki_trace.exchange.tensor_file import ITEMS
from oki_trace.exchange.trace_object import BLANK
from oki_trace.records import Step, Tensor
from oki_trace.store.tensors import MAX_RAW_BYTES, TensorName

Row = dict[str, Any]

MAX_ROWS = 2_000_000_000
# What a row group says it unpacks to; ours are some tens of megabytes.
MAX_GROUP_BYTES = 4_000_000_000
_ROWS_AT_ONCE = 1024
_BUFFER_BYTES = 1 << 20
_DOCUMENTS = ("choice", "sampling", "policy", "generation", "capture")


class _Cursor:
    """The rows of one table, in order; those of one owner at a time."""

    def __init__(self, folder: Path, name: str, key: str) -> None:
        self.name = name
        self._key = key
        path = folder / f"{name}{SUFFIX}"
        if path.is_symlink() or not path.is_file():
            raise wrong(f"the table {path.name} is missing or no file")
        try:
            # By default all of the file is fetched before the first row is given.
            self._file = pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES)
            self._check()
        except (pa.ArrowException, OSError, ValueError) as error:
            raise _unreadable(name, error) from error
        self._rows = self._read()
        self._next: Row | None = next(self._rows, None)

    def close(self) -> None:
        self._file.close()

    def of(self, owner: int) -> Iterator[Row]:
        """The rows that belong to ``owner`` and come next."""
        while self._next is not None and self._next[self._key] == owner:
            yield self._next
            self._next = next(self._rows, None)

    def all(self) -> Iterator[Row]:
        while self._next is not None:
            yield self._next
            self._next = next(self._rows, None)

    def end(self) -> None:
        if self._next is not None:
            raise wrong(f"the table {self.name} has rows that belong to nothing, or out of order")

    def _check(self) -> None:
        schema = TABLES[self.name]
        found = self._file.schema_arrow
        if found.names != schema.names or found.types != schema.types:
            raise wrong(f"the table {self.name} has other columns than an export")
        metadata = self._file.metadata
        groups = range(metadata.num_row_groups)
        if metadata.num_rows > MAX_ROWS or any(
            metadata.row_group(n).total_byte_size > MAX_GROUP_BYTES for n in groups
        ):
            raise wrong(f"the table {self.name} is too large")

    def _read(self) -> Iterator[Row]:
        # A row of tensors may be large: one at a time.
        at_once = 1 if self.name == "tensor" else _ROWS_AT_ONCE
        try:
            for batch in self._file.iter_batches(batch_size=at_once, use_threads=False):
                yield from batch.to_pylist()
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            raise _unreadable(self.name, error) from error


def import_tables(folder: Path, staging: Staging, tick: Callable[[], None]) -> None:
    """Read the tables of ``folder`` into ``staging``. Raises ExchangeError."""
    keys = {"conversation": "id", "message": "conversation_id", "step": "message_id"}
    keys["prompt_token"] = "message_id"
    with ExitStack() as closing:
        cursors = {}
        for name in TABLES:
            cursors[name] = _Cursor(folder, name, keys.get(name, "step_id"))
            closing.callback(cursors[name].close)
        conversations = list(cursors["conversation"].all())
        if len(conversations) != 1:
            raise wrong(f"the table conversation has {len(conversations)} rows, not one")
        said = _plain(conversations[0])
        staging.begin(Fields(said, "the conversation"))
        for row in cursors["message"].of(said["id"]):
            _message(row, cursors, staging, tick)
        for cursor in cursors.values():
            cursor.end()


def _message(
    row: Row, cursors: dict[str, _Cursor], staging: Staging, tick: Callable[[], None]
) -> None:
    where = f"message {staging.messages + 1}"
    message = _plain(row)
    for name in _DOCUMENTS:
        message[name] = _document(message[name], f"{where}, {name}")
    fields = Fields(message, where)
    if "capture" not in fields:
        staging.say(fields)
        return
    number = fields.integer("id", high=2**63)
    tokens = list(_bounded(cursors["prompt_token"].of(number), incoming.MAX_PROMPT, where))
    if [token["position"] for token in tokens] != list(range(len(tokens))):
        raise wrong(f"{where}: the tokens of its prompt are out of order")
    capture = Fields(message["capture"], f"{where}, capture")
    head = Fields(
        {
            **message,
            "prompt_token_ids": [_known(token["token_id"]) for token in tokens],
            "prompt_tokens": [token["token"] for token in tokens],
            "prompt_segments": [token["segment"] for token in tokens],
            "evidence_provenance": capture.text("evidence_provenance", ""),
            "logit_lens_available": capture.flag("logit_lens_available", False),
        },
        where,
    )
    ids = incoming.TokenIds()
    start = incoming.turn_start(head, ids)

    def steps() -> Iterator[Step]:
        for index, step in enumerate(cursors["step"].of(number)):
            made = Fields(_step(step, cursors, where), f"{where}, step {index}")
            read = incoming.step(made, index, start, ids)
            tensors = tuple(_tensor(found, where) for found in cursors["tensor"].of(step["id"]))
            if len({tensor.name for tensor in tensors}) != len(tensors):
                raise wrong(f"{where}, step {index}: a tensor is there twice")
            yield replace(read, tensors=tensors)
            tick()

    staging.reply(fields, start, steps(), fields.integer("tokens", None))


def _step(row: Row, cursors: dict[str, _Cursor], where: str) -> Row:
    """A step as a trace object has it."""
    number = row["id"]
    most = incoming.MAX_ENTRIES
    attended = list(_bounded(cursors["attention_layer"].of(number), most + 1, where))
    weights = _by_layer(cursors["attention_entry"], number, where)
    layers = list(_bounded(cursors["lens_layer"].of(number), incoming.MAX_LAYERS + 1, where))
    read = _by_layer(cursors["lens_entry"], number, where)
    if weights.keys() - {row["layer"] for row in attended}:
        raise wrong(f"{where}: attention of a layer that is not there")
    if read.keys() - {row["layer"] for row in layers}:
        raise wrong(f"{where}: a lens of a layer that is not there")
    return {
        "step": row["step_index"],
        "chosen_token": row["token"],
        "chosen_id": _known(row["token_id"]),
        "chosen_bytes": None if row["token_bytes"] is None else row["token_bytes"].hex(),
        **{
            name: row[name]
            for name in (
                *("position", "is_special", "logit", "prob", "logprob", "entropy", "rank"),
                *("margin", "sampled_prob", "elapsed_ms"),
            )
        },
        "decision": _document(row["decision"], f"{where}, decision"),
        "logits_topk": _ranked(list(_bounded(cursors["topk_entry"].of(number), most, where))),
        "attention": [{**row, "topk": _ranked(weights.get(row["layer"], []))} for row in attended],
        "logit_lens": [{**row, "topk": _ranked(read.get(row["layer"], []))} for row in layers],
    }


def _by_layer(cursor: _Cursor, step: int, where: str) -> dict[int, list[Row]]:
    found: dict[int, list[Row]] = {}
    for row in _bounded(cursor.of(step), incoming.MAX_LENS_CELLS, where):
        found.setdefault(row["layer"], []).append(row)
    return found


def _ranked(rows: list[Row]) -> list[Row]:
    if [row["rank"] for row in rows] != list(range(1, len(rows) + 1)):
        raise wrong("the ranks of a step's entries are not 1, 2, 3 and so on")
    return [
        {**row, "token_id": _known(row["token_id"])} if "token_id" in row else row
        for row in rows
        if row.get("token_id") != BLANK
    ]


def _tensor(row: Row, where: str) -> Tensor:
    dtype, data = ITEMS.get(row["dtype"] or ""), row["data"]
    shape, layers, key_offset = row["shape"], row["layers"] or [], row["key_offset"] or 0
    if row["name"] not in get_args(TensorName) or dtype is None or data is None or not shape:
        raise wrong(f"{where}: a tensor has an unknown name or dtype")
    good = len(shape) <= 3 and all(type(n) is int and n >= 0 for n in (*shape, *layers, key_offset))
    size = math.prod(shape) * np.dtype(dtype).itemsize if good else -1
    if size != len(data) or size > MAX_RAW_BYTES or max((*layers, key_offset), default=0) > 2**53:
        raise wrong(f"{where}: a tensor is not as large as its shape says")
    array = np.frombuffer(data, dtype=dtype).reshape(shape)
    return Tensor(
        name=cast("TensorName", row["name"]),
        array=array.astype(array.dtype.newbyteorder("="), copy=False),
        dtype=row["dtype"],
        layers=tuple(layers),
        key_offset=key_offset,
    )


def _plain(row: Row) -> Row:
    """The row as JSON would have it: moments as text."""
    try:
        moment = row["created_at"]
        return {**row, "created_at": None if moment is None else moment.isoformat()}
    except (ValueError, OverflowError) as error:
        raise wrong("a time is out of range") from error


def _document(text: str | None, where: str) -> Any:
    try:
        return None if text is None else loads(text)
    except (ValueError, RecursionError) as error:
        raise wrong(f"{where} is no JSON object") from error


def _known(token_id: int | None) -> int | None:
    return token_id if token_id is not None and token_id >= 0 else None


def _bounded(rows: Iterator[Row], most: int, where: str) -> Iterator[Row]:
    for count, row in enumerate(rows, start=1):
        if count > most:
            raise wrong(f"{where} has more than {most:,} rows of one kind")
        yield row


def _unreadable(name: str, error: Exception) -> ExchangeError:
    if isinstance(error, ExchangeError):
        return error
    return wrong(f"the table {name} is damaged or no Parquet file ({type(error).__name__})")
