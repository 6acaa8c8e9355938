"""A reply's rows from the store as Arrow tables, with what is worked out once for all questions.

The guarantee: measured values are the store's own, not rounded (the entries'
32-bit floats were 32-bit floats when they were measured); what is not a number
is NULL.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from oki_trace.analysis.head_targets import COUNTED_AS
from oki_trace.analysis.tables import BY_NAME, Kind, Table
from oki_trace.store.reading.bulk_read import Columns
from oki_trace.store.reading.reader import TraceReader

# Steps that are in memory at once: about 40 MB of Python values.
STEPS_AT_ONCE = 256

SHARES = ("first_token", "system", "user", "assistant", "template", "reply")
_SEGMENT_SHARE = {name: SHARES.index(thing) for name, thing in COUNTED_AS.items()}
_REPLY = 5

_ARROW: dict[Kind, pa.DataType] = {
    "BIGINT": pa.int64(),
    "INTEGER": pa.int32(),
    "DOUBLE": pa.float64(),
    "FLOAT": pa.float32(),
    "BOOLEAN": pa.bool_(),
    "VARCHAR": pa.string(),
    "TIMESTAMP": pa.timestamp("us"),
}

Tables = dict[str, pa.Table]


def schema(table: Table) -> pa.Schema:
    """The Arrow schema of one of our tables."""
    return pa.schema([(column.name, _ARROW[column.kind]) for column in table.columns])


def to_arrow(name: str, columns: dict[str, Any]) -> pa.Table:
    """Columns under our names, in any order and with others among them, as that table."""
    wanted = schema(BY_NAME[name])
    return pa.table([_array(columns[f.name], f.type) for f in wanted], schema=wanted)


def _array(values: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(values, np.ndarray) and values.dtype.kind == "f":
        missing = np.isnan(values)
        mask = missing if missing.any() else None
        if pa.types.is_integer(kind):
            values = np.where(missing, 0, values).astype(np.int64)
        return pa.array(values, mask=mask).cast(kind)
    if isinstance(values, np.ndarray):
        return pa.array(values).cast(kind)
    return pa.array(values, type=kind)


def reply_tables(reader: TraceReader, message_id: int) -> Iterator[Tables]:
    """The step tables of a reply, some steps at a time, and its prompt with the first.

    Each batch is one instant: of a reply that is running, the steps so far.
    """
    prompt = reader.prompt_columns(message_id)
    yield {
        "prompt_token": to_arrow(
            "prompt_token", {**prompt, "message_id": _same(message_id, prompt["position"])}
        )
    }
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


def _same(value: int, like: Any) -> NDArray[np.int64]:
    return np.full(len(like), value, dtype=np.int64)


def _step_tables(batch: dict[str, Columns], share: NDArray[np.int64], before: str) -> Tables:
    step = batch["step"]
    rows = _RowsOfStep(step)
    topk, lens_layer, lens_entry = batch["topk_entry"], batch["lens_layer"], batch["lens_entry"]
    attention_layer, attention_entry = batch["attention_layer"], batch["attention_entry"]
    return {
        "step": to_arrow(
            "step",
            {
                **step,
                "token_class": _classes(step["token"], step["is_special"].tolist(), before),
                **_other(step, topk, rows),
                **_settled(step, lens_layer, rows),
            },
        ),
        "topk_entry": to_arrow("topk_entry", {**topk, **rows.keys(topk)}),
        "lens_layer": to_arrow(
            "lens_layer",
            {**lens_layer, **rows.keys(lens_layer), **_first_of_layer(lens_layer, lens_entry)},
        ),
        "lens_entry": to_arrow("lens_entry", {**lens_entry, **rows.keys(lens_entry)}),
        "attention_layer": to_arrow(
            "attention_layer",
            {
                **attention_layer,
                **rows.keys(attention_layer),
                **_shared_out(attention_layer, attention_entry, share),
            },
        ),
        "attention_entry": to_arrow(
            "attention_entry", {**attention_entry, **rows.keys(attention_entry)}
        ),
    }


@dataclass(frozen=True, slots=True)
class _RowsOfStep:
    """Which step of a batch each row of a child table belongs to."""

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


def _other(step: Columns, topk: Columns, rows: _RowsOfStep) -> dict[str, Any]:
    """The most likely token that was not chosen; candidates come by step and rank."""
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
    return {"other_id": ids, "other_prob": probs, "other_token": tokens}


def _settled(step: Columns, lens_layer: Columns, rows: _RowsOfStep) -> dict[str, Any]:
    place = rows.of(lens_layer)
    count = len(step["id"])
    layers, probs = np.full(count, np.nan), np.full(count, np.nan)
    # By step and layer, so a step's last row is its last layer.
    layers[place] = lens_layer["layer"]
    at = np.flatnonzero(lens_layer["layer"] == step["settle_layer"][place])
    probs[place[at]] = lens_layer["chosen_prob"][at]
    return {"layers": layers, "settle_prob": probs}


def _first_of_layer(layer: Columns, entry: Columns) -> dict[str, Any]:
    """Rank 1 of each layer, a row of ``lens_layer`` each."""
    first = np.flatnonzero(entry["rank"] == 1)
    row = _rows_of_layer(layer, entry)[first]
    ids, probs = np.full(len(layer["layer"]), np.nan), np.full(len(layer["layer"]), np.nan)
    ids[row], probs[row] = entry["token_id"][first], entry["prob"][first]
    tokens: list[str | None] = [None] * len(ids)
    for at, one in zip(row.tolist(), first.tolist(), strict=True):
        tokens[at] = entry["token"][one]
    return {"top_id": ids, "top_prob": probs, "top_token": tokens}


def _rows_of_layer(layer: Columns, entry: Columns) -> NDArray[np.int64]:
    """The row of a layer's table that each entry belongs to; both come by step and layer."""
    span = int(max(layer["layer"].max(initial=0), entry["layer"].max(initial=0))) + 1
    row: NDArray[np.int64] = np.searchsorted(
        layer["step_id"] * span + layer["layer"], entry["step_id"] * span + entry["layer"]
    )
    return row


