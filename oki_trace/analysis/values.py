"""Converts the values of a result so that Arrow, Parquet and Python can hold them.

Python's dates end with the year 9999, Arrow's numbers have at most 38 digits, and Parquet has no
unions. A value that one of them cannot hold becomes text, as DuckDB writes it.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from oki_trace.errors import QuestionError

# The types that all three hold. A list loses time zones, so a zoned time in it becomes text.
_KEPT = frozenset({"boolean", "float", "double", "decimal", "varchar", "blob", "uuid", "null"}) | {
    *("tinyint", "smallint", "integer", "bigint", "hugeint"),
    *("utinyint", "usmallint", "uinteger", "ubigint"),
    *("date", "time", "timestamp", "timestamp_s", "timestamp_ms"),
    '"null"',
}
_ZONED = "timestamp with time zone"
_KEYS = frozenset({"varchar", "integer", "bigint"})
_NESTED = frozenset({"list", "array", "struct"})

_DAY = dt.date(1970, 1, 1).toordinal()
_FIRST_DAY, _LAST_DAY = dt.date.min.toordinal() - _DAY, dt.date.max.toordinal() - _DAY
_IN_A_DAY = {"s": 86_400, "ms": 86_400 * 10**3, "us": 86_400 * 10**6, "ns": 86_400 * 10**9}
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_MOST_DIGITS = 38


def distinct(names: Iterable[str]) -> list[str]:
    """The names made distinct, ignoring case: a second ``id`` is ``id_2``."""
    wanted = list(names)
    taken = {name.lower() for name in wanted}
    numbers: dict[str, int] = {}
    made = []
    for name in wanted:
        number = numbers.get(name.lower(), 0) + 1
        while number > 1 and f"{name}_{number}".lower() in taken:
            number += 1
        numbers[name.lower()] = number
        made.append(name if number == 1 else f"{name}_{number}")
        taken.add(made[-1].lower())
    return made


def projection(types: Sequence[Any]) -> str:
    """The SELECT list for columns of these types of DuckDB."""
    return ", ".join(
        f"#{i} AS c{i}"
        if _is_kept(one) or str(one.id).lower() == _ZONED
        else f"CAST(#{i} AS VARCHAR) AS c{i}"
        for i, one in enumerate(types, start=1)
    )


def _is_kept(type_: Any) -> bool:
    kind = str(type_.id).lower()
    if kind == "map":
        (_, key), (_, value) = type_.children
        return str(key.id).lower() in _KEYS and _is_kept(value)
    if kind in _NESTED:
        # The children of an array include its size; the fields of row(1, 2) have no names.
        parts = [part for part in type_.children if not isinstance(part[1], int)]
        return len({name for name, _ in parts}) == len(parts) and all(
            _is_kept(child) for _, child in parts
        )
    return kind in _KEPT


def readable(table: pa.Table) -> pa.Table:
    """The table, with text for columns that hold a value which Python or Parquet cannot hold."""
    outside = [i for i, column in enumerate(table.columns) if not _is_within(column)]
    if not outside:
        return table
    names = table.schema.names
    texts = table.select(outside).rename_columns([f"c{i}" for i in outside])
    with duckdb.connect(config={"threads": 1, "python_enable_replacements": "false"}) as other:
        other.execute("SET TimeZone = 'UTC'")
        other.register("result", texts)
        cast = other.sql("SELECT CAST(COLUMNS(*) AS VARCHAR) FROM result").to_arrow_table()
    for i, column in zip(outside, cast.columns, strict=True):
        table = table.set_column(i, names[i], column)
    return table


def _is_within(column: Any) -> bool:
    """Whether Python can hold all values of a column, nested ones too."""
    kind = column.type
    if pa.types.is_nested(kind):
        return all(
            _is_within(child)
            for chunk in (column.chunks if isinstance(column, pa.ChunkedArray) else [column])
            for child in _children(chunk)
        )
    bounds = _bounds(kind)
    if bounds is None:
        return True
    if not isinstance(bounds[0], Decimal):
        column = column.cast(pa.int32() if kind.bit_width == 32 else pa.int64())
    extremes = pc.min_max(column).as_py()
    least, most = extremes["min"], extremes["max"]
    return least is None or bool(bounds[0] <= least and most <= bounds[1])


def _children(array: Any) -> Iterator[Any]:
    if pa.types.is_struct(array.type):
        yield from array.flatten()
    elif pa.types.is_map(array.type):
        yield array.items
    else:
        yield array.flatten()


def _bounds(kind: Any) -> tuple[Any, Any] | None:
    """The least and the largest value that Python can hold; None for types without a bound."""
    if pa.types.is_date32(kind):
        return _FIRST_DAY, _LAST_DAY
    if pa.types.is_timestamp(kind):
        day = _IN_A_DAY[kind.unit]
        return _FIRST_DAY * day, (_LAST_DAY + 1) * day - 1
    if pa.types.is_time(kind):
        return 0, _IN_A_DAY[kind.unit] - 1
    if pa.types.is_decimal(kind) and kind.scale == 0:
        most = Decimal(10) ** _MOST_DIGITS - 1
        return -most, most
    return None


# A value takes a byte in Arrow or less, and an object in Python.
_PYTHON_BYTES = 8


def weight(batch: pa.RecordBatch) -> int:
    """The bytes of a batch, and some for each value."""
    return int(batch.nbytes) + _PYTHON_BYTES * sum(map(_count, batch.columns))


def _count(array: pa.Array) -> int:
    inner = sum(map(_count, _children(array))) if pa.types.is_nested(array.type) else 0
    return len(array) + inner


def packed(table: pa.Table, most: int) -> bytes:
    """The table as an Arrow stream. Raises QuestionError when it has more bytes than ``most``."""
    data = stream_of(table)
    if len(data) > 2 * most:
        raise too_large(most)
    return data


def too_large(most: int) -> QuestionError:
    """The error of a result of more than ``most`` bytes."""
    return QuestionError(
        f"The result is larger than {most / 1e6:,.0f} MB: ask for fewer rows or columns, or give "
        "it more memory (--memory)."
    )


def stream_of(table: pa.Table) -> bytes:
    """The table as an Arrow stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return bytes(sink.getvalue())


