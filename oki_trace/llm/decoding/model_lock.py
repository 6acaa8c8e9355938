"""One trace at a time on a model, by its own uncompiled code.

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


class _Lock:
    """A lock that its own thread cannot take again."""

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


def unwrap_compiled(model: Any) -> Any:
    """The module that ``torch.compile(model)`` wraps; ``model`` itself if it is not compiled."""
    while isinstance(original := getattr(model, "_orig_mod", None), nn.Module):
        model = original
    return model


@contextmanager
def lock_model(model: Any) -> Iterator[None]:
    """While this lasts, no other thread traces the model, and none of it runs compiled.

    ``model`` is unwrapped (``unwrap_compiled``). Raises CaptureError in a thread that
    holds the lock already.
    """
    with _locks_lock:
        # The embeddings are shared by all objects that stand for one model.
        lock = _locks.setdefault(model.get_input_embeddings(), _Lock())
    with lock.hold(), _uncompiled(model):
        yield


@contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """Undo ``module.compile()`` and ``module.forward = torch.compile(module.forward)``."""
    compiled: list[tuple[nn.Module, str, Any]] = []
    for module in model.modules():
        call = getattr(module, "_compiled_call_impl", None)
        forward: Any = module.__dict__.get("forward")
        original = getattr(forward, "_torchdynamo_orig_callable", None)
        if call is not None:
            compiled.append((module, "_compiled_call_impl", call))
            module._compiled_call_impl = None
        if original is not None:
            compiled.append((module, "forward", forward))
            module.__dict__["forward"] = original
    try:
        yield
    finally:
        for module, name, value in compiled:
            module.__dict__[name] = value
