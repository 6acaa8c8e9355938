"""The reading process as seen from outside: started, watched, and ended in any case.

It is given up when it shows no progress for ``STUCK_SECONDS``, and when it
takes more memory than it may where the system cannot see to that itself.
"""

from __future__ import annotations

import json
import os
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
from oki_trace.errors import ExchangeError, OkiTraceError
from oki_trace.exchange.reading.process import Outcome, Request
from oki_trace.exchange.refusal import refused

Tick = Callable[[int, int], None]  # steps done, of all (as far as known)

STUCK_SECONDS = 60.0
_LOOK_SECONDS = 0.25
# The program itself takes half of this.
_PROGRAM_BYTES = 250_000_000


class Reader:
    """A process that serves one request. ``started`` makes one."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        assert process.stdout is not None
        threading.Thread(target=_put_lines, args=(process.stdout, self._lines), daemon=True).start()

    def serve(self, request: Request, progress: Tick) -> Outcome:
        """Read what is asked for. Raises ExchangeError and what else the reading raised."""
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
                f"needed more than {request.memory_bytes / 1e6:,.0f} MB of memory, give more with "
                "`oki-trace import --memory`; else this is a fault of oki-trace"
            )
        if outcome.error is not None:
            kind, sentence = outcome.error
            raise _error(kind)(sentence)
        return outcome

    def _watched(self, request: Request, progress: Tick) -> Outcome | None:
        """What came of it; None when the process ended without a word."""
        steps, latest = 0, time.monotonic()
        while True:
            try:
                line = self._lines.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                if time.monotonic() - latest > STUCK_SECONDS:
                    raise refused(
                        f"reading it made no progress for {STUCK_SECONDS:.0f} s, so it was given up"
                    ) from None
            else:
                if line is None:
                    return None
                latest = time.monotonic()
                news = json.loads(line)
                if "outcome" in news:
                    return Outcome(**news["outcome"])
                steps = news["steps"]
            self._watch_memory(request)
            # Also without news: whoever watches may want to end it.
            progress(steps, 0)

    def _watch_memory(self, request: Request) -> None:
        with suppress(psutil.Error):
            held = psutil.Process(self._process.pid).memory_info().rss
            if held > request.memory_bytes + _PROGRAM_BYTES:
                raise refused(f"it needs more than {request.memory_bytes / 1e6:,.0f} MB of memory")


@contextmanager
def started() -> Iterator[Reader]:
    """A reader, which loads its libraries while its request is prepared."""
    process = subprocess.Popen(
        child_process.command("oki_trace.exchange.reading.process"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        # Ctrl-C is for this process, which ends the other.
        start_new_session=True,
        env={**os.environ, **child_process.FRUGAL},
    )
    with process:
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


def _error(kind: str) -> type[OkiTraceError]:
    found = getattr(errors, kind, None)
    if isinstance(found, type) and issubclass(found, OkiTraceError):
        return found
    return ExchangeError
