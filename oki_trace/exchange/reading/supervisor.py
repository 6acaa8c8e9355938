"""Starts the process that reads an import, watches it, and always ends it.

The process is killed when it makes no progress for ``STUCK_SECONDS``, and when it
exceeds its memory limit on a system that does not enforce the limit.
"""

from __future__ import annotations

import json
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import IO

import psutil

from oki_trace import child_process, errors
from oki_trace.errors import ExchangeError
from oki_trace.exchange.reading.process import Outcome, Request
from oki_trace.exchange.refusal import refused

Tick = Callable[[int, int], None]  # steps done, of all (as far as known)

STUCK_SECONDS = 60.0
_POLL_SECONDS = 0.25
# The program itself takes half of this.
_PROGRAM_BYTES = 250_000_000


class Reader:
    """A process that serves one request; ``started`` starts it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        assert process.stdout is not None
        threading.Thread(target=_put_lines, args=(process.stdout, self._lines), daemon=True).start()

    def serve(self, request: Request, progress: Tick) -> Outcome:
        """Read the file. Raises ExchangeError, or another error of the reading process."""
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(asdict(request)).encode() + b"\n")
            self._process.stdin.flush()
            outcome = self._watched(request, progress)
        except BrokenPipeError:
            outcome = None
        if outcome is None:
            raise refused(
                f"it ended the process that read it ({_ending(self._process.wait())}). If that "
                f"needed more than {request.memory_bytes / 1e6:,.0f} MB of memory, allow more with "
                "`oki-trace import --memory`; otherwise this is a bug in oki-trace"
            )
        if outcome.error is not None:
            name, sentence = outcome.error
            raise errors.named(name, ExchangeError)(sentence)
        return outcome

    def _watched(self, request: Request, progress: Tick) -> Outcome | None:
        """The outcome; None when the process ended without one."""
        steps, latest = 0, time.monotonic()
        while True:
            try:
                line = self._lines.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                if time.monotonic() - latest > STUCK_SECONDS:
                    raise refused(
                        f"reading it made no progress for {STUCK_SECONDS:.0f} s, so it was stopped"
                    ) from None
            else:
                if line is None:
                    return None
                latest = time.monotonic()
                report = json.loads(line)
                if "outcome" in report:
                    return Outcome(**report["outcome"])
                steps = report["steps"]
            self._watch_memory(request)
            # Also without a report: the caller may end the import by raising.
            progress(steps, 0)

    def _watch_memory(self, request: Request) -> None:
        with suppress(psutil.Error):
            resident = psutil.Process(self._process.pid).memory_info().rss
            if resident > request.memory_bytes + _PROGRAM_BYTES:
                raise refused(f"it needs more than {request.memory_bytes / 1e6:,.0f} MB of memory")


@contextmanager
def started() -> Iterator[Reader]:
    """A reader, which loads its libraries while the caller prepares the request."""
    with child_process.start("oki_trace.exchange.reading.process") as process:
        try:
            yield Reader(process)
        finally:
            process.kill()


def _put_lines(stream: IO[bytes], lines: queue.Queue[bytes | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _ending(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"status {status}"
