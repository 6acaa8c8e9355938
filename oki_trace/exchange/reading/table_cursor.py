"""Reads a Parquet table of an import row by row, and checks sizes before it unpacks values.

A few kilobytes of Parquet can expand to gigabytes: every row may refer to one long
text of a dictionary, and a run of one value may have any length. Texts are therefore
read as dictionaries whose lengths are checked, a few rows are in memory at a time,
and columns that are not needed are not read. The size of an unpacked page is bounded
by the memory limit of the process (see ``reading.process``).
"""

from __future__ import annotations

import datetime as dt
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from oki_trace.errors import ExchangeError
from oki_trace.exchange.reading import validation
from oki_trace.exchange.reading.source import opened
from oki_trace.exchange.refusal import refused
from oki_trace.exchange.tables import LATER, SUFFIX, TABLES

Row = dict[str, Any]

MAX_ROWS = 2_000_000_000
_MAX_METADATA_BYTES = 20_000_000
_MAX_METADATA_ENTRIES = 1_000_000
_BATCH_ROWS = 1024
_BUFFER_BYTES = 1 << 20
# Bytes of a cell; the other columns are settings and reports as JSON.
_MAX_CELL = {
    "token": 4 * validation.MAX_TOKEN,
    "token_bytes": 4 * validation.MAX_TOKEN,
    "content": 4 * validation.MAX_TEXT,
    "prompt": 4 * validation.MAX_TEXT,
    "title": 400_000,
}
_MAX_OTHER_CELL = 1_000_000
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


