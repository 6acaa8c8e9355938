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

# Below, relative to the largest, 32-bit powers of e lose digits, and their logarithms with them.
_DEEPEST = -80.0

FULL = "full logits"

Probs = NDArray[np.float64]
Logits = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Distance:
    """``basis``: "full logits", or "top-k": at most what the lists show, so rather low."""

    kl: float
    kl_reverse: float
    js: float
    tv: float
    basis: str


def softmax(logits: NDArray[np.generic]) -> Probs:
    """The distribution of ``logits`` (vocab,), in double precision; -inf gives 0."""
    # In place: an array as long as the vocabulary costs as much to make as to compute.
    probs = logits.astype(np.float64)
    probs -= probs.max()
    np.exp(probs, out=probs)
    probs /= probs.sum()
    return probs


def between_logits(a: Logits, b: Logits) -> list[Distance]:
    """The distance of each row of ``a`` from the same row of ``b``: (pairs, vocab) each, over
    one vocabulary and with a finite largest value. Both arrays are used up.

    In single precision, off by less than 1e-6 nats, or a millionth of the larger
    KL; in double where a token is less than e^-80 as likely as the first.
    """
    for logits in (a, b):
        logits -= logits.max(axis=1, keepdims=True)
    wide = np.minimum(a.min(axis=1), b.min(axis=1)) < _DEEPEST
    if wide.any():
        plain = iter([] if wide.all() else between_logits(a[~wide], b[~wide]))
        return [
            between(softmax(x), softmax(y)) if is_wide else next(plain)
            for x, y, is_wide in zip(a, b, wide, strict=True)
        ]
    # Every pass over the vocabulary costs: logarithms of a and b are their logits less a number.
    p, q = np.exp(a), np.exp(b)
    total, other_total = p.sum(axis=1), q.sum(axis=1)
    p /= total[:, np.newaxis]
    q /= other_total[:, np.newaxis]
    log_totals = np.log(total) - np.log(other_total)
    room = np.subtract(a, b)
    kl = _dots(p, room, b) - log_totals
    kl_reverse = log_totals - _dots(q, room, b)
    np.subtract(p, q, out=room)
    tv = np.abs(room, out=room).sum(axis=1) / 2
    # Half of KL(p ‖ middle) + KL(q ‖ middle), with log q put as log p - log(p / q).
    middle = np.add(p, q, out=p)
    middle /= 2
    np.log(middle, out=room)
    np.subtract(a, room, out=room)
    js = _dots(middle, room, b) - np.log(total) + kl_reverse / 2
    # The logarithm is convex, so it is no more than this: nothing, where the two are the same.
    np.minimum(js, (kl + kl_reverse) / 4, out=js)
    values = np.maximum(np.stack([kl, kl_reverse, js, tv], axis=1), 0).astype(np.float64)
    return [Distance(row[0], row[1], row[2], row[3], FULL) for row in values.tolist()]


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


def _dots(a: Logits, b: Logits, room: Logits) -> NDArray[np.float32]:
    # Not @: the linear algebra library takes threads of its own for it, which wait for
    # one another for milliseconds where other programs use the cores. Nor einsum, which adds
    # up term by term: sum() does it in pairs, and loses no digits.
    products: NDArray[np.float32] = np.multiply(a, b, out=room).sum(axis=1)
    return products
