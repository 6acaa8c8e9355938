"""Tool calls as models write them, read into a name and arguments.

Nothing is executed. A call that cannot be read keeps its text, without a name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from oki_trace.records import is_too_deep


class Call(NamedTuple):
    """A call; ``arguments`` as JSON gives them, or the text that was no JSON."""

    name: str
    arguments: Any


_ARGUMENTS = ("arguments", "parameters")
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
# Kimi K2.
_SECTION = re.compile(
    r"<\|tool_call_begin\|>(?:functions\.)?(?P<name>[\w.\-]+?)(?::\d+)?\s*"
    r"<\|tool_call_argument_begin\|>(?P<arguments>.*?)(?:<\|tool_call_end\|>|\Z)",
    re.DOTALL,
)
# Mistral from version 11 on: a name and a JSON object, with a marker between or without.
_NAMED = re.compile(r"(?P<name>[\w.\-]+)(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*(?=\{)")


def calls_in(text: str) -> list[Call]:
    """The calls that ``text``, from between the markers, consists of; none if it is cut off."""
    text = text.strip()
    for read in (_json, _functions, _key_values, _sections, _deepseek, _named):
        if found := list(read(text)):
            return found
    return []


def bare_call(text: str) -> Call | None:
    """The call that a text is, if it is one JSON object with a name and parameters alone."""
    text = text.strip()
    if not (text.startswith("{") and text.endswith("}")):
        return None
    found = list(_json(text))
    return found[0] if len(found) == 1 else None


def value_of(text: str) -> Any:
    """What a text is in JSON; the text itself where it is none, or one nested beyond sense."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text if is_too_deep(value) else value


def _json(text: str) -> Iterator[Call]:
    """One object or a list of them; or several, one after another."""
    decoder, at = json.JSONDecoder(), 0
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return
        if is_too_deep(value):
            return
        for one in value if isinstance(value, list) else [value]:
            if (call := _of_object(one)) is not None:
                yield call
        while at < len(text) and text[at] in " \t\r\n;,":
            at += 1


def _of_object(value: Any) -> Call | None:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict):
        return None
    name = value.get("name") or value.get("tool_name")
    arguments = next((value[key] for key in _ARGUMENTS if key in value), None)
    if not isinstance(name, str) or arguments is None:
        return None
    return Call(name, value_of(arguments) if isinstance(arguments, str) else arguments)


def _functions(text: str) -> Iterator[Call]:
    for found in _FUNCTION.finditer(text):
        pairs = _PARAMETER.finditer(found["body"])
        yield Call(found["name"], {pair["key"]: value_of(pair["value"]) for pair in pairs})


def _key_values(text: str) -> Iterator[Call]:
    name, _, rest = text.partition("<arg_key>")
    name = name.strip()
    if re.fullmatch(r"[\w.\-]+", name):
        pairs = _KEY_VALUE.finditer("<arg_key>" + rest)
        yield Call(name, {pair["key"].strip(): value_of(pair["value"]) for pair in pairs})


def _sections(text: str) -> Iterator[Call]:
    for found in _SECTION.finditer(text):
        yield Call(found["name"], value_of(found["arguments"].strip()))


def _deepseek(text: str) -> Iterator[Call]:
    for found in _DEEPSEEK.finditer(text):
        yield Call(found["name"], value_of(found["arguments"].strip()))


def _named(text: str) -> Iterator[Call]:
    at = 0
    while found := _NAMED.search(text, at):
        try:
            arguments, at = json.JSONDecoder().raw_decode(text, found.end())
        except (ValueError, RecursionError):
            return
        if is_too_deep(arguments):
            return
        yield Call(found["name"], arguments)
