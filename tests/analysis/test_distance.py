"""Distances of distributions: what holds for any two, and what lists of candidates can show."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oki_trace.analysis.distance import (
    Distance,
    between,
    between_lists,
    between_logits,
    softmax,
)

NUMBERS = ("kl", "kl_reverse", "js", "tv")
LOGITS = st.lists(st.floats(-12, 12), min_size=6, max_size=6)


def listed(probs: np.ndarray, k: int) -> dict[int, float]:
    return {int(i): float(probs[i]) for i in np.argsort(-probs, kind="stable")[:k]}


@given(LOGITS, LOGITS)
def test_what_holds_for_any_two(a: list[float], b: list[float]) -> None:
    p, q = softmax(np.array(a)), softmax(np.array(b))
    one, other = between(p, q), between(q, p)
    assert (one.kl, one.kl_reverse) == (other.kl_reverse, other.kl)
    assert one.js == pytest.approx(other.js) and one.tv == pytest.approx(other.tv)
    assert 0 <= one.js <= np.log(2) + 1e-12 and 0 <= one.tv <= 1
    assert one.kl >= 2 * one.tv**2 - 1e-9  # Pinsker's inequality
    same = between(p, p)
    assert (same.kl, same.js, same.tv) == (0, 0, 0)


def rows(*logits: list[float] | np.ndarray) -> np.ndarray:
    return np.array(logits, dtype=np.float32)


def close(found: Distance, exact: Distance) -> None:
    off = 1e-6 * max(1, exact.kl, exact.kl_reverse)
    for name in NUMBERS:
        assert getattr(found, name) == pytest.approx(getattr(exact, name), rel=0, abs=off)


@given(LOGITS, LOGITS)
def test_from_logits_it_is_the_same(a: list[float], b: list[float]) -> None:
    first, second = rows(a, b, a), rows(b, b, a)
    for x, y, found in zip(first, second, between_logits(first.copy(), second.copy()), strict=True):
        assert found.basis == "full logits"
        close(found, between(softmax(x), softmax(y)))


@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.1, 1.0, 10.0])
def test_over_a_whole_vocabulary_no_digits_are_lost(noise: float) -> None:
    rng = np.random.default_rng(0)
    first = (rng.gumbel(size=(3, 49_152)) * 2).astype(np.float32)
    second = first + (rng.normal(size=first.shape) * noise).astype(np.float32)
    plain = [between(softmax(x), softmax(y)) for x, y in zip(first, second, strict=True)]
    for exact, found in zip(plain, between_logits(first, second), strict=True):
        close(found, exact)
        assert noise or [getattr(found, name) for name in NUMBERS] == [0, 0, 0, 0]


def test_from_logits_that_rule_tokens_out() -> None:
    # Beside a row that needs no such care; the last token is too unlikely for a number.
    first = rows([0.0, -np.inf], [0.0, np.log(3.0)], [0.0, -800.0])
    second = rows([-np.inf, 0.0], [0.0, 0.0], [0.0, -800.0])
    apart, usual, same = between_logits(first, second)
    assert (apart.kl, apart.tv) == (np.inf, 1.0) and apart.js == pytest.approx(np.log(2))
    assert usual.tv == pytest.approx(0.25, abs=1e-6)
    assert (same.kl, same.js, same.tv) == (0, 0, 0)


@given(LOGITS, LOGITS)
def test_lists_of_everything_are_exact(a: list[float], b: list[float]) -> None:
    p, q = softmax(np.array(a)), softmax(np.array(b))
    exact, found = between(p, q), between_lists(listed(p, 6), listed(q, 6))
    assert found is not None
    for name in NUMBERS:
        assert getattr(found, name) == pytest.approx(getattr(exact, name), abs=1e-4)


def test_a_known_case() -> None:
    found = between(np.array([0.5, 0.5]), np.array([0.25, 0.75]))
    assert found.kl == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3))
    assert found.tv == pytest.approx(0.25)
    assert between(np.array([1.0, 0.0]), np.array([0.0, 1.0])).js == pytest.approx(np.log(2))
    assert between(np.array([1.0, 0.0]), np.array([0.0, 1.0])).kl == np.inf


def test_ruled_out_tokens_have_no_probability() -> None:
    assert softmax(np.array([0.0, -np.inf])).tolist() == [1.0, 0.0]


def test_what_only_one_list_has_gets_the_most_the_other_allows() -> None:
    # The second list leaves 0.1 for all others, and no more than 0.3 for one of them.
    found = between_lists({"x": 0.6, "y": 0.4}, {"x": 0.6, "z": 0.3})
    assert found is not None
    assert found.basis == "top-2"
    assert found.tv == pytest.approx(0.3)
    assert found.tv_most == pytest.approx(0.4)


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 6), st.integers(1, 20))
def test_lists_bound_the_total_variation(seed: int, spread: float, k: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(2, 20)) * spread
    logits[1] += logits[0] * rng.integers(0, 2)
    p, q = (softmax(row) for row in logits)
    total = float(np.abs(p - q).sum() / 2)
    found = between_lists(listed(p, k), listed(q, k))
    assert found is not None
    assert found.tv - 1e-9 <= total <= found.tv_most + 1e-9
    if k == 20:
        assert found.tv_most - found.tv < 1e-9
    exact = between(p, q)
    assert exact.tv == exact.tv_most == pytest.approx(total, abs=1e-9)


def test_lists_without_numbers_have_no_distance() -> None:
    assert between_lists({"x": 0.6}, {}) is None
    assert between_lists({"x": float("nan")}, {"x": 0.6}) is None
