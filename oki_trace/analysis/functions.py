"""What SQL can ask of the full tensors: functions that read them from the store.

Tensors are too large for the cache, so these look into the store itself, read-only,
and only at the steps that the statement comes to. A step or a tensor that is not
there gives NULL.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from inspect import Parameter, Signature
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from duckdb.func import FunctionNullHandling, PythonUDFType

from oki_trace.analysis.distance import softmax
from oki_trace.analysis.head_targets import HEAD_TARGETS, shares_of_heads
from oki_trace.analysis.pairs import floats, step_distances
from oki_trace.analysis.tables import FUNCTIONS, Function
from oki_trace.records import Prompt
from oki_trace.store.reading.reader import TraceReader

# Tensors in memory at once.
_TOGETHER = 16


def _distance(reader: TraceReader, *columns: Sequence[int | None]) -> pa.Array:
    rows = list(zip(*columns, strict=True))
    known = [row for row in rows if None not in row]
    found = iter(step_distances(reader, known))
    values = []
    for row in rows:
        one = next(found) if None not in row else None
        d = one and one.distance
        values.append(
            one
            and d
            and {
                "kl": d.kl,
                "kl_reverse": d.kl_reverse,
                "js": d.js,
                "tv": d.tv,
                "shared": one.shared,
                "top_rank": one.top_rank,
                "basis": d.basis,
            }
        )
    return pa.array(values, _DISTANCE)


_DISTANCE = pa.struct(
    [
        *((name, pa.float64()) for name in ("kl", "kl_reverse", "js", "tv")),
        ("shared", pa.int32()),
        ("top_rank", pa.int32()),
        ("basis", pa.string()),
    ]
)


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
        probs = softmax(floats(tensor))
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
    return pa.array(
        [
            message in kept[name] if name is not None else None
            for message, name in zip(messages, names, strict=True)
        ],
        pa.bool_(),
    )


def _head_shares(
    reader: TraceReader, messages: Sequence[int | None], steps: Sequence[int | None]
) -> pa.Array:
    found: list[tuple[Any, ...] | None] = [None] * len(messages)
    of_message = defaultdict(list)
    for (message, step), places in _places(messages, steps).items():
        of_message[message].append((step, places))
    for message, those in of_message.items():
        prompt: Prompt | None = None
        for first in range(0, len(those), _TOGETHER):
            some = those[first : first + _TOGETHER]
            indexes = [step for step, _ in some]
            tensors = reader.tensors(message, "attentions", indexes)
            for step, places in some:
                if step not in tensors:
                    continue
                prompt = prompt or reader.prompt(message)
                tensor = tensors[step]
                shares = shares_of_heads(floats(tensor), tensor.key_offset, prompt)
                for place in places:
                    found[place] = tensor.layers, shares
    return _as_lists(found)


def _as_lists(found: Sequence[tuple[Any, ...] | None]) -> pa.Array:
    """A list of heads for each step; made a column at a time, for there are hundreds."""
    layers, heads, shares, offsets = [], [], [], [0]
    for one in found:
        if one is not None:
            of_layers, of_heads = one[1].shape[:2]
            layers.append(np.repeat(np.array(one[0], dtype=np.int32), of_heads))
            heads.append(np.tile(np.arange(of_heads, dtype=np.int32), of_layers))
            shares.append(one[1].reshape(of_layers * of_heads, -1))
        offsets.append(offsets[-1] + (len(layers[-1]) if one is not None else 0))
    things = len(HEAD_TARGETS)
    flat = np.concatenate(shares) if shares else np.zeros((0, things + 1))
    each = pa.ListArray.from_arrays(
        np.arange(0, things * len(flat) + 1, things, dtype=np.int32),
        pa.array(np.ascontiguousarray(flat[:, :things]).ravel()),
    )
    none = np.zeros(0, np.int32)
    values = pa.StructArray.from_arrays(
        [
            pa.array(np.concatenate([none, *layers])),
            pa.array(np.concatenate([none, *heads])),
            each,
            pa.array(np.ascontiguousarray(flat[:, -1])),
        ],
        ["layer", "head", "shares", "focus"],
    )
    return pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), values, mask=pa.array([one is None for one in found])
    )


def _places(
    messages: Sequence[int | None], steps: Sequence[int | None]
) -> dict[tuple[int, int], list[int]]:
    """The rows of each step."""
    found = defaultdict(list)
    for place, (message, step) in enumerate(zip(messages, steps, strict=True)):
        if message is not None and step is not None:
            found[message, step].append(place)
    return found


_COMPUTE: dict[str, Callable[..., pa.Array]] = {
    "distance": _distance,
    "token_rank": _token_rank,
    "head_shares": _head_shares,
    "keeps": _keeps,
}


def register(connection: duckdb.DuckDBPyConnection, reader: TraceReader) -> None:
    """Make them known to a connection; they read through ``reader``."""
    for function in FUNCTIONS:
        connection.create_function(
            function.name,
            _over(function, reader),
            list(function.takes.values()),
            function.gives,
            type=PythonUDFType.ARROW,
            null_handling=FunctionNullHandling.SPECIAL,
        )


def _over(function: Function, reader: TraceReader) -> Callable[..., Any]:
    work = _COMPUTE[function.name]

    def compute(*columns: pa.ChunkedArray) -> pa.Array:
        return work(reader, *(column.to_pylist() for column in columns))

    # DuckDB counts them.
    compute.__signature__ = Signature(  # type: ignore[attr-defined]
        [Parameter(name, Parameter.POSITIONAL_ONLY) for name in function.takes]
    )
    return compute
