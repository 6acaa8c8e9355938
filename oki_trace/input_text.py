"""Refuses text from users that no store or tokenizer can hold; text is never changed."""

from __future__ import annotations

from pathlib import Path

from oki_trace.errors import UsageError
from oki_trace.sanitize import inert

_SHOWN = 40


def require_storable(text: str, name: str) -> str:
    """Return ``text``. Raises UsageError, which names it, for NUL and bytes that are not UTF-8.

    Python holds such bytes, from arguments and pipes, as lone surrogates.
    """
    if "\0" in text:
        raise UsageError(
            f"{name} holds a NUL character ({_around(text, text.index(chr(0)))}), which cannot be "
            "stored: leave it out."
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{name} holds bytes that are not UTF-8 ({_around(text, error.start)}): convert it, "
            "as with iconv -t UTF-8."
        ) from error
    return text


def read_text(path: Path) -> str:
    """The text of a file, with its line ends. Raises UsageError if it cannot be read."""
    try:
        return path.read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): name a text file.") from error


def _around(text: str, at: int) -> str:
    """The text around ``at``, with each undecodable byte as ``\\xe9``."""
    first = max(0, at - _SHOWN // 2)
    shown = (
        f"\\x{ord(c) - 0xDC00:02x}" if "\udc80" <= c <= "\udcff" else c
        for c in text[first : at + _SHOWN // 2]
    )
    return inert("".join(shown), keep="")
