"""Runs the user's SQL in a separate process with limits, which can be killed.

DuckDB's own limits do not cover a text of two gigabytes, a growing recursion or a plan of a
thousand branches. The statement therefore runs in ``sandbox_process``, with a memory limit that the
operating system enforces. The process is killed when its time runs out, when the caller gives up,
and when this program ends; otherwise it is kept for the next question.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

import psutil
import pyarrow as pa

from oki_trace import child_process, errors
from oki_trace.analysis import frames, values
from oki_trace.analysis.frames import Frame
from oki_trace.errors import QuestionError

MEMORY_BYTES = 512_000_000
# DuckDB needs this much.
LEAST_MEMORY_BYTES = 200_000_000
STATEMENT_BYTES = 1_000_000
# A result becomes Python objects, which take several times its size.
_RESULT_SHARE = 16
# A process that still uses more than this share of its memory after a question is ended.
_KEPT_SHARE = 4
_OPENING_SECONDS = 60.0
_POLL_SECONDS = 0.05

Tick = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Contents:
    """A state of a store: the cache's ``files`` and the ``live`` rows of each table.

    ``db`` is the store's address, for the functions that read tensors.
    """

    stamp: str
    db: str
    files: Mapping[str, Sequence[str]]
    live: Mapping[str, pa.Table]


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a statement: rows, seconds, and bytes beyond those of the process."""

    rows: int
    seconds: float
    memory_bytes: int = MEMORY_BYTES


@dataclass(frozen=True, slots=True)
class Result:
    """A table with distinct column names; ``kinds`` are DuckDB's types of its columns.

    ``cut``: there were more rows than the limit.
    """

    table: pa.Table
    kinds: tuple[str, ...]
    cut: bool


class Sandbox:
    """Runs SQL over one store, one statement at a time."""

    def __init__(self) -> None:
        # At most one.
        self._running: list[_Process] = []
        self._opened: tuple[str, int] | None = None
        self._one_at_a_time = threading.Lock()
        weakref.finalize(self, _end, self._running)

    def start(self) -> None:
        """Start the process, so that it loads its libraries in the meantime."""
        if not self._running:
            self._running.append(_Process())
            self._opened = None

    def close(self) -> None:
        """End the process, if there is one."""
        _end(self._running)

    def ask(
        self, sql: str, limits: Limits, contents: Callable[[], Contents], tick: Tick | None = None
    ) -> Result:
        """The result of one SELECT. ``tick`` is called while it runs; its errors end the question.

        Raises a one-line QuestionError for any other failure.
        """
        try:
            length = len(sql.encode())
        except UnicodeEncodeError as error:
            raise QuestionError(
                "The statement has bytes that are not UTF-8: write it in UTF-8."
            ) from error
        if length > STATEMENT_BYTES:
            raise QuestionError(
                f"The statement is longer than {STATEMENT_BYTES // 1_000_000} MB: shorten it."
            )
        tick = tick or (lambda: None)
        while not self._one_at_a_time.acquire(timeout=_POLL_SECONDS):
            tick()
        try:
            return self._ask(sql, limits, contents, tick)
        except QuestionError:
            raise
        except BaseException:
            self.close()
            raise
        finally:
            self._one_at_a_time.release()

    def _ask(
        self, sql: str, limits: Limits, contents: Callable[[], Contents], tick: Tick
    ) -> Result:
        if self._opened is not None and self._opened[1] != limits.memory_bytes:
            self.close()
        self.start()
        now = contents()
        if self._opened != (now.stamp, limits.memory_bytes):
            self._open(now, limits, tick)
        most = limits.memory_bytes // _RESULT_SHARE
        statement = {"sql": sql, "limit": limits.rows, "result_bytes": most}
        header, payload = self._reply(
            statement, b"", limits, tick, limits.seconds, payload_bytes=3 * most
        )
        return Result(values.unpacked(payload), tuple(header["kinds"]), header["cut"])

    def _open(self, contents: Contents, limits: Limits, tick: Tick) -> None:
        self._opened = None
        tables = {name: values.stream_of(table) for name, table in contents.live.items()}
        header = {
            "db": contents.db,
            "files": {name: list(files) for name, files in contents.files.items()},
            "live": {name: len(data) for name, data in tables.items()},
            "memory_bytes": limits.memory_bytes,
        }
        self._reply(header, b"".join(tables.values()), limits, tick, _OPENING_SECONDS)
        self._opened = contents.stamp, limits.memory_bytes

    def _reply(
        self,
        header: dict[str, Any],
        payload: bytes,
        limits: Limits,
        tick: Tick,
        seconds: float,
        *,
        payload_bytes: int = 0,
    ) -> Frame:
        """The reply of the process to a frame. Raises its error, or one when it was killed."""
        process = self._running[0]
        deadline = time.monotonic() + seconds
        process.send(header, payload, payload_bytes)
        while True:
            try:
                left = deadline - time.monotonic()
                reply = process.frames.get(timeout=max(0.0, min(_POLL_SECONDS, left)))
                break
            except queue.Empty:
                pass
            tick()
            if time.monotonic() > deadline:
                self.close()
                raise QuestionError(
                    f"The question took longer than {seconds:g} s and was ended: narrow it down, "
                    "or give it more time (--timeout)."
                )
            if process.memory() > limits.memory_bytes:
                self.close()
                raise _out_of_memory(limits)
        if reply is None:
            self.close()
            raise _out_of_memory(limits)
        if reply[0].get("taken", 0) > limits.memory_bytes // _KEPT_SHARE:
            self.close()
        if "error" in reply[0]:
            kind, sentence = reply[0]["error"]
            raise errors.named(kind, QuestionError)(sentence)
        return reply


