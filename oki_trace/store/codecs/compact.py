"""The codecs of mode "compact", with small results and a bounded error.

    cumulative   attentions. The running sum of each row is rounded to multiples of
                 2^-10 and stored as differences: the error of a weight, and of the sum
                 of any run of positions, is at most 2^-10, so the share of any part of
                 the prompt stays correct.
    companded    logits, as distances from the largest, which is exact. The grid is fine
                 near it and coarse far below, because an error matters as much as the
                 token is likely: the error of a distance g is at most half of
                 min(fine * 2^(g/2), coarse). -inf is preserved.
    blocks       hidden states, as 8-bit integers with a scale for each 32 neighbours
                 (llama.cpp: Q8_0): the error of a value is at most 1/254 of the largest
                 in its block, or 2^-100.

Each encodes float32 to bytes, or to no bytes when the array is not of the kind that
the codec is for. 16-bit codes are stored with all low bytes first, which compresses
better.
"""

from __future__ import annotations

import math
import struct

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

WEIGHT_STEP = 2.0**-10
PROB_BOUND = 1e-3
BLOCK = 32

# The grids to try on logits, (fine, coarse), the smallest result first.
GRIDS = ((2.0**-10, 2.0**-3), (2.0**-12, 2.0**-6))

_LARGEST_CODE = 0xFFFE
_MINUS_INFINITY = 0xFFFF
_LARGEST_SUM = 60.0  # of a row of weights: its code still has 16 bits
_COMPANDED_HEADER = struct.Struct("<fff")


def cumulative(weights: Floats) -> bytes:
    """Encode rows of weights along the last axis, each weight at least 0."""
    if not weights.size or not weights.min() >= 0:
        return b""
    sums = np.cumsum(weights, axis=-1, dtype=np.float64)
    if not sums[..., -1].max() <= _LARGEST_SUM:
        return b""
    sums *= 1 / WEIGHT_STEP
    codes = np.rint(sums, out=sums).astype(np.uint16)
    codes[..., 1:] -= codes[..., :-1].copy()
    return _planes(codes)


def from_cumulative(plain: bytes) -> Floats:
    return _codes(plain).astype(np.float32) * np.float32(WEIGHT_STEP)


def companded(logits: Floats, fine: float, coarse: float) -> bytes:
    """Encode logits whose largest is finite, the others finite or -inf."""
    largest = logits.max(initial=-np.inf)
    if not math.isfinite(largest):
        return b""
    grid = _Grid(fine, coarse)
    gaps = float(largest) - logits.astype(np.float64)
    is_infinite = np.isposinf(gaps)
    if is_infinite.any():
        gaps[is_infinite] = 0.0
    codes = np.rint(grid.codes(gaps))
    if not codes.max() <= _LARGEST_CODE:
        return b""
    integers = codes.astype(np.uint16)
    integers[is_infinite] = _MINUS_INFINITY
    return _COMPANDED_HEADER.pack(largest, fine, coarse) + _planes(integers)


def from_companded(plain: bytes) -> Floats:
    """Raises ValueError for an impossible header."""
    largest, fine, coarse = _COMPANDED_HEADER.unpack_from(plain)
    if not (math.isfinite(largest) and 1e-9 < fine < coarse < 1e9):
        raise ValueError("a grid that cannot be")
    codes = _codes(plain[_COMPANDED_HEADER.size :])
    finite = codes[codes != _MINUS_INFINITY]
    values = np.full(_MINUS_INFINITY + 1, -np.inf, dtype=np.float32)
    used = int(finite.max(initial=0)) + 1
    values[:used] = largest - _Grid(fine, coarse).gaps(np.arange(used, dtype=np.float64))
    return values[codes]


