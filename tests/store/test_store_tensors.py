"""Arrays to bytes and back: exact, bounded, and safe against damage."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from oki_trace.errors import TensorError
from oki_trace.records import TensorRecord
from oki_trace.store.codecs.float16 import floats_of, halves_of
from oki_trace.store.codecs.tensors import EncodedTensor, _checksum, decode, encode

SHAPES = npst.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=20)


def signed(encoded: EncodedTensor) -> EncodedTensor:
    """With the checksum made to fit, as someone who means harm would."""
    return dataclasses.replace(
        encoded,
        checksum=_checksum(
            encoded.name,
            encoded.dtype,
            encoded.shape,
            encoded.layers,
            encoded.key_offset,
            encoded.codec,
            encoded.data,
        ),
    )


@given(npst.arrays(np.uint32, SHAPES, elements=st.integers(0, 2**32 - 1)))
def test_exact_keeps_every_bit_of_float32(bits: np.ndarray) -> None:
    array = bits.view(np.float32)
    back = decode(encode(TensorRecord("hidden_states", array, "float32", (0, 1), 3), "exact"))
    assert back.array.dtype == np.float32 and back.array.shape == array.shape
    assert back.array.tobytes() == array.tobytes()
    assert (back.name, back.dtype, back.layers, back.key_offset) == (
        "hidden_states", "float32", (0, 1), 3,
    )  # fmt: skip


@given(
    bits=npst.arrays(np.uint16, SHAPES, elements=st.integers(0, 2**16 - 1)),
    dtype=st.sampled_from(["bfloat16", "float16"]),
    mode=st.sampled_from(["exact", "half"]),
)
def test_sixteen_bits_are_kept_in_either_mode(bits: np.ndarray, dtype: str, mode: str) -> None:
    array = bits if dtype == "bfloat16" else bits.view(np.float16)
    back = decode(encode(TensorRecord("logits", array, dtype), mode))
    assert back.dtype == dtype and back.array.dtype == array.dtype
    assert back.array.tobytes() == array.tobytes()


@settings(max_examples=300)
@given(
    array=npst.arrays(
        np.float32,
        SHAPES,
        elements=st.floats(width=32, allow_nan=True, allow_infinity=True),
    ),
    name=st.sampled_from(["logits", "hidden_states", "attentions"]),
)
def test_half_keeps_its_bound(array: np.ndarray, name: str) -> None:
    back = decode(encode(TensorRecord(name, array, "float32"), "half")).array
    finite = np.isfinite(array)
    np.testing.assert_array_equal(back[~finite], array[~finite])
    if not finite.any():
        return
    x = array[finite].astype(np.float64)
    shift = x.max() if name == "logits" else 0.0
    away = np.abs(x - shift)
    bound = np.maximum(2.0**-11 * away, 2.0**-39 * away.max())
    bound += 2.0**-22 * (np.abs(x) + abs(shift)) + 2.0**-140
    assert (np.abs(back[finite].astype(np.float64) - x) <= bound).all()


@pytest.mark.parametrize("name", ["logits", "attentions"])
def test_half_makes_again_what_it_has_made_once(name: str) -> None:
    """Also where the largest value was rounded up to a power of two, as weights near 1 are."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        array = (rng.random((2, 3, 7)) * 10.0 ** rng.integers(-6, 0, (2, 3, 7))).astype(np.float32)
        array[0, 0, 0] = 0.99999
        once = decode(encode(TensorRecord(name, array, "float32"), "half"))  # type: ignore[arg-type]
        again = encode(once, "half")
        assert again.codec.startswith("half")
        assert decode(again).array.tobytes() == once.array.tobytes()


def test_likely_tokens_are_the_most_precise() -> None:
    logits = np.linspace(-80, 21.37, 5000, dtype=np.float32)
    back = decode(encode(TensorRecord("logits", logits, "float32"), "half")).array
    assert back[-1] == logits[-1]
    error = np.abs(back - logits)
    assert error[-50:].max() < 5e-4 and error.max() < 0.04


def test_half_takes_activations_beyond_sixteen_bits() -> None:
    array = np.array([1e7, -3.5, 1e-3, 0], dtype=np.float32)
    encoded = encode(TensorRecord("hidden_states", array, "float32"), "half")
    assert encoded.codec.startswith("half")
    np.testing.assert_allclose(decode(encoded).array, array, rtol=2**-11, atol=1e7 * 2**-39)


def test_arrays_that_are_not_contiguous_and_numbers_of_numpy() -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6).T
    layers = tuple(np.arange(6))
    back = decode(
        encode(TensorRecord("hidden_states", array, "float32", layers, np.int64(2)), "exact")
    )
    np.testing.assert_array_equal(back.array, array)
    assert back.layers == (0, 1, 2, 3, 4, 5) and type(back.layers[0]) is int


