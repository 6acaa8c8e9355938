"""The process that runs the user's SQL; ``sandbox`` starts, watches and kills it.

It reads frames from standard input and answers each on standard output. It first opens the cache's
files and limits its own memory; every later frame is a statement. It ends when its input is closed,
because the process that started it is gone.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from typing import Any

import duckdb
import pyarrow as pa

from oki_trace.analysis import engine, frames, sql_guard, values
from oki_trace.analysis.frames import Frame
from oki_trace.analysis.tables import BY_NAME
from oki_trace.child_process import address_space, limit_memory
from oki_trace.errors import OkiTraceError, QuestionError
from oki_trace.store.reading.reader import TraceReader

# The share of DuckDB's buffers; vectors, texts and Arrow need the rest of the memory.
_BUFFERS = 0.75
# Each thread has buffers of its own.
_MOST_THREADS = 4
_BATCH_ROWS = 2048
# More columns fit no page and no terminal.
_MOST_COLUMNS = 2_000
# It uses every thread once, before the memory is limited.
_WARM_UP = "SELECT sum(hash(i)) FROM range(1000000) AS t(i)"


def main() -> None:
    """Serve until standard input ends."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    # Output of libraries must not get into the replies.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    waiting: queue.Queue[Frame] = queue.Queue()
    threading.Thread(target=_read, args=(waiting,), daemon=True).start()
    server = Server()
    while True:
        frames.write(channel, *server.reply(*waiting.get()))


def _read(waiting: queue.Queue[Frame]) -> None:
    while (frame := frames.read(sys.stdin.buffer)) is not None:
        waiting.put(frame)
    os._exit(1)


class Server:
    """The open tables, and the memory limit of statements over them."""

    def __init__(self) -> None:
        self._connection: duckdb.DuckDBPyConnection | None = None
        self._reader: TraceReader | None = None
        self._base: int | None = None
        self._memory_bytes = 0

    def reply(self, header: dict[str, Any], payload: bytes) -> Frame:
        """The reply to one frame. Any error of a statement is one sentence."""
        try:
            if "sql" in header:
                return self._ask(**header)
            self._open(payload=payload, **header)
            return {}, b""
        except OkiTraceError as caught:
            error: OkiTraceError = caught
        except MemoryError:
            error = engine.out_of_memory(self._memory_bytes)
        except RecursionError:
            error = QuestionError(sql_guard.TOO_DEEP)
        return {"error": [type(error).__name__, str(error)], "taken": self._taken()}, b""

    def _open(
        self, db: str, files: dict[str, list[str]], live: dict[str, int], memory_bytes: int,
        payload: bytes,
    ) -> None:  # fmt: skip
        """Open a state of the store; ``live`` are the sizes of the tables in the payload."""
        if self._connection is not None:
            self._connection.close()
        if self._reader is None:
            self._reader = TraceReader(db)
        self._memory_bytes = memory_bytes
        tables, at = {}, 0
        for name in BY_NAME:
            part = memoryview(payload)[at : at + live[name]]
            tables[name] = pa.ipc.open_stream(part).read_all()
            at += live[name]
        self._connection = engine.connect(
            files,
            tables,
            self._reader,
            memory_limit=f"{int(memory_bytes * _BUFFERS / 1e6)}MB",
            threads=min(os.cpu_count() or 1, _MOST_THREADS),
        )
        if self._base is None:
            self._connection.execute(_WARM_UP).fetchall()
            sql_guard.check(self._connection, "SELECT 1")
            limit_memory(memory_bytes)
            self._base = address_space()

    def _ask(self, sql: str, limit: int, result_bytes: int) -> Frame:
        assert self._connection is not None
        with engine.translate_errors(self._memory_bytes), self._connection.cursor() as cursor:
            sql_guard.check(cursor, sql)
        # The check's cursor has an unfinished result.
        with engine.translate_errors(self._memory_bytes), self._connection.cursor() as cursor:
            relation = cursor.sql(sql)
            names, types = relation.columns, relation.types
            if len(names) > _MOST_COLUMNS:
                raise QuestionError(
                    f"The result has {len(names):,} columns: ask for at most {_MOST_COLUMNS:,}."
                )
            batches, taken, rows = [], 0, 0
            # Values that Arrow or Python cannot hold exactly become text.
            reader: Any = relation.project(values.projection(types)).to_arrow_reader(
                min(limit + 1, _BATCH_ROWS)
            )
            for batch in reader:
                batches.append(batch)
                rows += len(batch)
                taken += values.weight(batch)
                if taken > result_bytes:
                    raise values.too_large(result_bytes)
                if rows > limit:
                    break
            table = pa.Table.from_batches(batches, reader.schema).slice(0, limit)
            table = values.readable(table.rename_columns(values.distinct(names)))
            data = values.packed(table, result_bytes)
        kinds = [str(one) for one in types]
        return {"kinds": kinds, "cut": rows > limit, "taken": self._taken()}, data

    def _taken(self) -> int:
        """The address space in bytes beyond that at the start."""
        now = address_space()
        return 0 if now is None or self._base is None else now - self._base
