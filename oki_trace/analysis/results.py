"""Writes results as CSV, JSON and Parquet."""

from __future__ import annotations

import csv
import datetime as dt
import io
import math
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from oki_trace.errors import QuestionError


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it: NaN is null, a time is ISO text."""
    if isinstance(value, float):
        return value + 0.0 if math.isfinite(value) else None
    if isinstance(value, Decimal):
        return int(value) if value.as_tuple().exponent == 0 else float(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, dt.date | dt.time):
        return value.isoformat()
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.hex() if isinstance(value, bytes) else str(value)


def objects(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[dict[str, Any]]:
    """A dictionary for each row. The names are distinct, as ``values.distinct`` makes them."""
    return [dict(zip(names, map(plain, row), strict=True)) for row in rows]


# Texts that Excel, LibreOffice and Sheets read as a formula; the sign may be full-width.
_FORMULA = re.compile(r"\s*[=+\-@＝＋－＠].", re.DOTALL)


def for_a_spreadsheet(value: Any) -> Any:
    """``value`` with an apostrophe in front when a spreadsheet would read it as a formula.

    ``components/shared.js`` does the same for files that the browser saves.
    """
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def write_csv(names: Sequence[str], rows: Iterable[Sequence[Any]], file: TextIO) -> None:
    """Write rows with a header. NULL is empty, and no text is a formula."""
    writer = csv.writer(_Lines(file), lineterminator="\r\n")
    writer.writerow(map(for_a_spreadsheet, names))
    writer.writerows([for_a_spreadsheet(plain(value)) for value in row] for row in rows)


class _Lines:
    """Ends rows with a newline only: csv quotes a lone carriage return only when its rows end
    with one.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, row: str) -> object:
        return self._file.write(row.removesuffix("\r\n") + "\n")


def parquet(table: pa.Table) -> bytes:
    """A compressed Parquet file. Raises QuestionError for a type that Parquet does not have."""
    file = io.BytesIO()
    try:
        pq.write_table(table, file, compression="zstd")
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise QuestionError(
            f"Parquet cannot hold the result ({error}): cast such a column to VARCHAR."
        ) from error
    return file.getvalue()
