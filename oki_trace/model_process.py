"""The process that holds the model; the worker starts it and may kill it at any moment.

Everything that uses a model's files runs here: configs, templates, tokenizers, weights,
decoding. It writes each step to the store itself, so a kill loses no written step.

It reads commands ("serve", "stop") as lines of standard input, and writes events as lines
of JSON to standard output. It exits when its input is closed, and with its parent.
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
from oki_trace.llm.failures import INTERRUPTIONS, summary
from oki_trace.llm.loading.activity import Activity, report_activity, reporting_to
from oki_trace.records import Message, ModelChoice, Status, TurnEnd
from oki_trace.settings import Settings
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.writer import TraceWriter

log = logging.getLogger(__name__)

EVENT_SECONDS = 0.1
_EXIT_SECONDS = 5.0


class StopRequested(KeyboardInterrupt):
    """Ends a phase before the first step."""


class Channel:
    """Events for the worker, a line of JSON each, from any thread."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._sent_at = 0.0

    def send(self, **event: Any) -> None:
        with self._lock:
            self._sent_at = time.monotonic()
            self._stream.write(json.dumps(event) + "\n")
            self._stream.flush()

    def pulse(self, **event: Any) -> None:
        """Send it unless another event was sent within the last ``EVENT_SECONDS``."""
        if time.monotonic() - self._sent_at >= EVENT_SECONDS:
            self.send(**event)


class ModelProcess:
    """Generates replies of one store on command, with one model at a time.

    ``stop`` ends the current reply after its next step, or earlier if it has none yet.
    """

    def __init__(self, writer: TraceWriter, reader: TraceReader, channel: Channel) -> None:
        self.stop = threading.Event()
        self._writer, self._reader, self._channel = writer, reader, channel
        self._loaded: Any = None
        # The tokenizer aborts the process when it runs out of memory; the worker reports that.
        self._memory = MemoryLimit(Activity.TEMPLATE, Activity.TOKENIZER)

    def serve_next(self) -> None:
        """Claim the oldest queued reply and generate it; report if there is none."""
        try:
            reply_id = None if self.stop.is_set() else self._writer.claim_next_reply()
        except StoreBusy as error:
            log.warning("will claim again: %s", error)
            self._channel.send(again=True)
            return
        self._channel.send(reply=reply_id)
        if reply_id is not None:
            self._serve(self._reader.message(reply_id))
            self._channel.send(done=reply_id)

    def _serve(self, reply: Message) -> None:
        assert reply.choice is not None
        with reporting_to(self._now_doing):
            try:
                loaded = self._load(reply.choice)
                # Imported here, because torch takes seconds and the process is to start at once.
                from oki_trace.generate import generate_reply

                self._send_state("decoding")
                generate_reply(
                    self._writer, self._reader, reply, loaded, should_stop=self._should_stop
                )
            except OkiTraceError as error:
                self._end(reply, Status.FAILED, str(error))
            except StopRequested:
                self._end(reply, Status.STOPPED, "stopped before the first token")
            except INTERRUPTIONS:
                raise
            except BaseException as error:
                log.exception("a bug in oki-trace")
                self._end(reply, Status.FAILED, f"This is a bug in oki-trace ({summary(error)}).")
            finally:
                self._memory.lift()
                self._send_state("idle")

    def _now_doing(self, what: Activity) -> None:
        self._channel.send(doing=what.name)
        self._memory.now_doing(what)

    def _load(self, choice: ModelChoice) -> Any:
        if self._loaded is None or self._loaded.requested != choice:
            self._loaded = None  # two models at once may not fit
            report_activity(Activity.LOADING)
            self._send_loading(choice, f"Loading {choice.model_id}", None)
            from oki_trace.llm.loading.load import load

            def report(text: str, fraction: float | None) -> None:
                if self.stop.is_set():
                    raise StopRequested
                self._send_loading(choice, text, fraction)

            self._loaded = load(choice, progress=report)
        return self._loaded

    def _should_stop(self) -> bool:
        self._channel.pulse(alive=True)
        return self.stop.is_set()

    def _send_loading(self, choice: ModelChoice, text: str, fraction: float | None) -> None:
        send = self._channel.send if fraction in (None, 1.0) else self._channel.pulse
        state = {"state": "loading", "model_id": choice.model_id, "detail": text}
        send(worker={**state, "progress": fraction})

    def _send_state(self, state: str) -> None:
        worker: dict[str, Any] = {"state": state}
        if self._loaded is not None:
            worker |= {"model_id": self._loaded.model_id, "detail": self._loaded.description}
        self._channel.send(worker=worker)

    def _end(self, reply: Message, status: Status, reason: str) -> None:
        if status is Status.FAILED:
            log.error("message %d failed: %s", reply.id, reason)
        # The reply may have been deleted, which may also be the reason.
        with suppress(NotFound):
            if self._reader.message(reply.id).status.is_live:
                self._writer.finish_reply(reply.id, TurnEnd(status, "", reason, 0.0))


def _listen(commands: queue.Queue[bool], process: ModelProcess) -> None:
    """Read the worker's commands; False ends the queue when the input is closed."""
    for line in sys.stdin:
        if line.strip() == "stop":
            process.stop.set()
        else:
            process.stop.clear()  # an earlier stop was for another reply
            commands.put(True)
    process.stop.set()
    commands.put(False)
    time.sleep(_EXIT_SECONDS)
    os._exit(1)


def _end_with(parent: int) -> None:
    """Have the kernel end this process with its parent, if the system supports that."""
    if sys.platform == "linux":
        import ctypes
        import signal

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        # When memory runs out, the kernel should end this process, not the one with the pages.
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("500")
    if os.getppid() != parent:
        os._exit(1)


def main() -> None:
    """The worker starts it; the last argument is the worker's process id."""
    _end_with(int(sys.argv[-1]))
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    channel = Channel(os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8"))
    # Output of libraries must not mix with the events.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    db = Settings.from_environment().db
    with TraceWriter(db) as writer, TraceReader(db) as reader:
        process = ModelProcess(writer, reader, channel)
        channel.send(ready=True)
        commands: queue.Queue[bool] = queue.Queue()
        threading.Thread(target=_listen, args=(commands, process), daemon=True).start()
        while commands.get():
            process.serve_next()
