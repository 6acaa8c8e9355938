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

FULL = "full logits"

Probs = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Distance:
    """``basis``: "full logits" (exact) or "top-k" (at most what the lists show, so rather low)."""

    kl: float
    kl_back: float
    js: float
    tv: float
    basis: str


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of a next token, from its logits: ``probs`` and their logarithms, (vocab,) each."""

    logs: Probs
    probs: Probs


def distribution(logits: NDArray[np.generic]) -> Distribution:
    """The softmax of ``logits`` (vocab,), in double precision; -inf gives 0."""
    # In place: an array as long as the vocabulary costs as much to make as to compute.
    logs = logits.astype(np.float64)
    logs -= logs.max()
    probs = np.exp(logs)
    total = probs.sum()
    probs /= total
    logs -= np.log(total)
    return Distribution(logs, probs)


def between_logits(a: Distribution, b: Distribution) -> Distance:
    """The distance of two distributions over the same vocabulary, with one logarithm a token."""
    if min(a.probs.min(), b.probs.min()) <= 0:
        return between(a.probs, b.probs)
    room = np.subtract(a.logs, b.logs)
    kl, kl_back = _dot(a.probs, room), -_dot(b.probs, room)
    np.subtract(a.probs, b.probs, out=room)
    tv = float(np.abs(room, out=room).sum() / 2)
    middle = np.add(a.probs, b.probs, out=room)
    middle /= 2
    # Half of KL(a ‖ middle) + KL(b ‖ middle), with log b put as log a - log(a / b).
    to_middle = np.log(middle)
    np.subtract(a.logs, to_middle, out=to_middle)
    js = _dot(middle, to_middle) + kl_back / 2
    return Distance(max(0.0, kl), max(0.0, kl_back), max(0.0, js), tv, FULL)


def between(a: Probs, b: Probs, basis: str = FULL) -> Distance:
    """The distance of two distributions over the same tokens, (tokens,) each."""
    middle = (a + b) / 2
    js = (_kl(a, middle) + _kl(b, middle)) / 2
    return Distance(_kl(a, b), _kl(b, a), js, float(np.abs(a - b).sum() / 2), basis)


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


def _dot(a: Probs, b: Probs) -> float:
    # Not @: the linear algebra library takes threads of its own for it, which wait for
    # one another for milliseconds where other programs use the cores.
    return float(np.einsum("i,i->", a, b))
