"""Distances of many pairs of steps, from the store's tensors.

From the full logits where both sides kept them and have the same vocabulary,
from the lists of candidates otherwise; each distance says which of the two it
is. Tensors are read a few steps at a time, by as many threads as there are cores.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oki_trace.analysis.distance import (
    Distance,
    between_lists,
    between_logits,
)
from oki_trace.records import Candidates, TensorRecord
from oki_trace.store.reading.reader import TraceReader

# Message and step of the first, message and step of the second.
Pair = tuple[int, int, int, int]
Floats = NDArray[np.float32]
# Read together; 24 steps of a vocabulary of 50,000 are 5 MB a side.
_TOGETHER = 24
# Compared together, in numbers a side: the more at once, the less the threads wait for one
# another, until a block is too large for the processor's cache.
_BLOCK = 8 * 49_152
# Each has a connection of its own to the store.
_MOST_THREADS = 8
# DuckDB asks from several threads at once, and each would bring as many.
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True, slots=True)
class StepDistance:
    """``shared``: candidates in both lists. ``top_rank``: the rank that the first's likeliest
    token has in the second; None: below the second's list, and no logits to ask.
    """

    distance: Distance
    shared: int
    top_rank: int | None


def step_distances(reader: TraceReader, pairs: Sequence[Pair]) -> list[StepDistance | None]:
    """How far each pair of steps is apart; None where a step does not exist."""
    places: dict[tuple[int, int], list[int]] = defaultdict(list)
    for place, (a, _, b, _) in enumerate(pairs):
        places[a, b].append(place)
    lists = {m: reader.candidates(m) for m in {message for two in places for message in two}}
    work = [
        (a, b, those[i : i + _TOGETHER])
        for (a, b), those in places.items()
        for i in range(0, len(those), _TOGETHER)
    ]

    def some(one: tuple[int, int, list[int]]) -> list[StepDistance | None]:
        a, b, those = one
        steps = [(pairs[place][1], pairs[place][3]) for place in those]
        return _some(reader, (a, b), (lists[a], lists[b]), steps)

    found: list[StepDistance | None] = [None] * len(pairs)
    _keep_freed_memory()
    with _ONE_AT_A_TIME, ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST_THREADS)) as pool:
        for (_, _, those), results in zip(work, pool.map(some, work), strict=True):
            for place, result in zip(those, results, strict=True):
                found[place] = result
    return found


def _keep_freed_memory() -> None:
    # The GNU C library gives arrays of this size back to the system when they are freed, and
    # to get them anew costs as much as all that is computed in them. Once a larger block has
    # been freed, it keeps what is smaller.
    np.empty(1 << 24, dtype=np.uint8)


def one_vocabulary(a: Candidates, b: Candidates) -> bool:
    """Whether ids mean the same on both sides, as far as the two lists show."""
    ids_a, ids_b = a.token_ids.tolist(), b.token_ids.tolist()
    if min(ids_a, default=0) < 0 or min(ids_b, default=0) < 0:
        return False
    texts = dict(zip(ids_a, a.tokens, strict=True))
    return all(texts.get(i, text) == text for i, text in zip(ids_b, b.tokens, strict=True))


def floats(tensor: TensorRecord) -> Floats:
    """The tensor's values as float32: bfloat16 is held as its bits."""
    if tensor.dtype == "bfloat16":
        return (tensor.array.astype(np.uint32) << 16).view(np.float32)
    return tensor.array.astype(np.float32, copy=False)


def _some(
    reader: TraceReader,
    messages: tuple[int, int],
    lists: tuple[Mapping[int, Candidates], Mapping[int, Candidates]],
    steps: Sequence[tuple[int, int]],
) -> list[StepDistance | None]:
    logits = [
        reader.tensors(message, "logits", sorted(set(those)))
        for message, those in zip(messages, zip(*steps, strict=True), strict=True)
    ]
    full_of = [{step: floats(tensor) for step, tensor in side.items()} for side in logits]
    found: list[StepDistance | None] = [None] * len(steps)
    full: dict[int, list[_Full]] = defaultdict(list)  # by the size of the vocabulary
    for place, (a, b) in enumerate(steps):
        top_a, top_b = lists[0].get(a), lists[1].get(b)
        if top_a is None or top_b is None:
            continue
        by_id = one_vocabulary(top_a, top_b)
        listed = _list(top_a, by_id), _list(top_b, by_id)
        shared = len(listed[0].keys() & listed[1].keys())
        full_a, full_b = full_of[0].get(a), full_of[1].get(b)
        if by_id and full_a is not None and full_b is not None and _comparable(full_a, full_b):
            full[full_a.size].append(_Full(place, shared, full_a, full_b))
        else:
            rank = _rank(next(iter(listed[0]), None), listed[1])
            found[place] = StepDistance(between_lists(*listed), shared, rank)
    for size, pairs in full.items():
        at_once = max(1, _BLOCK // size)
        for first in range(0, len(pairs), at_once):
            block = pairs[first : first + at_once]
            for pair, apart_by in zip(block, _step_distances(block), strict=True):
                found[pair.place] = apart_by
    return found


@dataclass(frozen=True, slots=True)
class _Full:
    """A pair with the logits of both sides, (vocab,) each."""

    place: int
    shared: int
    a: Floats
    b: Floats


def _comparable(a: Floats, b: Floats) -> bool:
    return a.shape == b.shape and bool(np.isfinite(a.max()) and np.isfinite(b.max()))


def _step_distances(pairs: Sequence[_Full]) -> list[StepDistance]:
    a, b = np.stack([pair.a for pair in pairs]), np.stack([pair.b for pair in pairs])
    tops = b[np.arange(len(pairs)), a.argmax(axis=1)]
    ranks = 1 + np.count_nonzero(b > tops[:, np.newaxis], axis=1)
    return [
        StepDistance(distance, pair.shared, rank)
        for pair, distance, rank in zip(pairs, between_logits(a, b), ranks.tolist(), strict=True)
    ]


def _list(top: Candidates, by_id: bool) -> dict[Hashable, float]:
    keys = top.token_ids.tolist() if by_id else top.tokens
    return dict(zip(keys, top.probs.tolist(), strict=True))


def _rank(token: Hashable, tokens: Iterable[Hashable]) -> int | None:
    return next((i for i, one in enumerate(tokens, start=1) if one == token), None)
