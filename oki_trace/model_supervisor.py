"""The process that holds the model, as its worker sees it: started, told, watched, ended.

What it does with a model's files may take for ever. Each phase has a limit, in
seconds of the processor where it computes in one thread, so that a busy machine does
not make a slow one of a good model, and in seconds by the clock for all else.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import subprocess
import threading
import time
from dataclasses import dataclass
from typing import IO, Any

import psutil

from oki_trace.child_process import command
from oki_trace.llm.loading.activity import Activity

log = logging.getLogger(__name__)

_LEAVING_SECONDS = 10.0
_MEMORY = (
    "which the system does when memory runs out. Close other programs, or choose a smaller model"
)


@dataclass(frozen=True, slots=True)
class Limit:
    """The most a phase may take without a sign of life; None: as much as it likes."""

    processor: float | None
    clock: float
    fix: str


LIMITS = {
    Activity.READING: Limit(180.0, 3600.0, "Download the model again, or choose another"),
    Activity.LOADING: Limit(
        None, 3600.0, "Look at the disk and the network, or choose another model"
    ),
    Activity.CHECKING: Limit(None, 3600.0, "Choose a smaller model"),
    Activity.TEMPLATE: Limit(
        30.0, 300.0, "Mend chat_template.jinja in the model's folder, or choose another model"
    ),
    Activity.TOKENIZER: Limit(30.0, 300.0, "Shorten the message, or choose another model"),
    Activity.DECODING: Limit(None, 3600.0, "Choose a smaller model"),
}
# How long a stop is waited for. A step of a large model takes its time.
STOP_SECONDS = dict.fromkeys(Activity, 3.0) | {Activity.DECODING: 20.0}


@dataclass(frozen=True, slots=True)
class Late:
    """Why the process has to be ended. ``stopped``: a stop was asked for, and not obeyed."""

    stopped: bool
    reason: str


class Watched:
    """A process that holds a model. It begins at once, and serves when it is told to."""

    def __init__(self, db: str) -> None:
        self._process = subprocess.Popen(
            [*command("oki_trace.model_process"), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OKI_TRACE_DB": db},
        )
        self._news: queue.Queue[dict[str, Any] | None] = queue.Queue()
        assert self._process.stdout is not None
        self._listener = threading.Thread(
            target=_put_news, args=(self._process.stdout, self._news), daemon=True
        )
        self._listener.start()
        self.has_begun = False
        self.is_asked = False
        self.reply: int | None = None
        self._ended = False
        self._stopped_at: float | None = None
        self._doing = Activity.LOADING
        self._latest = time.monotonic()
        self._computed = 0.0

    # ------------------------------------------------------------------ telling

    def ask(self) -> None:
        """Have it take the oldest queued reply; the news say which, or that there is none."""
        self.is_asked = True
        self._tell("serve")

    def stop(self) -> None:
        """Have it end the reply under way; ``overdue`` says when it did not."""
        if self._stopped_at is None:
            self._stopped_at = time.monotonic()
            self._tell("stop")

    def _tell(self, word: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(word.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            log.warning("it has ended and cannot be told to %s", word)

    # ---------------------------------------------------------------- listening

    def news(self, seconds: float) -> dict[str, Any] | None:
        """What it tells next, within ``seconds``; None when it tells nothing."""
        try:
            told = self._news.get(timeout=seconds)
        except queue.Empty:
            return None
        if told is None:
            self._ended = True
            return None
        self._latest = time.monotonic()
        if "ready" in told:
            self.has_begun = True
        if "doing" in told:
            self._doing = Activity[told["doing"]]
            self._computed = self._processor_seconds()
        if "again" in told or "done" in told or told.get("reply", 0) is None:
            self.is_asked, self.reply, self._stopped_at = False, None, None
        elif "reply" in told:
            self.reply = told["reply"]
            self._doing = Activity.LOADING
        return told

    @property
    def has_ended(self) -> bool:
        """Whether it has ended, and all that it told was heard."""
        return self._ended

    def overdue(self) -> Late | None:
        """Why it has to be ended; None while it need not be."""
        waited = time.monotonic() - self._latest
        if self._stopped_at is not None:
            if time.monotonic() - self._stopped_at > STOP_SECONDS[self._doing]:
                return Late(True, f"stopped while {self._doing}")
            return None
        limit = LIMITS[self._doing]
        if limit.processor is not None and self._computed_for() > limit.processor:
            return Late(False, _told_limit(self._doing, limit.processor, limit.fix))
        if waited > limit.clock:
            return Late(False, _told_limit(self._doing, limit.clock, limit.fix))
        return None

    def ending(self) -> str:
        """How it ended, for one that was not told to: a sentence and a fix."""
        status = self._process.wait()
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        return f"The process that held the model ended {how} while {self._doing}, {_MEMORY}."

    def _computed_for(self) -> float:
        return self._processor_seconds() - self._computed

    def _processor_seconds(self) -> float:
        try:
            times = psutil.Process(self._process.pid).cpu_times()
        except psutil.Error:
            return 0.0
        return float(times.user + times.system)

    # ------------------------------------------------------------------- ending

    def kill(self) -> None:
        """End it now, whatever it does."""
        self._process.kill()
        self._process.wait()
        self._listener.join()
        self._close_pipes()

    def close(self) -> None:
        """Let it leave; it is ended when it does not."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=_LEAVING_SECONDS)
        except subprocess.TimeoutExpired:
            log.warning("it did not leave, and was ended")
        self.kill()

    def _close_pipes(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                continue


def _told_limit(doing: Activity, seconds: float, fix: str) -> str:
    return f"Given up after {seconds:.0f} s while {doing}. {fix}."


def _put_news(stream: IO[bytes], news: queue.Queue[dict[str, Any] | None]) -> None:
    for line in stream:
        if line.endswith(b"\n"):  # it may have been ended within one
            news.put(json.loads(line))
    news.put(None)
