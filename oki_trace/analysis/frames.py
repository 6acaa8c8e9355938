"""Frames between the process that asks SQL and the one that answers it.

A frame is two lengths (4 and 8 bytes), a header in JSON and a payload of bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any, BinaryIO

_LENGTHS = struct.Struct(">IQ")

# A statement of a megabyte may be six in JSON.
_HEADER_BYTES = 64_000_000

Frame = tuple[dict[str, Any], bytes]


def write(stream: BinaryIO, header: dict[str, Any], payload: bytes | memoryview = b"") -> None:
    """Write one frame and flush it."""
    told = json.dumps(header).encode()
    stream.write(_LENGTHS.pack(len(told), len(payload)))
    stream.write(told)
    stream.write(payload)
    stream.flush()


def read(stream: BinaryIO, most: Callable[[], int] | None = None) -> Frame | None:
    """The next frame; None at the end, where a frame is cut short, and where its payload has
    more bytes than ``most`` allows by then.
    """
    lengths = stream.read(_LENGTHS.size)
    if len(lengths) < _LENGTHS.size:
        return None
    header, payload = _LENGTHS.unpack(lengths)
    if header > _HEADER_BYTES or (most is not None and payload > most()):
        return None
    told, data = stream.read(header), stream.read(payload)
    if len(told) < header or len(data) < payload:
        return None
    return json.loads(told), data
