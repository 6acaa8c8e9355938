"""The lens, a few steps behind the decoder.

It costs several times the model's own head, so it is computed for a few steps
together, in a thread of its own: no token waits for the lens of an earlier one.
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
from oki_trace.records import Lens

# Steps computed in one go: more of them hardly make a step cheaper.
TOGETHER = 4
# Steps that may wait, with their tensors, when the lens is slower than the decoder.
AT_MOST = 3 * TOGETHER
# A small machine has more threads at work than cores, and nobody waits for a lens that is late.
LENS_NICENESS = 10

Compute = Callable[[list[PendingLens]], list[Lens]]


class LensWorker:
    """Takes steps in and gives their lenses out, in order. Use it from one thread.

    ``aside`` False computes in the caller's thread: weights that move with each
    call cannot serve two.
    """

    def __init__(self, compute: Compute, *, aside: bool) -> None:
        self._compute = compute
        self._thread: ThreadPoolExecutor | None = None
        if aside:
            self._thread = ThreadPoolExecutor(1, "lens", initializer=_step_back)
        self._waiting: list[PendingLens] = []
        self._under_way: Future[list[Lens]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def add(self, step: PendingLens) -> None:
        """Hand over the newest step."""
        self._waiting.append(step)

    def ready(self) -> list[Lens]:
        """The lenses that are done since the last call; waits for some when too many wait."""
        done: list[Lens] = []
        if self._under_way and (self._under_way.done() or len(self._waiting) >= AT_MOST):
            done = self._under_way.result()
            self._under_way = None
        if self._under_way is None and len(self._waiting) >= TOGETHER:
            due, self._waiting = self._waiting[:TOGETHER], self._waiting[TOGETHER:]
            if self._thread is None:
                return done + self._compute(due)
            self._under_way = self._thread.submit(self._compute, due)
        return done

    def rest(self) -> Iterator[Lens]:
        """Every lens not yet given, when nobody decodes any more."""
        if self._under_way is not None:
            yield from self._under_way.result()
            self._under_way = None
        while self._waiting:
            due, self._waiting = self._waiting[:TOGETHER], self._waiting[TOGETHER:]
            yield from self._compute(due)


def _step_back() -> None:
    """This thread uses one core, and gives way to the decoder and to the store."""
    torch.set_num_threads(1)
    if sys.platform == "linux":  # where a thread has a priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LENS_NICENESS)
