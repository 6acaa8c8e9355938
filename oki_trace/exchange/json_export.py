"""A conversation as JSON: one document, or a line a step.

The document: ``{"format": "oki-trace", "version": 2, "conversation": {…},
"messages": [{id, role, content, status, …, trace?}]}``, a step a line in the
file. In JSON lines the first line is that document with traces that have no
``steps``, and each line after it is a step that names its ``message``.

Both are written as they are read, a few steps in memory, however long the reply.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, TextIO

from oki_trace.errors import NotFound
from oki_trace.exchange.selection import Selection, is_traced, selected
from oki_trace.exchange.trace_object import (
    FORMAT,
    VERSION,
    head_object,
    part_objects,
    plain,
    step_objects,
    trace_object,
)
from oki_trace.exchange.v1 import v1_head, v1_steps
from oki_trace.records import Message
from oki_trace.reporting import Progress
from oki_trace.store.reading.reader import TraceReader

JSONL = "jsonl"

# ASCII, so that it is the same in every encoding and inert in a terminal.
_encode = json.JSONEncoder(ensure_ascii=True, allow_nan=False).encode


def write_conversation(
    reader: TraceReader,
    conversation_id: int,
    file: TextIO,
    message_id: int | None = None,
    progress: Progress | None = None,
    *,
    tensors: bool = False,
) -> None:
    """Write the whole conversation, or the trace object of one of its replies.

    What is written was true at one instant, while replies go on too. ``tensors``:
    whether they are written beside it. Raises NotFound for a conversation or
    message that is not there.
    """
    with selected(reader, conversation_id, message_id) as chosen:
        counted = _Counted(chosen, progress, tensors=tensors)
        if message_id is not None:
            (reply,) = chosen.replies
            _write_trace(file, counted, reply)
            file.write("\n")
            return
        file.write(_open(document_head(chosen)) + ', "messages": [')
        for place, message in enumerate(chosen.messages):
            file.write(",\n" if place else "\n")
            if message.id in chosen.traced:
                file.write(_open(message_head(message)) + ', "trace": ')
                _write_trace(file, counted, message)
                file.write("}")
            else:
                file.write(_encode(message_head(message)))
        file.write("\n]}\n")


def write_lines(
    reader: TraceReader,
    conversation_id: int,
    file: TextIO,
    message_id: int | None = None,
    progress: Progress | None = None,
    *,
    tensors: bool = False,
) -> None:
    """Write the conversation as JSON lines; with ``message_id`` the steps of that reply alone."""
    with selected(reader, conversation_id, message_id) as chosen:
        counted = _Counted(chosen, progress, tensors=tensors)
        heads = []
        for message in chosen.messages:
            head = message_head(message)
            if message.id in chosen.traced:
                head["trace"] = counted.head(message)
            heads.append(head)
        file.write(_encode({**document_head(chosen), "layout": JSONL, "messages": heads}) + "\n")
        for reply in chosen.replies:
            for step in counted.steps(reply):
                file.write(_encode({"message": reply.id, **step}) + "\n")


def write_v1(
    reader: TraceReader,
    conversation_id: int,
    file: TextIO,
    message_id: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Write traces of version 1: of one reply the trace, of several a list.

    Raises NotFound when the conversation has no traced reply.
    """
    with selected(reader, conversation_id, message_id) as chosen:
        if not chosen.replies:
            raise NotFound(
                f"Conversation {conversation_id} has no traced reply, and trace-v1 holds nothing "
                "else. Choose another --format."
            )
        several = len(chosen.replies) > 1
        done = 0
        file.write("[\n" if several else "")
        for place, reply in enumerate(chosen.replies):
            head = chosen.head(reply)
            file.write((",\n" if place else "") + _open(v1_head(head)) + ', "steps": [')
            for number, step in enumerate(v1_steps(head, chosen.reader.iter_steps(reply.id))):
                file.write((",\n" if number else "\n") + _encode(step))
                done += 1
                if progress is not None:
                    progress(done, chosen.steps)
            file.write("\n]}")
        file.write("\n]\n" if several else "\n")


def conversation_object(reader: TraceReader, conversation_id: int) -> dict[str, Any]:
    """The document of a conversation, in memory. Raises NotFound."""
    with selected(reader, conversation_id) as chosen:
        messages = []
        for message in chosen.messages:
            head = message_head(message)
            if message.id in chosen.traced:
                head["trace"] = _trace(chosen, message, timed=True)
            messages.append(head)
        return {**document_head(chosen), "messages": messages}


def trace_of(
    reader: TraceReader, messages: Sequence[Message], message: Message, *, timed: bool = False
) -> dict[str, Any] | None:
    """The trace object of a reply, in memory; None for a message that has none.

    ``timed`` as a file has it; without, it is what ``run_traced`` returned.
    """
    if not is_traced(message):
        return None
    conversation = reader.conversation(message.conversation_id)
    return _trace(
        Selection(reader, conversation, messages, frozenset({message.id})), message, timed=timed
    )


def document_head(chosen: Selection) -> dict[str, Any]:
    """The document up to its ``messages``."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "conversation": {
            "id": chosen.conversation.id,
            "title": chosen.conversation.title,
            "created_at": chosen.conversation.created_at.isoformat(),
        },
    }


def message_head(message: Message) -> dict[str, Any]:
    """A message up to its ``trace``; what was asked for stands in replies alone."""
    head: dict[str, Any] = {
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
    for name in ("choice", "sampling", "policy", "template"):
        asked = getattr(message, name)
        if asked is not None:
            head[name] = plain(asdict(asked))
    if message.parts and not is_traced(message):
        head["parts"] = part_objects(message.parts)
    if message.tool_name is not None:
        head["tool_name"] = message.tool_name
    if is_traced(message):
        head |= {"seconds": plain(message.seconds), "tokens": message.tokens}
    elif message.seconds is not None:
        head["seconds"] = plain(message.seconds)
    return head


def _trace(chosen: Selection, reply: Message, *, timed: bool) -> dict[str, Any]:
    # What stands in a file says that its tensors are not in it.
    head = chosen.head(reply, tensors=not timed)
    return trace_object(head, chosen.reader.iter_steps(reply.id), timed=timed)


class _Counted:
    """The steps of a selection as objects, told to the progress as they go by."""

    def __init__(self, chosen: Selection, progress: Progress | None, *, tensors: bool) -> None:
        self.chosen = chosen
        self._tensors = tensors
        self._progress = progress
        self._done = 0

    def head(self, reply: Message) -> dict[str, Any]:
        return head_object(self.chosen.head(reply, tensors=self._tensors))

    def steps(self, reply: Message) -> Iterator[dict[str, Any]]:
        prompt = self.chosen.reader.prompt(reply.id)
        steps = self.chosen.reader.iter_steps(reply.id)
        for step in step_objects(prompt, steps, timed=True):
            yield step
            self._done += 1
            if self._progress is not None:
                self._progress(self._done, self.chosen.steps)


def _write_trace(file: TextIO, counted: _Counted, reply: Message) -> None:
    file.write(_open(counted.head(reply)) + ', "steps": [')
    for place, step in enumerate(counted.steps(reply)):
        file.write(",\n" if place else "\n")
        file.write(_encode(step))
    file.write("\n]}")


def _open(document: dict[str, Any]) -> str:
    """An object that more is to be written into."""
    return _encode(document)[:-1]
