"""Mode "compact": small, and never further off than it says, whatever it is given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from oki_trace.records import (
    CapturePolicy,
    ChatMessage,
    Role,
    Sampling,
    Step,
    Tensor,
    TurnEnd,
    TurnStart,
)
from oki_trace.store.codecs import compact
from oki_trace.store.codecs.tensors import decode, encode

SHAPES = npst.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=40)
BOUND = 1e-3
ANYTHING = st.floats(width=32, allow_nan=True, allow_infinity=True)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - float(logits.max()))
    return weights / weights.sum()


def as_bfloat16(array: np.ndarray) -> np.ndarray:
    """The bits of the nearest bfloat16 below: any bits will do."""
    return (np.ascontiguousarray(array, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def back(name: Any, array: np.ndarray, dtype: str = "float32") -> np.ndarray:
    return decode(encode(Tensor(name, array, dtype), "compact")).array


def assert_probs_kept(exact: np.ndarray, restored: np.ndarray) -> None:
    if np.isnan(exact).any() or not np.isfinite(exact.max(initial=-np.inf)):
        np.testing.assert_array_equal(restored, exact)
    else:
        assert np.abs(softmax(exact) - softmax(restored)).max() <= BOUND


@settings(max_examples=300)
@given(
    weights=npst.arrays(
        np.float32, SHAPES, elements=st.one_of(st.floats(0, 1, width=32), st.floats(0, 1e-3))
    )
)
def test_weights_and_the_sums_of_runs_keep_their_bound(weights: np.ndarray) -> None:
    weights = weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1)
    restored = back("attentions", weights)
    assert restored.shape == weights.shape
    off = restored.astype(np.float64) - weights
    assert np.abs(off).max(initial=0) <= 2**-10
    running = np.concatenate([np.zeros_like(off[..., :1]), off.cumsum(axis=-1)], axis=-1)
    runs = running[..., :, None] - running[..., None, :]
    assert np.abs(runs).max(initial=0) <= 2**-10 + 1e-12


@settings(max_examples=300)
@given(
    logits=npst.arrays(
        np.float32,
        st.integers(0, 300),
        elements=st.one_of(ANYTHING, st.floats(-40, 40, width=32), st.just(-np.inf)),
    )
)
def test_probabilities_keep_their_bound(logits: np.ndarray) -> None:
    restored = back("logits", logits)
    assert_probs_kept(logits, restored)
    np.testing.assert_array_equal(np.isneginf(restored), np.isneginf(logits))
    bits = as_bfloat16(logits)
    assert_probs_kept(from_bfloat16(bits), from_bfloat16(back("logits", bits, "bfloat16")))


@given(
    logits=npst.arrays(np.float32, 2000, elements=st.floats(-60, 60, width=32)),
    grid=st.sampled_from(compact.GRIDS),
)
def test_a_logit_is_as_precise_as_its_token_is_likely(
    logits: np.ndarray, grid: tuple[float, float]
) -> None:
    restored = compact.from_companded(compact.companded(logits, *grid))
    gap = float(logits.max()) - logits.astype(np.float64)
    bound = np.minimum(grid[0] * np.exp2(gap / 2 + grid[0]), grid[1]) / 2 + 1e-5
    # Where the coarse grid begins, one code may straddle the two.
    assert (np.abs(restored - logits) <= bound * 1.01).all()
    assert restored[logits.argmax()] == logits.max()


@settings(max_examples=300)
@given(
    array=npst.arrays(np.float32, SHAPES, elements=ANYTHING),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_hidden_states_keep_their_bound(array: np.ndarray, dtype: str) -> None:
    if dtype == "bfloat16":
        given_, exact = as_bfloat16(array), from_bfloat16(as_bfloat16(array))
    else:
        with np.errstate(over="ignore"):
            given_ = array.astype(dtype)
        exact = given_.astype(np.float32)
    restored = back("hidden_states", given_, dtype)
    assert restored.dtype == given_.dtype and restored.shape == given_.shape
    values = from_bfloat16(restored) if dtype == "bfloat16" else restored
    x, y = exact.ravel().astype(np.float64), values.ravel().astype(np.float64)
    np.testing.assert_array_equal(np.isfinite(y), np.isfinite(x))
    if not np.isfinite(x).all():
        # Kept as in mode half, which has a bound of its own, or bit for bit.
        np.testing.assert_array_equal(y[~np.isfinite(x)], x[~np.isfinite(x)])
        return
    for first in range(0, x.size, 32):
        block = slice(first, first + 32)
        largest = np.abs(x[block]).max()
        rounding = {"float32": 2**-22, "float16": 2**-10, "bfloat16": 2**-7}[dtype]
        assert np.abs(x[block] - y[block]).max() <= largest * (1 / 254 + rounding) + 2.0**-24


@pytest.mark.parametrize(
    "row",
    [
        np.zeros(500),
        np.full(500, 1 / 500),
        np.eye(1, 500)[0],
        np.full(500, 1e-9),
        np.full(70_000, 1 / 70_000),
    ],
)
def test_rows_of_one_kind(row: np.ndarray) -> None:
    weights = np.tile(row.astype(np.float32), (2, 3, 1))
    restored = back("attentions", weights)
    assert np.abs(restored - weights).max() <= 2**-10
    assert np.abs(restored.sum(-1) - weights.sum(-1)).max() <= 2**-10


@pytest.mark.parametrize("mask", [-np.inf, np.finfo(np.float32).min, -1e30, -1e4])
def test_logits_that_a_model_rules_out(mask: float) -> None:
    logits = np.random.default_rng(0).normal(0, 4, 5000).astype(np.float32)
    logits[4000:] = mask
    restored = back("logits", logits)
    assert_probs_kept(logits, restored)
    assert (restored[4000:] <= mask / 2).all()


def test_a_tensor_of_another_kind_is_kept_as_it_is() -> None:
    for array in (np.array([-0.5, 1.5]), np.array([1e30, 2.0]), np.array([np.nan, 1.0])):
        weights = array.astype(np.float32)
        np.testing.assert_allclose(back("attentions", weights), weights, rtol=2**-11)
    doubles = np.linspace(-1, 1, 7)
    np.testing.assert_array_equal(back("logits", doubles, "float64"), doubles)


class Kept:
    """A sink that keeps the steps of a turn."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def start(self, start: TurnStart) -> None:
        self.prompt_len = len(start.prompt)

    def step(self, step: Step) -> None:
        self.steps.append(step)

    def lens(self, lens: Any) -> None:
        pass

    def settle(self) -> None:
        pass

    def end(self, end: TurnEnd) -> None:
        pass


