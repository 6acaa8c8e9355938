"""Full tensors written as a safetensors file (see ``tensor_file.py``), one after another.

The library that defines the format writes it from memory alone, and its NumPy
side has no bfloat16; so it is written here, in constant memory however long the
replies, and any reader of safetensors opens it.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from oki_trace.exchange.selection import Selection
from oki_trace.exchange.tensor_file import CODES, FORMAT, ITEMS
from oki_trace.reporting import Progress
from oki_trace.store.codecs.tensors import TensorHead


def write_tensors(chosen: Selection, file: BinaryIO, progress: Progress | None = None) -> int:
    """Write every full tensor of the selection; returns how many there are.

    What is known of them is read once for each part of the file, and never held.
    """
    file.write(bytes(8))  # the header's length, known when it is written
    count = end = 0
    for message_id, index, head in _heads(chosen):
        size = math.prod(head.shape) * np.dtype(ITEMS[head.dtype]).itemsize
        entry = {
            "dtype": CODES[head.dtype],
            "shape": list(head.shape),
            "data_offsets": [end, end + size],
        }
        _put(file, "," if count else "{", f"message-{message_id}/step-{index}/{head.name}", entry)
        end += size
        count += 1
    file.write(b',"__metadata__":{"format":' if count else b'{"__metadata__":{"format":')
    file.write(_json(FORMAT))
    for name, pairs in (("layers", _layers(chosen)), ("key_offset", _key_offsets(chosen))):
        file.write(b"," + _json(name) + b':"{')
        for place, (key, value) in enumerate(pairs):
            text = f"{json.dumps(key)}: {json.dumps(value)}"
            # JSON as text in JSON: its quotes are escaped once more.
            file.write(_json(", " + text if place else text)[1:-1])
        file.write(b'}"')
    file.write(b"}}")
    file.write(b" " * (-file.tell() % 8))
    start = file.tell()
    file.seek(0)
    file.write(struct.pack("<Q", start - 8))
    file.seek(start)
    for done, (message_id, index, head) in enumerate(_heads(chosen), start=1):
        tensor = chosen.reader.tensor(message_id, index, head.name)
        file.write(tensor.array.astype(ITEMS[tensor.dtype], copy=False).tobytes())
        if progress is not None:
            progress(done, count)
    return count


def _heads(chosen: Selection) -> Iterator[tuple[int, int, TensorHead]]:
    """(message, step, tensor) of all, in the order in which they are written."""
    for reply in chosen.replies:
        for index, head in chosen.reader.tensor_heads(reply.id):
            yield reply.id, index, head


def _layers(chosen: Selection) -> Iterator[tuple[str, list[int]]]:
    """The layers of each reply's tensors, and of those that differ from its first."""
    general: dict[tuple[int, str], tuple[int, ...]] = {}
    for message_id, index, head in _heads(chosen):
        first = general.get((message_id, head.name))
        if first is None:
            general[message_id, head.name] = head.layers
            yield f"message-{message_id}/{head.name}", list(head.layers)
        elif first != head.layers:
            yield f"message-{message_id}/step-{index}/{head.name}", list(head.layers)


def _key_offsets(chosen: Selection) -> Iterator[tuple[str, int]]:
    for message_id, index, head in _heads(chosen):
        if head.key_offset:
            yield f"message-{message_id}/step-{index}/{head.name}", head.key_offset


def _put(file: BinaryIO, before: str, name: str, value: Any) -> None:
    file.write(before.encode() + _json(name) + b":" + _json(value))


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
