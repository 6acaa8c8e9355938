"""DuckDB connections to the cache's tables, with limits and without access to files or networks.

A connection sees one state of the store: the Parquet files of one manifest, and a copy of the
messages that were running when it was opened.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa

from oki_trace.analysis import functions
from oki_trace.analysis.tables import BY_NAME
from oki_trace.errors import QuestionError
from oki_trace.store.reading.reader import TraceReader

# With Python and Arrow the process stays below 1 GB.
MEMORY_BYTES = 768_000_000
CONFIG: dict[str, str | bool | int | float | list[str]] = {
    "memory_limit": f"{MEMORY_BYTES // 1_000_000}MB",
    # Nothing is written to the disk, not even data that does not fit into memory.
    "temp_directory": "",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "allow_community_extensions": "false",
    "allow_persistent_secrets": "false",
    # A table's name never means a variable of this program.
    "python_enable_replacements": "false",
}


@dataclass(frozen=True, slots=True)
class Rows:
    """A result; ``kinds`` are DuckDB's types. ``cut``: there were more rows than the limit."""

    columns: tuple[str, ...]
    kinds: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    cut: bool = False


def connect(
    files: Mapping[str, Sequence[str]],
    live: Mapping[str, Any],
    reader: TraceReader,
    **config: str | int,
) -> duckdb.DuckDBPyConnection:
    """A locked-down connection with our tables and functions.

    Each table is the union of its Parquet ``files`` and its ``live`` Arrow table; the functions
    read tensors through ``reader``. ``config``: settings of DuckDB.
    """
    connection = duckdb.connect(":memory:", config={**CONFIG, **config})
    connection.execute("SET TimeZone = 'UTC'")
    for name in BY_NAME:
        relations = []
        if files.get(name):
            relations.append(connection.read_parquet(list(files[name])))
        if len(live[name]) or not relations:
            connection.register("live", live[name])
            connection.table("live").create("live_" + name)
            connection.unregister("live")
            relations.append(connection.table("live_" + name))
        whole = relations[0] if len(relations) == 1 else relations[0].union(relations[1])
        whole.create_view(name)
    functions.register(connection, reader)
    allowed = sorted({file for those in files.values() for file in those})
    connection.execute("SET allowed_paths = ?", [allowed])
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    return connection


def run(
    connection: duckdb.DuckDBPyConnection, sql: str, parameters: Mapping[str, Any] | None = None
) -> Rows:
    """The result of a trusted statement. Raises QuestionError when DuckDB cannot run it."""
    with translate_errors(), connection.cursor() as cursor:
        result = cursor.execute(sql, dict(parameters or {}))
        names = tuple(str(column[0]) for column in result.description or ())
        kinds = tuple(str(column[1]) for column in result.description or ())
        return Rows(names, kinds, tuple(result.fetchall()))


def out_of_memory(memory_bytes: int = MEMORY_BYTES) -> QuestionError:
    """The error of a question that exceeds its memory."""
    return QuestionError(
        f"The question needs more than {memory_bytes / 1e6:,.0f} MB of memory: narrow it down."
    )


_OUTSIDE = (
    "The question accesses a file or an address: it can read only the tables that "
    "`oki-trace sql --tables` lists."
)
_UNREADABLE = "A file of the cache cannot be read: rebuild it with `oki-trace sql --rebuild`."


@contextmanager
def translate_errors(memory_bytes: int = MEMORY_BYTES) -> Iterator[None]:
    """Turn DuckDB's errors into a QuestionError of one sentence that names the fix.

    While Arrow reads a result, it raises DuckDB's messages as its own errors.
    """
    try:
        yield
    except (duckdb.Error, pa.ArrowException, OSError) as error:
        message = str(error)
        if isinstance(error, duckdb.InterruptException):
            raise QuestionError("The question was interrupted: run it again.") from error
        if isinstance(error, duckdb.OutOfMemoryException | MemoryError):
            raise out_of_memory(memory_bytes) from error
        if "Out of Memory Error" in message:
            raise out_of_memory(memory_bytes) from error
        if isinstance(error, duckdb.PermissionException) or message.startswith("Permission Error"):
            raise QuestionError(_OUTSIDE) from error
        if isinstance(error, duckdb.IOException) or message.startswith("IO Error"):
            raise QuestionError(_UNREADABLE) from error
        raise _in_one_line(message) from error


def _in_one_line(message: str) -> QuestionError:
    # The error of one of our own functions is a whole sentence.
    _, of_ours, own = message.partition("while executing the UDF: ")
    if of_ours:
        return QuestionError(own.partition(": ")[2])
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    sentence = (lines[0].partition(": ")[2] or lines[0]).rstrip(".!") + "."
    # DuckDB also suggests its own tables.
    hints = (
        line
        for line in lines[1:]
        if line.startswith(("Candidate", "Did you mean")) and '"pg_' not in line
    )
    if hint := next(hints, ""):
        sentence += f" {hint}" if hint.endswith("?") else f" {hint.rstrip('.')}."
    return QuestionError(f"The SQL cannot be answered: {sentence}")
