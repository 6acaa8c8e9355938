"""The lens, a few steps behind the decoder.

It costs several times the model's own head, so it is computed for a few steps
together, in a thread of its own. A decode step on a CPU mostly waits for
memory, and one core less slows it little; but two computations that both want
every core wait for each other at every turn. So where cores are few the decoder
has them all until a batch is due, and leaves one to the lens while that lasts;
where they are many it leaves one all the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import torch

from oki_trace.llm.reduce import Unlensed
from oki_trace.records import Lens

# Steps computed in one go: more of them hardly make a step cheaper.
TOGETHER = 4
# Steps to gather before a core is taken from the decoder.
BATCH = 8
# Steps that may wait when the lens is slower than the decoder, which then waits for it.
AT_MOST = 3 * BATCH
# From so many cores on, one less is not felt.
MANY_CORES = 6

Compute = Callable[[list[Unlensed]], list[Lens]]


class TrailingLens:
    """Takes steps in and gives lenses out, in order; used from the decoder's thread.

    ``compute`` runs in another thread while the decoder goes on, unless
    ``aside`` is False: weights that move with each call cannot serve two.
    """

    def __init__(self, compute: Compute, *, aside: bool) -> None:
        self._compute = compute
        self._cores = torch.get_num_threads()
        self._few = self._cores < MANY_CORES
        self._thread: ThreadPoolExecutor | None = None
        if aside:
            self._thread = ThreadPoolExecutor(
                1, "lens", initializer=torch.set_num_threads, initargs=(1,)
            )
        self._waiting: list[Unlensed] = []
        self._under_way: Future[list[Lens]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        torch.set_num_threads(self._cores)

    @property
    def decoder_has_all_cores(self) -> bool:
        """Whether the next step is decoded with none left for anything else."""
        return self._few and self._under_way is None

    def add(self, step: Unlensed) -> None:
        """Hand over the newest step."""
        self._waiting.append(step)

    def ready(self) -> list[Lens]:
        """The lenses that are done since the last call."""
        done: list[Lens] = []
        if self._under_way and (self._under_way.done() or len(self._waiting) >= AT_MOST):
            done = self._under_way.result()
            self._under_way = None
            if self._few:
                torch.set_num_threads(self._cores)
        if self._under_way is None and len(self._waiting) >= BATCH:
            due, self._waiting = self._waiting, []
            if self._thread is None:
                return self._all(due)
            torch.set_num_threads(max(1, self._cores - 1))
            self._under_way = self._thread.submit(self._all, due)
        return done

    def rest(self) -> Iterator[Lens]:
        """Every lens not yet given, when nobody decodes any more."""
        if self._under_way is not None:
            yield from self._under_way.result()
            self._under_way = None
        torch.set_num_threads(self._cores)
        due, self._waiting = self._waiting, []
        yield from self._all(due)

    def _all(self, steps: list[Unlensed]) -> list[Lens]:
        return [
            lens
            for first in range(0, len(steps), TOGETHER)
            for lens in self._compute(steps[first : first + TOGETHER])
        ]
