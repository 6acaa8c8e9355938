"""SQL functions over the full tensors, read from the store.

Tensors are too large for the cache, so these functions read them from the store, and only for the
steps that the statement reaches. The result is NULL for a step or a tensor that does not exist.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from inspect import Parameter, Signature
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from duckdb.func import FunctionNullHandling, PythonUDFType
from numpy.typing import NDArray

from oki_trace.analysis.distance import softmax
from oki_trace.analysis.head_targets import HEAD_TARGETS, shares_of_heads
from oki_trace.analysis.step_distance import Pair, StepKey, step_distances
from oki_trace.analysis.tables import FUNCTIONS, Function
from oki_trace.errors import NotFound
from oki_trace.records import Prompt
from oki_trace.store.reading.reader import TraceReader

# Tensors in memory at a time.
_TENSORS_AT_ONCE = 16

_DISTANCE = pa.struct(
    [
        *((name, pa.float64()) for name in ("kl", "kl_reverse", "js", "tv", "tv_most")),
        ("shared", pa.int32()),
        ("top_rank", pa.int32()),
        ("basis", pa.string()),
    ]
)

# The layers of a step's attention tensor, and what ``shares_of_heads`` makes of it.
_Shares = tuple[Sequence[int], NDArray[np.float64]]


def _distance(reader: TraceReader, *columns: Sequence[int | None]) -> pa.Array:
    return _distances(reader, columns, StepKey)


def _distance_at(reader: TraceReader, *columns: Sequence[int | None]) -> pa.Array:
    lengths: dict[int, int] = {}

    def key(message: int, position: int) -> StepKey:
        if message not in lengths:
            lengths[message] = _prompt_len(reader, message)
        step = position - lengths[message]
        return StepKey(message, step) if step >= 0 else StepKey(message, position, given=True)

    return _distances(reader, columns, key)


def _prompt_len(reader: TraceReader, message_id: int) -> int:
    try:
        return reader.message(message_id).prompt_len or 0
    except NotFound:
        return 0


def _distances(
    reader: TraceReader,
    columns: Sequence[Sequence[int | None]],
    key: Callable[[int, int], StepKey],
) -> pa.Array:
    rows: list[Pair | None] = [
        None if a is None or i is None or b is None or j is None else (key(a, i), key(b, j))
        for a, i, b, j in zip(*columns, strict=True)
    ]
    distances = iter(step_distances(reader, [row for row in rows if row is not None]))
    values: list[dict[str, Any] | None] = []
    for row in rows:
        found = None if row is None else next(distances)
        values.append(
            None
            if found is None
            else asdict(found.distance) | {"shared": found.shared, "top_rank": found.top_rank}
        )
    return pa.array(values, _DISTANCE)


def _token_rank(
    reader: TraceReader,
    messages: Sequence[int | None],
    steps: Sequence[int | None],
    tokens: Sequence[int | None],
) -> pa.Array:
    values: list[dict[str, Any] | None] = [None] * len(messages)
    for (message, step), places in _places(messages, steps).items():
        tensor = reader.tensors(message, "logits", [step]).get(step)
        if tensor is None:
            continue
        probs = softmax(tensor.to_float32())
        for place in places:
            token = tokens[place]
            if token is not None and 0 <= token < len(probs):
                prob = probs[token]
                rank = 1 + int(np.count_nonzero(probs > prob))
                values[place] = {"prob": float(prob), "rank": rank}
    return pa.array(values, pa.struct([("prob", pa.float64()), ("rank", pa.int32())]))


def _keeps(
    reader: TraceReader, messages: Sequence[int | None], names: Sequence[str | None]
) -> pa.Array:
    kept = {name: reader.replies_with(name) for name in set(names) if name is not None}
    values = [
        None if name is None else message in kept[name]
        for message, name in zip(messages, names, strict=True)
    ]
    return pa.array(values, pa.bool_())


def _head_shares(
    reader: TraceReader, messages: Sequence[int | None], steps: Sequence[int | None]
) -> pa.Array:
    values: list[_Shares | None] = [None] * len(messages)
    of_message = defaultdict(list)
    for (message, step), places in _places(messages, steps).items():
        of_message[message].append((step, places))
    for message, of_steps in of_message.items():
        prompt: Prompt | None = None
        for first in range(0, len(of_steps), _TENSORS_AT_ONCE):
            batch = dict(of_steps[first : first + _TENSORS_AT_ONCE])
            for step, tensor in reader.tensors(message, "attentions", list(batch)).items():
                prompt = prompt or reader.prompt(message)
                shares = shares_of_heads(tensor.to_float32(), tensor.key_offset, prompt)
                for place in batch[step]:
                    values[place] = tensor.layers, shares
    return _lists_of_heads(values)


def _lists_of_heads(values: Sequence[_Shares | None]) -> pa.Array:
    """A list of heads for each step, built a column at a time: a step has hundreds of heads."""
    layers, heads = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
    shares, offsets = [np.zeros((0, len(HEAD_TARGETS) + 1))], [0]
    for value in values:
        if value is not None:
            layer_count, head_count = value[1].shape[:2]
            layers.append(np.repeat(np.array(value[0], dtype=np.int32), head_count))
            heads.append(np.tile(np.arange(head_count, dtype=np.int32), layer_count))
            shares.append(value[1].reshape(layer_count * head_count, -1))
        offsets.append(offsets[-1] + (0 if value is None else len(layers[-1])))
    flat = np.concatenate(shares)
    targets = np.ascontiguousarray(flat[:, :-1])
    lists = pa.ListArray.from_arrays(
        np.arange(0, targets.size + 1, len(HEAD_TARGETS), dtype=np.int32), pa.array(targets.ravel())
    )
    columns = {
        "layer": pa.array(np.concatenate(layers)),
        "head": pa.array(np.concatenate(heads)),
        "shares": lists,
        "focus": pa.array(np.ascontiguousarray(flat[:, -1])),
    }
    return pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()),
        pa.StructArray.from_arrays(list(columns.values()), list(columns)),
        mask=pa.array([value is None for value in values]),
    )


def _places(
    messages: Sequence[int | None], steps: Sequence[int | None]
) -> dict[tuple[int, int], list[int]]:
    """The rows that ask for each step."""
    places = defaultdict(list)
    for place, (message, step) in enumerate(zip(messages, steps, strict=True)):
        if message is not None and step is not None:
            places[message, step].append(place)
    return places


_COMPUTE: dict[str, Callable[..., pa.Array]] = {
    "distance": _distance,
    "distance_at": _distance_at,
    "token_rank": _token_rank,
    "head_shares": _head_shares,
    "keeps": _keeps,
}


def register(connection: duckdb.DuckDBPyConnection, reader: TraceReader) -> None:
    """Add the functions to a connection; they read through ``reader``."""
    for function in FUNCTIONS:
        connection.create_function(
            function.name,
            _bound(function, reader),
            list(function.parameters.values()),
            function.returns,
            type=PythonUDFType.ARROW,
            null_handling=FunctionNullHandling.SPECIAL,
        )


def _bound(function: Function, reader: TraceReader) -> Callable[..., Any]:
    def compute(*columns: pa.ChunkedArray) -> pa.Array:
        return _COMPUTE[function.name](reader, *(column.to_pylist() for column in columns))

    # DuckDB counts the parameters.
    compute.__signature__ = Signature(  # type: ignore[attr-defined]
        [Parameter(name, Parameter.POSITIONAL_ONLY) for name in function.parameters]
    )
    return compute
