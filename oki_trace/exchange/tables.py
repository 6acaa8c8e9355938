"""The tables of a Parquet export: the store's, under the same names.

Settings and reports are JSON text, as they stand in a trace object; ``data`` of
a tensor is the array itself, little-endian, in C order, so that
``numpy.frombuffer(data, dtype).reshape(shape)`` reads it (bfloat16 as its bits,
in uint16). What is not a number is null; infinities are kept.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

TIME = pa.timestamp("us", tz="UTC")
_I, _L, _F, _D, _S, _B = (
    *(pa.int32(), pa.int64(), pa.float32(), pa.float64()),
    *(pa.string(), pa.binary()),
)

TABLES: dict[str, Any] = {
    name: pa.schema(columns)
    for name, columns in {
        "conversation": {"id": _L, "title": _S, "created_at": TIME},
        "message": {
            "id": _L,
            "conversation_id": _L,
            "position": _I,
            "role": _S,
            "content": _S,
            "status": _S,
            "created_at": TIME,
            "model_id": _S,
            "prompt_len": _I,
            "tokens": _I,
            "reason": _S,
            "seconds": _D,
            "tensors_pruned_at": TIME,
            "choice": _S,
            "sampling": _S,
            "policy": _S,
            "generation": _S,
            "capture": _S,
            "checks": _S,
            "digest": _S,
            "prompt": _S,
        },
        "prompt_token": {
            "message_id": _L,
            "position": _I,
            "token_id": _I,
            "token": _S,
            "segment": _S,
        },
        "step": {
            "id": _L,
            "message_id": _L,
            "step_index": _I,
            "position": _I,
            "token_id": _I,
            "token": _S,
            "token_bytes": _B,
            "is_special": pa.bool_(),
            "logit": _D,
            "prob": _D,
            "logprob": _D,
            "entropy": _D,
            "rank": _I,
            "margin": _D,
            "sampled_prob": _D,
            "elapsed_ms": _D,
            "settle_layer": _I,
            "greedy_id": _I,
            "decision": _S,
            "digest": _B,
            "tensor_digest": _B,
        },
        "topk_entry": {
            "step_id": _L,
            "rank": _I,
            "token_id": _I,
            "token": _S,
            "logit": _F,
            "prob": _F,
            "sampled_prob": _F,
            "noise": _F,
        },
        "attention_layer": {"step_id": _L, "layer": _I, "missing": _D},
        "attention_entry": {
            "step_id": _L,
            "layer": _I,
            "rank": _I,
            "position": _I,
            "weight": _F,
        },
        "lens_layer": {
            "step_id": _L,
            "layer": _I,
            "entropy": _F,
            "chosen_rank": _I,
            "chosen_prob": _F,
            "kl": _F,
        },
        "lens_entry": {
            "step_id": _L,
            "layer": _I,
            "rank": _I,
            "token_id": _I,
            "token": _S,
            "logit": _F,
            "prob": _F,
        },
        "tensor": {
            "step_id": _L,
            "name": _S,
            "dtype": _S,
            "shape": pa.list_(_L),
            "layers": pa.list_(_L),
            "key_offset": _L,
            "data": _B,
        },
    }.items()
}

SUFFIX = ".parquet"
FILES = frozenset(f"{name}{SUFFIX}" for name in TABLES)
