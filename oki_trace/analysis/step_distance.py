"""Computes the distances between many pairs of steps of a store.

Only this module decides how two recorded steps are compared: from the full logits if both sides
kept them and share a vocabulary, else from the candidate lists. Tensors are read a few steps at a
time, by as many threads as the machine has cores.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from oki_trace.analysis.distance import Distance, between_lists, between_logits
from oki_trace.records import Candidates
from oki_trace.store.reading.reader import TraceReader

Floats = NDArray[np.float32]
# Steps that are read together; 24 steps of a vocabulary of 50,000 are 5 MB a side.
_STEPS_AT_ONCE = 24
# Numbers a side that are compared together. Larger blocks make the threads wait less for one
# another, until a block exceeds the processor's cache.
_BLOCK = 8 * 49_152
# Each thread has a connection of its own to the store.
_MOST_THREADS = 8
# DuckDB calls from several threads at once, and each call would start as many.
_ONE_AT_A_TIME = threading.Lock()


class StepKey(NamedTuple):
    """A step of a message: ``at`` is its step_index, or for a ``given`` token its position."""

    message: int
    at: int
    given: bool = False


Pair = tuple[StepKey, StepKey]
# The steps of one message: the message, and whether they are those of given tokens.
Side = tuple[int, bool]


@dataclass(frozen=True, slots=True)
class StepDistance:
    """``shared``: candidates in both lists. ``top_rank``: the rank that the first's top
    token has in the second; None when it is not in the second's list and there are no logits.
    """

    distance: Distance
    shared: int
    top_rank: int | None


def step_distances(reader: TraceReader, pairs: Sequence[Pair]) -> list[StepDistance | None]:
    """The distance of each pair of steps; None where a step does not exist or has no numbers."""
    places: dict[tuple[Side, Side], list[int]] = defaultdict(list)
    for place, (a, b) in enumerate(pairs):
        places[(a.message, a.given), (b.message, b.given)].append(place)
    sides = {side for two in places for side in two}
    lists = {side: reader.candidates(side[0], given=side[1]) for side in sides}
    batches = [
        (two, of_two[i : i + _STEPS_AT_ONCE])
        for two, of_two in places.items()
        for i in range(0, len(of_two), _STEPS_AT_ONCE)
    ]

    def measure(batch: tuple[tuple[Side, Side], list[int]]) -> list[StepDistance | None]:
        (a, b), of_batch = batch
        steps = [(pairs[place][0].at, pairs[place][1].at) for place in of_batch]
        return _measure(reader, (a, b), (lists[a], lists[b]), steps)

    distances: list[StepDistance | None] = [None] * len(pairs)
    _keep_freed_memory()
    with _ONE_AT_A_TIME, ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST_THREADS)) as pool:
        for (_, of_batch), results in zip(batches, pool.map(measure, batches), strict=True):
            for place, result in zip(of_batch, results, strict=True):
                distances[place] = result
    return distances


def _keep_freed_memory() -> None:
    # The GNU C library returns arrays of this size to the system when they are freed, and
    # allocating them again costs as much as the computation. Once a larger block has been freed,
    # it keeps smaller ones.
    np.empty(1 << 24, dtype=np.uint8)


def one_vocabulary(a: Candidates, b: Candidates) -> bool:
    """Whether ids mean the same tokens on both sides, as far as the two lists show."""
    ids_a, ids_b = a.token_ids.tolist(), b.token_ids.tolist()
    if min(ids_a, default=0) < 0 or min(ids_b, default=0) < 0:
        return False
    texts = dict(zip(ids_a, a.tokens, strict=True))
    return all(texts.get(i, text) == text for i, text in zip(ids_b, b.tokens, strict=True))


def _measure(
    reader: TraceReader,
    sides: tuple[Side, Side],
    lists: tuple[Mapping[int, Candidates], Mapping[int, Candidates]],
    steps: Sequence[tuple[int, int]],
) -> list[StepDistance | None]:
    logits = [
        {
            step: tensor.to_float32()
            for step, tensor in reader.tensors(
                message, "logits", sorted(set(of_side)), given=given
            ).items()
        }
        for (message, given), of_side in zip(sides, zip(*steps, strict=True), strict=True)
    ]
    distances: list[StepDistance | None] = [None] * len(steps)
    full: dict[int, list[_Full]] = defaultdict(list)  # by the size of the vocabulary
    for place, (a, b) in enumerate(steps):
        list_a, list_b = lists[0].get(a), lists[1].get(b)
        if list_a is None or list_b is None:
            continue
        by_id = one_vocabulary(list_a, list_b)
        probs_a, probs_b = _probs(list_a, by_id), _probs(list_b, by_id)
        shared = len(probs_a.keys() & probs_b.keys())
        logits_a, logits_b = logits[0].get(a), logits[1].get(b)
        if by_id and _comparable(logits_a, logits_b):
            assert logits_a is not None and logits_b is not None
            full[logits_a.size].append(_Full(place, shared, logits_a, logits_b))
        elif (distance := between_lists(probs_a, probs_b)) is not None:
            rank = _rank(next(iter(probs_a)), probs_b)
            distances[place] = StepDistance(distance, shared, rank)
    for size, pairs in full.items():
        at_once = max(1, _BLOCK // size)
        for first in range(0, len(pairs), at_once):
            block = pairs[first : first + at_once]
            for pair, result in zip(block, _from_logits(block), strict=True):
                distances[pair.place] = result
    return distances


@dataclass(frozen=True, slots=True)
class _Full:
    """A pair with the logits of both sides, (vocab,) each."""

    place: int
    shared: int
    a: Floats
    b: Floats


def _comparable(a: Floats | None, b: Floats | None) -> bool:
    if a is None or b is None or a.shape != b.shape:
        return False
    return bool(np.isfinite(a.max()) and np.isfinite(b.max()))


def _from_logits(pairs: Sequence[_Full]) -> list[StepDistance]:
    a, b = np.stack([pair.a for pair in pairs]), np.stack([pair.b for pair in pairs])
    tops = b[np.arange(len(pairs)), a.argmax(axis=1)]
    ranks = 1 + np.count_nonzero(b > tops[:, np.newaxis], axis=1)
    return [
        StepDistance(distance, pair.shared, rank)
        for pair, distance, rank in zip(pairs, between_logits(a, b), ranks.tolist(), strict=True)
    ]


def _probs(candidates: Candidates, by_id: bool) -> dict[Hashable, float]:
    """The probabilities by token id, or by text; pieces of a character share one text."""
    probs: dict[Hashable, float] = {}
    keys: Sequence[Hashable] = candidates.token_ids.tolist() if by_id else candidates.tokens
    for key, prob in zip(keys, candidates.probs.tolist(), strict=True):
        probs[key] = probs.get(key, 0.0) + prob
    return probs


def _rank(token: Hashable, tokens: Iterable[Hashable]) -> int | None:
    return next((i for i, one in enumerate(tokens, start=1) if one == token), None)
