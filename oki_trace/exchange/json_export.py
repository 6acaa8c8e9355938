"""Exports a conversation as JSON, as JSON lines with one step each, or as version 1 traces.

The document is ``{"format": "oki-trace", "version": 2, "conversation": {…},
"messages": [{id, role, content, status, …, trace?}]}`` with one step a line. The
first line of JSON lines is that document with traces that have no ``steps`` and no
``prompt_steps``; each further line is a step that names its ``message``, the given
tokens of a message first.

Steps are written as they are read, so replies of any length take little memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TextIO

from oki_trace.errors import NotFound
from oki_trace.exchange.selection import Selection, is_traced, selected
from oki_trace.exchange.trace_object import (
    FORMAT,
    VERSION,
    Json,
    head_object,
    part_objects,
    plain,
    step_objects,
    trace_object,
)
from oki_trace.records import Message
from oki_trace.store.reading.reader import Reader, TraceReader

JSONL = "jsonl"
# The names of version 1, which docs/formats.md lists: of a trace, a step, and their entries.
V1_TRACE = (
    *("model_id", "prompt", "output", "prompt_len", "messages"),
    *("evidence_provenance", "logit_lens_available"),
)
V1_STEP = ("step", "chosen_token", "chosen_id")
V1_CANDIDATE = ("token", "prob")
V1_EVIDENCE = ("token", "weight", "position", "in_prompt", "relative")

# ASCII is the same in every encoding, and has no effect on a terminal.
_encode = json.JSONEncoder(ensure_ascii=True, allow_nan=False).encode


def write_conversation(chosen: Selection, file: TextIO) -> None:
    """Write the document of a conversation, or the trace object of a single reply."""
    if chosen.single is not None:
        _write_trace(file, chosen, chosen.single)
        file.write("\n")
        return
    file.write(_open(document_head(chosen)) + ', "messages": [')
    for place, (message, head) in enumerate(_heads(chosen)):
        file.write(",\n" if place else "\n")
        if message.id in chosen.traced:
            file.write(_open(head) + ', "trace": ')
            _write_trace(file, chosen, message)
            file.write("}")
        else:
            file.write(_encode(head))
    file.write("\n]}\n")


def write_lines(chosen: Selection, file: TextIO) -> None:
    """Write the selection as JSON lines."""
    heads = []
    for message, head in _heads(chosen):
        if message.id in chosen.traced:
            head["trace"] = head_object(chosen.head(message))
        heads.append(head)
    file.write(_encode({**document_head(chosen), "layout": JSONL, "messages": heads}) + "\n")
    for reply in chosen.replies:
        for given in (True, False):
            for step in _steps(chosen, reply, given=given):
                file.write(_encode({"message": reply.id, **step}) + "\n")


def write_v1(chosen: Selection, file: TextIO) -> None:
    """Write traces of version 1: one trace, or a list of several.

    Raises NotFound when the conversation has no traced reply.
    """
    if not chosen.replies:
        raise NotFound(
            f"Conversation {chosen.conversation.id} has no traced reply, and trace-v1 holds "
            "nothing else. Choose another --format."
        )
    several = len(chosen.replies) > 1
    file.write("[\n" if several else "")
    for place, reply in enumerate(chosen.replies):
        head = chosen.head(reply)
        file.write(",\n" if place else "")
        steps = step_objects(head.start.prompt, chosen.iter_steps(reply))
        parts = {"steps": map(_v1_step, steps)}
        _write_object(file, _only(head_object(head), V1_TRACE), parts)
    file.write("\n]\n" if several else "\n")


def conversation_object(reader: TraceReader, conversation_id: int) -> Json:
    """The document of a conversation, in memory. Raises NotFound."""
    with selected(reader, conversation_id, tensors=False) as chosen:
        messages = []
        for message, head in _heads(chosen):
            if message.id in chosen.traced:
                head["trace"] = _trace(chosen, message, timed=True)
            messages.append(head)
        return {**document_head(chosen), "messages": messages}


def trace_of(
    reader: Reader, messages: Sequence[Message], message: Message, *, timed: bool = False
) -> Json | None:
    """The trace object of a reply, in memory; None for a message without a trace.

    ``timed``: as in a file; otherwise it is what ``run_traced`` returned.
    """
    if not is_traced(message):
        return None
    conversation = reader.conversation(message.conversation_id)
    # A file without the tensors says so.
    chosen = Selection(reader, conversation, messages, frozenset({message.id}), tensors=not timed)
    return _trace(chosen, message, timed=timed)


def document_head(chosen: Selection) -> Json:
    """The document without its ``messages``."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "conversation": {
            "id": chosen.conversation.id,
            "title": chosen.conversation.title,
            "created_at": chosen.conversation.created_at.isoformat(),
        },
    }


