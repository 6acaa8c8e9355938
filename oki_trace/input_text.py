"""Text as people give it: what no store and no tokenizer can keep is refused, never changed."""

from __future__ import annotations

from oki_trace.errors import UsageError
from oki_trace.sanitize import inert

_SHOWN = 40


def checked(text: str, what: str) -> str:
    """``text`` itself. Raises UsageError where ``what`` holds NUL or bytes that are not UTF-8.

    Python has such bytes, in arguments and from a pipe, as halves of surrogate pairs.
    """
    if "\0" in text:
        raise UsageError(
            f"{what} holds a NUL character ({_around(text, text.index(chr(0)))}), which cannot be "
            "kept: leave it out."
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{what} holds bytes that are not UTF-8 ({_around(text, error.start)}): convert it, "
            "as with iconv -t UTF-8."
        ) from error
    return text


def _around(text: str, at: int) -> str:
    """The place, with each byte that is no text as ``\\xe9``."""
    first = max(0, at - _SHOWN // 2)
    shown = (
        f"\\x{ord(c) - 0xDC00:02x}" if "\udc80" <= c <= "\udcff" else c
        for c in text[first : at + _SHOWN // 2]
    )
    return inert("".join(shown), keep="")