def unpacked(data: bytes) -> pa.Table:
    """The table of an Arrow stream."""
    return pa.ipc.open_stream(data).read_all()


def rows_of(table: pa.Table) -> list[tuple[Any, ...]]:
    """The rows of a ``readable`` table as tuples of Python values; whole decimals are ints."""
    if not table.num_columns:
        return []
    return list(zip(*(_column(column) for column in table.columns), strict=True))


def _column(column: pa.ChunkedArray) -> list[Any]:
    kind = column.type
    if pa.types.is_decimal(kind) and kind.scale == 0:
        return [None if value is None else int(value) for value in column.to_pylist()]
    if pa.types.is_timestamp(kind) and kind.tz is not None:
        # In UTC, without a time zone library.
        return [
            None if value is None else _EPOCH + dt.timedelta(microseconds=value)
            for value in column.cast(pa.timestamp("us", "UTC")).cast(pa.int64()).to_pylist()
        ]
    return [_with_dictionaries(value, kind) for value in column.to_pylist()]


def _with_dictionaries(value: Any, kind: Any) -> Any:
    """``value`` with dictionaries for maps, which Arrow gives as lists of pairs."""
    if value is None or not pa.types.is_nested(kind):
        return value
    if pa.types.is_map(kind):
        return {key: _with_dictionaries(item, kind.item_type) for key, item in value}
    if pa.types.is_struct(kind):
        return {
            field.name: _with_dictionaries(value[field.name], field.type)
            for field in (kind.field(i) for i in range(kind.num_fields))
        }
    return [_with_dictionaries(item, kind.value_type) for item in value]
