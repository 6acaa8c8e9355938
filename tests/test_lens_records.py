"""The names of lenses, and a lens that cannot read every layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from oki_trace.errors import UsageError
from oki_trace.records import LOGIT, CapturePolicy, require_lens_name
from oki_trace.store.reading import documents
from tests import builders


@pytest.mark.parametrize("name", ["jlens", "8b", "tuned-v1.2_final", "a" * 63])
def test_a_lens_may_have_the_name(name: str) -> None:
    require_lens_name(name)
    assert CapturePolicy(lenses=(name,)).lenses == (name,)


@pytest.mark.parametrize(
    "name", ["", LOGIT, "JLens", "a" * 64, "../up", ".hidden", "-flag", "a b", "a\n", "é", 5]
)
def test_a_lens_may_not_have_the_name(name: Any) -> None:
    with pytest.raises(UsageError, match="a lens is named by"):
        CapturePolicy(lenses=(name,))


def test_a_policy_names_a_lens_once_and_none_without_the_logit_lens() -> None:
    with pytest.raises(UsageError, match="twice"):
        CapturePolicy(lenses=("jlens", "tuned", "jlens"))
    with pytest.raises(UsageError, match="no_lens"):
        CapturePolicy(no_lens=True, lenses=("jlens",))


def test_the_lenses_of_a_policy_are_stored_and_an_older_policy_has_none() -> None:
    policy = CapturePolicy(lenses=("jlens", "tuned"))
    document: Any = documents.to_document(policy)
    assert document["lenses"] == ["jlens", "tuned"]
    assert documents.OF_A_MESSAGE["policy"](document) == policy
    del document["lenses"]
    assert documents.OF_A_MESSAGE["policy"](document) == CapturePolicy()


def test_a_token_settles_at_a_layer_that_the_lens_reads() -> None:
    every = builders.lens(0, np.random.default_rng(0), layers=3)
    assert every.layer_numbers.tolist() == [0, 1, 2, 3]
    some = replace(every, name="jlens", layers=np.array([2, 3, 5, 8]))
    for ranks, settled in (([4, 1, 1, 1], 3), ([1, 1, 1, 1], 2), ([1, 1, 1, 2], None)):
        assert replace(some, chosen_rank=np.array(ranks)).settle_layer == settled
