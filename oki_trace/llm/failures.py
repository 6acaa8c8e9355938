"""Summarizes exceptions from a model's code and its libraries, and detects lack of memory."""

from __future__ import annotations

import errno
import re

# Raised to end a program, not by its work. Any other BaseException is a library's way to
# report a failure: a panic of the tokenizers' Rust code is one.
INTERRUPTIONS = (KeyboardInterrupt, SystemExit, GeneratorExit)

# torch raises a RuntimeError with these words; on a GPU its subclass may say nothing.
_OUT_OF_MEMORY = re.compile(
    "out ?of ?memory|not enough memory|allocate memory|paging file", re.IGNORECASE
)


def first_line(error: BaseException, limit: int = 160) -> str:
    """The first line of the exception's message; its type where it has no message."""
    lines = str(error).splitlines()
    return next((line.strip() for line in lines if line.strip()), type(error).__name__)[:limit]


def summary(error: BaseException) -> str:
    """The exception's type and the first line of its message."""
    line = first_line(error, 300) if str(error).strip() else ""
    return f"{type(error).__name__}: {line}".rstrip(": .")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the system, torch or a library ran out of memory."""
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or _OUT_OF_MEMORY.search(summary(error)) is not None
    )
