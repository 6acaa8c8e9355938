"""``ask compare``, the Compare page and NumPy give one distance for one pair of steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import streamlit as st

from dashboard.viewdata import comparison
from oki_trace.analysis import questions
from oki_trace.analysis.query_session import QuerySession
from oki_trace.records import Candidates, Step
from oki_trace.store.writing.writer import TraceWriter
from tests import builders
from tests.analysis import made

STEPS = 12
VOCABULARY = 50


@pytest.fixture
def db(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    path = str(tmp_path / "store.db")
    monkeypatch.setenv("OKI_TRACE_DB", path)
    yield path
    st.cache_resource.clear()
    st.cache_data.clear()


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return np.asarray(powers / powers.sum())


def step(index: int, logits: np.ndarray, *, topk: int) -> Step:
    """A step whose candidates are the likeliest tokens of ``logits``: (vocab,)."""
    made_up = builders.step(index, np.random.default_rng(index), vocab=VOCABULARY, topk=topk)
    ids = np.argsort(-logits, kind="stable")[:topk]
    top = Candidates(
        ids, tuple(f"t{i}" for i in ids), logits[ids], softmax(logits)[ids].astype(np.float32)
    )
    tensors = tuple(
        replace(tensor, array=logits) if tensor.name == "logits" else tensor
        for tensor in made_up.tensors
    )
    return replace(made_up, token=f"w{index}", topk=top, tensors=tensors)


def reply(writer: TraceWriter, logits: np.ndarray, *, topk: int, tensors: bool) -> int:
    _, number = made.begin(writer, steps=0, tensors="exact" if tensors else "none")
    steps = [step(i, row, topk=topk) for i, row in enumerate(logits)]
    writer.append(number, [s if tensors else replace(s, tensors=()) for s in steps])
    made.finish(writer, number)
    return number


@pytest.mark.parametrize("tensors", [True, False])
@pytest.mark.parametrize("topk", [4, 10, VOCABULARY])
def test_the_page_the_command_line_and_numpy_agree(db: str, topk: int, tensors: bool) -> None:
    rng = np.random.default_rng(topk)
    one = (rng.normal(size=(STEPS, VOCABULARY)) * 3).astype(np.float32)
    two = (one + rng.normal(size=one.shape)).astype(np.float32)
    with TraceWriter(db) as writer:
        a = reply(writer, one, topk=topk, tensors=tensors)
        b = reply(writer, two, topk=topk, tensors=tensors)
    with QuerySession(db) as session:
        answer = questions.answer(session, "compare", (str(a), str(b)))
        about = questions.answer(session, "compare", (f"{a}:3", f"{b}:3")).about
    from dashboard import data

    left = data.message(a)
    right = data.message(b)
    assert left is not None and right is not None
    pairs = comparison.align(data.steps(left), data.steps(right))
    page = data.distances(left, right, pairs)
    assert [(pair.left, pair.right) for pair in pairs] == [(i, i) for i in range(STEPS)]
    for i, distance in enumerate(page):
        assert distance is not None
        for name in ("kl", "kl_reverse", "js", "tv", "tv_most", "basis"):
            assert getattr(distance, name) == answer.column(name)[i]
        p, q = softmax(one[i].astype(np.float64)), softmax(two[i].astype(np.float64))
        total = np.abs(p - q).sum() / 2
        if tensors:
            assert distance.basis == "full logits"
            assert distance.tv == distance.tv_most == pytest.approx(total, abs=1e-6)
            assert distance.kl == pytest.approx((p * np.log(p / q)).sum(), abs=1e-5)
        else:
            assert distance.basis == f"top-{topk}"
            assert distance.tv - 1e-5 <= total <= distance.tv_most + 1e-5
            assert (distance.tv_most - distance.tv < 1e-5) == (topk == VOCABULARY)
    assert page[3] is not None
    assert f"TV {page[3].tv:.4f}" in about and f"from {page[3].basis}." in about
    assert comparison.is_exact(page) == tensors
    data.reopen()
