"""Encodes full tensors to bytes, and decodes them.

Activations hardly compress, so precision decides the size, not the compression level.
Codecs:

    raw        the array's own bits, little-endian, C order
    zstd       the same, compressed
    half       16-bit floats h with value = shift + scale * h; a header holds the two
    cumulative, companded, blocks    see ``compact``
    half+zstd, cumulative+zstd, …    the same, compressed

Mode "exact" preserves every bit. Mode "half" encodes a float32 array as ``half``: shift
is the maximum for logits, so that likely tokens are the most precise, and 0 otherwise;
scale is the power of two that makes the largest |value - shift| just fit. With M that
largest, the error of a value x is at most max(2^-11 |x - shift|, 2^-39 M), plus
float32's own rounding. NaN and infinities are preserved. A bfloat16 or float16 array is
stored bit for bit in both modes.

Mode "compact" guarantees, for every model: the error of an attention weight, and of the
sum of any run of them, is at most 2^-10 < 0.001; of a probability (the softmax of the
logits) at most 0.001, which is checked for each step as it is stored; of a hidden state
at most 1/254 of the largest among its 32 neighbours; a 16-bit array is then rounded to
its own dtype. An array that cannot meet this, because it contains NaN for example, is
stored as in mode "half", or bit for bit.

The checksum covers the stored bytes and everything needed to decode them, so it reveals
a changed shape as well as a changed byte. It finds damage, not forgery.
"""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import zstandard
from numpy.typing import NDArray

from oki_trace.errors import TensorError
from oki_trace.records import TensorRecord
from oki_trace.store.codecs import compact
from oki_trace.store.codecs.float16 import floats_of, halves_of

TensorName = Literal["logits", "hidden_states", "attentions"]

