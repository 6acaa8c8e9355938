"""Converts messages from the format of transformers to this project's records."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from oki_trace.errors import UsageError
from oki_trace.records import ChatMessage, Part, Role

_FORM = "Each message needs a role (system, user, assistant or tool) and a content."
_STRING = 'A prompt or content must be a string, or a list of {"type": "text", "text": …}.'
_THINKING = ("reasoning_content", "thinking", "reasoning")


def chat_message(message: Mapping[str, Any]) -> ChatMessage:
    """A message from ``{"role": …, "content": …}``, an assistant's also with ``tool_calls``.

    Its thinking may be ``reasoning_content``, ``thinking`` or ``reasoning``. Raises
    UsageError for anything else.
    """
    try:
        role = Role(message["role"])
        content, thinking = _text(message.get("content"))
        calls = [_call(call) for call in message.get("tool_calls") or ()]
    except UsageError:
        raise
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(_FORM) from error
    if message.get("content") is None and not calls:
        raise UsageError(_STRING if "content" in message else _FORM)
    if role is Role.TOOL:
        name = message.get("name")
        return ChatMessage(role, content, tool_name=None if name is None else str(name))
    if role is not Role.ASSISTANT:
        return ChatMessage(role, content)
    thinking += [str(message[key]) for key in _THINKING if message.get(key)][:1]
    parts = [Part("thinking", text) for text in thinking]
    if content and (parts or calls):
        parts.append(Part("answer", content))
    return ChatMessage(role, content, (*parts, *calls))


def _text(content: Any) -> tuple[str, list[str]]:
    """(text, pieces of thinking) of a content, which may be a list of typed parts."""
    if content is None:
        return "", []
    if isinstance(content, str):
        return content, []
    if not isinstance(content, Sequence):
        raise UsageError(_STRING)
    pieces: dict[str, list[str]] = {"text": [], "thinking": []}
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in pieces or not isinstance(part.get(kind), str):
            raise UsageError(_STRING)
        pieces[kind].append(part[kind])
    return "".join(pieces["text"]), pieces["thinking"]


def _call(call: Mapping[str, Any]) -> Part:
    function = call.get("function", call)
    arguments = function.get("arguments")
    text = arguments
    if isinstance(text, str):
        with suppress(ValueError):
            arguments = json.loads(text)
    else:
        text = json.dumps(arguments, ensure_ascii=False)
    return Part("tool_call", text, name=str(function["name"]), arguments=arguments)
