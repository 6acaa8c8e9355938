"""How far two next-token distributions are apart.

Kullback-Leibler divergence in both directions and Jensen-Shannon divergence in
nats (the latter at most ln 2), total variation as a share of 1: half the sum of
absolute differences. (Cover and Thomas, Elements of Information Theory, 2nd ed.,
chapters 2 and 11.)
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# What 32-bit probabilities may miss of 1: less than this cannot be told from nothing.
_ROUNDING = 1e-6

Probs = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Distance:
    """``basis``: "full logits" (exact) or "top-k" (at most what the lists show, so rather low)."""

    kl: float
    kl_back: float
    js: float
    tv: float
    basis: str


def softmax(logits: NDArray[np.generic]) -> Probs:
    """Probabilities of ``logits`` (vocab,), in double precision; -inf gives 0."""
    # In place: an array as long as the vocabulary costs more to make than to compute.
    probs = logits.astype(np.float64)
    probs -= probs.max()
    np.exp(probs, out=probs)
    probs /= probs.sum()
    return probs


def between(a: Probs, b: Probs, basis: str = "full logits") -> Distance:
    """The distance of two distributions over the same tokens, (tokens,) each."""
    if min(a.min(), b.min()) <= 0:
        middle = (a + b) / 2
        js = (_kl(a, middle) + _kl(b, middle)) / 2
        return Distance(_kl(a, b), _kl(b, a), js, float(np.abs(a - b).sum() / 2), basis)
    # Nothing is ruled out, as hardly ever in full logits: a logarithm each and dot
    # products, in one array, since to make one costs more than to compute it.
    room = np.subtract(a, b)
    tv = float(np.abs(room, out=room).sum() / 2)
    np.log(a, out=room)
    own_a, a_under_b = float(a @ room), float(b @ room)
    np.log(b, out=room)
    own_b, b_under_a = float(b @ room), float(a @ room)
    np.add(a, b, out=room)
    room /= 2
    js = (own_a + own_b) / 2 - float(room @ np.log(room))
    return Distance(
        max(0.0, own_a - b_under_a), max(0.0, own_b - a_under_b), max(0.0, js), tv, basis
    )


def between_lists(a: Mapping[Hashable, float], b: Mapping[Hashable, float]) -> Distance:
    """The distance as far as two lists of the most likely tokens show it.

    A token that only one list has is given the most the other allows: no more
    than its smallest entry, no more than the first gives it, and together no
    more than what that list leaves of 1. All else counts as one token.
    """
    tokens = [*a, *(token for token in b if token not in a)]
    first, second = _filled(a, b, tokens), _filled(b, a, tokens)
    return between(first, second, f"top-{min(len(a), len(b))}")


def _filled(
    own: Mapping[Hashable, float], other: Mapping[Hashable, float], tokens: list[Hashable]
) -> Probs:
    left = max(0.0, 1.0 - sum(own.values()))
    least = min(own.values(), default=1.0)
    guessed = {token: min(least, other[token]) for token in tokens if token not in own}
    total = sum(guessed.values())
    scale = min(1.0, left / total) if total else 0.0
    probs = [own[token] if token in own else guessed[token] * scale for token in tokens]
    return np.array([*probs, max(left - total * scale, _ROUNDING)])


def _kl(a: Probs, b: Probs) -> float:
    """The sum of a ln(a / b); infinite where b rules out what a allows."""
    seen = a > 0
    with np.errstate(divide="ignore"):
        return max(0.0, float((a[seen] * np.log(a[seen] / b[seen])).sum()))
