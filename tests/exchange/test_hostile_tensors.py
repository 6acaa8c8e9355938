"""The file of tensors beside an import is read as it says it is, or refused."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from oki_trace.exchange.exporting import export
from oki_trace.exchange.formats import Format
from oki_trace.store.reading.reader import TraceReader
from tests.exchange.inline import import_inline as import_path
from tests.exchange.test_hostile_imports import db, exports, refused

__all__ = ["db", "exports"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 8,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"\xff\xff\xff\xff",
    ],
)
def test_a_file_of_tensors_that_is_none_is_refused(
    data: bytes, exports: dict[Format, Path], tmp_path: Path, db: Path
) -> None:
    (tmp_path / "x.json").write_bytes(exports[Format.JSON].read_bytes())
    (tmp_path / "x.safetensors").write_bytes(data)
    refused(tmp_path / "x.json", db, "is not a tensor file of oki-trace")


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h["message-3/step-0/logits"].update(shape=[2**62, 2**62]),
        lambda h: h["message-3/step-0/logits"].update(data_offsets=[0, 2**60]),
        lambda h: h["message-3/step-0/logits"].update(data_offsets=[100, 0]),
        lambda h: h["message-3/step-0/logits"].update(dtype="PICKLE"),
        lambda h: h.update({"../../x": h.pop("message-3/step-0/logits")}),
        lambda h: h.update({"message-3/step-99/logits": h.pop("message-3/step-0/logits")}),
        lambda h: h["__metadata__"].update(layers="["),
        lambda h: h["__metadata__"].update(key_offset='{"message-3/step-0/logits": -1}'),
        lambda h: h.pop("__metadata__"),
    ],
)
def test_a_header_of_tensors_is_not_believed(
    change: Callable[[Any], object], exports: dict[Format, Path], tmp_path: Path, db: Path
) -> None:
    header = header_of(exports)
    change(header)
    refused(with_header(json.dumps(header), exports, tmp_path), db, "tensors")


@pytest.mark.parametrize("name", ["message-3/step-0/logits", "__metadata__"])
def test_a_name_twice_in_a_header_of_tensors_is_refused(
    name: str, exports: dict[Format, Path], tmp_path: Path, db: Path
) -> None:
    header = header_of(exports)
    text = json.dumps(header)[:-1] + f', "{name}": {json.dumps(header[name])}}}'
    refused(with_header(text, exports, tmp_path), db, "is not a tensor file of oki-trace")


def test_a_header_of_tensors_may_name_them_in_any_order(
    exports: dict[Format, Path], tmp_path: Path, db: Path
) -> None:
    header = header_of(exports)
    turned = dict(reversed(header.items()))
    import_path(with_header(json.dumps(turned), exports, tmp_path), db)
    with TraceReader(db) as reader:
        export(reader, 1, Format.JSON, tmp_path / "again.json", sys.stdout, tensors=True)
    again = (tmp_path / "again.safetensors").read_bytes()
    assert again == (exports[Format.JSON].parent / "full.safetensors").read_bytes()


def header_of(exports: dict[Format, Path]) -> dict[str, Any]:
    data = (exports[Format.JSON].parent / "full.safetensors").read_bytes()
    header: dict[str, Any] = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    return header


def with_header(text: str, exports: dict[Format, Path], folder: Path) -> Path:
    """The export with its tensors, under another header."""
    full = exports[Format.JSON].parent / "full.json"
    data = full.with_suffix(".safetensors").read_bytes()
    arrays = data[8 + struct.unpack("<Q", data[:8])[0] :]
    (folder / "x.json").write_bytes(full.read_bytes())
    (folder / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text.encode() + arrays)
    return folder / "x.json"
