"""Reads the header of a GGUF file, with bounds, before any library reads it.

The libraries create an object for each element of an array, however many the file
declares. This module creates none, and compares every length with the file's length
and with those of published models.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

# The struct code of each scalar, by its number in the file; 8 is a string, 9 an array.
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIifBQqd", strict=True))
_INTEGERS = frozenset("BbHhIiQq")
_STRING, _ARRAY = 8, 9

# The largest vocabularies have 262,144 tokens and 514,906 merges.
MAX_ELEMENTS = 1 << 21
_MAX_IN_ARRAY = 1 << 20
_MAX_KEYS = 1 << 14
_MAX_TENSORS = 1 << 17
_MAX_DIMENSIONS = 8
_MAX_NAME = 1 << 12
_MAX_TEXT = 1 << 24


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The number of ``tensors``, of their ``elements`` together, and the integers by name."""

    tensors: int
    elements: int
    numbers: dict[str, int]


def read_gguf_header(path: Path) -> GgufHeader:
    """The file's header. Raises ValueError with what is wrong, to follow the file's name."""
    try:
        with path.open("rb", buffering=1 << 20) as stream:
            return _Reader(stream, path.stat().st_size).header()
    except (struct.error, OverflowError) as error:
        raise ValueError("is truncated") from error


class _Reader:
    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream = stream
        self._size = size
        self._elements = 0
        self._order = "<"

    def header(self) -> GgufHeader:
        if self._stream.read(4) != b"GGUF":
            raise ValueError("is not a GGUF file")
        version = self._scalar("I")
        if version & 0xFFFF == 0:
            self._order, version = ">", version >> 24
        if version not in (2, 3):
            raise ValueError(f"has GGUF version {version}, which is not supported")
        tensors, keys = self._scalar("Q"), self._scalar("Q")
        _limit(tensors, _MAX_TENSORS, "tensors")
        _limit(keys, _MAX_KEYS, "entries")
        numbers: dict[str, int] = {}
        for _ in range(keys):
            name = self._name()
            value = self._value(self._scalar("I"), name)
            if value is not None:
                numbers[name] = value
        return GgufHeader(tensors, sum(self._tensor() for _ in range(tensors)), numbers)

    def _value(self, kind: int, name: str, depth: int = 0) -> int | None:
        """An integer; None for any other value, which is skipped."""
        if kind in _SCALARS:
            value: int = self._scalar(_SCALARS[kind])
            return value if _SCALARS[kind] in _INTEGERS else None
        if kind == _STRING:
            self._skip(_limit(self._scalar("Q"), _MAX_TEXT, f"bytes in {name}"))
            return None
        if kind != _ARRAY or depth > 2:
            raise ValueError(f"has an entry {name} of an unknown kind")
        of, length = self._scalar("I"), self._scalar("Q")
        _limit(length, _MAX_IN_ARRAY, f"values in {name}")
        self._elements += length
        if self._elements > MAX_ELEMENTS:
            raise ValueError(f"declares more than {MAX_ELEMENTS:,} values, and no model has them")
        if of in _SCALARS:
            self._skip(length * struct.calcsize("<" + _SCALARS[of]))
        else:
            for _ in range(length):
                self._value(of, name, depth + 1)
        return None

    def _tensor(self) -> int:
        """The number of a tensor's elements."""
        self._name()
        elements = 1
        for _ in range(_limit(self._scalar("I"), _MAX_DIMENSIONS, "dimensions of a tensor")):
            elements *= self._scalar("Q")
        self._scalar("I")
        if self._scalar("Q") > self._size:
            raise ValueError("is truncated")
        return elements

    def _name(self) -> str:
        length = _limit(self._scalar("Q"), _MAX_NAME, "bytes in a name")
        return self._read(length).decode("utf-8", errors="replace")

    def _scalar(self, code: str) -> Any:
        return struct.unpack(self._order + code, self._read(struct.calcsize("<" + code)))[0]

    def _read(self, length: int) -> bytes:
        data = self._stream.read(length)
        if len(data) < length:
            raise ValueError("is truncated")
        return data

    def _skip(self, length: int) -> None:
        if self._stream.tell() + length > self._size:
            raise ValueError("is truncated")
        self._stream.seek(length, 1)


def _limit(number: int, most: int, what: str) -> int:
    if number > most:
        raise ValueError(f"declares {number:,} {what}, and no model has more than {most:,}")
    return number
