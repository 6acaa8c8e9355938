"""Reads the safetensors file next to an export, one step at a time.

The format is a JSON header followed by the arrays, with names such as
``message-2/step-5/logits``, or ``message-2/position-5/logits`` for a given token. The
values of the metadata are text. They contain, as JSON, facts that an array does not
include: ``layers`` by ``message-2/attentions`` (or by a tensor's full name where a step
differs), and ``key_offset`` by full name where it is not 0.

The header may list the tensors in any order; an index of 64 bytes per tensor is kept
in memory.
"""

from __future__ import annotations

import math
import os
import re
import struct
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, Literal, Self, cast, get_args

import numpy as np
from pydantic import Field, Json
from typing_extensions import TypedDict

from oki_trace.errors import ExchangeError
from oki_trace.exchange.reading import validation
from oki_trace.exchange.reading.json_stream import JsonStream
from oki_trace.exchange.reading.source import opened
from oki_trace.records import TensorRecord
from oki_trace.store.codecs.tensors import MAX_RAW_BYTES, TensorName

SUFFIX = ".safetensors"
FORMAT = "oki-trace"
CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# Little-endian; NumPy has no bfloat16, so its bits are stored.
ITEMS = {"float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}

Shape = Annotated[list[validation.Large], Field(max_length=3)]
Layers = Annotated[list[validation.Large], Field(max_length=validation.MAX_LAYERS + 1)]

# The limit of safetensors itself.
_MAX_HEADER_BYTES = 100_000_000
_DTYPES = {code: name for name, code in CODES.items()}
_NAME = re.compile(
    r"message-(\d{1,18})/(step|position)-(\d{1,9})/(logits|hidden_states|attentions)"
)
# The index has eight numbers a tensor: message, key of the step, name, dtype and dimensions in
# one, the shape filled up with ones, and where its bytes begin.
_NAMES = sorted(get_args(TensorName))
_KINDS = sorted(ITEMS)
_COLUMNS = 8
_MESSAGE, _STEP, _WHICH, _KIND, _SHAPE, _START = 0, 1, 2, 3, slice(4, 7), 7


@dataclass(frozen=True, slots=True)
class StepPlace:
    """A step of a message: by step_index, or by position if its token was ``given``.

    As text, its part of a tensor's name. ``key`` is a number that no other step of the
    message has: below 0 for given tokens.
    """

    index: int
    given: bool

    def __str__(self) -> str:
        return f"{'position' if self.given else 'step'}-{self.index}"

    @property
    def key(self) -> int:
        return -1 - self.index if self.given else self.index


class _Entry(TypedDict):
    dtype: Literal["F64", "F32", "F16", "BF16"]
    shape: Shape
    data_offsets: Annotated[list[validation.Large], Field(min_length=2, max_length=2)]


class _Metadata(TypedDict):
    format: Literal["oki-trace"]
    layers: Json[dict[str, Layers]]
    key_offset: Json[dict[str, validation.Large]]


def byte_count(dtype: str, shape: Sequence[int]) -> int:
    """The bytes of an array; Python's integers do not overflow."""
    return math.prod(shape) * np.dtype(ITEMS[dtype]).itemsize


def decode(
    name: str, dtype: str, shape: Sequence[int], data: bytes, layers: Sequence[int], offset: int
) -> TensorRecord:
    """A tensor from the bytes of its array."""
    stored = np.frombuffer(data, dtype=ITEMS[dtype]).reshape(shape)
    return TensorRecord(
        name=cast("TensorName", name),
        array=stored.astype(stored.dtype.newbyteorder("="), copy=False),
        dtype=dtype,
        layers=tuple(layers),
        key_offset=offset,
    )


class TensorFile:
    """The safetensors file of an export, which is not trusted. Raises ExchangeError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with ExitStack() as closing:
            self._file = closing.enter_context(opened(path, follow=False))
            self._read_header(os.fstat(self._file.fileno()).st_size)
            self._closing = closing.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._closing.close()

    def __len__(self) -> int:
        """The number of tensors."""
        return len(self._index)

    def has(self, message: int) -> bool:
        """Whether a reply has any tensor."""
        first, end = np.searchsorted(self._index[:, _MESSAGE], [message, message + 1])
        return bool(first < end)

    def of_step(self, message: int, step: StepPlace) -> Iterator[TensorRecord]:
        """The tensors of one step."""
        first, end = np.searchsorted(self._index[:, _MESSAGE], [message, message + 1])
        steps = self._index[first:end, _STEP]
        low, high = np.searchsorted(steps, [step.key, step.key + 1]) + first
        for place in self._index[low:high].tolist():
            name = _NAMES[place[_WHICH]]
            kind, dimensions = divmod(place[_KIND], 4)
            dtype, shape = _KINDS[kind], place[_SHAPE][:dimensions]
            size = byte_count(dtype, shape)
            self._file.seek(self._data + place[_START])
            data = self._file.read(size)
            if len(data) != size:
                raise self._wrong("it is shorter than its header says")
            full = f"message-{message}/{step}/{name}"
            layers = self._layers.get(full, self._layers.get(f"message-{message}/{name}", ()))
            yield decode(name, dtype, shape, data, layers, self._key_offsets.get(full, 0))

    def _read_header(self, size: int) -> None:
        first = self._file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise self._wrong("it has no header")
        self._data = 8 + length
        places: array[int] = array("q")
        metadata: list[_Metadata] = []
        stream = JsonStream(cast("BinaryIO", _Part(self._file, length)))
        try:
            # A name that comes twice is noticed in the index, which takes less memory.
            for name in stream.items(unique=False):
                if name == "__metadata__":
                    metadata.append(validation.read(_Metadata, stream.value(), name))
                else:
                    entry = validation.read(_Entry, stream.value(), name[:60])
                    places.extend(self._place(name, entry, size - self._data))
            stream.end()
            (only,) = metadata
        except (ExchangeError, ValueError) as error:
            raise self._wrong("its header is not that of an export") from error
        self._layers, self._key_offsets = only["layers"], only["key_offset"]
        index = np.frombuffer(places, dtype=np.int64).reshape(-1, _COLUMNS)
        order = np.lexsort((index[:, _WHICH], index[:, _STEP], index[:, _MESSAGE]))
        self._index = index[order]
        keys = self._index[:, : _WHICH + 1]
        if (keys[1:] == keys[:-1]).all(axis=1).any():
            raise self._wrong("it has a tensor twice")

    def _place(self, name: str, entry: _Entry, data_bytes: int) -> tuple[int, ...]:
        """A tensor as the numbers of the index. Raises ValueError."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError("not the name of a tensor")
        shape, dtype = entry["shape"], _DTYPES[entry["dtype"]]
        start, end = entry["data_offsets"]
        size = byte_count(dtype, shape)
        if not (start <= end <= data_bytes and end - start == size <= MAX_RAW_BYTES):
            raise ValueError("a tensor does not fit into the file")
        kind = _KINDS.index(dtype) * 4 + len(shape)
        filled = (*shape, *[1] * (3 - len(shape)))
        step = StepPlace(int(match[3]), match[2] == "position")
        return (int(match[1]), step.key, _NAMES.index(match[4]), kind, *filled, start)

    def _wrong(self, reason: str) -> ExchangeError:
        return ExchangeError(
            f"{self._path} is not a tensor file of oki-trace ({reason}): export it again, or "
            "move it away to import without tensors."
        )


class _Part:
    """The next ``length`` bytes of a file."""

    def __init__(self, file: BinaryIO, length: int) -> None:
        self._file = file
        self._left = length

    def read(self, size: int) -> bytes:
        data = self._file.read(min(size, self._left))
        self._left -= len(data)
        return data
