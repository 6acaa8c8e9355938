"""Writes full tensors to a safetensors file (see ``tensor_file.py``), one after another.

The safetensors library needs all tensors in memory, and has no bfloat16 for NumPy.
This module uses constant memory, whatever the length of the replies, and every
safetensors reader can open the file.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO

from oki_trace.exchange.selection import Selection
from oki_trace.exchange.tensor_file import CODES, FORMAT, ITEMS, StepPlace, byte_count
from oki_trace.store.codecs.tensors import TensorHead


def write_tensors(chosen: Selection, file: BinaryIO) -> int:
    """Write every full tensor of the selection; returns their number.

    The list of tensors is read again for each part of the file, and never held.
    """
    file.write(bytes(8))  # the header's length, which is known later
    count = end = 0
    for path, _, _, head in _heads(chosen):
        size = byte_count(head.dtype, head.shape)
        entry = {
            "dtype": CODES[head.dtype],
            "shape": list(head.shape),
            "data_offsets": [end, end + size],
        }
        key = _json(path)
        file.write((b"," if count else b"{") + key + b":" + _json(entry))
        end += size
        count += 1
    file.write(b',"__metadata__":{"format":' if count else b'{"__metadata__":{"format":')
    file.write(_json(FORMAT))
    for name, pairs in (("layers", _layers(chosen)), ("key_offset", _key_offsets(chosen))):
        file.write(b"," + _json(name) + b':"{')
        for place, (path, value) in enumerate(pairs):
            text = f"{json.dumps(path)}: {json.dumps(value)}"
            # JSON as text in JSON: its quotes are escaped once more.
            file.write(_json(", " + text if place else text)[1:-1])
        file.write(b'}"')
    file.write(b"}}")
    file.write(b" " * (-file.tell() % 8))
    start = file.tell()
    file.seek(0)
    file.write(struct.pack("<Q", start - 8))
    file.seek(start)
    for done, (_, message_id, step, head) in enumerate(_heads(chosen), start=1):
        tensor = chosen.reader.tensor(message_id, step.index, head.name, given=step.given)
        file.write(tensor.array.astype(ITEMS[tensor.dtype], copy=False).tobytes())
        chosen.progress(done, count)
    return count


def _heads(chosen: Selection) -> Iterator[tuple[str, int, StepPlace, TensorHead]]:
    """(name in the file, message id, step, tensor) in the order of the file."""
    for reply in chosen.replies:
        for given in (True, False):
            for index, head in chosen.reader.tensor_heads(reply.id, given=given):
                place = StepPlace(index, given)
                yield f"message-{reply.id}/{place}/{head.name}", reply.id, place, head


def _layers(chosen: Selection) -> Iterator[tuple[str, list[int]]]:
    """The layers of each reply's first tensor of a name, and of those that differ from it."""
    first_layers: dict[tuple[int, str], tuple[int, ...]] = {}
    for path, message_id, _, head in _heads(chosen):
        first = first_layers.get((message_id, head.name))
        if first is None:
            first_layers[message_id, head.name] = head.layers
            yield f"message-{message_id}/{head.name}", list(head.layers)
        elif first != head.layers:
            yield path, list(head.layers)


def _key_offsets(chosen: Selection) -> Iterator[tuple[str, int]]:
    for path, _, _, head in _heads(chosen):
        if head.key_offset:
            yield path, head.key_offset


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
