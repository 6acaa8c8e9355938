"""Reads a reply's rows as Arrow tables and adds the derived columns that questions use.

Measured values are those of the store, not rounded (the floats of entries are 32-bit, as they were
measured); NaN is NULL.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from oki_trace.analysis.head_targets import COUNTED_AS
from oki_trace.analysis.tables import BY_NAME
from oki_trace.store.reading.bulk_read import Columns
from oki_trace.store.reading.reader import TraceReader

# Steps in memory at a time: about 40 MB of Python values.
STEPS_AT_ONCE = 256

SHARES = ("first_token", "system", "user", "assistant", "template", "reply")
_SEGMENT_SHARE = {name: SHARES.index(target) for name, target in COUNTED_AS.items()}

Tables = dict[str, pa.Table]


def to_arrow(name: str, columns: dict[str, Any]) -> pa.Table:
    """Columns by name as the Arrow table ``name``; other columns are left out."""
    schema = BY_NAME[name].schema
    return pa.table([_array(columns[f.name], f.type) for f in schema], schema=schema)


def _array(values: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(values, np.ndarray):
        # NaN becomes NULL, also on the way to an integer.
        return pa.array(values, from_pandas=True).cast(kind)
    return pa.array(values, type=kind)


def reply_tables(reader: TraceReader, message_id: int) -> Iterator[Tables]:
    """The prompt of a reply, and its step tables, some steps at a time.

    A running reply has its steps so far; each batch is read from one snapshot.
    """
    prompt = reader.prompt_columns(message_id)
    yield {"prompt_token": to_arrow("prompt_token", prompt)}
    share = _shares_of_prompt(prompt)
    before = ""
    first = 0
    while True:
        batch = reader.step_columns(message_id, first, first + STEPS_AT_ONCE)
        step = batch["step"]
        count = len(step["id"])
        if count:
            yield _step_tables(batch, share, before)
            before = step["token"][-1]
        if count < STEPS_AT_ONCE:
            return
        first += count


def _step_tables(batch: dict[str, Columns], share: NDArray[np.int64], before: str) -> Tables:
    step = batch["step"]
    rows = _RowsOfStep(step)
    topk, lens_layer, lens_entry = batch["topk_entry"], batch["lens_layer"], batch["lens_entry"]
    attention_layer, attention_entry = batch["attention_layer"], batch["attention_entry"]
    derived = {
        "step": {
            "token_class": _classes(step["token"], step["is_special"].tolist(), before),
            **_runner_up(step, topk, rows),
            **_settled(step, lens_layer, rows),
        },
        "lens_layer": _top_of_layer(lens_layer, lens_entry),
        "attention_layer": _divided(attention_layer, attention_entry, share),
    }
    return {
        name: to_arrow(
            name,
            {
                **columns,
                **({} if name == "step" else rows.keys(columns)),
                **derived.get(name, {}),
            },
        )
        for name, columns in batch.items()
    }


@dataclass(frozen=True, slots=True)
class _RowsOfStep:
    """The step of a batch that each row of a child table belongs to."""

    step: Columns

    def of(self, child: Columns) -> NDArray[np.int64]:
        """The place in the batch of each row's step: (rows,)."""
        ids = self.step["id"]
        order = np.argsort(ids)
        place: NDArray[np.int64] = order[np.searchsorted(ids, child["step_id"], sorter=order)]
        return place

    def keys(self, child: Columns) -> dict[str, Any]:
        place = self.of(child)
        return {
            "message_id": self.step["message_id"][place],
            "step_index": self.step["step_index"][place],
        }


def _runner_up(step: Columns, topk: Columns, rows: _RowsOfStep) -> dict[str, Any]:
    """The most likely token that was not chosen; candidates are ordered by step and rank."""
    place = rows.of(topk)
    others = np.flatnonzero(topk["token_id"] != step["token_id"][place])
    steps, first = np.unique(place[others], return_index=True)
    count = len(step["id"])
    ids, probs = np.full(count, np.nan), np.full(count, np.nan)
    ids[steps] = topk["token_id"][others[first]]
    probs[steps] = topk["prob"][others[first]]
    tokens: list[str | None] = [None] * count
    for one, row in zip(steps.tolist(), others[first].tolist(), strict=True):
        tokens[one] = topk["token"][row]
    return {"runner_up_id": ids, "runner_up_prob": probs, "runner_up_token": tokens}


