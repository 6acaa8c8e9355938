"""The process that holds the model for a worker, which can end it at any moment.

All that a model's files bring with them runs here: configs, templates, tokenizers,
weights, decoding. What is decoded is written to the store from here, a step at a
time, so an end by force loses no step that was written.

It is told what to do by lines of JSON on its standard input, and tells by lines on
its standard output what it is doing. It ends when its input is closed, and with the
process that started it.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from oki_trace.errors import NotFound, OkiTraceError, StoreBusy
from oki_trace.llm.decoding.memory_limit import MemoryLimit
from oki_trace.llm.loading.activity import INTERRUPTIONS, Doing, now_doing, told_to, why
from oki_trace.records import Message, ModelChoice, Status, TurnEnd
from oki_trace.settings import Settings
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.writer import TraceWriter

log = logging.getLogger(__name__)

NEWS_SECONDS = 0.1
_LEAVING_SECONDS = 5.0


class StopAsked(KeyboardInterrupt):
    """Ends a phase that has no step to end after."""


class Channel:
    """What is told to the worker: a line of JSON each, from any thread."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._told = 0.0

    def say(self, **news: Any) -> None:
        with self._lock:
            self._told = time.monotonic()
            self._stream.write(json.dumps(news) + "\n")
            self._stream.flush()

    def pulse(self, **news: Any) -> None:
        """Say it unless something was said a moment ago."""
        if time.monotonic() - self._told >= NEWS_SECONDS:
            self.say(**news)


class ModelProcess:
    """Answers replies of one store, each when it is told to, with one model at a time."""

    def __init__(self, db: str, channel: Channel) -> None:
        self._writer = TraceWriter(db)
        self._reader = TraceReader(db)
        self._channel = channel
        self._loaded: Any = None
        self._stop = threading.Event()
        # The tokenizer's code ends the process when it gets none; the worker says so.
        self._memory = MemoryLimit(Doing.TEMPLATE, Doing.TOKENIZER)

    def close(self) -> None:
        self._reader.close()
        self._writer.close()

    def stop(self) -> None:
        """End the reply under way after its next step, or at the next chance before it."""
        self._stop.set()

    def go_on(self) -> None:
        """What was said before of stopping was for another reply."""
        self._stop.clear()

    def serve_next(self) -> None:
        """Take the oldest queued reply and answer it; say when there was none."""
        try:
            reply_id = None if self._stop.is_set() else self._writer.claim_next_reply()
        except StoreBusy as error:
            log.warning("asking again: %s", error)
            self._channel.say(again=True)
            return
        self._channel.say(reply=reply_id)
        if reply_id is not None:
            self._serve(self._reader.message(reply_id))
            self._channel.say(done=reply_id)

    def _serve(self, reply: Message) -> None:
        assert reply.choice is not None
        with told_to(self._now_doing):
            try:
                loaded = self._load(reply.choice)
                # Imported here: it begins at once, and torch takes seconds.
                from oki_trace.generate import generate_reply

                self._say_loaded("decoding")
                generate_reply(
                    self._writer, self._reader, reply, loaded, should_stop=self._should_stop
                )
            except OkiTraceError as error:
                self._fail(reply, str(error))
            except StopAsked:
                end = TurnEnd(Status.STOPPED, "", "stopped before the first token", 0.0)
                self._end(reply, end)
            except INTERRUPTIONS:
                raise
            except BaseException as error:
                log.exception("a fault of oki-trace")
                self._fail(reply, f"This is a fault of oki-trace ({why(error)}).")
            finally:
                self._memory.lift()
                self._say_loaded("idle")

    def _now_doing(self, what: Doing) -> None:
        self._channel.say(doing=what.name)
        self._memory.now_doing(what)

    def _load(self, choice: ModelChoice) -> Any:
        if self._loaded is None or self._loaded.requested != choice:
            self._loaded = None  # two models at once may not fit
            now_doing(Doing.LOADING)
            self._say_loading(choice, f"Loading {choice.model_id}", None)
            from oki_trace.llm.loading.load import load

            def report(text: str, fraction: float | None) -> None:
                if self._stop.is_set():
                    raise StopAsked
                self._say_loading(choice, text, fraction)

            self._loaded = load(choice, progress=report)
        return self._loaded

    def _should_stop(self) -> bool:
        self._channel.pulse(alive=True)
        return self._stop.is_set()

    def _say_loading(self, choice: ModelChoice, text: str, fraction: float | None) -> None:
        state = {"state": "loading", "model_id": choice.model_id, "detail": text}
        if fraction in (None, 1.0):
            self._channel.say(worker={**state, "progress": fraction})
        else:
            self._channel.pulse(worker={**state, "progress": fraction})

    def _say_loaded(self, state: str) -> None:
        told: dict[str, Any] = {"state": state}
        if self._loaded is not None:
            told |= {"model_id": self._loaded.model_id, "detail": self._loaded.description}
        self._channel.say(worker=told)

    def _fail(self, reply: Message, reason: str) -> None:
        log.error("message %d failed: %s", reply.id, reason)
        self._end(reply, TurnEnd(Status.FAILED, "", reason, 0.0))

    def _end(self, reply: Message, end: TurnEnd) -> None:
        # It may have been deleted meanwhile, and that may be why.
        with suppress(NotFound):
            if self._reader.message(reply.id).status.is_live:
                self._writer.finish_reply(reply.id, end)


def _listen(told: queue.Queue[bool], held: ModelProcess) -> None:
    """Take the worker's lines: "serve" is put into the queue, "stop" is for what goes on."""
    for line in sys.stdin:
        if line.strip() == "stop":
            held.stop()
        else:
            held.go_on()
            told.put(True)
    held.stop()
    told.put(False)
    time.sleep(_LEAVING_SECONDS)
    os._exit(1)


def _end_with(parent: int) -> None:
    """Have the kernel end this process with its parent, where it can."""
    if sys.platform == "linux":
        import ctypes
        import signal

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        # When memory runs out, this is the process to end, not the one that serves the pages.
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("500")
    if os.getppid() != parent:
        os._exit(1)


def main() -> None:
    """Started by the worker, not by hand; its last argument is the worker's process id."""
    _end_with(int(sys.argv[-1]))
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    channel = Channel(os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8"))
    # What a library prints is not part of what is told.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    held = ModelProcess(Settings.from_environment().db, channel)
    try:
        channel.say(ready=True)
        told: queue.Queue[bool] = queue.Queue()
        threading.Thread(target=_listen, args=(told, held), daemon=True).start()
        while told.get():
            held.serve_next()
    finally:
        held.close()
