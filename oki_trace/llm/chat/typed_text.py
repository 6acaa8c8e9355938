"""The tokens of a text that a user typed to be a part of a reply."""

from __future__ import annotations

from typing import Any

from oki_trace.errors import CaptureError


def typed_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The ids of the text's tokens, without those that begin or end a prompt.

    Raises CaptureError for a text that has none.
    """
    ids = tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if not ids:
        raise CaptureError(f"The text {text!r} has no tokens. Give another one.")
    return ids
