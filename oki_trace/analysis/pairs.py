"""Distances of many pairs of steps, from the store's tensors.

From the full logits where both sides kept them and have the same vocabulary,
from the lists of candidates otherwise; each distance says which of the two it
is. Tensors are read a few steps at a time, by as many threads as there are cores.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from oki_trace.analysis.distance import (
    Distance,
    Distribution,
    between_lists,
    between_logits,
    distribution,
)
from oki_trace.records import Candidates, Tensor
from oki_trace.store.reader import TraceReader

# Message and step of the first, message and step of the second.
Pair = tuple[int, int, int, int]
# Read together; 16 steps of a vocabulary of 50,000 are 3 MB a side.
_TOGETHER = 16
# Each has a connection of its own to the store.
_MOST_THREADS = 8


@dataclass(frozen=True, slots=True)
class Apart:
    """``shared``: candidates in both lists. ``top_rank``: the rank that the first's likeliest
    token has in the second; None: below the second's list, and no logits to ask.
    """

    distance: Distance
    shared: int
    top_rank: int | None


def apart(reader: TraceReader, pairs: Sequence[Pair]) -> list[Apart | None]:
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

    def some(one: tuple[int, int, list[int]]) -> list[Apart | None]:
        a, b, those = one
        steps = [(pairs[place][1], pairs[place][3]) for place in those]
        return _some(reader, (a, b), (lists[a], lists[b]), steps)

    found: list[Apart | None] = [None] * len(pairs)
    _keep_freed_memory()
    with ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST_THREADS)) as pool:
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


def floats(tensor: Tensor) -> np.ndarray:
    """The tensor's values as float32: bfloat16 is held as its bits."""
    if tensor.dtype == "bfloat16":
        return (tensor.array.astype(np.uint32) << 16).view(np.float32)
    return tensor.array.astype(np.float32, copy=False)


def _some(
    reader: TraceReader,
    messages: tuple[int, int],
    lists: tuple[Mapping[int, Candidates], Mapping[int, Candidates]],
    steps: Sequence[tuple[int, int]],
) -> list[Apart | None]:
    logits = [
        reader.tensors(message, "logits", sorted(set(those)))
        for message, those in zip(messages, zip(*steps, strict=True), strict=True)
    ]

    # Not kept for the next pair: to get fresh memory costs more than to compute.
    def full(side: int, step: int) -> Distribution | None:
        tensor = logits[side].get(step)
        return None if tensor is None else distribution(floats(tensor))

    found: list[Apart | None] = []
    for a, b in steps:
        top_a, top_b = lists[0].get(a), lists[1].get(b)
        if top_a is None or top_b is None:
            found.append(None)
        else:
            found.append(_apart(top_a, top_b, full(0, a), full(1, b)))
    return found


def _apart(
    a: Candidates, b: Candidates, full_a: Distribution | None, full_b: Distribution | None
) -> Apart:
    by_id = one_vocabulary(a, b)
    lists = _list(a, by_id), _list(b, by_id)
    shared = len(lists[0].keys() & lists[1].keys())
    if (
        by_id
        and full_a is not None
        and full_b is not None
        and full_a.probs.shape == full_b.probs.shape
    ):
        top = full_b.probs[full_a.probs.argmax()]
        rank = 1 + int(np.count_nonzero(full_b.probs > top))
        return Apart(between_logits(full_a, full_b), shared, rank)
    return Apart(between_lists(*lists), shared, _rank(next(iter(lists[0]), None), lists[1]))


def _list(top: Candidates, by_id: bool) -> dict[Hashable, float]:
    keys = top.token_ids.tolist() if by_id else top.tokens
    return dict(zip(keys, top.probs.tolist(), strict=True))


def _rank(token: Hashable, tokens: Iterable[Hashable]) -> int | None:
    return next((i for i, one in enumerate(tokens, start=1) if one == token), None)
