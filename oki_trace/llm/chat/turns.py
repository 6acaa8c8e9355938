"""Messages as a chat template takes them, in the form that this template reads.

Templates differ in where they look for thinking, in whether a content is a text or a
list of parts, and in whether a call's arguments are an object or a text. None of it
is declared. The name of the thinking is in the template's text; the rest is tried in
turn, and the first form counts in which all that was said appears in the prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from oki_trace.records import ChatMessage, Part, Role, Segment

Turn = dict[str, Any]

_OPEN, _CLOSE = "\ue000", "\ue001"
MARK = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")


@dataclass(frozen=True)
class Form:
    """How messages are written down; the most usual way by default.

    ``named_ids``: a call is known by its tool and number, not by a number alone.
    ``calls_in_content``: the template knows no calls, so they are text, as they were written.
    """

    content_as_list: bool = False
    arguments_as_text: bool = False
    empty_as_none: bool = False
    named_ids: bool = False
    calls_in_content: bool = False
    without_thinking: bool = False


@dataclass(frozen=True)
class Said:
    """A text that stands in the place of a mark: what it is, and whether it has to appear."""

    segment: Segment
    text: str
    needed: bool
    message: int
    arguments: Any = None


def forms(messages: Sequence[ChatMessage]) -> list[Form]:
    """The ways to write these messages, the usual one first."""
    calls = any(part.kind == "tool_call" for m in messages for part in m.parts)
    thinks = any(part.kind == "thinking" for m in messages for part in m.parts)
    both, one = (False, True), (False,)
    of_calls = both if calls else one
    ways = product(both, of_calls, of_calls, of_calls, of_calls, both if thinks else one)
    # Calls as text are the last resort: the fifth.
    return [Form(*way) for way in sorted(ways, key=lambda way: (way[4], sum(way)))]


def turns(
    messages: Sequence[ChatMessage],
    template: str,
    form: Form,
    around: tuple[str, str] = ("", ""),
) -> list[Turn]:
    """The messages as dictionaries. Calls are numbered through, and answers find theirs.

    ``around``: the markers that the model writes around a call.
    """
    key = thinking_key(template)
    as_block = bool(re.search(r"""==\s*['"]thinking['"]""", template))
    made: list[Turn] = []
    waiting: list[tuple[str, str]] = []
    number = 0
    for message in messages:
        turn: Turn = {"role": str(message.role), "content": message.content}
        thinking = "" if form.without_thinking else _thinking(message)
        calls = [part for part in message.parts if part.kind == "tool_call"]
        if calls:
            waiting = []
            for place, part in enumerate(calls):
                number += 1
                name = part.name or ""
                waiting.append((name, _call_id(number, name, place, form)))
            if form.calls_in_content:
                written = (_as_written(part, around) for part in calls)
                turn["content"] = "\n".join([message.content, *written]).lstrip("\n")
            else:
                ids = (call_id for _, call_id in waiting)
                turn["tool_calls"] = [_call(*pair, form) for pair in zip(calls, ids, strict=True)]
                if form.empty_as_none and not message.content:
                    turn["content"] = None
        if message.role is Role.TOOL:
            place = next((i for i, (n, _) in enumerate(waiting) if n == message.tool_name), 0)
            name, call_id = waiting.pop(place) if waiting else ("", _call_id(number, "", 0, form))
            turn |= {"name": message.tool_name or name, "tool_call_id": call_id}
        blocks = [{"type": "text", "text": turn["content"]}]
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


def _call(part: Part, call_id: str, form: Form) -> Turn:
    arguments = {} if part.arguments is None else part.arguments
    if form.arguments_as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    function = {"name": part.name or "", "arguments": arguments}
    return {"type": "function", "id": call_id, "function": function}


def _call_id(number: int, name: str, place: int, form: Form) -> str:
    """Nine letters and digits: Mistral's templates take no other. Kimi's show the id alone."""
    return f"functions.{name}:{place}" if form.named_ids else f"call{number:05d}"


def _as_written(part: Part, around: tuple[str, str]) -> str:
    """A call as text; one that was not decoded here as most models write it."""
    call = {"name": part.name, "arguments": part.arguments}
    text = part.text or json.dumps(call, ensure_ascii=False)
    return f"{around[0]}\n{text}\n{around[1]}".strip()


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
                name = part.name or ""
                # Of a call that cannot be read there is nothing to look for.
                called = mark(Said("tool_call", name, bool(name), place, part.arguments))
                text = part.text.replace(name, called, 1) if name else part.text
                part = replace(part, name=called, text=text)
            parts.append(part)
        content = message.content
        if content:
            # What a model says before it calls a tool, many templates leave out on purpose.
            beside = any(part.kind == "tool_call" for part in message.parts)
            needed = bool(content.strip()) and not beside
            content = mark(Said(message.role.value, content, needed, place))
        made.append(replace(message, content=content, parts=tuple(parts)))
    return made, behind
