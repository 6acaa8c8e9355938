"""Messages as callers of transformers write them, into the records of this project."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from oki_trace.errors import UsageError
from oki_trace.records import ChatMessage, Part, Role

_FORM = "Each message needs a role (system, user, assistant or tool) and a content."
_STRING = (
    "What is said has to be a string: give the prompt, or each content, so, or as a list of "
    '{"type": "text", "text": …}.'
)
_THINKING = ("reasoning_content", "thinking", "reasoning")


def chat_message(message: Mapping[str, Any]) -> ChatMessage:
    """``{"role": …, "content": …}``, of an assistant also with thinking and ``tool_calls``.

    Raises UsageError for what is no message.
    """
    try:
        role = Role(message["role"])
        content, thinking = _text(message.get("content"))
        called = message.get("tool_calls") or ()
        calls = [_call(call) for call in called]
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
    """(text, thinking) of a content, which may be a list of typed parts."""
    if content is None:
        return "", []
    if isinstance(content, str):
        return content, []
    if not isinstance(content, Sequence):
        raise UsageError(_STRING)
    said: list[str] = []
    thinking: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "thinking") or not isinstance(part.get(kind), str):
            raise UsageError(_STRING)
        (said if kind == "text" else thinking).append(part[kind])
    return "".join(said), thinking


def _call(call: Mapping[str, Any]) -> Part:
    function = call.get("function", call)
    arguments = function.get("arguments")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    if isinstance(arguments, str):
        with suppress(ValueError):
            arguments = json.loads(arguments)
    return Part("tool_call", text, name=str(function["name"]), arguments=arguments)