def _heads(chosen: Selection) -> Iterator[tuple[Message, Json]]:
    """Each message, and its object without the ``trace``.

    ``parent_id`` is left out where the message follows the one before it, and is 0 for a
    message that follows none.
    """
    before: int | None = None
    for message in chosen.messages:
        parent = {} if message.parent_id == before else {"parent_id": message.parent_id or 0}
        yield message, message_head(message) | parent
        before = message.id


def message_head(message: Message) -> Json:
    """A message without its ``trace``; only replies have the request that made them."""
    head: Json = {
        "id": message.id,
        "role": str(message.role),
        "content": message.content,
        "status": str(message.status),
        "created_at": message.created_at.isoformat(),
    }
    if message.digest:
        head["digest"] = message.digest
    if message.reason is not None:
        head["reason"] = message.reason
    if message.tensors_pruned_at is not None:
        head["tensors_pruned_at"] = message.tensors_pruned_at.isoformat()
    for name in ("branch_of", "branch_step"):
        if getattr(message, name) is not None:
            head[name] = getattr(message, name)
    for name in ("choice", "sampling", "policy", "template", "forced"):
        record = getattr(message, name)
        if record is not None:
            head[name] = plain(asdict(record))
    if message.parts and not is_traced(message):
        head["parts"] = part_objects(message.parts)
    if message.tool_name is not None:
        head["tool_name"] = message.tool_name
    if is_traced(message):
        head |= {"seconds": plain(message.seconds), "tokens": message.tokens}
    elif message.seconds is not None:
        head["seconds"] = plain(message.seconds)
    return head


def _trace(chosen: Selection, message: Message, *, timed: bool) -> Json:
    """The trace object of a reply, in memory."""
    given = chosen.iter_steps(message, given=True)
    return trace_object(chosen.head(message), chosen.iter_steps(message), given, timed=timed)


def _steps(chosen: Selection, reply: Message, *, given: bool = False) -> Iterator[Json]:
    steps = chosen.iter_steps(reply, given=given)
    return step_objects(chosen.reader.prompt(reply.id), steps, timed=True)


def _v1_step(step: Json) -> Json:
    return {
        **_only(step, V1_STEP),
        "logits_topk": [_only(entry, V1_CANDIDATE) for entry in step["logits_topk"]],
        "evidence": [_only(entry, V1_EVIDENCE) for entry in step["evidence"]],
        "logit_lens": [
            {"layer": row["layer"], "topk": [_only(entry, V1_CANDIDATE) for entry in row["topk"]]}
            for row in step["logit_lens"]
        ],
    }


def _only(values: Json, names: tuple[str, ...]) -> Json:
    return {name: values[name] for name in names}


def _write_trace(file: TextIO, chosen: Selection, reply: Message) -> None:
    parts = {"steps": _steps(chosen, reply), "prompt_steps": _steps(chosen, reply, given=True)}
    _write_object(file, head_object(chosen.head(reply)), parts)


def _write_object(file: TextIO, head: Json, lists: Mapping[str, Iterable[Json]]) -> None:
    """An object whose last values are ``lists`` of steps, one a line."""
    file.write(_open(head))
    for name, steps in lists.items():
        file.write(f', "{name}": [')
        for place, step in enumerate(steps):
            file.write((",\n" if place else "\n") + _encode(step))
        file.write("\n]")
    file.write("}")


def _open(document: Json) -> str:
    """An object without its closing brace."""
    return _encode(document)[:-1]
