"""Full tensors as a safetensors file, written and read a tensor at a time.

The library that defines the format writes it from memory alone, and its NumPy
side has no bfloat16; the format is a header and the arrays one after another,
so a reply of any length is written here in constant memory, and any reader of
safetensors opens it. Names: ``message-2/step-5/logits``.

The metadata, which holds text alone, has what an array does not say of itself,
as JSON: ``layers`` by ``message-2/attentions`` (or by a tensor's full name
where a step differs), ``key_offset`` by full name where it is not 0.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, cast

import numpy as np

from oki_trace.errors import ExchangeError
from oki_trace.exchange.selection import Progress, Selection
from oki_trace.records import Tensor
from oki_trace.store.tensors import MAX_RAW_BYTES, TensorName

SUFFIX = ".safetensors"

_FORMAT = "oki-trace"
# What safetensors itself allows a header to be.
_MAX_HEADER_BYTES = 100_000_000
_CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_DTYPES = {code: name for name, code in _CODES.items()}
# Little-endian; NumPy has no bfloat16, its bits stand in for it.
ITEMS = {"float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}
_NAME = re.compile(r"message-(\d{1,18})/step-(\d{1,9})/(logits|hidden_states|attentions)")


def write_tensors(chosen: Selection, file: BinaryIO, progress: Progress | None = None) -> int:
    """Write every full tensor of the selection; returns how many there are."""
    header: dict[str, Any] = {}
    layers: dict[str, list[int]] = {}
    offsets: dict[str, int] = {}
    places = []
    end = 0
    for reply in chosen.replies:
        for index, head in chosen.reader.tensor_heads(reply.id):
            full = f"message-{reply.id}/step-{index}/{head.name}"
            general = f"message-{reply.id}/{head.name}"
            own = list(head.layers)
            if layers.setdefault(general, own) != own:
                layers[full] = own
            if head.key_offset:
                offsets[full] = head.key_offset
            size = math.prod(head.shape) * np.dtype(ITEMS[head.dtype]).itemsize
            header[full] = {
                "dtype": _CODES[head.dtype],
                "shape": list(head.shape),
                "data_offsets": [end, end + size],
            }
            end += size
            places.append((reply.id, index, head.name))
    header["__metadata__"] = {
        "format": _FORMAT,
        "layers": json.dumps(layers),
        "key_offset": json.dumps(offsets),
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for done, (message_id, index, name) in enumerate(places, start=1):
        tensor = chosen.reader.tensor(message_id, index, name)
        file.write(tensor.array.astype(ITEMS[tensor.dtype], copy=False).tobytes())
        if progress is not None:
            progress(done, len(places))
    return len(places)


@dataclass(frozen=True, slots=True)
class _Place:
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class TensorFile:
    """A safetensors file of this project's making, which is not taken at its word.

    Raises ExchangeError for what is not one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise ExchangeError(f"Cannot read {path}: {error.strerror or error}.") from error
        try:
            self._read_header(path.stat().st_size)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def __len__(self) -> int:
        """How many tensors there are."""
        return len(self._places)

    def of_step(self, message: int, step_index: int) -> Iterator[Tensor]:
        """The tensors of one step."""
        for name in self._of.get((message, step_index), ()):
            full = f"message-{message}/step-{step_index}/{name}"
            place = self._places[full]
            self._file.seek(self._data + place.start)
            data = self._file.read(place.end - place.start)
            if len(data) != place.end - place.start:
                raise self._wrong("it is shorter than it says")
            array = np.frombuffer(data, dtype=ITEMS[place.dtype]).reshape(place.shape)
            general = f"message-{message}/{name}"
            yield Tensor(
                name=name,
                array=array.astype(array.dtype.newbyteorder("="), copy=False),
                dtype=place.dtype,
                layers=self._layers.get(full, self._layers.get(general, ())),
                key_offset=self._key_offsets.get(full, 0),
            )

    def _read_header(self, size: int) -> None:
        first = self._file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise self._wrong("it has no header")
        try:
            header = json.loads(self._file.read(length))
            metadata = header.pop("__metadata__")
            layers, offsets = json.loads(metadata["layers"]), json.loads(metadata["key_offset"])
            assert metadata["format"] == _FORMAT and isinstance(layers, dict)
            self._layers = {name: _integers(value) for name, value in layers.items()}
            self._key_offsets = {
                name: _integers([value])[0] for name, value in dict(offsets).items()
            }
            self._data = 8 + length
            self._places = {
                name: self._place(entry, size - self._data) for name, entry in header.items()
            }
        except ExchangeError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
            raise self._wrong("its header is not an export's") from error
        except RecursionError as error:
            raise self._wrong("its header is nested too deeply") from error
        self._of: dict[tuple[int, int], list[TensorName]] = {}
        for name in self._places:
            parts = _NAME.fullmatch(name)
            if parts is None:
                raise self._wrong(f"{name[:60]!r} is no name of a tensor")
            key = (int(parts[1]), int(parts[2]))
            self._of.setdefault(key, []).append(cast("TensorName", parts[3]))

    def _place(self, entry: dict[str, Any], room: int) -> _Place:
        shape = _integers(entry["shape"])
        start, end = _integers(entry["data_offsets"])
        dtype = _DTYPES[entry["dtype"]]
        # By Python's own integers, which do not overflow.
        size = math.prod(shape) * np.dtype(ITEMS[dtype]).itemsize
        if not (0 <= start <= end <= room and end - start == size <= MAX_RAW_BYTES):
            raise self._wrong("a tensor does not fit into it")
        if len(shape) > 3:
            raise self._wrong("a tensor has more dimensions than any of ours")
        return _Place(dtype, shape, start, end)

    def _wrong(self, what: str) -> ExchangeError:
        return ExchangeError(
            f"{self._path} holds no tensors of oki-trace ({what}): export them again, or move it "
            "away to import without them."
        )


def _integers(values: Any) -> tuple[int, ...]:
    """A short list of whole numbers from 0. Raises ValueError."""
    good = isinstance(values, list) and len(values) <= 100_000
    if not good or not all(type(v) is int and 0 <= v < 2**53 for v in values):
        raise ValueError("no list of whole numbers")
    return tuple(values)