class _Process:
    """The process, and its replies."""

    def __init__(self) -> None:
        self._popen = child_process.start("oki_trace.analysis.sandbox_process")
        self.frames: queue.Queue[Frame | None] = queue.Queue()
        self._base: int | None = None
        assert self._popen.stdin is not None and self._popen.stdout is not None
        self._input: BinaryIO = self._popen.stdin  # type: ignore[assignment]
        self._most = [0]
        threading.Thread(
            target=_put_frames, args=(self._popen.stdout, self.frames, self._most), daemon=True
        ).start()

    def send(self, header: dict[str, Any], payload: bytes, answer_bytes: int) -> None:
        """Send a frame; the reply may have a payload of ``answer_bytes``."""
        self._most[0] = answer_bytes
        if self._base is None and "sql" in header:
            self._base = self._resident()
        with suppress(BrokenPipeError):
            frames.write(self._input, header, payload)

    def memory(self) -> int:
        """The resident bytes beyond those before the first statement."""
        return 0 if self._base is None else self._resident() - self._base

    def _resident(self) -> int:
        with suppress(psutil.Error):
            return int(psutil.Process(self._popen.pid).memory_info().rss)
        return 0

    def end(self) -> None:
        self._popen.kill()
        self._popen.wait()
        with suppress(BrokenPipeError):
            self._input.close()


def _put_frames(stream: BinaryIO, replies: queue.Queue[Frame | None], most: list[int]) -> None:
    """Each frame as it comes, and None at the end or for a frame that is too large."""
    with stream, suppress(ValueError, OSError):
        while (frame := frames.read(stream, lambda: most[0])) is not None:
            replies.put(frame)
    replies.put(None)


def _end(running: list[_Process]) -> None:
    while running:
        running.pop().end()


def _out_of_memory(limits: Limits) -> QuestionError:
    return QuestionError(
        f"The question needs more than {limits.memory_bytes / 1e6:,.0f} MB of memory, or DuckDB "
        "failed at it: narrow it down, or give it more memory (--memory)."
    )
