"""Reads arguments and tools of a chat template from ``KEY=VALUE`` texts and a JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oki_trace.errors import UsageError
from oki_trace.records import TemplateOptions

# More than any model's context holds.
MAX_TOOLS_BYTES = 4_000_000


def options_from(
    arguments: Sequence[str] = (), tools: Sequence[Mapping[str, Any]] = ()
) -> TemplateOptions:
    """Options from ``KEY=VALUE`` texts; a value is JSON if it parses, else text.

    Raises UsageError for a text without ``=``, an invalid name and an invalid tool.
    """
    values: dict[str, Any] = {}
    for text in arguments:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise UsageError(f"{text!r} is not KEY=VALUE, such as enable_thinking=false.")
        values[name.strip()] = _value(value.strip())
    return TemplateOptions(values, tuple(as_schema(tool) for tool in tools))


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        # Model cards write these as Python does.
        return {"True": True, "False": False, "None": None}.get(text, text)


def as_schema(tool: Any) -> Any:
    """A tool in the form of ``apply_chat_template``, from that form or its function alone."""
    if isinstance(tool, Mapping) and "function" not in tool and "name" in tool:
        return {"type": "function", "function": dict(tool)}
    return tool


def read_tools(path: Path) -> list[Any]:
    """The tool schemas in a JSON file: a list, or one. Raises UsageError."""
    try:
        if path.stat().st_size > MAX_TOOLS_BYTES:
            raise UsageError(f"{path} is larger than {MAX_TOOLS_BYTES:,} bytes.")
        return parse_tools(path.read_text(encoding="utf-8-sig"), str(path))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8.") from error


def parse_tools(text: str, where: str) -> list[Any]:
    """The tool schemas in a JSON text. Raises UsageError, which names ``where``."""
    try:
        tools = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{where} is not a JSON list of tool schemas: {reason}.") from error
    if isinstance(tools, dict) and isinstance(tools.get("tools"), list):
        tools = tools["tools"]
    return tools if isinstance(tools, list) else [tools]