class TableCursor:
    """The rows of one table in order, grouped by their owner in the column ``key``.

    A table that older exports do not have may be missing, and is then empty.
    ``pulse`` is called with every batch of rows. Raises ExchangeError.
    """

    def __init__(
        self, folder: Path, name: str, key: str, pulse: Callable[[], None] = lambda: None
    ) -> None:
        self.name = name
        self._key = key
        self._pulse = pulse
        self._types = dict(zip(TABLES[name].names, TABLES[name].types, strict=True))
        self._closing = ExitStack()
        try:
            path = folder / f"{name}{SUFFIX}"
            is_there = name not in LATER or path.exists()
            self._columns: set[str] = set()
            if is_there:
                self._file = self._open(path)
                self._columns = self._checked()
            self._batches = self._read() if is_there else iter(())
            self._batch: list[Sequence[Any]] = []
            self._owners: Sequence[Any] = ()
            self._at = 0
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._closing.close()

    def has(self, column: str) -> bool:
        """Whether the file has this column: an older one may not."""
        return column in self._columns

    def of(self, owner: int) -> Iterator[Row]:
        """The next rows if they belong to ``owner``, one at a time."""
        while self._has_next() and self._owners[self._at] == owner:
            self._at += 1
            (row,) = self._rows(self._at - 1, self._at)
            yield row

    def take(self, owner: int, most: int, where: str) -> list[Row]:
        """The same rows at once; more than ``most`` are refused."""
        rows: list[Row] = []
        while self._has_next():
            first = end = self._at
            while end < len(self._owners) and self._owners[end] == owner:
                end += 1
            rows += self._rows(first, end)
            self._at = end
            if len(rows) > most:
                raise refused(f"{where} has more than {most:,} rows in the table {self.name}")
            if end < len(self._owners):
                break
        return rows

    def next_owner(self) -> Any:
        """The owner of the next row; None at the end."""
        return self._owners[self._at] if self._has_next() else None

    def end(self) -> None:
        """Raise unless all rows were taken."""
        if self._has_next():
            raise refused(f"the table {self.name} has rows that have no owner or are out of order")

    def _has_next(self) -> bool:
        while self._at >= len(self._owners):
            batch = next(self._batches, None)
            if batch is None:
                return False
            self._batch, self._at = batch, 0
            self._owners = batch[list(self._types).index(self._key)]
        return True

    def _rows(self, first: int, end: int) -> list[Row]:
        values = zip(*[column[first:end] for column in self._batch], strict=True)
        return [dict(zip(self._types, row, strict=True)) for row in values]

    def _open(self, path: Path) -> Any:
        file = self._closing.enter_context(opened(path, follow=False))
        file.seek(0, 2)
        size = file.tell()
        file.seek(max(0, size - 8))
        tail = file.read(8)
        length = struct.unpack("<I", tail[:4])[0] if tail[4:] == b"PAR1" else size
        if length >= size:
            raise refused(f"the table {self.name} is damaged or not a Parquet file")
        if length > _MAX_METADATA_BYTES:
            raise refused(f"the table {self.name} has too much metadata")
        file.seek(0)
        try:
            metadata = pq.ParquetFile(
                file,
                thrift_string_size_limit=_MAX_METADATA_BYTES,
                thrift_container_size_limit=_MAX_METADATA_ENTRIES,
            ).metadata
            names = metadata.schema.to_arrow_schema().names
            if len(set(names)) != len(names):
                raise refused(f"the table {self.name} has a column twice")
            texts = [name for name in names if self._is_text(name)]
            # By default the whole file is fetched before the first row is returned.
            return self._closing.enter_context(
                pq.ParquetFile(
                    file,
                    metadata=metadata,
                    pre_buffer=False,
                    buffer_size=_BUFFER_BYTES,
                    read_dictionary=texts,
                )
            )
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._unreadable(error) from error

    def _checked(self) -> set[str]:
        """The columns to read: those of an export, which must have its types."""
        if self._file.metadata.num_rows > MAX_ROWS:
            raise refused(f"the table {self.name} has more than {MAX_ROWS:,} rows")
        types = dict(zip(self._file.schema_arrow.names, self._file.schema_arrow.types, strict=True))
        for name, kind in self._types.items():
            if name in types and _value_type(types[name]) != kind:
                raise refused(f"the table {self.name} has the wrong type in column {name}")
        if self._key not in types:
            raise refused(f"the table {self.name} has no column {self._key}")
        return self._types.keys() & types.keys()

    def _read(self) -> Iterator[list[Sequence[Any]]]:
        """Batches of rows, a list a column; a missing column is all None."""
        # A row of tensors may be large.
        batch_rows = 1 if self.name == "tensor" else _BATCH_ROWS
        try:
            for batch in self._file.iter_batches(
                batch_size=batch_rows, columns=sorted(self._columns), use_threads=False
            ):
                self._pulse()
                yield [
                    self._values(name, batch.column(name))
                    if name in self._columns
                    else [None] * batch.num_rows
                    for name in self._types
                ]
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            raise self._unreadable(error) from error

    def _is_text(self, name: str) -> bool:
        """Whether a column is read as a dictionary; the bytes of tensors are all different."""
        kind = self._types.get(name)
        is_text = kind is not None and (pa.types.is_string(kind) or pa.types.is_binary(kind))
        return bool(is_text and name != "data")

    def _values(self, name: str, column: Any) -> list[Any]:
        """A column as Python values; NaN becomes None."""
        kind = self._types[name]
        if self._is_text(name):
            return self._texts(name, column)
        if pa.types.is_timestamp(kind):
            return [_time(value) for value in column.cast(pa.int64()).to_pylist()]
        if pa.types.is_list(kind):
            longest = pc.max(pc.list_value_length(column)).as_py() or 0
            if longest > validation.MAX_LAYERS + 1:
                raise refused(f"the table {self.name}: {name} has too many entries")
        values: list[Any] = column.to_pylist()
        if pa.types.is_floating(kind):
            return [None if value != value else value for value in values]
        return values

    def _texts(self, name: str, column: Any) -> list[Any]:
        longest = pc.max(pc.binary_length(column.dictionary)).as_py() or 0
        most = _MAX_CELL.get(name, _MAX_OTHER_CELL)
        if longest > most:
            raise refused(f"the table {self.name}: {name} is longer than {most:,} bytes")
        # One object for each text, however many rows refer to it.
        texts = column.dictionary.to_pylist()
        return [None if at is None else texts[at] for at in column.indices.to_pylist()]

    def _unreadable(self, error: Exception) -> ExchangeError | MemoryError:
        if isinstance(error, ExchangeError | MemoryError):
            return error
        reason = f"is damaged or not a Parquet file ({type(error).__name__})"
        return refused(f"the table {self.name} {reason}")


def _value_type(kind: Any) -> Any:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _time(microseconds: int | None) -> Any:
    """A datetime, or a text that ``validation`` refuses for a time outside Python's range."""
    try:
        return microseconds and _EPOCH + dt.timedelta(microseconds=microseconds)
    except OverflowError:
        return "out of range"
