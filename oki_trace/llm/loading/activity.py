"""Reports what a process is doing with a model to the process that supervises it.

A model's files contain code from others: its chat template or tokenizer may loop for
ever, and its code may ignore a request to stop. Each phase is therefore reported when
it begins, so that the process can be ended with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import StrEnum


class Activity(StrEnum):
    """A phase of a reply; its value completes "while …"."""

    READING = "the model's config and tokenizer were read"
    LOADING = "the model was loaded"
    CHECKING = "the model's numbers were checked"
    TEMPLATE = "its chat template was rendered"
    TOKENIZER = "its tokenizer was running"
    DECODING = "the model was running"


_callback: ContextVar[Callable[[Activity], None] | None] = ContextVar("callback", default=None)


@contextmanager
def reporting_to(callback: Callable[[Activity], None]) -> Iterator[None]:
    """In this context, ``callback`` is called at the beginning of each phase, in its thread."""
    token = _callback.set(callback)
    try:
        yield
    finally:
        _callback.reset(token)


def report_activity(activity: Activity) -> None:
    """``activity`` begins, and any other ends."""
    callback = _callback.get()
    if callback is not None:
        callback(activity)
