"""Converts messages to the form that a chat template reads.

Templates differ in where they read thinking, in whether a content is a text or a
list of parts, and in whether a call's arguments are an object or a text. None of this
is declared. The name of the thinking is in the template's text; the rest is tried in
turn, until every message appears in the prompt.
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
    """A way to write messages as dictionaries; the most common one by default.

    ``named_ids``: a call's id is its tool and number, not a number alone.
    ``calls_in_content``: the template has no calls, so they are written as text.
    """

    content_as_list: bool = False
    arguments_as_text: bool = False
    empty_as_none: bool = False
    named_ids: bool = False
    calls_in_content: bool = False
    without_thinking: bool = False


@dataclass(frozen=True)
class MarkedText:
    """A text that a mark replaces, and whether it must appear in the prompt.

    ``message`` is the place of its message; ``arguments`` are those of a call.
    """

    segment: Segment
    text: str
    required: bool
    message: int
    arguments: Any = None


def forms(messages: Sequence[ChatMessage]) -> list[Form]:
    """The forms to try for these messages, the most common one first."""
    kinds = {part.kind for message in messages for part in message.parts}
    of_calls = (False, True) if "tool_call" in kinds else (False,)
    of_thinking = (False, True) if "thinking" in kinds else (False,)
    choices = product((False, True), of_calls, of_calls, of_calls, of_calls, of_thinking)
    # Calls as text, the fifth, are the last resort.
    return [Form(*choice) for choice in sorted(choices, key=lambda c: (c[4], sum(c)))]


def turns(
    messages: Sequence[ChatMessage],
    template: str,
    form: Form,
    call_markers: tuple[str, str] = ("", ""),
) -> list[Turn]:
    """The messages as dictionaries. Calls are numbered, and a tool's answer names its call.

    ``call_markers`` are those that the model writes around a call.
    """
    key = thinking_key(template)
    as_block = bool(re.search(r"""==\s*['"]thinking['"]""", template))
    made: list[Turn] = []
    unanswered: list[tuple[str, str]] = []
    number = 0
    for message in messages:
        turn: Turn = {"role": str(message.role), "content": message.content}
        calls = [part for part in message.parts if part.kind == "tool_call"]
        if calls:
            names = [part.name or "" for part in calls]
            ids = [_call_id(number + i + 1, name, i, form) for i, name in enumerate(names)]
            number += len(calls)
            unanswered = list(zip(names, ids, strict=True))
            if form.calls_in_content:
                written = (_as_written(part, call_markers) for part in calls)
                turn["content"] = "\n".join([message.content, *written]).lstrip("\n")
            else:
                turn["tool_calls"] = [_call(*pair, form) for pair in zip(calls, ids, strict=True)]
                if form.empty_as_none and not message.content:
                    turn["content"] = None
        if message.role is Role.TOOL:
            names = [name for name, _ in unanswered]
            place = names.index(message.tool_name) if message.tool_name in names else 0
            name, call_id = (
                unanswered.pop(place) if unanswered else ("", _call_id(number, "", 0, form))
            )
            turn |= {"name": message.tool_name or name, "tool_call_id": call_id}
        thoughts = [part.text for part in message.parts if part.kind == "thinking"]
        thinking = "" if form.without_thinking else "\n\n".join(thoughts)
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
    """The key of a message's thinking in this template; None if it has none."""
    if "reasoning_content" in template:
        return "reasoning_content"
    for name in ("thinking", "reasoning"):
        # A variable of the same name is an argument: whether the model is to think.
        quoted = rf"""['"]{name}['"]"""
        if re.search(rf"\w\.{name}\b|\[{quoted}\]|{quoted} in |\.get\({quoted}", template):
            return name
    return None


def _call(part: Part, call_id: str, form: Form) -> Turn:
    arguments = {} if part.arguments is None else part.arguments
    if form.arguments_as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    function = {"name": part.name or "", "arguments": arguments}
    return {"type": "function", "id": call_id, "function": function}


def _call_id(number: int, name: str, place: int, form: Form) -> str:
    """Nine letters and digits: Mistral's templates accept nothing else. Kimi's show only the id."""
    return f"functions.{name}:{place}" if form.named_ids else f"call{number:05d}"


def _as_written(part: Part, markers: tuple[str, str]) -> str:
    """A call as the model wrote it; one from elsewhere in the form that most models write."""
    call = {"name": part.name, "arguments": part.arguments}
    text = part.text or json.dumps(call, ensure_ascii=False)
    return f"{markers[0]}\n{text}\n{markers[1]}".strip()


def marked(messages: Sequence[ChatMessage]) -> tuple[list[ChatMessage], list[MarkedText]]:
    """The messages with a mark in place of each text, and the text of each mark."""
    texts: list[MarkedText] = []

    def mark(*fields: Any) -> str:
        texts.append(MarkedText(*fields))
        return f"{_OPEN}{len(texts) - 1}{_CLOSE}"

    made = []
    for place, message in enumerate(messages):
        parts = []
        for part in message.parts:
            if part.kind == "thinking" and part.text:
                # Templates leave out the thinking of earlier turns on purpose.
                part = replace(part, text=mark("thinking", part.text, False, place))
            elif part.kind == "tool_call":
                name = part.name or ""  # none of a call that cannot be read
                called = mark("tool_call", name, bool(name), place, part.arguments)
                text = part.text.replace(name, called, 1) if name else part.text
                part = replace(part, name=called, text=text)
            parts.append(part)
        content = message.content
        if content:
            # Many templates leave out a text before a call on purpose.
            has_call = any(part.kind == "tool_call" for part in message.parts)
            required = bool(content.strip()) and not has_call
            content = mark(message.role.value, content, required, place)
        made.append(replace(message, content=content, parts=tuple(parts)))
    return made, texts
