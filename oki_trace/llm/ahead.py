"""Decoding in a thread of its own, a few steps ahead of what is made of them.

A decode step on a CPU waits for memory: one core less hardly slows it. That
core computes the lens, reduces the tensors and feeds the store meanwhile, so a
trace costs the decoder almost nothing; and the decoder's threads never fight
with the rest of the machine for every core, which is far worse than one less.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")

# Steps that may wait. A full queue makes the decoder wait; nothing is dropped.
STEPS_AHEAD = 8


class Ahead(Iterator[Item]):
    """Iterates over what ``make()`` generates in another thread.

    ``threads`` is how many CPU threads torch may use there. An exception of
    the generator is raised here, after the items before it. ``close`` ends the
    thread after the item under way; it is safe to call more than once.
    """

    def __init__(self, make: Callable[[], Generator[Item]], threads: int) -> None:
        self._queue: queue.Queue[Item | _End] = queue.Queue(STEPS_AHEAD)
        self._closing = threading.Event()
        self._ended = False
        self._thread = threading.Thread(
            target=self._run, args=(make, threads), name="decoder", daemon=True
        )
        self._thread.start()

    def __next__(self) -> Item:
        if self._ended:
            raise StopIteration
        found = self._queue.get()
        if not isinstance(found, _End):
            return found
        self._ended = True
        self._thread.join()
        if found.error is not None:
            raise found.error
        raise StopIteration

    @property
    def waiting(self) -> bool:
        """Whether the next item, or the end, is already there."""
        return not self._queue.empty()

    def close(self) -> None:
        """End the generator; what it had made and nobody took is dropped."""
        self._closing.set()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue
        self._ended = True

    def _run(self, make: Callable[[], Generator[Item]], threads: int) -> None:
        error: BaseException | None = None
        try:
            torch.set_num_threads(threads)
            items = make()
            try:
                for item in items:
                    self._queue.put(item)
                    if self._closing.is_set():
                        break
            finally:
                items.close()
        except BaseException as raised:  # handed over to the thread that iterates
            error = raised
        self._queue.put(_End(error))


class _End:
    def __init__(self, error: BaseException | None) -> None:
        self.error = error


@contextmanager
def shared_cores() -> Iterator[int]:
    """Within, this thread uses one core for torch; yields how many a decoder may use.

    The number of threads is put back as it was found.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield max(1, before - 1)
    finally:
        torch.set_num_threads(before)
