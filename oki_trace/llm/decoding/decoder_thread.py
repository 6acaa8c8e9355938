"""Decodes in its own thread, a few steps ahead of reduction and storage.

A decode step on a CPU mostly waits for memory: with one core less it is hardly
slower, often not at all. That core reduces the tensors, computes the lens and feeds
the store meanwhile. Two computations that both use every core would wait for each
other at every operation, which costs far more than one core.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import ParamSpec, TypeVar

import torch

Item = TypeVar("Item")
P = ParamSpec("P")
R = TypeVar("R")

# Steps that may be queued, each with its tensors. A full queue makes the decoder wait.
STEPS_AHEAD = 8


@contextmanager
def iterate_in_thread(items: Generator[Item]) -> Iterator[Iterator[Item]]:
    """Yields an iterator over ``items``, which another thread generates.

    An exception of ``items`` is raised in the calling thread. The first item, the pass
    over the whole prompt, is generated in the calling thread: it may use every core, its
    memory is allocated with the model's, and a signal ends it at once. From then on,
    torch has one core in the calling thread and all others in the new one. At the end of
    the context, ``items`` is closed, at the latest after the item in progress, and the
    number of threads is restored.
    """
    cores = torch.get_num_threads()
    try:
        first = list(islice(items, 1))
        torch.set_num_threads(1)
        decoder = _Decoder(items, max(1, cores - 1))
        try:
            yield chain(first, decoder)
        finally:
            decoder.close()
    finally:
        items.close()
        torch.set_num_threads(cores)


@dataclass(frozen=True)
class _End:
    """The end of the items; ``error`` is the exception that ended them."""

    error: BaseException | None


class _Decoder(Iterator[Item]):
    """Iterates over ``items``, which a thread of its own generates."""

    def __init__(self, items: Generator[Item], cores: int) -> None:
        self._queue: queue.Queue[Item | _End] = queue.Queue(STEPS_AHEAD)
        self._closing = threading.Event()
        self._ended = False
        self._thread = threading.Thread(
            target=with_thread_state(self._run), args=(items, cores), name="decoder", daemon=True
        )
        self._thread.start()

    def __next__(self) -> Item:
        if self._ended:
            raise StopIteration
        item = self._queue.get()
        if not isinstance(item, _End):
            return item
        self._ended = True
        raise StopIteration if item.error is None else item.error

    def close(self) -> None:
        """End the thread; items that are still queued are dropped."""
        self._closing.set()
        while not self._ended:
            self._ended = isinstance(self._queue.get(), _End)
        self._thread.join()

    def _run(self, items: Generator[Item], cores: int) -> None:
        error: BaseException | None = None
        try:
            torch.set_num_threads(cores)
            for item in items:
                self._queue.put(item)
                if self._closing.is_set():
                    break
        except BaseException as raised:  # raised again in the thread that iterates
            error = raised
        self._queue.put(_End(error))


def autocast_state() -> tuple[tuple[str, bool, torch.dtype], ...]:
    """The calling thread's autocast: (device type, whether it is enabled, dtype) of each."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device_types = {"cpu"} | ({accelerator.type} if accelerator is not None else set())
    return tuple(
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in sorted(device_types)
    )


def with_thread_state(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, to be called in another thread with the autocast state of this one.

    torch keeps autocast per thread; decoding and the lens must compute as the caller's
    thread would.
    """
    state = autocast_state()

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with ExitStack() as stack:
            for kind, enabled, dtype in state:
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            return function(*args, **kwargs)

    return call
