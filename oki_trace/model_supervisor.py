"""Starts, commands, watches and ends the model process on behalf of the worker.

Reading a model's files may never end, so each phase has a time limit: in processor seconds
if it computes in one thread, so that a busy machine makes no difference, and otherwise in
seconds by the clock.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

import psutil

from oki_trace.child_process import command
from oki_trace.llm.loading.activity import Activity

log = logging.getLogger(__name__)

_EXIT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Limit:
    """The longest silence of a phase, in seconds; ``processor`` None: no limit. ``fix``: advice."""

    processor: float | None
    clock: float
    fix: str


LIMITS = {
    Activity.READING: Limit(180.0, 3600.0, "Download the model again, or choose another"),
    Activity.LOADING: Limit(
        None, 3600.0, "Check the disk and the network, or choose another model"
    ),
    Activity.CHECKING: Limit(None, 3600.0, "Choose a smaller model"),
    Activity.TEMPLATE: Limit(
        30.0, 300.0, "Fix chat_template.jinja in the model's folder, or choose another model"
    ),
    Activity.TOKENIZER: Limit(30.0, 300.0, "Shorten the message, or choose another model"),
    Activity.DECODING: Limit(None, 3600.0, "Choose a smaller model"),
}
# How long a phase may take to obey a stop. One step of a large model takes seconds.
STOP_SECONDS = dict.fromkeys(Activity, 3.0) | {Activity.DECODING: 20.0}


@dataclass(frozen=True, slots=True)
class Overdue:
    """Why the process has to be killed. ``stopped``: it ignored a stop."""

    stopped: bool
    reason: str


class ModelSupervisor:
    """A model process. It starts at once, and serves a reply on command.

    ``is_serving`` from ``serve`` until the process has reported the end of that reply, or
    that none is queued; ``reply`` is the message it works on.
    """

    def __init__(self, db: str) -> None:
        self._process = subprocess.Popen(
            [*command("oki_trace.model_process"), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OKI_TRACE_DB": db},
        )
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._listener = threading.Thread(
            target=_read_events, args=(self._stdout, self._events), daemon=True
        )
        self._listener.start()
        self.has_begun = False
        self.has_ended = False  # and all its events were read
        self.is_serving = False
        self.reply: int | None = None
        self._stopped_at: float | None = None
        self._doing = Activity.LOADING
        self._last_event_at = time.monotonic()
        self._processor_before = 0.0

    def serve(self) -> None:
        """Have it claim and answer the oldest queued reply, if there is one."""
        self.is_serving = True
        self._send("serve")

    def stop(self) -> None:
        """Have it end the current reply; ``overdue`` says when it does not."""
        if self._stopped_at is None:
            self._stopped_at = time.monotonic()
            self._send("stop")

    def _send(self, word: str) -> None:
        try:
            self._stdin.write(word.encode() + b"\n")
            self._stdin.flush()
        except BrokenPipeError:
            log.warning("the model process has ended and cannot %s", word)

    def next_event(self, seconds: float) -> dict[str, Any] | None:
        """The next event within ``seconds``; None when there is none."""
        try:
            event = self._events.get(timeout=seconds)
        except queue.Empty:
            return None
        if event is None:
            self.has_ended = True
            return None
        self._last_event_at = time.monotonic()
        if "ready" in event:
            self.has_begun = True
        if "doing" in event:
            self._doing = Activity[event["doing"]]
            self._processor_before = self._processor_seconds()
        if "again" in event or "done" in event or event.get("reply", 0) is None:
            self.is_serving, self.reply, self._stopped_at = False, None, None
        elif "reply" in event:
            self.reply = event["reply"]
            self._doing = Activity.LOADING
        return event

    def overdue(self) -> Overdue | None:
        """Why the process has to be killed; None if it need not be."""
        now = time.monotonic()
        if self._stopped_at is not None:
            late = now - self._stopped_at > STOP_SECONDS[self._doing]
            return Overdue(True, f"stopped while {self._doing}") if late else None
        limit = LIMITS[self._doing]
        spent = [(now - self._last_event_at, limit.clock)]
        if limit.processor is not None:
            spent.append((self._processor_seconds() - self._processor_before, limit.processor))
        for seconds, most in spent:
            if seconds > most:
                reason = f"Stopped after {most:.0f} s while {self._doing}. {limit.fix}."
                return Overdue(False, reason)
        return None

    def exit_reason(self) -> str:
        """How the process ended by itself, and how to avoid it."""
        status = self._process.wait()
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        return (
            f"The model process ended {how} while {self._doing}, as when memory runs out. "
            "Close other programs, or choose a smaller model."
        )

    def _processor_seconds(self) -> float:
        try:
            times = psutil.Process(self._process.pid).cpu_times()
        except psutil.Error:
            return 0.0
        return float(times.user + times.system)

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.wait()
        self._listener.join()
        for pipe in (self._stdin, self._stdout):
            with suppress(BrokenPipeError):
                pipe.close()

    def close(self) -> None:
        """Let the process exit; kill it if it does not."""
        self._stdin.close()
        try:
            self._process.wait(timeout=_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            log.warning("the model process did not exit, and was killed")
        self.kill()


def _read_events(stream: IO[bytes], events: queue.Queue[dict[str, Any] | None]) -> None:
    for line in stream:
        if line.endswith(b"\n"):  # a killed process may leave half a line
            events.put(json.loads(line))
    events.put(None)
