"""Decoding in a thread of its own, a few steps ahead of what is made of them.

A decode step on a CPU mostly waits for memory: one core less slows it little,
often not at all. That core reduces the tensors, computes the lens and feeds the
store meanwhile. Two computations that both want every core would wait for each
other at every turn, which is far worse than one core less.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import TypeVar

import torch

from oki_trace.llm.decoding.thread_state import with_thread_state

Item = TypeVar("Item")

# Steps that may wait, each with its tensors. A full queue makes the decoder wait.
STEPS_AHEAD = 8


@contextmanager
def iterate_in_thread(items: Generator[Item]) -> Iterator[Iterator[Item]]:
    """Within, ``items`` are generated in another thread; an exception of theirs is raised here.

    The first, which takes the whole prompt, is generated here and now: it is
    computing, so it may use every core, its memory is where that of the model is,
    and a signal ends it at once. The thread has all cores but one for torch, and
    this thread the other. When the context ends, so do ``items``, at the latest
    after the one under way, and the number of threads is put back.
    """
    cores = torch.get_num_threads()
    try:
        first = list(_first(items))
        torch.set_num_threads(1)
        decoder = _Decoder(items, max(1, cores - 1))
        try:
            yield chain(first, decoder)
        finally:
            decoder.close()
    finally:
        items.close()
        torch.set_num_threads(cores)


def _first(items: Iterator[Item]) -> Iterator[Item]:
    for item in items:
        yield item
        return


class _Decoder(Iterator[Item]):
    """Iterates over ``items``, which go on in another thread."""

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
        found = self._queue.get()
        if not isinstance(found, _End):
            return found
        self._ended = True
        if found.error is not None:
            raise found.error
        raise StopIteration

    def close(self) -> None:
        """What was made and nobody took is dropped."""
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
        except BaseException as raised:  # handed over to the thread that iterates
            error = raised
        self._queue.put(_End(error))


class _End:
    def __init__(self, error: BaseException | None) -> None:
        self.error = error
