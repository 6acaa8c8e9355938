"""The safetensors file that stands beside an export, and reading it a step at a time.

The format is a header, which is JSON, and the arrays one after another. Names:
``message-2/step-5/logits``. The metadata, which holds text alone, has what an
array does not say of itself, as JSON: ``layers`` by ``message-2/attentions``
(or by a tensor's full name where a step differs), ``key_offset`` by full name
where it is not 0.

The header may name the tensors in any order; where each lies is held in 64
bytes a tensor.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, cast, get_args

import numpy as np

from oki_trace.errors import ExchangeError
from oki_trace.exchange.reading.json_stream import JsonStream
from oki_trace.exchange.reading.source import opened
from oki_trace.records import TensorRecord
from oki_trace.store.codecs.tensors import MAX_RAW_BYTES, TensorName

SUFFIX = ".safetensors"
FORMAT = "oki-trace"
CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# Little-endian; NumPy has no bfloat16, its bits stand in for it.
ITEMS = {"float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}

# What safetensors itself allows a header to be.
_MAX_HEADER_BYTES = 100_000_000
_MAX_LIST = 1_001  # layers
_DTYPES = {code: name for name, code in CODES.items()}
_NAME = re.compile(r"message-(\d{1,18})/step-(\d{1,9})/(logits|hidden_states|attentions)")
# As numbers, so that a tensor's place is eight of them: message, step, name, dtype and
# dimensions in one, the shape filled up with ones, and where its bytes begin.
_NAMES = sorted(get_args(TensorName))
_KINDS = sorted(ITEMS)
_COLUMNS = 8
_MESSAGE, _STEP, _WHICH, _KIND, _SHAPE, _START = 0, 1, 2, 3, slice(4, 7), 7


class TensorFile:
    """A safetensors file of this project's making, which is not taken at its word.

    Raises ExchangeError for what is not one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with ExitStack() as closing:
            self._file = closing.enter_context(opened(path, follow=False))
            self._read_header(os.fstat(self._file.fileno()).st_size)
            self._closing = closing.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.close()

    def __len__(self) -> int:
        """How many tensors there are."""
        return len(self._places)

    def has(self, message: int) -> bool:
        """Whether there is any tensor of a reply."""
        first, end = np.searchsorted(self._places[:, _MESSAGE], [message, message + 1])
        return bool(first < end)

    def of_step(self, message: int, step_index: int) -> Iterator[TensorRecord]:
        """The tensors of one step."""
        first, end = np.searchsorted(self._places[:, _MESSAGE], [message, message + 1])
        steps = self._places[first:end, _STEP]
        low, high = np.searchsorted(steps, [step_index, step_index + 1]) + first
        for place in self._places[low:high].tolist():
            name = _NAMES[place[_WHICH]]
            kind, dimensions = divmod(place[_KIND], 4)
            dtype, shape = _KINDS[kind], place[_SHAPE][:dimensions]
            size = math.prod(shape) * np.dtype(ITEMS[dtype]).itemsize
            self._file.seek(self._data + place[_START])
            data = self._file.read(size)
            if len(data) != size:
                raise self._wrong("it is shorter than it says")
            full = f"message-{message}/step-{step_index}/{name}"
            found = np.frombuffer(data, dtype=ITEMS[dtype]).reshape(shape)
            yield TensorRecord(
                name=cast("TensorName", name),
                array=found.astype(found.dtype.newbyteorder("="), copy=False),
                dtype=dtype,
                layers=self._layers.get(full, self._layers.get(f"message-{message}/{name}", ())),
                key_offset=self._key_offsets.get(full, 0),
            )

    def _read_header(self, size: int) -> None:
        first = self._file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise self._wrong("it has no header")
        self._data = 8 + length
        places, metadata = array("q"), None
        for name, value in self._header(length):
            if name != "__metadata__":
                places.extend(self._place(name, value, size - self._data))
            elif metadata is None:
                metadata = value
            else:
                raise self._wrong("its header is not an export's")
        try:
            assert metadata is not None and metadata["format"] == FORMAT
            self._layers = {
                name: _integers(value) for name, value in json.loads(metadata["layers"]).items()
            }
            self._key_offsets = {
                name: _integers([value])[0]
                for name, value in json.loads(metadata["key_offset"]).items()
            }
        except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
            raise self._wrong("its header is not an export's") from error
        except RecursionError as error:
            raise self._wrong("its header is nested too deeply") from error
        found = np.frombuffer(places, dtype=np.int64).reshape(-1, _COLUMNS)
        order = np.lexsort((found[:, _WHICH], found[:, _STEP], found[:, _MESSAGE]))
        self._places = found[order]
        keys = self._places[:, : _WHICH + 1]
        if (keys[1:] == keys[:-1]).all(axis=1).any():
            raise self._wrong("a tensor is there twice")

    def _header(self, length: int) -> Iterator[tuple[str, Any]]:
        """The names in the header with their values, one at a time."""
        stream = JsonStream(cast("BinaryIO", _Part(self._file, length)), str(self._path))
        try:
            # Names given twice are found among the places, where they take less room.
            for name in stream.items(unique=False):
                yield name, stream.value()
            stream.end()
        except ExchangeError as error:
            raise self._wrong("its header is not an export's") from error

    def _place(self, name: str, entry: Any, room: int) -> tuple[int, ...]:
        """A tensor's place, as the numbers that are kept of it."""
        parts = _NAME.fullmatch(name)
        if parts is None:
            raise self._wrong(f"{name[:60]!r} is no name of a tensor")
        try:
            shape = _integers(entry["shape"])
            start, end = _integers(entry["data_offsets"])
            dtype = _DTYPES[entry["dtype"]]
        except (ValueError, LookupError, TypeError) as error:
            raise self._wrong("its header is not an export's") from error
        # By Python's own integers, which do not overflow.
        size = math.prod(shape) * np.dtype(ITEMS[dtype]).itemsize
        if not (0 <= start <= end <= room and end - start == size <= MAX_RAW_BYTES):
            raise self._wrong("a tensor does not fit into it")
        if len(shape) > 3:
            raise self._wrong("a tensor has more dimensions than any of ours")
        kind = _KINDS.index(dtype) * 4 + len(shape)
        filled = (*shape, *[1] * (3 - len(shape)))
        return (int(parts[1]), int(parts[2]), _NAMES.index(parts[3]), kind, *filled, start)

    def _wrong(self, what: str) -> ExchangeError:
        return ExchangeError(
            f"{self._path} holds no tensors of oki-trace ({what}): export them again, or move it "
            "away to import without them."
        )


class _Part:
    """So many bytes of a file, and no more."""

    def __init__(self, file: BinaryIO, length: int) -> None:
        self._file = file
        self._left = length

    def read(self, size: int) -> bytes:
        data = self._file.read(min(size, self._left))
        self._left -= len(data)
        return data


def _integers(values: Any) -> tuple[int, ...]:
    """A short list of whole numbers from 0. Raises ValueError."""
    good = isinstance(values, list) and len(values) <= _MAX_LIST
    if not good or not all(type(v) is int and 0 <= v < 2**53 for v in values):
        raise ValueError("no list of whole numbers")
    return tuple(values)
