"""Two replies side by side, without a page."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashboard.viewdata import comparison
from dashboard.viewdata.comparison import Pair, align, divergence
from oki_trace.analysis.distance import Distance, between_lists
from oki_trace.analysis.reply_alignment import Alignment
from oki_trace.records import StepSummary


def said(words: Sequence[str]) -> list[StepSummary]:
    return [
        StepSummary(
            id=i,
            step_index=i,
            position=6 + i,
            token_id=i,
            token=word,
            token_bytes=word.encode(),
            is_special=False,
            prob=0.5,
            logprob=-0.7,
            entropy=1.0,
            rank=1,
            margin=0.1,
            settle_layer=2,
        )
        for i, word in enumerate(words)
    ]


def test_equal_tokens_stand_beside_each_other() -> None:
    pairs = align(said(["the", "cat", "sat", "down"]), said(["the", "old", "cat", "sat", "up"]))
    assert pairs == [
        Pair(0, 0, True),
        Pair(None, 1, False),
        Pair(1, 2, True),
        Pair(2, 3, True),
        Pair(3, 4, False),
    ]
    assert divergence(pairs) == 1
    assert divergence(pairs[:1]) is None
    assert align([], []) == []


def test_the_first_place_to_see_is_one_that_both_have() -> None:
    first = comparison.first_shown
    assert first(align(said("abcd"), said("aXcd"))) == 1
    # Nothing stands beside what was put in: the next place, else the last before.
    assert first(align(said("acd"), said("abcd"))) == 2
    assert first(align(said("ab"), said("abc"))) == 1
    assert first(align(said("abc"), said("abc"))) == 0
    assert first(align(said(""), said("abc"))) is None


def test_long_replies_are_held_side_by_side_step_by_step() -> None:
    many = said(["a"] * (comparison.ALIGNED_TOKENS + 1))
    pairs = align(many, said(["a", "b", "a"]))
    assert pairs[:4] == [
        Pair(0, 0, True),
        Pair(1, 1, False),
        Pair(2, 2, True),
        Pair(3, None, False),
    ]
    assert len(pairs) == len(many)


words = st.lists(st.sampled_from("abc"), max_size=12)


@given(words, words)
def test_an_alignment_loses_nothing_and_keeps_the_order(left: list[str], right: list[str]) -> None:
    pairs = align(said(left), said(right))
    assert [p.left for p in pairs if p.left is not None] == list(range(len(left)))
    assert [p.right for p in pairs if p.right is not None] == list(range(len(right)))
    for p in pairs:
        if p.same:
            assert p.left is not None and p.right is not None
            assert left[p.left] == right[p.right]
    first = divergence(pairs)
    assert (first is None) == (left == right)
    if first is not None:
        assert left[:first] == right[:first]


def test_a_distance_in_words() -> None:
    assert comparison.in_words(None) == "not known"
    assert comparison.in_words(between_lists({"a": 0.75, "b": 0.25}, {"a": 1.0})) == "0.250"
    assert comparison.in_words(Distance(0, 0, 0, 0.25, 0.5, "top-1")) == "0.250 to 0.500"


def test_the_chart_has_the_pairs_whose_distance_is_known() -> None:
    steps = said(["a", "b"])
    pairs = align(steps, steps)
    found = [between_lists({"a": 0.9}, {"a": 0.9}), None]
    assert found[0] is not None and found[0].tv == 0
    rows = comparison.rows(pairs, found, steps, steps)
    assert [(row["pair"], row["token"]) for row in rows] == [(0, "the same token")]
    json.dumps(rows, allow_nan=False)


def test_both_replies_are_saved_place_by_place() -> None:
    left, right = said(["a", "b"]), said(["a", "c", "d"])
    pairs = align(left, right)
    found = [Distance(0, 0, 0, 0.0, 0.1, "top-1"), None, None]
    names, *rows = comparison.sheet(pairs, found, left, right)
    assert [dict(zip(names, row, strict=True)) for row in rows] == [
        {
            "pair": 0,
            "left_step": 0,
            "left_token": "a",
            "right_step": 0,
            "right_token": "a",
            "same": 1,
            "least_total_variation": 0.0,
            "most_total_variation": 0.1,
        },
        {
            "pair": 1,
            "left_step": 1,
            "left_token": "b",
            "right_step": 1,
            "right_token": "c",
            "same": 0,
            "least_total_variation": None,
            "most_total_variation": None,
        },
        {
            "pair": 2,
            "left_step": None,
            "left_token": None,
            "right_step": 2,
            "right_token": "d",
            "same": 0,
            "least_total_variation": None,
            "most_total_variation": None,
        },
    ]


@pytest.mark.parametrize(
    ("left", "right", "told"),
    [
        ("a", "a", "Both replies have the same 1 token."),
        ("ab", "ab", "Both replies have the same 2 tokens."),
        ("ab", "ac", "The replies diverge at step 1; 1 of 2 pairs match."),
        ("abc", "abde", "The replies diverge at step 2; 2 of 4 pairs match."),
        ("a", "b", "The replies diverge at step 0; 0 of 1 pairs match."),
    ],
)
def test_what_two_replies_share_is_told_in_a_sentence(left: str, right: str, told: str) -> None:
    assert comparison.verdict(align(said(list(left)), said(list(right)))) == told


def test_a_branch_stands_beside_the_step_it_departs_from() -> None:
    whole, branch = said(["the", "cat", "sat", "down"]), said(["lay", "down"])
    aligned = Alignment(2, 0, (True, True), True)
    assert align(whole, branch, aligned) == [
        Pair(0, None, True),
        Pair(1, None, True),
        Pair(2, 0, False),
        Pair(3, 1, True),
    ]
    pairs = align(branch, whole, aligned.swapped)
    assert pairs == [
        Pair(None, 0, True),
        Pair(None, 1, True),
        Pair(0, 2, False),
        Pair(1, 3, True),
    ]
    assert comparison.verdict(pairs) == "The replies diverge at step 2; 3 of 4 pairs match."
    assert comparison.first_shown(pairs) == 2
