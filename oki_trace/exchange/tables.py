"""The tables of a Parquet export: those of the store, with the same names.

Settings and reports are JSON text, as in a trace object. ``data`` of a tensor is the array itself,
little-endian, in C order, so that ``numpy.frombuffer(data, dtype).reshape(shape)`` reads it
(bfloat16 as its bits, in uint16). NaN is null; infinities are kept.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from oki_trace.store.schema.arrow import arrow_types

# Of this store alone, and meaningless in another.
_LEFT_OUT = {
    "conversation": {"updated_at", "uid"},
    "message": {"owner", "heartbeat_at", "stop_requested", "score_of", "readings"},
    "step": {"tensor_bytes"},
    "tensor": {"id", "codec", "checksum", "raw_bytes"},
}
_DERIVED: dict[str, dict[str, pa.DataType]] = {
    "message": {"tokens": pa.int32()},
    "tensor": {
        "shape": pa.list_(pa.int64()),
        "layers": pa.list_(pa.int64()),
        "key_offset": pa.int64(),
    },
}

TABLES: dict[str, Any] = {
    name: pa.schema(
        {
            column: kind
            for column, kind in {**arrow_types(name), **_DERIVED.get(name, {})}.items()
            if column not in _LEFT_OUT.get(name, ())
        }
    )
    for name in (
        *("conversation", "message", "prompt_token", "step", "topk_entry"),
        *(
            "attention_layer",
            "attention_entry",
            "lens_layer",
            "lens_entry",
            "router_entry",
            "tensor",
        ),
    )
}

# The tables that older exports do not have.
LATER = frozenset({"router_entry"})

SUFFIX = ".parquet"
FILES = frozenset(f"{name}{SUFFIX}" for name in TABLES)
