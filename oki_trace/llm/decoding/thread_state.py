"""What torch keeps for each thread, carried into the threads of a trace.

Autocast holds in the thread that switched it on alone. Decoding and the lens have
threads of their own, and must compute as the caller's thread does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


class ThreadState:
    """The calling thread's, as it is when this is made."""

    def __init__(self) -> None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        kinds = {"cpu"} | ({accelerator.type} if accelerator is not None else set())
        self._autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in sorted(kinds)
        ]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Compute so in this thread while the context lasts."""
        with ExitStack() as stack:
            for kind, enabled, dtype in self._autocast:
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            yield


def with_thread_state(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, to be called in another thread with the state of this one."""
    state = ThreadState()

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with state.applied():
            return function(*args, **kwargs)

    return call
