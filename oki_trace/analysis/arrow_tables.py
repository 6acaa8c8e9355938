"""Reads a reply's rows as Arrow tables and adds the derived columns that questions use.

Measured values are those of the store, not rounded (the floats of entries are 32-bit, as they were
measured); NaN is NULL.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from oki_trace.analysis.head_targets import COUNTED_AS
from oki_trace.analysis.tables import BY_NAME
from oki_trace.records import LOGIT
from oki_trace.store.reading.bulk_read import Columns
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.schema import arrow

# Steps in memory at a time: about 40 MB of Python values.
STEPS_AT_ONCE = 256

SHARES = ("first_token", "system", "user", "assistant", "template", "reply")
_SEGMENT_SHARE = {name: SHARES.index(target) for name, target in COUNTED_AS.items()}

Tables = dict[str, pa.Table]


def to_arrow(name: str, columns: dict[str, Any]) -> pa.Table:
    """Columns by name as the Arrow table ``name``; other columns are left out."""
    return arrow.to_arrow(columns, BY_NAME[name].schema)


def reply_tables(reader: TraceReader, message_id: int) -> Iterator[Tables]:
    """The prompt of a reply, and its step tables, some steps at a time: given tokens first.

    A running reply has its steps so far; each batch is read from one snapshot.
    """
    prompt = reader.prompt_columns(message_id)
    yield {"prompt_token": to_arrow("prompt_token", prompt)}
    share = _shares_of_prompt(prompt)
    for first in range(0, len(share), STEPS_AT_ONCE):
        batch = reader.step_columns(message_id, first, first + STEPS_AT_ONCE, given=True)
        if len(batch["step"]["id"]):
            start = int(batch["step"]["position"][0])
            yield _step_tables(batch, share, prompt["token"][start - 1])
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
    topk, lens_layer, lens_entry = batch["topk_entry"], batch["lens_layer"], batch["lens_entry"]
    attention_layer, attention_entry = batch["attention_layer"], batch["attention_entry"]
    derived = {
        "step": {
            "token_class": _classes(step["token"], step["is_special"].tolist(), before),
            **_runner_up(step, topk),
            **_settled(step, _of_logit_lens(lens_layer)),
        },
        "lens_layer": _top_of_layer(lens_layer, lens_entry),
        "attention_layer": _divided(attention_layer, attention_entry, share),
    }
    for name, columns in batch.items():
        if name != "step":
            place = _places(step, columns)
            columns |= {key: step[key][place] for key in ("message_id", "step_index")}
    return {name: to_arrow(name, batch[name] | derived.get(name, {})) for name in batch}


def _places(step: Columns, child: Columns) -> NDArray[np.int64]:
    """The place in the batch of the step that each row of a child table belongs to: (rows,)."""
    order = np.argsort(step["id"])
    place: NDArray[np.int64] = order[np.searchsorted(step["id"], child["step_id"], sorter=order)]
    return place


def _runner_up(step: Columns, topk: Columns) -> dict[str, Any]:
    """The most likely token that was not chosen; candidates are ordered by step and rank."""
    place = _places(step, topk)
    others = np.flatnonzero(topk["token_id"] != step["token_id"][place])
    steps, first = np.unique(place[others], return_index=True)
    return _tokens_at("runner_up", topk, others[first], steps, len(step["id"]))


def _tokens_at(
    name: str, entry: Columns, rows: NDArray[np.int64], at: NDArray[np.int64], count: int
) -> dict[str, Any]:
    """The id, probability and text of the entries ``rows``, ``at`` places of columns (count,)."""
    ids, probs = np.full(count, np.nan), np.full(count, np.nan)
    ids[at], probs[at] = entry["token_id"][rows], entry["prob"][rows]
    tokens: list[str | None] = [None] * count
    for place, row in zip(at.tolist(), rows.tolist(), strict=True):
        tokens[place] = entry["token"][row]
    return {f"{name}_id": ids, f"{name}_prob": probs, f"{name}_token": tokens}


def _of_logit_lens(lens_layer: Columns) -> Columns:
    rows = np.array([name == LOGIT for name in lens_layer["lens"]], dtype=np.bool_)
    return {name: lens_layer[name][rows] for name in ("step_id", "layer", "chosen_prob")}


def _settled(step: Columns, lens_layer: Columns) -> dict[str, Any]:
    place = _places(step, lens_layer)
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
    return _tokens_at("top", entry, first, row, len(layer["layer"]))


def _rows_of_layer(layer: Columns, entry: Columns) -> NDArray[np.int64]:
    """The row of a layer's table that each entry belongs to."""
    span = int(max(layer["layer"].max(initial=0), entry["layer"].max(initial=0))) + 1
    lenses = {name: number for number, name in enumerate(dict.fromkeys(layer.get("lens", ())))}

    def key(rows: Columns) -> NDArray[np.int64]:
        of_layer: NDArray[np.int64] = rows["step_id"] * span + rows["layer"]
        if len(lenses) > 1:
            numbers = np.fromiter((lenses[name] for name in rows["lens"]), np.int64)
            of_layer = of_layer * len(lenses) + numbers
        return of_layer

    keys = key(layer)
    order = np.argsort(keys)
    row: NDArray[np.int64] = order[np.searchsorted(keys, key(entry), sorter=order)]
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