class _Grid:
    """The code of a gap is the integral of 1/step: step = fine * 2^(gap/2) up to coarse."""

    def __init__(self, fine: float, coarse: float) -> None:
        self.coarse = coarse
        self.scale = 2 / (math.log(2) * fine)
        self.bend = 2 * math.log2(coarse / fine)
        self.code_at_bend = self.scale * (1 - 2 ** (-self.bend / 2))

    def codes(self, gaps: NDArray[np.float64]) -> NDArray[np.float64]:
        codes = self.code_at_bend + (gaps - self.bend) / self.coarse
        near = gaps < self.bend
        codes[near] = self.scale * (1 - np.exp2(gaps[near] / -2))
        return codes

    def gaps(self, codes: NDArray[np.float64]) -> NDArray[np.float64]:
        gaps = self.bend + (codes - self.code_at_bend) * self.coarse
        near = codes < self.code_at_bend
        gaps[near] = -2 * np.log2(1 - codes[near] / self.scale)
        return gaps


def blocks(array: Floats) -> bytes:
    """Encode finite values of any magnitude; blocks run over the array in C order."""
    padded = np.zeros(-(-array.size // BLOCK) * BLOCK, dtype=np.float32)
    padded[: array.size] = array.ravel()
    rows = padded.reshape(-1, BLOCK)
    largest = np.abs(rows).max(axis=1, initial=0.0)
    # 127 scales of a block could add up to more than float32 holds.
    if not largest.max(initial=0.0) < 2.0**127:
        return b""
    # A scale below float32's normal numbers would lose its precision.
    scales = np.where(largest > 2.0**-100, largest / np.float32(127), np.float32(0))
    divisors = np.where(scales == 0, np.float32(1), scales)
    scaled = np.where(scales[:, None] == 0, np.float32(0), rows) / divisors[:, None]
    codes = np.rint(scaled).astype(np.int8).ravel()[: array.size]
    return scales.astype("<f4").tobytes() + codes.tobytes()


def from_blocks(plain: bytes, size: int) -> Floats:
    count = -(-size // BLOCK)
    scales = np.frombuffer(plain, dtype="<f4", count=count).astype(np.float32)
    padded = np.zeros(count * BLOCK, dtype=np.float32)
    padded[:size] = np.frombuffer(plain, dtype=np.int8, offset=4 * count)
    return (padded.reshape(-1, BLOCK) * scales[:, None]).ravel()[:size]


def plain_size(codec: str, size: int) -> int:
    """The number of bytes for ``size`` values, before compression."""
    if codec == "cumulative":
        return 2 * size
    if codec == "companded":
        return _COMPANDED_HEADER.size + 2 * size
    return -(-size // BLOCK) * 4 + size


def decode(codec: str, plain: bytes, size: int) -> Floats:
    """The ``size`` values, flat. Raises ValueError for bytes no encoder wrote."""
    if codec == "blocks":
        return from_blocks(plain, size)
    return from_companded(plain) if codec == "companded" else from_cumulative(plain)


def keeps_probs(logits: Floats, restored: Floats) -> bool:
    """Whether every probability changes by at most half of PROB_BOUND."""
    if np.isnan(logits).any() or not np.isfinite(logits.max(initial=-np.inf)):
        return np.array_equal(logits, restored, equal_nan=True)
    return bool(np.abs(_softmax(logits) - _softmax(restored)).max() <= PROB_BOUND / 2)


def _softmax(logits: Floats) -> NDArray[np.float64]:
    weights = np.exp(logits.astype(np.float64) - float(logits.max()))
    return np.asarray(weights / weights.sum())


def _planes(codes: NDArray[np.uint16]) -> bytes:
    pairs = np.ascontiguousarray(codes, dtype="<u2").view(np.uint8).reshape(-1, 2)
    return pairs.T.tobytes()


def _codes(plain: bytes) -> NDArray[np.uint16]:
    pairs = np.frombuffer(plain, dtype=np.uint8).reshape(2, -1)
    return np.ascontiguousarray(pairs.T).view("<u2").ravel().astype(np.uint16, copy=False)
