"""The distance between two next-token distributions.

Kullback-Leibler divergence in both directions and Jensen-Shannon divergence in nats (the latter at
most ln 2), total variation as a share of 1: half the sum of absolute differences. (Cover and
Thomas, Elements of Information Theory, 2nd ed., chapters 2 and 11.)
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# 32-bit probabilities may miss this much of 1: a smaller rest cannot be told from 0.
_ROUNDING = 1e-6

# Below this, relative to the largest logit, 32-bit exponentials lose digits.
_DEEPEST = -80.0

FULL = "full logits"

Probs = NDArray[np.float64]
Logits = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Distance:
    """``basis``: "full logits", where ``tv`` and ``tv_most`` are the same exact number; or "top-k".

    From candidate lists, the total variation is at least ``tv`` and at most ``tv_most``,
    and the divergences are estimates that tend to be too low.
    """

    kl: float
    kl_reverse: float
    js: float
    tv: float
    tv_most: float
    basis: str


def softmax(logits: NDArray[np.generic]) -> Probs:
    """The distribution of ``logits`` (vocab,), in double precision; -inf gives 0."""
    # In place: allocating an array of this size costs as much as computing it.
    probs = logits.astype(np.float64)
    probs -= probs.max()
    np.exp(probs, out=probs)
    probs /= probs.sum()
    return probs


def between_logits(a: Logits, b: Logits) -> list[Distance]:
    """The distance between each row of ``a`` and the same row of ``b``: (pairs, vocab) each.

    Both have one vocabulary and a finite largest value in every row, and both are overwritten. In
    single precision, with an error below 1e-6 nats or a millionth of the larger KL; in double where
    a token is less than e^-80 as likely as the first.
    """
    for logits in (a, b):
        logits -= logits.max(axis=1, keepdims=True)
    wide = np.minimum(a.min(axis=1), b.min(axis=1)) < _DEEPEST
    if wide.any():
        others = iter([] if wide.all() else between_logits(a[~wide], b[~wide]))
        return [
            between(softmax(x), softmax(y)) if is_wide else next(others)
            for x, y, is_wide in zip(a, b, wide, strict=True)
        ]
    # Every pass over the vocabulary costs: log probabilities are the logits less one number.
    p, q = np.exp(a), np.exp(b)
    p_total, q_total = p.sum(axis=1), q.sum(axis=1)
    p /= p_total[:, np.newaxis]
    q /= q_total[:, np.newaxis]
    log_ratio = np.log(p_total) - np.log(q_total)
    scratch = np.subtract(a, b)
    kl = _dots(p, scratch, b) - log_ratio
    kl_reverse = log_ratio - _dots(q, scratch, b)
    np.subtract(p, q, out=scratch)
    tv = np.abs(scratch, out=scratch).sum(axis=1) / 2
    # Half of KL(p ‖ middle) + KL(q ‖ middle), with log q written as log p - log(p / q).
    middle = np.add(p, q, out=p)
    middle /= 2
    np.log(middle, out=scratch)
    np.subtract(a, scratch, out=scratch)
    js = _dots(middle, scratch, b) - np.log(p_total) + kl_reverse / 2
    # By convexity JS is no more than this, which is 0 where the two distributions are equal.
    np.minimum(js, (kl + kl_reverse) / 4, out=js)
    values = np.maximum(np.stack([kl, kl_reverse, js, tv, tv], axis=1), 0).astype(np.float64)
    return [
        Distance(kl, kl_reverse, js, tv, tv_most, FULL)
        for kl, kl_reverse, js, tv, tv_most in values.tolist()
    ]


def between(p: Probs, q: Probs) -> Distance:
    """The distance between two distributions over the same tokens, (tokens,) each."""
    middle = (p + q) / 2
    js = (_kl(p, middle) + _kl(q, middle)) / 2
    tv = float(np.abs(p - q).sum() / 2)
    return Distance(_kl(p, q), _kl(q, p), js, tv, tv, FULL)


def between_lists(a: Mapping[Hashable, float], b: Mapping[Hashable, float]) -> Distance | None:
    """The distance, as far as two lists of the most likely tokens determine it.

    None where a list is empty or has a probability that is no number.

    For the estimates, a token that is in only one list gets the highest probability that the other
    list allows: at most its smallest entry, at most the probability in the first list, and
    in total at most 1 minus the sum of the list. The rest of the probability counts as one token.
    """
    if not a or not b or not all(map(math.isfinite, (*a.values(), *b.values()))):
        return None
    tokens = [*a, *(token for token in b if token not in a)]
    estimate = between(_filled(a, b, tokens), _filled(b, a, tokens))
    tv, tv_most = _tv_bounds(a, b)
    basis = f"top-{min(len(a), len(b))}"
    return Distance(estimate.kl, estimate.kl_reverse, estimate.js, tv, tv_most, basis)


def _filled(
    own: Mapping[Hashable, float], other: Mapping[Hashable, float], tokens: list[Hashable]
) -> Probs:
    rest = max(0.0, 1.0 - sum(own.values()))
    least = min(own.values())
    guessed = {token: min(least, other[token]) for token in tokens if token not in own}
    total = sum(guessed.values())
    scale = min(1.0, rest / total) if total else 0.0
    probs = [own[token] if token in own else guessed[token] * scale for token in tokens]
    return np.array([*probs, max(rest - total * scale, _ROUNDING)])


def _tv_bounds(p: Mapping[Hashable, float], q: Mapping[Hashable, float]) -> tuple[float, float]:
    """The smallest and the largest possible total variation of two distributions.

    A token that only one list has is at most as likely in the other as the last on that list.
    """
    p_rest, q_rest = (max(0.0, 1 - sum(probs.values())) for probs in (p, q))
    p_over_q = sum(max(0.0, p[token] - q[token]) for token in p.keys() & q.keys())
    q_over_p = sum(max(0.0, q[token] - p[token]) for token in p.keys() & q.keys())
    only_p = [p[token] for token in p.keys() - q.keys()]
    only_q = [q[token] for token in q.keys() - p.keys()]
    p_least, q_least = min(p_rest, *p.values()), min(q_rest, *q.values())
    # The total variation is the sum of what p has over q, and also of what q has over p.
    low = max(
        p_over_q + max(sum(max(0.0, x - q_least) for x in only_p), sum(only_p) - q_rest, 0.0),
        q_over_p + max(sum(max(0.0, x - p_least) for x in only_q), sum(only_q) - p_rest, 0.0),
    )
    high = min(p_over_q + sum(only_p) + p_rest, q_over_p + sum(only_q) + q_rest, 1.0)
    return min(low, high), high


def _kl(p: Probs, q: Probs) -> float:
    """The sum of p ln(p / q); infinite where q rules out a token that p allows."""
    possible = p > 0
    with np.errstate(divide="ignore"):
        return max(0.0, float((p[possible] * np.log(p[possible] / q[possible])).sum()))


def _dots(a: Logits, b: Logits, out: Logits) -> NDArray[np.float32]:
    # Not @: BLAS uses threads of its own, which wait for one another for milliseconds when other
    # programs use the cores. Nor einsum, which adds term by term; sum() adds in pairs and loses
    # no digits.
    products: NDArray[np.float32] = np.multiply(a, b, out=out).sum(axis=1)
    return products
