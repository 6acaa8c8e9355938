"""Decoding in a thread of its own, a few steps ahead of what is made of them.

A decode step on a CPU mostly waits for memory: one core less slows it little,
often not at all. That core reduces the tensors, computes the lens and feeds the
store meanwhile. Two computations that both want every core would wait for each
other at every turn, which is far worse than one core less.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Make = Callable[[Callable[[], bool]], Generator[Item]]

# Steps that may wait, each with its tensors. A full queue makes the decoder wait.
STEPS_AHEAD = 8


class Ahead(Iterator[Item]):
    """Iterates over what ``make(abandoned)`` generates in another thread.

    ``abandoned()`` tells it that this was closed. ``cores`` is how many torch may
    use there: for the first item, which takes the whole prompt, and for each later
    one. An exception of the generator is raised here, after the items before it.
    ``close`` ends the thread, at the latest after the item under way; it may be
    called more than once.
    """

    def __init__(self, make: Make[Item], cores: tuple[int, int]) -> None:
        self._queue: queue.Queue[Item | _End] = queue.Queue(STEPS_AHEAD)
        self._closing = threading.Event()
        self._ended = False
        self._thread = threading.Thread(
            target=self._run, args=(make, *cores), name="decoder", daemon=True
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

    def close(self) -> None:
        """End the generator; what it had made and nobody took is dropped."""
        self._closing.set()
        while not self._ended:
            self._ended = isinstance(self._queue.get(), _End)
        self._thread.join()

    def _run(self, make: Make[Item], first: int, later: int) -> None:
        error: BaseException | None = None
        try:
            torch.set_num_threads(first)
            items = make(self._closing.is_set)
            try:
                for item in items:
                    torch.set_num_threads(later)
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
def one_core() -> Iterator[int]:
    """Within, this thread uses one core for torch; yields how many there are in all.

    The number of threads is put back as it was found.
    """
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield cores
    finally:
        torch.set_num_threads(cores)
