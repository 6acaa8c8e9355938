"""Messages as rows, with the settings of a reply as columns.

``prompt_hash`` is the same for all replies to the same words: a digest of the
messages before, roles and contents, whichever model they were put to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from oki_trace.analysis.arrow_tables import to_arrow
from oki_trace.analysis.tables import BY_NAME
from oki_trace.errors import NotFound
from oki_trace.records import Message, Role
from oki_trace.store.reading.bulk_read import MessageMark
from oki_trace.store.reading.reader import TraceReader


def message_table(reader: TraceReader, marks: Sequence[MessageMark]) -> pa.Table:
    """Some messages of one conversation. One that has just been deleted is left out."""
    try:
        messages = reader.messages(marks[0].conversation_id)
    except NotFound:
        messages = []
    wanted = {mark.id for mark in marks}
    rows = []
    digest = hashlib.sha256()
    for message in messages:
        if message.id in wanted:
            rows.append(_row(message, digest.hexdigest()[:16]))
        digest.update(repr((str(message.role), message.content)).encode("utf-8", "replace"))
    names = [column.name for column in BY_NAME["message"].columns]
    return to_arrow("message", {name: [row[name] for row in rows] for name in names})


def _row(message: Message, prompt_hash: str) -> dict[str, Any]:
    is_reply = message.role is Role.ASSISTANT
    generation, capture, sampling = message.generation, message.capture, message.sampling
    sampled = generation is not None and generation.do_sample
    calls = [
        {"name": part.name, "arguments": part.arguments}
        for part in message.parts
        if part.kind == "tool_call"
    ]
    return {
        "id": message.id,
        "conversation_id": message.conversation_id,
        "position": message.position,
        "role": str(message.role),
        "content": message.content,
        "status": str(message.status),
        "created_at": message.created_at.replace(tzinfo=None),
        "model_id": message.model_id,
        "prompt_len": message.prompt_len,
        "tokens": message.tokens if is_reply else None,
        "seconds": message.seconds,
        "reason": message.reason,
        "layers": capture.layers if capture else None,
        "dtype": capture.dtype if capture else None,
        "device": capture.device if capture else None,
        "quantization": capture.quantization if capture else None,
        "temperature": generation.temperature if generation and sampled else None,
        "top_p": generation.top_p if generation and sampled else None,
        "top_k": generation.top_k if generation and sampled else None,
        "repetition_penalty": generation.repetition_penalty if generation else None,
        "seed": _seed(message) if sampling and sampled else None,
        "prompt_hash": prompt_hash if is_reply else None,
        "thinking": "\n\n".join(p.text for p in message.parts if p.kind == "thinking") or None,
        "tool_calls": json.dumps(calls, ensure_ascii=False) if calls else None,
        "tool_name": message.tool_name,
    }


def _seed(message: Message) -> int | None:
    if message.generation is not None and message.generation.seed is not None:
        return message.generation.seed
    return message.sampling.seed if message.sampling else None
