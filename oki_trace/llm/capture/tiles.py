"""Sums over the vocabulary for many rows of logits, one tile at a time.

A tile is small enough for a core's cache, so that the passes over it cost no time at
the memory; several cores share the tiles. Each tile's exponents are relative to its own
largest logit, and double precision adds the tiles up.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from oki_trace.llm.decoding.decoder_thread import with_thread_state

# Tokens per block: the best k tokens are in the k blocks with the largest maxima.
BLOCK = 64
# Logits that are processed together, in two float32 buffers of so many, and tokens per tile.
_TILE_LOGITS = 2**16
_SHORTEST_TILE = 32 * BLOCK
_SMALLEST_EXPONENT = -80.0


@dataclass(frozen=True)
class RowSums:
    """Sums over each row in float64, (rows,), on the CPU.

    With s a logit minus the row's ``largest`` and p the model's own probability:
    ``total`` Σ e^s, ``products`` Σ s·e^s, ``cross`` Σ p·s, ``above`` the number of logits
    above the chosen one.
    """

    largest: Tensor
    total: Tensor
    products: Tensor
    cross: Tensor
    above: Tensor

    @property
    def finite(self) -> Tensor:
        """Which rows have finite sums, (rows,)."""
        return torch.isfinite(self.total + self.products + self.cross)

    def rows(self, rows: slice) -> RowSums:
        """The sums of some rows."""
        return RowSums(*(values[rows] for values in vars(self).values()))

    def replaced(
        self, drafts: Tensor, scores: Tensor, probs: Tensor, chosen: Tensor, exact_chosen: Tensor
    ) -> RowSums:
        """These sums with the logits ``drafts`` (rows, n) replaced by ``scores`` (rows, n).

        Their tokens have the model's probabilities ``probs`` (n,), which add up to 1 over the
        whole vocabulary; ``above`` so far counts logits above ``chosen`` (rows, 1), whose
        exact value is ``exact_chosen``. The largest logit is one of the ``scores``.
        """
        largest = scores.amax(-1, keepdim=True)
        before, after = drafts - self.largest[:, None].float(), scores - largest
        before_weights, after_weights = before.exp(), after.exp()
        raised = self.largest - largest[:, 0].double()
        total = self.total - before_weights.sum(-1, dtype=torch.float64)
        products = self.products - (before_weights * before).sum(-1, dtype=torch.float64)
        scale = raised.exp()
        above = (scores > exact_chosen).sum(-1) - (drafts > chosen).sum(-1)
        return RowSums(
            largest[:, 0].double(),
            scale * total + after_weights.sum(-1, dtype=torch.float64),
            scale * (products + raised * total)
            + (after_weights * after).sum(-1, dtype=torch.float64),
            self.cross + raised + ((scores - drafts) * probs).sum(-1, dtype=torch.float64),
            self.above + above,
        )


class TileSums:
    """Adds up tiles of the rows of some steps, each with the same number of rows.

    ``block_maxima`` (rows, whole blocks) are the largest logits of each block. A tile has
    ``length`` tokens, the last one fewer; there are ``count``.
    """

    def __init__(
        self, chosen: Tensor, vocab: int, probs: Tensor | None, *, excluded: bool = False
    ) -> None:
        """``chosen`` (rows, 1) logits; ``probs`` (steps, vocab), the model's own.

        ``excluded``: some logits are -inf; 0 · -inf then counts as 0.
        """
        rows, device = len(chosen), chosen.device
        self._chosen = chosen
        self._probs = probs
        self._excluded = excluded
        steps = rows if probs is None else len(probs)
        self._step_rows = rows // steps
        self._together = steps
        self.length = vocab
        if device.type == "cpu":
            longest = max(_TILE_LOGITS // rows // BLOCK * BLOCK, _SHORTEST_TILE)
            self.length = min(longest, vocab)
            self._together = max(1, _TILE_LOGITS // self.length // self._step_rows)
        self.count = -(-vocab // self.length)
        self._values = torch.zeros(5, self.count, rows, device=device)
        self._mass = torch.zeros(self.count, steps, device=device)
        self.block_maxima = torch.empty(rows, vocab // BLOCK, device=device)

    def span(self, tile: int) -> tuple[int, int]:
        """The first token of a tile, and the one after its last."""
        start = tile * self.length
        return start, start + self.length

    def buffer(self) -> Tensor:
        """Memory for ``add``; each thread has its own."""
        rows = min(self._together * self._step_rows, len(self._chosen))
        return self._chosen.new_empty(2, rows, self.length)

    def add(self, tile: int, logits: Tensor, buffer: Tensor) -> None:
        """Add a tile of logits (rows, tokens), in fp32 or in a type that is converted to it."""
        start, _ = self.span(tile)
        probs = None if self._probs is None else self._probs[:, start : start + logits.shape[1]]
        if probs is not None:
            torch.sum(probs, -1, out=self._mass[tile])
        for step in range(0, self._mass.shape[1], self._together):
            steps = slice(step, step + self._together)
            rows = slice(step * self._step_rows, steps.stop * self._step_rows)
            own = None if probs is None else probs[steps]
            self._add(tile, rows, logits[rows], own, buffer)

    def _add(
        self, tile: int, rows: slice, logits: Tensor, probs: Tensor | None, buffer: Tensor
    ) -> None:
        shifted, weights = buffer[:, : len(logits), : logits.shape[1]]
        # Rows that lie a power of two apart in memory would evict each other from the cache.
        logits = shifted.copy_(logits)
        largest, total, products, cross, above = self._values[:, tile, rows]
        blocks = logits.shape[1] // BLOCK
        start = self.span(tile)[0] // BLOCK
        maxima = self.block_maxima[rows, start : start + blocks]
        torch.amax(logits[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK)), -1, out=maxima)
        torch.amax(maxima if blocks * BLOCK == logits.shape[1] else logits, -1, out=largest)
        largest.clamp_min_(torch.finfo(torch.float32).min)
        # Ones as floats: sums of booleans are many times slower, and no tile has 2^24 tokens.
        torch.sum(torch.gt(logits, self._chosen[rows], out=weights), -1, out=above)
        torch.sub(logits, largest[:, None], out=shifted)
        if probs is not None:
            by_step = (len(probs), self._step_rows, shifted.shape[1])
            torch.mul(shifted.view(by_step), probs[:, None], out=weights.view(by_step))
            (torch.nansum if self._excluded else torch.sum)(weights, -1, out=cross)
        # Below, e^s takes many times as long; above, so small a weight changes no sum.
        shifted.clamp_min_(_SMALLEST_EXPONENT)
        torch.sum(torch.exp(shifted, out=weights), -1, out=total)
        torch.sum(weights.mul_(shifted), -1, out=products)

    def row_sums(self) -> RowSums:
        """The sums of all tiles."""
        largest, total, products, cross, above = self._values.cpu().double()
        mass = self._mass.cpu().double().repeat_interleave(total.shape[1] // self._mass.shape[1], 1)
        row_largest = largest.amax(0)
        below = largest - row_largest
        scale = below.exp()
        return RowSums(
            row_largest,
            (scale * total).sum(0),
            (scale * (products + below * total)).sum(0),
            (cross + below * mass).sum(0),
            above.sum(0),
        )


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "tiles", initializer=torch.set_num_threads, initargs=(1,))


if hasattr(os, "register_at_fork"):  # a forked process has no threads of its parent's pool
    os.register_at_fork(after_in_child=_pool.cache_clear)


def share(work: Callable[[Iterator[int]], None], count: int) -> None:
    """Call ``work`` in as many threads as torch uses here, each computing on one core.

    All calls get the same iterator over the numbers below ``count``, so each number goes to
    one of them, and fewer to a thread that another program slows down.
    """
    cores = torch.get_num_threads()
    numbers = iter(range(count))
    if min(cores, count) <= 1:
        work(numbers)
        return
    inference = torch.is_inference_mode_enabled()

    def help_out() -> None:
        with torch.inference_mode(inference), torch.no_grad():
            work(numbers)

    torch.set_num_threads(1)
    helpers = min(cores, count) - 1
    try:
        futures = [_pool(cores - 1).submit(with_thread_state(help_out)) for _ in range(helpers)]
        try:
            work(numbers)
        finally:
            deque(numbers, maxlen=0)  # after an error, the others take no more
            wait(futures)
        for future in futures:
            future.result()
    finally:
        torch.set_num_threads(cores)
