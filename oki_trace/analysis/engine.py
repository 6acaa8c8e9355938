"""DuckDB, shut in: our tables, our limits, no file and no network beyond the cache's own files.

One connection sees one state of the store: the Parquet files of one manifest,
and a copy of what was running when it was made.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa

from oki_trace.analysis import functions
from oki_trace.analysis.tables import BY_NAME
from oki_trace.errors import QuestionError
from oki_trace.store.reader import TraceReader

# Together with Python and Arrow this stays below 1 GB.
CONFIG: dict[str, str | bool | int | float | list[str]] = {
    "memory_limit": "768MB",
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
    """A result: a row a tuple. ``cut``: there were more than were asked for."""

    columns: tuple[str, ...]
    kinds: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    cut: bool = False


def connect(
    files: Mapping[str, Sequence[str]], live: Mapping[str, Any], reader: TraceReader
) -> duckdb.DuckDBPyConnection:
    """Our tables: Parquet ``files`` by table, and with them ``live`` Arrow tables; our functions,
    which read tensors through ``reader``; then locked.
    """
    connection = duckdb.connect(":memory:", config=CONFIG)
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
    connection: duckdb.DuckDBPyConnection,
    sql: str,
    parameters: Mapping[str, Any] | None = None,
    *,
    limit: int | None = None,
    seconds: float | None = None,
) -> Rows:
    """At most ``limit`` rows, within ``seconds``. Raises QuestionError when it cannot be."""
    with told_plainly(seconds), _cursor(connection, seconds) as cursor:
        result = cursor.execute(sql, dict(parameters or {}))
        names = tuple(str(column[0]) for column in result.description or ())
        kinds = tuple(str(column[1]) for column in result.description or ())
        rows = result.fetchall() if limit is None else result.fetchmany(limit + 1)
    cut = limit is not None and len(rows) > limit
    return Rows(names, kinds, tuple(rows[:limit] if cut else rows), cut)


def run_arrow(
    connection: duckdb.DuckDBPyConnection, sql: str, *, limit: int, seconds: float
) -> tuple[Any, bool]:
    """The same as an Arrow table, with its types, and whether there were more rows."""
    with told_plainly(seconds), _cursor(connection, seconds) as cursor:
        reader: Any = cursor.sql(sql).to_arrow_reader(limit + 1)
        batches, count = [], 0
        for batch in reader:
            batches.append(batch)
            count += len(batch)
            if count > limit:
                break
    table = pa.Table.from_batches(batches, reader.schema)
    return table.slice(0, limit), count > limit


@contextmanager
def _cursor(
    connection: duckdb.DuckDBPyConnection, seconds: float | None
) -> Iterator[duckdb.DuckDBPyConnection]:
    """A place for one question, which is ended after so long; what is not fetched goes with it."""
    with connection.cursor() as cursor:
        if seconds is None:
            yield cursor
            return
        timer = threading.Timer(seconds, cursor.interrupt)
        timer.daemon = True
        timer.start()
        try:
            yield cursor
        finally:
            timer.cancel()
            timer.join()


@contextmanager
def told_plainly(seconds: float | None = None) -> Iterator[None]:
    """Turn what DuckDB raises into one sentence that names the fix."""
    try:
        yield
    except duckdb.InterruptException as error:
        raise QuestionError(
            f"The question took longer than {seconds:g} s and was ended: narrow it down, or give "
            "it more time (--timeout)."
            if seconds is not None
            else "The question was interrupted: ask it again."
        ) from error
    except duckdb.OutOfMemoryException as error:
        raise QuestionError(
            "The question needs more than 768 MB of memory: narrow it down, or ask for less."
        ) from error
    except duckdb.PermissionException as error:
        raise QuestionError(
            "The question reaches for a file or an address: it can read only the tables that "
            "`oki-trace sql --tables` lists."
        ) from error
    except duckdb.IOException as error:
        raise QuestionError(
            "A file of the cache cannot be read: write it anew with `oki-trace sql --rebuild`."
        ) from error
    except duckdb.Error as error:
        # What one of our own functions found wrong says all by itself.
        _, ours, told = str(error).partition("while executing the UDF: ")
        if ours:
            raise QuestionError(told.partition(": ")[2]) from error
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        what = lines[0].partition(": ")[2] or lines[0]
        # DuckDB's own tables are like any name.
        hints = (
            line
            for line in lines[1:]
            if line.startswith(("Candidate", "Did you mean")) and '"pg_' not in line
        )
        said = what.rstrip(".!") + "."
        if hint := next(hints, ""):
            said += f" {hint}" if hint.endswith("?") else f" {hint.rstrip('.')}."
        raise QuestionError(f"The SQL cannot be answered: {said}") from error
