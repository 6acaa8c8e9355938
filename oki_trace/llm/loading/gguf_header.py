"""What a GGUF file says of itself, read with bounds before any library reads it.

The readers that follow make an object of each element of an array, whatever number
of them the file declares. Here nothing is made of them, and every length is held
against the file and against what models have.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

# By number in the file: the struct code of a scalar. 8 is a string, 9 an array.
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIifBQqd", strict=True))
_INTEGERS = frozenset("BbHhIiQq")
_STRING, _ARRAY = 8, 9

# The largest vocabularies have 262,144 tokens and 514,906 merges.
MOST_ELEMENTS = 1 << 21
_MOST_IN_ONE = 1 << 20
_MOST_KEYS = 1 << 14
_MOST_TENSORS = 1 << 17
_MOST_DIMENSIONS = 8
_MOST_NAME = 1 << 12
_MOST_TEXT = 1 << 24


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """How many ``tensors``, of how many ``elements`` together; its whole ``numbers``, by name."""

    tensors: int
    elements: int
    numbers: dict[str, int] = field(default_factory=dict)


class _Unsound(ValueError):
    """What is wrong, to follow on the file's name."""


def read_header(path: Path) -> GgufHeader:
    """The file's header. Raises ValueError that says what is wrong with it."""
    try:
        with path.open("rb", buffering=1 << 20) as stream:
            return _Reader(stream, path.stat().st_size).header()
    except (struct.error, OverflowError) as error:
        raise _Unsound("is cut short") from error


class _Reader:
    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream = stream
        self._size = size
        self._left = MOST_ELEMENTS
        self._order = "<"

    def header(self) -> GgufHeader:
        if self._stream.read(4) != b"GGUF":
            raise _Unsound("is not a GGUF file")
        version = self._number("I")
        if version & 0xFFFF == 0:
            self._order, version = ">", version >> 24
        if version not in (2, 3):
            raise _Unsound(f"is of version {version} of GGUF, which is not read")
        tensors, keys = self._number("Q"), self._number("Q")
        self._most(tensors, _MOST_TENSORS, "tensors")
        self._most(keys, _MOST_KEYS, "entries")
        numbers: dict[str, int] = {}
        for _ in range(keys):
            name = self._name()
            value = self._value(self._number("I"), name)
            if value is not None:
                numbers[name] = value
        return GgufHeader(tensors, sum(self._tensor() for _ in range(tensors)), numbers)

    def _value(self, kind: int, name: str, depth: int = 0) -> int | None:
        """A whole number; None for what is something else, which is passed over."""
        if kind in _SCALARS:
            value = self._number(_SCALARS[kind])
            return value if _SCALARS[kind] in _INTEGERS else None
        if kind == _STRING:
            self._pass(self._most(self._number("Q"), _MOST_TEXT, f"bytes in {name}"))
            return None
        if kind != _ARRAY or depth > 2:
            raise _Unsound(f"has an entry {name} of an unknown kind")
        of, length = self._number("I"), self._number("Q")
        self._most(length, _MOST_IN_ONE, f"values in {name}")
        self._left -= length
        if self._left < 0:
            raise _Unsound(f"declares more than {MOST_ELEMENTS:,} values, and no model has them")
        if of in _SCALARS:
            self._pass(length * struct.calcsize("<" + _SCALARS[of]))
        else:
            for _ in range(length):
                self._value(of, name, depth + 1)
        return None

    def _tensor(self) -> int:
        self._name()
        dimensions = self._most(self._number("I"), _MOST_DIMENSIONS, "dimensions of a tensor")
        elements = 1
        for _ in range(dimensions):
            elements *= self._number("Q")
        self._number("I")
        if self._number("Q") > self._size:
            raise _Unsound("is cut short")
        return elements

    def _name(self) -> str:
        length = self._most(self._number("Q"), _MOST_NAME, "bytes in a name")
        return self._read(length).decode("utf-8", errors="replace")

    def _most(self, number: int, most: int, what: str) -> int:
        if number > most:
            raise _Unsound(f"declares {number:,} {what}, and no model has more than {most:,}")
        return number

    def _number(self, code: str) -> int:
        found: int = struct.unpack(self._order + code, self._read(struct.calcsize("<" + code)))[0]
        return found

    def _read(self, length: int) -> bytes:
        found = self._stream.read(length)
        if len(found) < length:
            raise _Unsound("is cut short")
        return found

    def _pass(self, length: int) -> None:
        if self._stream.tell() + length > self._size:
            raise _Unsound("is cut short")
        self._stream.seek(length, 1)
