"""Tables, tensors and zips with anything in them: imported whole, or refused in one line."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oki_trace.exchange.formats import Format
from oki_trace.exchange.tables import TABLES
from tests.exchange.test_fuzz_documents import quick
from tests.exchange.test_hostile_imports import exports, whole_or_nothing

__all__ = ["exports"]


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Anything that a column of this type can hold, the awkward first."""
    if pa.types.is_integer(kind):
        top = 2 ** (kind.bit_width - 1)
        return st.sampled_from([0, -1, -2, top - 1, -top]) | st.integers(-top, top - 1)
    if pa.types.is_floating(kind):
        return st.floats(width=kind.bit_width)
    if pa.types.is_boolean(kind):
        return st.booleans()
    if pa.types.is_string(kind):
        odd = ["", "{}", "[]", "null", '{"policy": 1}', "NaN", "\x00", "../x"]
        return st.sampled_from(odd) | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    if pa.types.is_binary(kind):
        return st.binary(max_size=20)
    if pa.types.is_timestamp(kind):
        return st.integers(-(2**62), 2**62)
    return st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4)


@quick
@given(data=st.data())
def test_tables_with_anything_in_any_cell(
    data: st.DataObject, exports: dict[Format, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    target = folder / "x"
    shutil.copytree(exports[Format.PARQUET], target)
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from(sorted(TABLES)))
        schema = TABLES[name]
        table = pq.read_table(target / f"{name}.parquet")
        if not table.num_rows:
            continue
        rows = list(range(table.num_rows))
        row = data.draw(st.sampled_from(rows))
        how = data.draw(st.sampled_from(["value", "value", "value", "cut", "double", "swap"]))
        if how == "value":
            field = data.draw(st.sampled_from(list(schema)))
            values = table.column(field.name).to_pylist()
            if pa.types.is_timestamp(field.type):
                values = table.column(field.name).cast(pa.int64()).to_pylist()
            values[row] = data.draw(st.none() | values_of(field.type))
            at = table.column_names.index(field.name)
            table = table.set_column(at, field, pa.array(values, type=field.type))
        elif how == "cut":
            table = table.slice(0, row) if row else table.slice(1)
        elif how == "double":
            table = table.take([*rows[: row + 1], *rows[row:]])
        else:
            other = data.draw(st.sampled_from(rows))
            rows[row], rows[other] = rows[other], rows[row]
            table = table.take(rows)
        pq.write_table(table, target / f"{name}.parquet")
    whole_or_nothing(target, folder / "t.db")


def changed(data: st.DataObject, content: bytes) -> bytes:
    """A few bytes replaced, put in or taken out; now and then the rest cut off."""
    made = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(made) - 1))
        made[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    return bytes(made[: data.draw(st.sampled_from([len(made), len(made) // 2, len(made)]))])


@quick
@given(data=st.data())
def test_tensors_with_any_bytes_changed(
    data: st.DataObject, exports: dict[Format, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Half of the time within the header, which says where everything is."""
    folder = tmp_path_factory.mktemp("fuzz")
    full = exports[Format.JSON].parent / "full.json"
    shutil.copy(full, folder / "x.json")
    content = full.with_suffix(".safetensors").read_bytes()
    if data.draw(st.booleans()):
        end = 8 + int.from_bytes(content[:8], "little")
        content = changed(data, content[:end]) + content[end:]
    else:
        content = changed(data, content)
    (folder / "x.safetensors").write_bytes(content)
    whole_or_nothing(folder / "x.json", folder / "t.db")


@quick
@given(data=st.data())
def test_a_zip_with_any_bytes_changed(
    data: st.DataObject, exports: dict[Format, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    path = shutil.make_archive(str(folder / "x"), "zip", exports[Format.PARQUET])
    content = Path(path).read_bytes()
    if data.draw(st.booleans()):
        # The directory at its end, which names every member.
        start = content.index(b"PK\x01\x02")
        content = content[:start] + changed(data, content[start:])
    else:
        content = changed(data, content)
    Path(path).write_bytes(content)
    whole_or_nothing(Path(path), folder / "t.db")
