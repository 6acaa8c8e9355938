"""Messages as a chat template takes them, in the form that this template reads.

Templates differ in where they look for thinking, in whether a content is a text or a
list of parts, and in whether a call's arguments are an object or a text. None of it
is declared. The name of the thinking is in the template's text; the rest is tried in
turn, and the first form counts in which all that was said appears in the prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from oki_trace.records import ChatMessage, Part, Role, Segment

Turn = dict[str, Any]

_OPEN, _CLOSE = "\ue000", "\ue001"
MARK = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")


@dataclass(frozen=True)
class Form:
    """How messages are written down; the most usual way by default."""

    content_as_list: bool = False
    arguments_as_text: bool = False
    empty_as_none: bool = False
    with_thinking: bool = True


@dataclass(frozen=True)
class Said:
    """A text that stands in the place of a mark: what it is, and whether it has to appear."""

    segment: Segment
    text: str
    needed: bool
    message: int
    arguments: Any = None


def forms(messages: Sequence[ChatMessage]) -> Iterator[Form]:
    """The ways to write these messages, the usual one first, each once."""
    calls = any(part.kind == "tool_call" for m in messages for part in m.parts)
    thinks = any(part.kind == "thinking" for m in messages for part in m.parts)
    both, one = (False, True), (False,)
    for without, as_list, as_text, as_none in product(
        both if thinks else one, both, both if calls else one, both if calls else one
    ):
        yield Form(as_list, as_text, as_none, not without)


def turns(messages: Sequence[ChatMessage], template: str, form: Form) -> list[Turn]:
    """The messages as dictionaries. Calls are numbered through, and answers find theirs."""
    key = thinking_key(template)
    as_block = bool(re.search(r"""==\s*['"]thinking['"]""", template))
    made: list[Turn] = []
    waiting: list[tuple[str, str]] = []
    number = 0
    for message in messages:
        turn: Turn = {"role": str(message.role), "content": message.content}
        thinking = _thinking(message) if form.with_thinking else ""
        calls = [part for part in message.parts if part.kind == "tool_call"]
        if calls:
            turn["tool_calls"] = []
            waiting = []
            for part in calls:
                number += 1
                turn["tool_calls"].append(_call(part, number, form))
                waiting.append((part.name or "", _call_id(number)))
            if form.empty_as_none and not message.content:
                turn["content"] = None
        if message.role is Role.TOOL:
            place = next((i for i, (n, _) in enumerate(waiting) if n == message.tool_name), 0)
            name, call_id = waiting.pop(place) if waiting else ("", _call_id(number))
            turn |= {"name": message.tool_name or name, "tool_call_id": call_id}
        blocks = [{"type": "text", "text": message.content}]
        if thinking and as_block:
            turn["content"] = [{"type": "thinking", "thinking": thinking}, *blocks]
        elif thinking and key is not None:
            turn[key] = thinking
        if form.content_as_list and isinstance(turn["content"], str):
            turn["content"] = blocks
        made.append(turn)
    return made


def thinking_key(template: str) -> str | None:
    """What a message's thinking is called in this template; None where it has no place."""
    if "reasoning_content" in template:
        return "reasoning_content"
    for name in ("thinking", "reasoning"):
        # A variable of the same name is an argument: that the model is to think.
        quoted = rf"""['"]{name}['"]"""
        read = rf"\w\.{name}\b|\[{quoted}\]|{quoted} in |\.get\({quoted}"
        if re.search(read, template):
            return name
    return None


def _thinking(message: ChatMessage) -> str:
    return "\n\n".join(part.text for part in message.parts if part.kind == "thinking")


def _call(part: Part, number: int, form: Form) -> Turn:
    arguments = {} if part.arguments is None else part.arguments
    if form.arguments_as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    function = {"name": part.name or "", "arguments": arguments}
    return {"type": "function", "id": _call_id(number), "function": function}


def _call_id(number: int) -> str:
    """Nine letters and digits: Mistral's templates take no other."""
    return f"call{number:05d}"


def marked(messages: Sequence[ChatMessage]) -> tuple[list[ChatMessage], list[Said]]:
    """The messages with a mark in place of each text, and what stands behind each mark."""
    behind: list[Said] = []

    def mark(said: Said) -> str:
        behind.append(said)
        return f"{_OPEN}{len(behind) - 1}{_CLOSE}"

    made = []
    for place, message in enumerate(messages):
        parts = []
        for part in message.parts:
            if part.kind == "thinking" and part.text:
                # Templates leave out the thinking of earlier turns on purpose.
                part = replace(part, text=mark(Said("thinking", part.text, False, place)))
            elif part.kind == "tool_call":
                called = Said("tool_call", part.name or "", True, place, part.arguments)
                part = replace(part, name=mark(called))
            parts.append(part)
        content = message.content
        if content:
            content = mark(Said(message.role.value, content, bool(content.strip()), place))
        made.append(replace(message, content=content, parts=tuple(parts)))
    return made, behind
