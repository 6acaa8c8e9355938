"""Reads messages as rows, with the settings of a reply as columns.

``prompt_hash`` is a digest of the roles and contents of the messages before a reply. It is the same
for all replies to the same messages, whatever the model.
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

_COLUMNS = tuple(column.name for column in BY_NAME["message"].columns)
_OF_CAPTURE = ("layers", "dtype", "device", "quantization")
_OF_SAMPLING = ("temperature", "top_p", "top_k")


def message_table(reader: TraceReader, marks: Sequence[MessageMark]) -> pa.Table:
    """Some messages of one conversation, without those that have just been deleted."""
    try:
        messages = reader.messages(marks[0].conversation_id)
    except NotFound:
        messages = []
    wanted = {mark.id for mark in marks}
    rows = []
    # Of the messages on the path to each message, itself included.
    digests: dict[int | None, Any] = {None: hashlib.sha256()}
    for message in messages:
        before = digests.get(message.parent_id) or digests[None]
        if message.id in wanted:
            rows.append(_row(message, _prompt_hash(before, message)))
        digest = digests[message.id] = before.copy()
        digest.update(repr((str(message.role), message.content)).encode("utf-8", "replace"))
    return to_arrow("message", {name: [row[name] for row in rows] for name in _COLUMNS})


def _prompt_hash(before: Any, message: Message) -> str:
    """The hash of what a reply goes on from: the messages, and its own beginning."""
    if message.forced is None and not message.prefix_len:
        return str(before.hexdigest()[:16])
    digest = before.copy()
    digest.update(repr((message.branch_of, message.branch_step, message.forced)).encode())
    return str(digest.hexdigest()[:16])


def _row(message: Message, prompt_hash: str) -> dict[str, Any]:
    generation, capture = message.generation, message.capture
    sampling = generation if generation is not None and generation.do_sample else None
    calls = [
        {"name": part.name, "arguments": part.arguments}
        for part in message.parts
        if part.kind == "tool_call"
    ]
    thinking = [part.text for part in message.parts if part.kind == "thinking"]
    derived = {
        "role": str(message.role),
        "status": str(message.status),
        "created_at": message.created_at.replace(tzinfo=None),
        **{name: getattr(capture, name, None) for name in _OF_CAPTURE},
        **{name: getattr(sampling, name, None) for name in _OF_SAMPLING},
        "repetition_penalty": getattr(generation, "repetition_penalty", None),
        "seed": _seed(message) if sampling else None,
        "trace_prompt": getattr(message.policy, "trace_prompt", None),
        "tokens": None,
        "prompt_hash": None,
        "thinking": "\n\n".join(thinking) or None,
        "tool_calls": json.dumps(calls, ensure_ascii=False) if calls else None,
    }
    if message.role is Role.ASSISTANT:
        derived |= {"tokens": message.tokens, "prompt_hash": prompt_hash}
    return {name: derived[name] if name in derived else getattr(message, name) for name in _COLUMNS}


def _seed(message: Message) -> int | None:
    settings = (message.generation, message.sampling)
    seeds = [one.seed for one in settings if one is not None and one.seed is not None]
    return seeds[0] if seeds and message.sampling else None