# NumPy has no bfloat16, so arrays hold its bits.
_STORED_AS = {"float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}

# Below SQLite's limit for one value, and enough for the attention of 64 layers with 64 heads
# over 100,000 keys as 16-bit floats.
MAX_RAW_BYTES = 1_000_000_000

_HALF_HEADER = struct.Struct("<ff")
_LARGEST_HALF_EXPONENT = 15  # 2^15 < 65504, the largest 16-bit float
# Beyond this, in either direction, scale or value could leave the range of float32.
_LARGEST_SCALED = 2.0**90
# Higher levels save less than 2 % on activations and cost several times as much.
_LEVEL = 1
_COMPACT = {"attentions": "cumulative", "logits": "companded", "hidden_states": "blocks"}
# Compression that leaves more than this share is not worth the time of each read.
_WORTHWHILE = 0.97


@dataclass(frozen=True, slots=True)
class TensorHead:
    """A stored tensor without its values. ``dtype`` and ``shape`` are those of the array."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    layers: tuple[int, ...]
    key_offset: int


@dataclass(frozen=True, slots=True)
class EncodedTensor(TensorHead):
    """A tensor as a row of the store."""

    codec: str
    checksum: str
    raw_bytes: int
    data: bytes


class Kept(NamedTuple):
    """A tensor as its row, and as it will be decoded from it."""

    row: EncodedTensor
    content: TensorRecord


def encode(tensor: TensorRecord, mode: Literal["exact", "half", "compact"]) -> EncodedTensor:
    """The row of ``tensor``. Raises TensorError for a dtype or size that cannot be stored."""
    return keep(tensor, mode).row


def keep(
    tensor: TensorRecord, mode: Literal["exact", "half", "compact"], *, faithful: bool = False
) -> Kept:
    """The same, with the tensor that will be decoded from the row.

    ``faithful``: in ``mode`` if that preserves every bit, else in mode "exact". It is for
    arrays that were decoded from a store: encoding them again nearly always preserves
    every bit.
    """
    row, content = _encode(tensor, mode)
    if faithful and content.array.tobytes() != tensor.array.tobytes():
        row, content = _encode(tensor, "exact")
    return Kept(row, content)


def _encode(tensor: TensorRecord, mode: Literal["exact", "half", "compact"]) -> Kept:
    stored_as = _STORED_AS.get(tensor.dtype)
    array = tensor.array
    if stored_as is None or array.dtype != np.dtype(stored_as).newbyteorder("="):
        raise TensorError(
            f"The tensor {tensor.name} ({tensor.dtype}, held as {array.dtype}) cannot be stored: "
            f"give it as {', '.join(_STORED_AS)}."
        )
    if array.nbytes > MAX_RAW_BYTES:
        raise TensorError(
            f"The tensor {tensor.name} has {array.nbytes} bytes, more than one value of a store "
            'can hold: capture with tensors="none", or shorten the prompt.'
        )
    codec, plain = "raw", b""
    if mode == "compact":
        codec, plain = _to_compact(tensor)
    elif mode == "half" and tensor.dtype == "float32":
        codec, plain = "half", _to_half(tensor.name, cast("NDArray[np.float32]", array))
    content = tensor
    if plain:
        values = _values(codec, plain, tensor.dtype, array.size)
        content = replace(tensor, array=values.reshape(array.shape))
    else:
        codec, plain = "raw", np.ascontiguousarray(array, dtype=stored_as).tobytes()
    packed = zstandard.ZstdCompressor(level=_LEVEL).compress(plain)
    if len(packed) < _WORTHWHILE * len(plain):
        codec, plain = ("zstd" if codec == "raw" else f"{codec}+zstd"), packed
    # The checksum covers the repr of these numbers, which is different for NumPy's integers.
    layers = tuple(int(layer) for layer in tensor.layers)
    head = (tensor.name, tensor.dtype, array.shape, layers, int(tensor.key_offset))
    checksum = _checksum(*head, codec, plain)
    return Kept(EncodedTensor(*head, codec, checksum, array.nbytes, plain), content)


def decode(encoded: EncodedTensor) -> TensorRecord:
    """Decode a row. Raises TensorError, which names the problem, for a row that was changed."""
    where = f"The stored tensor {encoded.name}"
    head = (encoded.name, encoded.dtype, encoded.shape, encoded.layers, encoded.key_offset)
    checksum = _checksum(*head, encoded.codec, encoded.data)
    if checksum != encoded.checksum:
        raise TensorError(
            f"{where} is damaged (checksum {checksum}, expected {encoded.checksum}): restore a "
            "backup, or generate the reply again."
        )
    kind, _, packing = encoded.codec.partition("+")
    if kind == "zstd":
        kind, packing = "raw", "zstd"
    stored_as = _STORED_AS.get(encoded.dtype)
    known = kind in ("raw", "half", *_COMPACT.values())
    if stored_as is None or not known or packing not in ("", "zstd"):
        raise TensorError(
            f"{where} has the unknown dtype or codec {encoded.dtype}, {encoded.codec}: upgrade "
            "oki-trace."
        )
    # From the declared shape, before decompression: a blob cannot use more memory.
    size = math.prod(encoded.shape)
    item = np.dtype(stored_as)
    if kind == "raw":
        expected = size * item.itemsize
    elif kind == "half":
        expected = _HALF_HEADER.size + 2 * size
    else:
        expected = compact.plain_size(kind, size)
    if min(encoded.shape, default=0) < 0 or size * item.itemsize > MAX_RAW_BYTES:
        raise TensorError(f"{where} has the impossible shape {encoded.shape}: restore a backup.")
    plain = _unpack(where, encoded.data, expected) if packing else encoded.data
    if len(plain) != expected:
        raise TensorError(
            f"{where} has {len(plain)} bytes where its shape {encoded.shape} takes {expected}: "
            "restore a backup."
        )
    try:
        array = _values(kind, plain, encoded.dtype, size)
    except ValueError as error:
        raise TensorError(f"{where} is invalid ({error}): restore a backup.") from error
    array = array.astype(item.newbyteorder("="), copy=False).reshape(encoded.shape)
    name = cast("TensorName", encoded.name)
    return TensorRecord(name, array, encoded.dtype, encoded.layers, encoded.key_offset)


def _values(kind: str, plain: bytes, dtype: str, size: int) -> NDArray[Any]:
    """The flat array of a codec's bytes. Raises ValueError for bytes no encoder wrote."""
    if kind == "raw":
        return np.frombuffer(plain, dtype=_STORED_AS[dtype])
    if kind == "half":
        return _from_half(plain)
    return _from_float32(compact.decode(kind, plain, size), dtype)


def _to_compact(tensor: TensorRecord) -> tuple[str, bytes]:
    """The codec and its bytes; no bytes when only mode "exact" can store the array."""
    if tensor.dtype == "float64":  # more precise than float32
        return "raw", b""
    floats = tensor.to_float32()
    codec = _COMPACT[tensor.name]
    if tensor.name == "attentions":
        plain = compact.cumulative(floats)
    elif tensor.name == "hidden_states":
        plain = compact.blocks(floats)
    else:
        for grid in compact.GRIDS:
            plain = compact.companded(floats, *grid)
            if plain and _keeps_probs(tensor, floats, compact.from_companded(plain)):
                return codec, plain
        plain = b""
    if not plain and tensor.dtype == "float32":
        codec, plain = "half", _to_half(tensor.name, floats)
        if (
            tensor.name == "logits"
            and plain
            and not _keeps_probs(tensor, floats, _from_half(plain))
        ):
            plain = b""
    return codec if plain else "raw", plain


def _keeps_probs(
    tensor: TensorRecord, exact: NDArray[np.float32], restored: NDArray[np.float32]
) -> bool:
    back = _from_float32(restored, tensor.dtype)
    as_read = TensorRecord(tensor.name, back, tensor.dtype).to_float32()
    return compact.keeps_probs(exact.ravel(), as_read.ravel())


def _from_float32(array: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """``array`` rounded to ``dtype``, to the nearest, ties to even."""
    if dtype == "bfloat16":
        bits = array.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return array.astype(dtype, copy=False)


def _to_half(name: str, array: NDArray[np.float32]) -> bytes:
    """The header and the 16-bit floats; no bytes when the array is out of range."""
    shift, values = np.float32(0), array
    if name == "logits" and array.size:
        shift = array.max()
        if not abs(shift) < _LARGEST_SCALED:
            return b""
        values = array - shift
    magnitude = np.abs(values)
    largest = float(magnitude.max(initial=0.0))
    if not math.isfinite(largest):
        largest = float(magnitude.max(initial=0.0, where=np.isfinite(magnitude)))
    if not (largest == 0 or 1 / _LARGEST_SCALED < largest < _LARGEST_SCALED):
        return b""
    mantissa, exponent = math.frexp(largest)
    # A largest value that was rounded up to a power of two gets the scale it was rounded with,
    # so that a decoded array is encoded to the same bytes.
    exponent -= _LARGEST_HALF_EXPONENT + (mantissa == 0.5) if largest else 0
    # A power of two: the scaling itself rounds nothing.
    halves = halves_of(values * np.float32(math.ldexp(1.0, -exponent)))
    return _HALF_HEADER.pack(shift, math.ldexp(1.0, exponent)) + halves.tobytes()


def _from_half(plain: bytes) -> NDArray[np.float32]:
    shift, scale = _HALF_HEADER.unpack_from(plain)
    values = floats_of(np.frombuffer(plain, dtype="<f2", offset=_HALF_HEADER.size))
    values *= np.float32(scale)
    values += np.float32(shift)
    return values


def _unpack(where: str, data: bytes, expected: int) -> bytes:
    try:
        claimed = zstandard.frame_content_size(data)
        if claimed == expected:
            return zstandard.ZstdDecompressor().decompress(data)
    except zstandard.ZstdError as error:
        raise TensorError(f"{where} cannot be unpacked ({error}): restore a backup.") from error
    raise TensorError(
        f"{where} declares {claimed} bytes where its shape takes {expected}: restore a backup."
    )


def _checksum(
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    layers: tuple[int, ...],
    key_offset: int,
    codec: str,
    data: bytes,
) -> str:
    meaning = repr((name, dtype, shape, layers, key_offset, codec)).encode()
    return f"crc32:{zlib.crc32(data, zlib.crc32(meaning)):08x}"
