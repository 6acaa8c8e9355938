"""The message format between the sandbox and its process.

A frame is two lengths (4 and 8 bytes), a header in JSON and a payload of bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any, BinaryIO

_LENGTHS = struct.Struct(">IQ")

# A statement of one megabyte can be six in JSON.
_HEADER_BYTES = 64_000_000

Frame = tuple[dict[str, Any], bytes]


def write(stream: BinaryIO, header: dict[str, Any], payload: bytes | memoryview = b"") -> None:
    """Write one frame and flush it."""
    text = json.dumps(header).encode()
    stream.write(_LENGTHS.pack(len(text), len(payload)))
    stream.write(text)
    stream.write(payload)
    stream.flush()


def read(stream: BinaryIO, most: Callable[[], int] | None = None) -> Frame | None:
    """The next frame; None at the end, for an incomplete frame, and for one whose payload has more
    bytes than ``most()``.
    """
    lengths = stream.read(_LENGTHS.size)
    if len(lengths) < _LENGTHS.size:
        return None
    header, payload = _LENGTHS.unpack(lengths)
    if header > _HEADER_BYTES or (most is not None and payload > most()):
        return None
    text, data = stream.read(header), stream.read(payload)
    if len(text) < header or len(data) < payload:
        return None
    return json.loads(text), data