def _settled(step: Columns, lens_layer: Columns, rows: _RowsOfStep) -> dict[str, Any]:
    place = rows.of(lens_layer)
    count = len(step["id"])
    layers, probs = np.full(count, np.nan), np.full(count, np.nan)
    # Rows are ordered by step and layer, so a step's last row is its last layer.
    layers[place] = lens_layer["layer"]
    at = np.flatnonzero(lens_layer["layer"] == step["settle_layer"][place])
    probs[place[at]] = lens_layer["chosen_prob"][at]
    return {"layers": layers, "settle_prob": probs}


def _top_of_layer(layer: Columns, entry: Columns) -> dict[str, Any]:
    """The most likely token of each row of ``lens_layer``."""
    first = np.flatnonzero(entry["rank"] == 1)
    row = _rows_of_layer(layer, entry)[first]
    ids, probs = np.full(len(layer["layer"]), np.nan), np.full(len(layer["layer"]), np.nan)
    ids[row], probs[row] = entry["token_id"][first], entry["prob"][first]
    tokens: list[str | None] = [None] * len(ids)
    for at, one in zip(row.tolist(), first.tolist(), strict=True):
        tokens[at] = entry["token"][one]
    return {"top_id": ids, "top_prob": probs, "top_token": tokens}


def _rows_of_layer(layer: Columns, entry: Columns) -> NDArray[np.int64]:
    """The row of a layer's table that each entry belongs to; both are ordered by step and layer."""
    span = int(max(layer["layer"].max(initial=0), entry["layer"].max(initial=0))) + 1
    row: NDArray[np.int64] = np.searchsorted(
        layer["step_id"] * span + layer["layer"], entry["step_id"] * span + entry["layer"]
    )
    return row


def _shares_of_prompt(prompt: Columns) -> NDArray[np.int64]:
    """The index in SHARES of each position of the prompt: (prompt_len,)."""
    share = np.array([_SEGMENT_SHARE[segment] for segment in prompt["segment"]], dtype=np.int64)
    share[:1] = 0
    return share


def _divided(layer: Columns, entry: Columns, share: NDArray[np.int64]) -> dict[str, Any]:
    """The recorded weights by part of the text, and their rest: (rows of attention_layer,) each."""
    position = entry["position"]
    inside = position < len(share)
    kind = np.full(len(position), SHARES.index("reply"))
    kind[inside] = share[position[inside]]
    row = _rows_of_layer(layer, entry)
    count = len(layer["layer"])
    weight = np.nan_to_num(entry["weight"])
    sums = np.bincount(row * len(SHARES) + kind, weight, minlength=count * len(SHARES))
    by_share = sums.reshape(count, len(SHARES))
    rest = 1.0 - np.nan_to_num(layer["missing"]) - by_share.sum(axis=1)
    return {
        **{name: by_share[:, i] for i, name in enumerate(SHARES)},
        # Rounding can leave a little less than zero.
        "rest": np.maximum(rest, 0.0),
        # Rows are ordered by step and layer, so a step's last row is its last layer.
        "is_evidence": np.append(np.diff(layer["step_id"]) != 0, True)[:count],
    }


def _classes(tokens: Sequence[str], special: Sequence[bool], before: str) -> list[str]:
    return [
        token_class(token, is_special=is_special, before=before)
        for token, is_special, before in zip(tokens, special, (before, *tokens), strict=False)
    ]


def token_class(token: str, *, is_special: bool = False, before: str = "") -> str:
    """The kind of a token; ``before`` is the text of the token before it."""
    bare = token.strip()
    if is_special:
        return "special"
    if not bare:
        return "space"
    if not any(c.isalnum() for c in bare):
        return "punctuation"
    if bare[0].isdigit():
        return "number"
    return "rest of a word" if token[0].isalnum() and before[-1:].isalnum() else "new word"