@pytest.mark.parametrize(
    ("array", "dtype"),
    [(np.zeros(3, np.int8), "int8"), (np.zeros(3, np.float32), "bfloat16")],
)
def test_what_cannot_be_kept_is_refused(array: np.ndarray, dtype: str) -> None:
    with pytest.raises(TensorError, match="logits"):
        encode(TensorRecord("logits", array, dtype), "exact")


@pytest.mark.parametrize("mode", ["exact", "half", "compact"])
@given(data=st.data())
def test_any_damage_is_noticed(mode: str, data: st.DataObject) -> None:
    array = np.linspace(0, 1, 60, dtype=np.float32)
    good = encode(TensorRecord("attentions", array.reshape(2, 3, 10), "float32", (1, 2), 0), mode)
    at = data.draw(st.integers(0, len(good.data) - 1))
    flipped = bytearray(good.data)
    flipped[at] ^= data.draw(st.integers(1, 255))
    for bad in (
        dataclasses.replace(good, data=bytes(flipped)),
        dataclasses.replace(good, data=good.data[:at]),
        dataclasses.replace(good, shape=(3, 2, 10)),
        dataclasses.replace(good, layers=(2, 1)),
        dataclasses.replace(good, key_offset=1),
        dataclasses.replace(good, dtype="float64"),
    ):
        with pytest.raises(TensorError, match="attentions"):
            decode(bad)


@pytest.mark.parametrize(
    ("codec", "takes"),
    [("zstd", 200), ("half+zstd", 108), ("cumulative+zstd", 100), ("companded+zstd", 112),
     ("blocks+zstd", 58)],
)  # fmt: skip
def test_a_bomb_is_not_unpacked(codec: str, takes: int) -> None:
    zeros = zstandard.ZstdCompressor(level=1).compress(bytes(400_000_000))
    small = encode(TensorRecord("logits", np.zeros(50, np.float32), "float32"), "exact")
    with pytest.raises(
        TensorError, match=f"declares 400000000 bytes where its shape takes {takes}"
    ):
        decode(signed(dataclasses.replace(small, codec=codec, data=zeros)))


def test_a_frame_that_hides_its_size_is_not_unpacked() -> None:
    packer = zstandard.ZstdCompressor(level=1, write_content_size=False)
    zeros = packer.compress(bytes(400_000_000))
    small = encode(TensorRecord("logits", np.zeros(50, np.float32), "float32"), "exact")
    with pytest.raises(TensorError, match="where its shape takes 200"):
        decode(signed(dataclasses.replace(small, codec="zstd", data=zeros)))


@pytest.mark.parametrize(
    "change",
    [
        {"shape": (10**9, 10)},
        {"shape": (-50,)},
        {"shape": (49,)},
        {"codec": "gzip"},
        {"dtype": "object"},
        {"codec": "zstd", "data": b"no frame"},
        {"codec": "half+zstd"},
        {"codec": "raw", "data": b"123"},
        {"codec": "half", "data": b""},
        {"codec": "companded", "data": bytes(112)},
        {"codec": "companded", "data": b"\xff" * 112},
        {"codec": "cumulative", "data": b""},
        {"codec": "blocks", "data": bytes(57)},
        {"codec": "blocks+raw"},
    ],
)
def test_a_forged_row_is_a_clear_error(change: dict[str, object]) -> None:
    good = encode(TensorRecord("logits", np.zeros(50, np.float32), "float32"), "exact")
    with pytest.raises(TensorError, match="logits"):
        decode(signed(dataclasses.replace(good, **change)))


def test_halves_come_back_as_numpys_own() -> None:
    every = np.arange(1 << 16, dtype="<u2").view("<f2")
    for halves in (every, every[np.isfinite(every)], every[:0], every[:1024]):
        found, expected = floats_of(halves), halves.astype("<f4")
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found.view("<u4"), expected.view("<u4"))


def test_halves_are_numpys_own() -> None:
    """Every 16-bit float, all that lies halfway between two, and a little to either side."""
    exact = np.arange(2**16, dtype="<u2").view("<f2").astype("<f4")
    finite = np.sort(exact[np.isfinite(exact)])
    halfway = (finite[:-1] + finite[1:]) / 2
    beside = [np.nextafter(halfway, np.float32(way)) for way in (-np.inf, np.inf)]
    tiny = np.array([1e-45, -1e-45, 1e-30], dtype="<f4")
    every = np.concatenate([exact, halfway, *beside, tiny])
    largest = np.abs(every) < 65_520  # the others are rounded in another way
    for values in (
        every,
        every[largest],
        every[::-7],
        every[:0],
        every[largest][:2400].reshape(2, 3, 400),
    ):
        with np.errstate(over="ignore"):
            found, expected = halves_of(values), values.astype("<f2")
        assert found.shape == expected.shape and found.dtype == expected.dtype
        np.testing.assert_array_equal(found.view("<u2"), expected.view("<u2"))