def _shares_of_prompt(prompt: Columns) -> NDArray[np.int64]:
    """Which share each position of the prompt counts to: (prompt_len,)."""
    share = np.array([_SEGMENT_SHARE[segment] for segment in prompt["segment"]], dtype=np.int64)
    share[:1] = 0
    return share


def _shared_out(layer: Columns, entry: Columns, share: NDArray[np.int64]) -> dict[str, Any]:
    """The kept weights by what they look at, and what is left: (rows of attention_layer,) each."""
    position = entry["position"]
    inside = position < len(share)
    kind = np.full(len(position), _REPLY)
    kind[inside] = share[position[inside]]
    row = _rows_of_layer(layer, entry)
    count = len(layer["layer"])
    weight = np.nan_to_num(entry["weight"])
    sums = np.bincount(row * len(SHARES) + kind, weight, minlength=count * len(SHARES))
    by_share = sums.reshape(count, len(SHARES))
    rest = 1.0 - np.nan_to_num(layer["missing"]) - by_share.sum(axis=1)
    return {
        **{name: by_share[:, i] for i, name in enumerate(SHARES)},
        # Rounding can leave a trace below zero.
        "rest": np.maximum(rest, 0.0),
        # By step and layer, so a step's last row is its last layer.
        "is_evidence": np.append(np.diff(layer["step_id"]) != 0, True)[:count],
    }


def _classes(tokens: Sequence[str], special: Sequence[bool], before: str) -> list[str]:
    found = []
    for token, is_special in zip(tokens, special, strict=True):
        found.append(token_class(token, is_special=is_special, before=before))
        before = token
    return found


def token_class(token: str, *, is_special: bool = False, before: str = "") -> str:
    """What kind of token this is; ``before`` is the text of the one before it."""
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
