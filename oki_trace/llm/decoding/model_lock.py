"""One trace at a time on a model, by its own uncompiled code.

A trace attaches hooks and reads what they leave; two at once would read each
other's. So a second thread waits, whichever object it holds the model by (an
adapter shares its base model's modules). A thread that begins a trace within its
own trace would wait for itself, and is refused.

``torch.compile`` replaces the calls that hooks depend on. What was compiled runs as
it was written while a trace lasts, and is put back.
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
    """A lock that knows its thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: int | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        if self._thread == threading.get_ident():
            raise CaptureError(
                "This thread is tracing this model already. Begin the next trace when the one "
                "under way has ended."
            )
        with self._lock:
            self._thread = threading.get_ident()
            try:
                yield
            finally:
                self._thread = None


_locks: weakref.WeakKeyDictionary[nn.Module, _Lock] = weakref.WeakKeyDictionary()
_making = threading.Lock()


def unwrap_compiled(model: Any) -> Any:
    """The module that ``torch.compile(model)`` wraps; ``model`` itself if it is none of these."""
    while isinstance(original := getattr(model, "_orig_mod", None), nn.Module):
        model = original
    return model


@contextmanager
def lock_model(model: Any) -> Iterator[None]:
    """While this lasts, no other thread traces the model, and none of it runs compiled.

    ``model`` is not wrapped any more (``uncompiled``). Raises CaptureError in a
    thread that holds it already.
    """
    with _making:
        # The embeddings are shared by all objects that stand for one model.
        lock = _locks.setdefault(model.get_input_embeddings(), _Lock())
    with lock.held(), _as_written(model):
        yield


@contextmanager
def _as_written(model: nn.Module) -> Iterator[None]:
    """Undo ``module.compile()`` and ``module.forward = torch.compile(module.forward)``."""
    calls = [m for m in model.modules() if getattr(m, "_compiled_call_impl", None) is not None]
    forwards: list[tuple[nn.Module, Any, Any]] = []
    for module in model.modules():
        forward: Any = module.__dict__.get("forward")
        original = getattr(forward, "_torchdynamo_orig_callable", None)
        if original is not None:
            forwards.append((module, forward, original))
    compiled = [(module, module._compiled_call_impl) for module in calls]
    for module in calls:
        module._compiled_call_impl = None
    for module, _, original in forwards:
        module.__dict__["forward"] = original
    try:
        yield
    finally:
        for module, call in compiled:
            module._compiled_call_impl = call
        for module, forward, _ in forwards:
            module.__dict__["forward"] = forward
