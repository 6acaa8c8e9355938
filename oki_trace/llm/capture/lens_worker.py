"""Computes the lens in its own thread, a few steps behind the decoder.

It costs several times as much as the model's own head, so it is computed for a few
steps together, and no token waits for the lens of an earlier one. While no step of the
reply waits, the thread computes the lenses of the prompt's tokens.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import torch

from oki_trace.llm.capture.reduce import PendingLens
from oki_trace.records import Lens, Step

# Steps computed together: with more, a step is hardly cheaper.
BATCH_STEPS = 4
# Steps that may wait, with their tensors, when the lens is slower than the decoder.
MAX_WAITING = 3 * BATCH_STEPS
# A small machine has more busy threads than cores, and nothing waits for a late lens.
LENS_NICENESS = 10

Compute = Callable[[list[PendingLens]], list[Lens]]
# A few steps of the prompt with their lenses; an empty list when there are no more.
Background = Callable[[], list[Step]]


def _no_steps() -> list[Step]:
    return []


class LensWorker:
    """Takes steps and returns their lenses, in order. Use it from one thread.

    ``in_thread`` False computes in the caller's thread, for a model whose weights move
    with each call: they cannot serve two threads. ``background`` is called while fewer steps
    wait than are computed together, until it returns nothing.
    """

    def __init__(
        self, compute: Compute, *, in_thread: bool, background: Background = _no_steps
    ) -> None:
        self._compute = compute
        self._background = background
        self._has_background = True
        self._executor: ThreadPoolExecutor | None = None
        if in_thread:
            self._executor = ThreadPoolExecutor(1, "lens", initializer=_lower_priority)
        self._waiting: list[PendingLens] = []
        self._running: Future[list[Lens]] | Future[list[Step]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def add(self, step: PendingLens) -> None:
        """Queue the newest step."""
        self._waiting.append(step)

    def poll(self) -> list[Lens | Step]:
        """What is done since the last call; waits while too many steps are queued."""
        done: list[Lens | Step] = []
        if self._running and (self._running.done() or len(self._waiting) >= MAX_WAITING):
            done = self._finished()
        if self._running is None and len(self._waiting) >= BATCH_STEPS:
            if self._executor is None:
                return done + self._compute(self._next_batch())
            self._running = self._executor.submit(self._compute, self._next_batch())
        elif self._running is None and self._has_background and self._executor is not None:
            self._running = self._executor.submit(self._next_in_background)
        return done

    def drain(self) -> Iterator[Lens | Step]:
        """All that is not yet returned, computed in the caller's thread when decoding has ended."""
        yield from self._finished()
        while self._waiting:
            yield from self._compute(self._next_batch())
        while steps := self._background():
            yield from steps

    def _finished(self) -> list[Lens | Step]:
        """The result of the computation in progress, when it is done."""
        if self._running is None:
            return []
        result, self._running = self._running.result(), None
        return [*result]

    def _next_in_background(self) -> list[Step]:
        steps = self._background()
        self._has_background = bool(steps)
        return steps

    def _next_batch(self) -> list[PendingLens]:
        batch, self._waiting = self._waiting[:BATCH_STEPS], self._waiting[BATCH_STEPS:]
        return batch


def _lower_priority() -> None:
    """Use one core in this thread, and yield to the decoder and the store."""
    torch.set_num_threads(1)
    if sys.platform == "linux":  # where a thread has a priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LENS_NICENESS)
