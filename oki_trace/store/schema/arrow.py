"""The store's tables as Arrow schemas and Parquet files, for the query cache and for exports."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    Integer,
    LargeBinary,
    String,
)

from oki_trace.store.schema.column_types import ModelText, UtcTime
from oki_trace.store.schema.models import Base

# The rows that DuckDB gives to one thread at a time.
ROW_GROUP = 122_880

# The first that fits counts: a BigInteger is an Integer too.
_TYPES: tuple[tuple[type[Any], pa.DataType], ...] = (
    (UtcTime, pa.timestamp("us", tz="UTC")),
    (BigInteger, pa.int64()),
    (Integer, pa.int32()),
    (Boolean, pa.bool_()),
    (Double, pa.float64()),
    (LargeBinary, pa.binary()),
    (String, pa.string()),
    (ModelText, pa.string()),
    (JSON, pa.string()),
)
# Their numbers are measured as 32-bit floats, which the store's 64-bit columns hold exactly.
_FLOAT32 = frozenset({"topk_entry", "attention_entry", "lens_layer", "lens_entry", "router_entry"})


def arrow_type(column: Column[Any]) -> pa.DataType:
    """The Arrow type of a column of the store; a JSON document is text."""
    kind = next(arrow for sql, arrow in _TYPES if isinstance(column.type, sql))
    is_float32 = kind == pa.float64() and column.table.name in _FLOAT32
    return pa.float32() if is_float32 else kind


def arrow_types(table: str) -> dict[str, pa.DataType]:
    """The Arrow type of each column of a table of the store, in order."""
    return {column.name: arrow_type(column) for column in Base.metadata.tables[table].columns}


def to_arrow(columns: Mapping[str, Any], schema: pa.Schema) -> pa.Table:
    """Columns by name as an Arrow table; other columns are left out, and NaN becomes NULL."""
    return pa.table([_array(columns[f.name], f.type) for f in schema], schema=schema)


def _array(values: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(values, np.ndarray):
        # NaN becomes NULL, also on the way to an integer.
        return pa.array(values, from_pandas=True).cast(kind)
    return pa.array(values, type=kind)


class ParquetTable:
    """A Parquet file of one table. Rows are collected until ``flush`` writes them.

    The same rows give the same bytes: nothing of the machine or the time is written.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.schema = schema
        self.rows = 0
        self.bytes = 0
        self._batches: list[pa.Table] = []
        # Values that seldom repeat need no dictionary: measured numbers and arrays.
        texts = [f.name for f in schema if f.name != "data" and not pa.types.is_floating(f.type)]
        self._file = pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=texts)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def add(self, rows: pa.Table) -> None:
        """Collect some rows."""
        self._batches.append(rows)
        self.rows += len(rows)
        self.bytes += rows.nbytes

    def flush(self) -> None:
        """Write the collected rows."""
        if self._batches:
            rows = pa.concat_tables(self._batches)
            self._file.write_table(rows, row_group_size=ROW_GROUP)
        self._batches.clear()
        self.rows = self.bytes = 0
