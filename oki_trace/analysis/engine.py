"""DuckDB, shut in: our tables, our limits, no file and no network beyond the cache's own files.

One connection sees one state of the store: the Parquet files of one manifest,
and a copy of what was running when it was made.
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

# Together with Python and Arrow this stays below 1 GB.
MEMORY_BYTES = 768_000_000
CONFIG: dict[str, str | bool | int | float | list[str]] = {
    "memory_limit": f"{MEMORY_BYTES // 1_000_000}MB",
    # Nothing is written, not even what does not fit into memory.
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
    """A result: a row a tuple; ``kinds`` are DuckDB's types. ``cut``: there were more rows."""

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
    """Our tables: Parquet ``files`` by table, and with them ``live`` Arrow tables; our functions,
    which read tensors through ``reader``; then locked. ``config``: settings of DuckDB's.
    """
    connection = duckdb.connect(":memory:", config={**CONFIG, **config})
    # Wherever the machine stands.
    connection.execute("SET TimeZone = 'UTC'")
    for name in BY_NAME:
        relations = []
        if files.get(name):
            relations.append(connection.read_parquet(list(files[name])))
        if len(live[name]) or not relations:
            connection.register("arriving", live[name])
            connection.table("arriving").create("live_" + name)
            connection.unregister("arriving")
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
    """The answer to a statement of ours. Raises QuestionError when it cannot be."""
    with translate_errors(), connection.cursor() as cursor:
        result = cursor.execute(sql, dict(parameters or {}))
        names = tuple(str(column[0]) for column in result.description or ())
        kinds = tuple(str(column[1]) for column in result.description or ())
        return Rows(names, kinds, tuple(result.fetchall()))


def out_of_memory(memory_bytes: int = MEMORY_BYTES) -> QuestionError:
    """What is said of a question that takes more memory than it may."""
    return QuestionError(
        f"The question needs more than {memory_bytes / 1e6:,.0f} MB of memory: narrow it down, or "
        "ask for less."
    )


_REACHES_OUT = (
    "The question reaches for a file or an address: it can read only the tables that "
    "`oki-trace sql --tables` lists."
)
_UNREADABLE = "A file of the cache cannot be read: write it anew with `oki-trace sql --rebuild`."


@contextmanager
def translate_errors(memory_bytes: int = MEMORY_BYTES) -> Iterator[None]:
    """Turn what DuckDB raises into one sentence that names the fix."""
    try:
        yield
    except duckdb.InterruptException as error:
        raise QuestionError("The question was interrupted: ask it again.") from error
    except duckdb.OutOfMemoryException as error:
        raise out_of_memory(memory_bytes) from error
    except duckdb.PermissionException as error:
        raise QuestionError(_REACHES_OUT) from error
    except duckdb.IOException as error:
        raise QuestionError(_UNREADABLE) from error
    except duckdb.Error as error:
        raise _in_one_line(str(error)) from error


@contextmanager
def streamed_plainly(memory_bytes: int) -> Iterator[None]:
    """The same while Arrow reads the result, which raises what DuckDB says as its own errors."""
    try:
        with translate_errors(memory_bytes):
            yield
    except (pa.ArrowException, OSError) as error:
        said = str(error)
        if isinstance(error, MemoryError) or "Out of Memory Error" in said:
            raise out_of_memory(memory_bytes) from error
        if said.startswith("Permission Error"):
            raise QuestionError(_REACHES_OUT) from error
        if said.startswith("IO Error"):
            raise QuestionError(_UNREADABLE) from error
        raise _in_one_line(said) from error


def _in_one_line(said: str) -> QuestionError:
    # What one of our own functions found wrong says all by itself.
    _, ours, told = said.partition("while executing the UDF: ")
    if ours:
        return QuestionError(told.partition(": ")[2])
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    what = lines[0].partition(": ")[2] or lines[0]
    # DuckDB's own tables are like any name.
    hints = (
        line
        for line in lines[1:]
        if line.startswith(("Candidate", "Did you mean")) and '"pg_' not in line
    )
    told = what.rstrip(".!") + "."
    if hint := next(hints, ""):
        told += f" {hint}" if hint.endswith("?") else f" {hint.rstrip('.')}."
    return QuestionError(f"The SQL cannot be answered: {told}")
