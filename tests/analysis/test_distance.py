"""Distances of distributions: what holds for any two, and what lists of candidates can show."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oki_trace.analysis.distance import (
    Distribution,
    between,
    between_lists,
    between_logits,
    distribution,
)

LOGITS = st.lists(st.floats(-12, 12), min_size=6, max_size=6)


def softmax(logits: np.ndarray) -> np.ndarray:
    return distribution(logits).probs


def listed(probs: np.ndarray, k: int) -> dict[int, float]:
    return {int(i): float(probs[i]) for i in np.argsort(-probs, kind="stable")[:k]}


@given(LOGITS, LOGITS)
def test_what_holds_for_any_two(a: list[float], b: list[float]) -> None:
    p, q = softmax(np.array(a)), softmax(np.array(b))
    one, other = between(p, q), between(q, p)
    assert (one.kl, one.kl_back) == (other.kl_back, other.kl)
    assert one.js == pytest.approx(other.js) and one.tv == pytest.approx(other.tv)
    assert 0 <= one.js <= np.log(2) + 1e-12 and 0 <= one.tv <= 1
    assert one.kl >= 2 * one.tv**2 - 1e-9  # Pinsker's inequality
    same = between(p, p)
    assert (same.kl, same.js, same.tv) == (0, 0, 0)


@given(LOGITS, LOGITS)
def test_from_logits_it_is_the_same(a: list[float], b: list[float]) -> None:
    p, q = distribution(np.array(a)), distribution(np.array(b))
    plain, found = between(p.probs, q.probs), between_logits(p, q)
    assert found.basis == "full logits"
    for name in ("kl", "kl_back", "js", "tv"):
        assert getattr(found, name) == pytest.approx(getattr(plain, name), abs=1e-12)


def test_from_logits_that_rule_tokens_out() -> None:
    def of(*logits: float) -> Distribution:
        return distribution(np.array(logits))

    found = between_logits(of(0.0, -np.inf), of(-np.inf, 0.0))
    assert (found.kl, found.tv) == (np.inf, 1.0) and found.js == pytest.approx(np.log(2))
    # Too small for a number, yet not ruled out.
    assert between_logits(of(0.0, -800.0), of(0.0, -800.0)).kl == 0


@given(LOGITS, LOGITS)
def test_lists_of_everything_are_exact(a: list[float], b: list[float]) -> None:
    p, q = softmax(np.array(a)), softmax(np.array(b))
    exact, found = between(p, q), between_lists(listed(p, 6), listed(q, 6))
    for name in ("kl", "kl_back", "js", "tv"):
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
    assert found.basis == "top-2"
    assert found.tv == pytest.approx(0.3)
