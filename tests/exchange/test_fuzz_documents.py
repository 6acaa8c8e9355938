"""JSON documents with anything anywhere, files with any bytes changed: refused or imported."""

from __future__ import annotations

import copy
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oki_trace.errors import OkiTraceError
from oki_trace.exchange.formats import Format
from tests.exchange.inline import import_bytes as import_stream
from tests.exchange.test_hostile_imports import db, exports, whole_or_nothing

__all__ = ["db", "exports"]

# The same few examples every time; as many others as wished for, by --hypothesis-seed.
LONG = os.environ.get("OKI_TRACE_FUZZ")
quick = settings(
    max_examples=int(LONG or 40),
    deadline=None,
    derandomize=LONG is None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


JUNK: Any = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def places(value: Any, so_far: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    paths = []
    for key, item in inside:
        paths.append((*so_far, key))
        if isinstance(item, dict | list):
            paths += places(item, (*so_far, key))
    return paths


@quick
@given(data=st.data())
def test_a_document_with_anything_anywhere(
    data: st.DataObject, exports: dict[Format, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A value replaced, dropped or doubled, up to three of them."""
    folder = tmp_path_factory.mktemp("fuzz")
    format = data.draw(st.sampled_from([Format.JSON, Format.TRACE_V1]))
    document = copy.deepcopy(json.loads(exports[format].read_text()))
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.sampled_from(places(document)))
        holder = document
        for key in where[:-1]:
            holder = holder[key]
        if data.draw(st.booleans()):
            holder[where[-1]] = data.draw(JUNK)
        elif isinstance(holder, list):
            holder.insert(where[-1], holder[where[-1]])
        else:
            del holder[where[-1]]
    (folder / "x.json").write_text(json.dumps(document))
    whole_or_nothing(folder / "x.json", folder / "t.db")


@quick
@given(data=st.data())
def test_a_file_with_any_bytes_changed(
    data: st.DataObject, exports: dict[Format, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    format = data.draw(st.sampled_from([Format.JSON, Format.JSONL, Format.PARQUET]))
    target = folder / "x"
    if format is Format.PARQUET:
        target.mkdir()
        for file in exports[format].iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        file = target / data.draw(st.sampled_from(sorted(p.name for p in target.iterdir())))
    else:
        file = target
        file.write_bytes(exports[format].read_bytes())
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    file.write_bytes(content)
    whole_or_nothing(target, folder / "t.db")


@quick
@given(data=st.binary(max_size=200))
def test_any_bytes_at_all(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    db = tmp_path_factory.mktemp("fuzz") / "t.db"
    with pytest.raises(OkiTraceError):
        import_stream(io.BytesIO(data), db)
    assert not db.exists()
