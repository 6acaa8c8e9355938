"""Parses tool calls in a model's text into a name and arguments.

Nothing is executed. A call that cannot be read keeps its text, without a name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from oki_trace.records import is_too_deep


class Call(NamedTuple):
    """A call; ``arguments`` as JSON has them, or the text if it is not JSON."""

    name: str
    arguments: Any


# GLM: a name, and pairs of keys and values.
_KEY_VALUE = re.compile(
    r"<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>", re.DOTALL
)
# Qwen 3 Coder: elements that are called function=name and parameter=key.
_FUNCTION = re.compile(r"<function=(?P<name>[^>\s]+)>(?P<body>.*?)(?:</function>|\Z)", re.DOTALL)
_PARAMETER = re.compile(
    r"<parameter=(?P<key>[^>\s]+)>\n?(?P<value>.*?)\n?(?:</parameter>|\Z)", re.DOTALL
)
# DeepSeek: V3 and R1 with the type before the name and a fence, V3.1 without.
_DEEPSEEK = re.compile(
    r"(?:<｜tool▁call▁begin｜>)?(?:function<｜tool▁sep｜>)?(?P<name>[\w.\-]+)"
    r"(?:<｜tool▁sep｜>|\s*\n```json\s*)(?P<arguments>.*?)(?:```)?\s*(?:<｜tool▁call▁end｜>|\Z)",
    re.DOTALL,
)
_KIMI = re.compile(
    r"<\|tool_call_begin\|>(?:functions\.)?(?P<name>[\w.\-]+?)(?::\d+)?\s*"
    r"<\|tool_call_argument_begin\|>(?P<arguments>.*?)(?:<\|tool_call_end\|>|\Z)",
    re.DOTALL,
)
# Mistral since version 11: a name and a JSON object, with or without a marker between.
_MISTRAL = re.compile(r"(?P<name>[\w.\-]+)(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*(?=\{)")


def calls_in(text: str) -> list[Call]:
    """The calls in ``text``, which is the text between the markers; none if it is cut off."""
    text = text.strip()
    for read in (_json, _qwen, _glm, _kimi, _deepseek, _mistral):
        if calls := list(read(text)):
            return calls
    return []


def bare_call(text: str) -> Call | None:
    """The call, if the text is only one JSON object with a name and parameters."""
    text = text.strip()
    calls = list(_json(text)) if text.startswith("{") and text.endswith("}") else []
    return calls[0] if len(calls) == 1 else None


def json_or_text(text: str) -> Any:
    """The value that a text is in JSON; the text itself if it is no JSON, or nested too deeply."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text if is_too_deep(value) else value


def _decode(text: str, at: int) -> tuple[Any, int] | None:
    """The JSON value at a place and where it ends; None if there is none, or one too deep."""
    try:
        value, end = json.JSONDecoder().raw_decode(text, at)
    except (ValueError, RecursionError):
        return None
    return None if is_too_deep(value) else (value, end)


def _json(text: str) -> Iterator[Call]:
    """Objects and lists of them, one after another."""
    at = 0
    while at < len(text) and (decoded := _decode(text, at)):
        value, at = decoded
        for item in value if isinstance(value, list) else [value]:
            if (call := _of_object(item)) is not None:
                yield call
        at = len(text) - len(text[at:].lstrip(" \t\r\n;,"))


def _of_object(value: Any) -> Call | None:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict):
        return None
    name = value.get("name") or value.get("tool_name")
    arguments = next((value[key] for key in ("arguments", "parameters") if key in value), None)
    if not isinstance(name, str) or arguments is None:
        return None
    return Call(name, json_or_text(arguments) if isinstance(arguments, str) else arguments)


def _qwen(text: str) -> Iterator[Call]:
    for call in _FUNCTION.finditer(text):
        pairs = _PARAMETER.finditer(call["body"])
        yield Call(call["name"], {pair["key"]: json_or_text(pair["value"]) for pair in pairs})


def _glm(text: str) -> Iterator[Call]:
    name, _, rest = text.partition("<arg_key>")
    name = name.strip()
    if re.fullmatch(r"[\w.\-]+", name):
        pairs = _KEY_VALUE.finditer("<arg_key>" + rest)
        yield Call(name, {pair["key"].strip(): json_or_text(pair["value"]) for pair in pairs})


def _kimi(text: str) -> Iterator[Call]:
    for call in _KIMI.finditer(text):
        yield Call(call["name"], json_or_text(call["arguments"].strip()))


def _deepseek(text: str) -> Iterator[Call]:
    for call in _DEEPSEEK.finditer(text):
        yield Call(call["name"], json_or_text(call["arguments"].strip()))


def _mistral(text: str) -> Iterator[Call]:
    at = 0
    while (call := _MISTRAL.search(text, at)) and (decoded := _decode(text, call.end())):
        arguments, at = decoded
        yield Call(call["name"], arguments)
