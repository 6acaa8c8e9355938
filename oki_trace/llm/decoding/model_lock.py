"""A lock that lets a model run one trace at a time, with its uncompiled code.

A trace attaches hooks to the model; two at once would read each other's tensors. So a
second thread waits, whichever object it refers to the model by (an adapter shares its
base model's modules). A thread that begins a trace within its own trace would wait for
itself, and is refused.

``torch.compile`` replaces the calls that hooks depend on. While a trace lasts, compiled
modules run uncompiled.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from oki_trace.errors import CaptureError
from oki_trace.llm.torch_internals import compiled_calls_off


class _Lock:
    """A lock that the thread that holds it cannot take again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: int | None = None

    @contextmanager
    def hold(self) -> Iterator[None]:
        if self._thread == threading.get_ident():
            raise CaptureError(
                "This thread is tracing this model already. Begin the next trace when the "
                "current one has ended."
            )
        with self._lock:
            self._thread = threading.get_ident()
            try:
                yield
            finally:
                self._thread = None


_locks: weakref.WeakKeyDictionary[nn.Module, _Lock] = weakref.WeakKeyDictionary()
_locks_lock = threading.Lock()


@contextmanager
def lock_model(model: Any) -> Iterator[None]:
    """In this context, no other thread traces the model, and no part of it runs compiled.

    ``model`` is unwrapped (``torch_internals.uncompiled``). Raises CaptureError in a thread that
    holds the lock already.
    """
    with _locks_lock:
        # The embeddings are shared by all objects that stand for one model.
        lock = _locks.setdefault(model.get_input_embeddings(), _Lock())
    with lock.hold(), compiled_calls_off(model):
        yield
