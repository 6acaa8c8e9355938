"""Why a file is not imported, as one sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from oki_trace.errors import ExchangeError


def refused(what: str) -> ExchangeError:
    """The error for a file that cannot be imported."""
    return ExchangeError(f"The file cannot be imported: {what}. Nothing was.")


def invalid(where: str, error: ValidationError) -> ExchangeError:
    """The first value that does not fit; ``where`` names the object that was validated."""
    (first, *_) = error.errors(include_url=False)
    place = where
    names = list(first["loc"])
    last = ""
    while names:
        name, at = names.pop(0), ""
        if names and isinstance(names[0], int):
            at = f" {names[0] + 1}"
            del names[0]
        if names:
            place = f"{place}, {name}{at}"
        else:
            last = f"{name}{at}"
    what = _what(first)
    return refused(f"{place}: {last} {what}" if last else f"{place} {what}")


def _what(error: Any) -> str:
    if error["input"] is None:
        return "is missing"
    if error["type"] in ("literal_error", "enum"):
        return f"is {str(error['input'])[:40]!r}, which is none of {error['ctx']['expected']}"
    tell = _SENTENCES.get(error["type"])
    return tell(error.get("ctx", {})) if tell else str(error["msg"])


_SENTENCES: dict[str, Callable[[dict[str, Any]], str]] = {
    "missing": lambda _: "is missing",
    "string_type": lambda _: "is no text",
    "string_unicode": lambda _: "is no text: it holds half of a character",
    "string_too_long": lambda c: f"is longer than {c['max_length']:,} characters",
    "bytes_too_long": lambda c: f"is longer than {c['max_length']:,} bytes",
    "int_type": lambda _: "is no whole number",
    "float_type": lambda _: "is no number",
    "bool_type": lambda _: "is neither true nor false",
    "list_type": lambda _: "is no list",
    "dict_type": lambda _: "is no object",
    "too_long": lambda c: f"has more than {c['max_length']:,} entries",
    "greater_than_equal": lambda c: f"is below {c['ge']:,}",
    "greater_than": lambda c: f"is not above {c['gt']:,}",
    "less_than_equal": lambda c: f"is above {c['le']:,}",
    "less_than": lambda c: f"is not below {c['lt']:,}",
}