def test_a_real_model_in_a_fifth_of_the_room(smollm2: tuple[Any, Any]) -> None:
    from oki_trace.tracing import prepare, trace_turn

    kept = Kept()
    trace_turn(
        prepare(*smollm2, [kept]),
        "smollm2",
        [ChatMessage(Role.USER, "The cat sat on the mat, and the dog asked why. " * 18)],
        Sampling(max_new_tokens=6),
        CapturePolicy(tensors="exact"),
        [kept],
    )
    ratios = []
    for step in kept.steps:
        encoded = {tensor.name: encode(tensor, "compact") for tensor in step.tensors}
        exact = {tensor.name: tensor.array for tensor in step.tensors}
        assert exact["attentions"].shape[-1] == pytest.approx(256, abs=20)
        restored = {name: decode(one).array for name, one in encoded.items()}
        ratios.append(
            sum(len(one.data) for one in encoded.values())
            / sum(4 * array.size for array in exact.values())
        )
        weights = restored["attentions"]
        assert np.abs(weights - exact["attentions"]).max() <= BOUND
        assert np.abs(weights.sum(-1) - 1).max() <= BOUND
        # What is stored is well within what is promised.
        off = softmax(restored["logits"]) - softmax(exact["logits"])
        assert np.abs(off).max() <= BOUND / 5
        assert restored["logits"].argmax() == exact["logits"].argmax()
        hidden, was = restored["hidden_states"], exact["hidden_states"]
        blocks = np.abs(was).reshape(len(was), -1, 32).max(-1)
        error = np.abs(hidden - was).reshape(len(was), -1, 32).max(-1)
        assert (error <= blocks / 254 * 1.001).all()
        bits = as_bfloat16(exact["logits"])
        assert_probs_kept(from_bfloat16(bits), from_bfloat16(back("logits", bits, "bfloat16")))
    assert len(ratios) >= 5 and max(ratios) <= 0.2, ratios
