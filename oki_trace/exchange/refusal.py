"""Errors that say in one sentence why a file is not imported."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from oki_trace.errors import ExchangeError

# By pydantic's type of error; in braces the limits of its context.
_REASONS = {
    "missing": "is missing",
    "string_type": "is not text",
    "string_unicode": "is not valid text: it contains a lone surrogate",
    "string_too_long": "is longer than {max_length:,} characters",
    "bytes_too_long": "is longer than {max_length:,} bytes",
    "int_type": "is not a whole number",
    "float_type": "is not a number",
    "bool_type": "is neither true nor false",
    "list_type": "is not a list",
    "dict_type": "is not an object",
    "too_long": "has more than {max_length:,} entries",
    "greater_than_equal": "is below {ge:,}",
    "less_than_equal": "is above {le:,}",
    "less_than": "is not below {lt:,}",
}


def refused(reason: str) -> ExchangeError:
    """The error for a file that cannot be imported."""
    return ExchangeError(f"The file cannot be imported: {reason}. Nothing was imported.")


def invalid(where: str, error: ValidationError) -> ExchangeError:
    """The error for the first value that does not fit; ``where`` names the validated object."""
    (first, *_) = error.errors(include_url=False)
    path: list[str] = []
    for key in first["loc"]:
        if key == "[key]":  # pydantic's mark of the name before it, instead of its value
            continue
        if isinstance(key, int) and path:
            path[-1] += f" {key + 1}"
        else:
            name = str(key)[:60]  # of an object in the file: anything
            path.append(name if name.isidentifier() else repr(name))
    *outer, field = path or [""]
    place = ", ".join([where, *outer])
    return refused(f"{place}: {field} {_reason(first)}" if field else f"{place} {_reason(first)}")


def _reason(error: Any) -> str:
    if error["input"] is None:
        return "is missing"
    if error["type"] in ("literal_error", "enum"):
        return f"is {str(error['input'])[:40]!r}, which is none of {error['ctx']['expected']}"
    reason = _REASONS.get(error["type"])
    return str(error["msg"]) if reason is None else reason.format(**error.get("ctx", {}))
