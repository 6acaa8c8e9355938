"""What is being done with a model, told to whoever watches from outside.

A model's files are programs of others: its chat template may loop for ever, its
tokenizer too, and its code need not listen to a request to stop. So what runs them
says which of them it is at, and a process that holds the model can be ended with
the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import StrEnum

# Raised to end a program, not by its work. Other BaseExceptions are a library's way to
# say that it failed: a panic of the tokenizers' Rust code is one.
INTERRUPTIONS = (KeyboardInterrupt, SystemExit, GeneratorExit)


class Doing(StrEnum):
    """A phase of a reply, named as it stands in a sentence."""

    READING = "the model's config and tokenizer were read"
    LOADING = "the model was loaded"
    CHECKING = "the model's numbers were checked"
    TEMPLATE = "its chat template was rendered"
    TOKENIZER = "its tokenizer was at work"
    DECODING = "the model computed"


Tell = Callable[[Doing], None]

_told: ContextVar[Tell | None] = ContextVar("told", default=None)


@contextmanager
def told_to(tell: Tell) -> Iterator[None]:
    """While this lasts, ``tell`` is called at the beginning of each phase, in its thread."""
    token = _told.set(tell)
    try:
        yield
    finally:
        _told.reset(token)


def now_doing(what: Doing) -> None:
    """The phase ``what`` begins, and any other ends."""
    tell = _told.get()
    if tell is not None:
        tell(what)


def why(error: BaseException) -> str:
    """What ``error`` says, in one line: its kind and its first line."""
    first = (str(error).strip().splitlines() or [""])[0][:300]
    return f"{type(error).__name__}: {first}".rstrip(": .")
