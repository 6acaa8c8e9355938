"""SQL from outside, answered by a process that can be ended: limits that hold.

DuckDB keeps to its own limits only where it thinks of them: a text of two
gigabytes, a recursion that grows and a plan of a thousand branches are beyond
them. So the statement runs in a process of its own (``sandbox_process``) with a
limit of memory that the system holds; it is killed when its time is over, when
whoever asked goes away, and when this program ends. One that has behaved is
kept for the next question.
"""

from __future__ import annotations

import os
import queue
import subprocess
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
from oki_trace.errors import OkiTraceError, QuestionError

MEMORY_BYTES = 512_000_000
# Below this DuckDB cannot work.
LEAST_MEMORY_BYTES = 200_000_000
STATEMENT_BYTES = 1_000_000
# A result is Python's objects in the end, which take several times as much.
_RESULT_SHARE = 16
# A process that keeps more than this share of its memory between questions is not kept.
_KEPT_SHARE = 4
_OPENING_SECONDS = 60.0
_LOOK_SECONDS = 0.05

Tick = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Contents:
    """A state of a store: ``files`` of the cache and ``live`` tables, by table.

    ``db`` is the store's address, for functions that read tensors.
    """

    stamp: str
    db: str
    files: Mapping[str, Sequence[str]]
    live: Mapping[str, pa.Table]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a statement may take: rows of its result, seconds, and bytes beyond the program."""

    rows: int
    seconds: float
    memory_bytes: int = MEMORY_BYTES


@dataclass(frozen=True, slots=True)
class Result:
    """A table whose columns have distinct names; ``kinds`` are DuckDB's types of them.

    ``cut``: there were more rows than were asked for.
    """

    table: pa.Table
    kinds: tuple[str, ...]
    cut: bool


class Sandbox:
    """Answers SQL about one store, one question at a time."""

    def __init__(self) -> None:
        # One, or none.
        self._running: list[_Process] = []
        self._opened: tuple[str, int] | None = None
        self._one_at_a_time = threading.Lock()
        weakref.finalize(self, _end, self._running)

    def start(self) -> None:
        """Start the process, so that it loads its libraries while something else is done."""
        if not self._running:
            self._running.append(_Process())
            self._opened = None

    def close(self) -> None:
        """End the process, if there is one."""
        _end(self._running)

    def ask(
        self, sql: str, limits: Limits, contents: Callable[[], Contents], tick: Tick | None = None
    ) -> Result:
        """The answer to one SELECT. ``tick`` is called meanwhile; what it raises ends the question.

        Raises QuestionError, in one line, for whatever the statement tries.
        """
        try:
            length = len(sql.encode())
        except UnicodeEncodeError as error:
            raise QuestionError(
                "The statement holds bytes that are not UTF-8: write it in UTF-8."
            ) from error
        if length > STATEMENT_BYTES:
            raise QuestionError(
                f"The statement is longer than {STATEMENT_BYTES // 1_000_000} MB: ask with a "
                "shorter one."
            )
        tick = tick or _nothing
        while not self._one_at_a_time.acquire(timeout=_LOOK_SECONDS):
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
        asked = {"sql": sql, "limit": limits.rows, "result_bytes": most}
        header, payload = self._answered(
            asked, (), limits, tick, limits.seconds, payload_bytes=3 * most
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
        self._answered(header, tuple(tables.values()), limits, tick, _OPENING_SECONDS)
        self._opened = contents.stamp, limits.memory_bytes

    def _answered(
        self,
        header: dict[str, Any],
        payload: Sequence[bytes],
        limits: Limits,
        tick: Tick,
        seconds: float,
        *,
        payload_bytes: int = 0,
    ) -> Frame:
        """What the process says to a frame. Raises what it raised, or that it was ended."""
        process = self._running[0]
        ends = time.monotonic() + seconds
        process.send(header, b"".join(payload), payload_bytes)
        while True:
            try:
                found = process.frames.get(
                    timeout=max(0.0, min(_LOOK_SECONDS, ends - time.monotonic()))
                )
                break
            except queue.Empty:
                pass
            tick()
            if time.monotonic() > ends:
                self.close()
                raise QuestionError(
                    f"The question took longer than {seconds:g} s and was ended: narrow it down, "
                    "or give it more time (--timeout)."
                )
            if process.memory() > limits.memory_bytes:
                self.close()
                raise _out_of_memory(limits)
        if found is None:
            self.close()
            raise _out_of_memory(limits)
        if found[0].get("taken", 0) > limits.memory_bytes // _KEPT_SHARE:
            self.close()
        if "error" in found[0]:
            kind, sentence = found[0]["error"]
            raise _error(kind)(sentence)
        return found


class _Process:
    """The process, and what it has said."""

    def __init__(self) -> None:
        self._popen = subprocess.Popen(
            child_process.command("oki_trace.analysis.sandbox_process"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # Ctrl-C is for this process, which ends the other.
            start_new_session=True,
            env={**os.environ, **child_process.FRUGAL},
        )
        self.frames: queue.Queue[Frame | None] = queue.Queue()
        self._base: int | None = None
        assert self._popen.stdin is not None and self._popen.stdout is not None
        self._input: BinaryIO = self._popen.stdin  # type: ignore[assignment]
        self._most = [0]
        threading.Thread(
            target=_put_frames, args=(self._popen.stdout, self.frames, self._most), daemon=True
        ).start()

    def send(self, header: dict[str, Any], payload: bytes, answer_bytes: int) -> None:
        """Send a frame; the answer may have a payload of so many bytes."""
        self._most[0] = answer_bytes
        if self._base is None and "sql" in header:
            self._base = self._resident()
        with suppress(BrokenPipeError):
            frames.write(self._input, header, payload)

    def memory(self) -> int:
        """The bytes that it holds beyond those it had before its first question."""
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


def _put_frames(stream: BinaryIO, found: queue.Queue[Frame | None], most: list[int]) -> None:
    """Each frame as it comes, then None; a frame larger than it may be is the last."""
    with stream, suppress(ValueError, OSError):
        while (frame := frames.read(stream, lambda: most[0])) is not None:
            found.put(frame)
    found.put(None)


def _end(running: list[_Process]) -> None:
    while running:
        running.pop().end()


def _nothing() -> None:
    pass


def _out_of_memory(limits: Limits) -> QuestionError:
    return QuestionError(
        f"The question needs more than {limits.memory_bytes / 1e6:,.0f} MB of memory, or DuckDB "
        "failed at it: narrow it down, ask for less, or give it more memory (--memory)."
    )


def _error(kind: str) -> type[OkiTraceError]:
    found = getattr(errors, kind, None)
    if isinstance(found, type) and issubclass(found, OkiTraceError):
        return found
    return QuestionError
