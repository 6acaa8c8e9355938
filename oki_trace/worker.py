"""The process that owns the model for the explorer.

Pages ask through the store: a queued reply is the request, its steps are the
answer, a stop is a flag on it. So a page may be reloaded, closed or opened
twice while a reply is decoded, and nothing of it is lost. One worker serves
one store on a machine; it leaves when the explorer that started it is gone and
no reply is waiting.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from oki_trace import asking
from oki_trace.errors import OkiTraceError
from oki_trace.records import Message, ModelChoice
from oki_trace.settings import Settings
from oki_trace.store.reader import TraceReader
from oki_trace.store.writer import TraceWriter

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1
HEARTBEAT_SECONDS = 2.0


def lock_path(db: str) -> Path:
    """The file whose lock the worker of this store holds."""
    folder = Settings.from_environment().data_dir
    return folder / f"worker-{hashlib.sha256(db.encode()).hexdigest()[:12]}.lock"


def ensure_running(db: str) -> None:
    """Start a worker for this store unless one holds its lock; returns at once.

    The worker belongs to the calling process and follows it when it ends.
    """
    path = lock_path(db)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path, blocking=False):
            pass
    except Timeout:
        return
    # Two callers may both get here; the worker that comes second finds the
    # lock taken and leaves.
    output = path.with_suffix(".log").open("ab")
    command = [sys.executable, "-m", "oki_trace.worker", "--db", db, "--parent", str(os.getpid())]
    with output:
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


class Worker:
    """Answers the queued replies of one store, one after another."""

    def __init__(self, db: str, parent: int | None) -> None:
        self._writer = TraceWriter(db)
        self._reader = TraceReader(db)
        self._parent = parent
        self._loaded: Any = None
        self._stopping = threading.Event()

    def run(self) -> None:
        """Serve until told to stop, or until the parent is gone and nothing waits."""
        self._writer.mark_interrupted()
        self._say("idle")
        seen = -1
        idle_for = 0.0
        while not self._stopping.is_set():
            version = self._reader.version()
            reply_id = self._writer.claim_next_reply() if version != seen else None
            if reply_id is not None:
                self._serve(self._reader.message(reply_id))
                continue
            seen = version
            if self._parent is not None and not psutil.pid_exists(self._parent):
                return
            self._stopping.wait(POLL_SECONDS)
            idle_for += POLL_SECONDS
            if idle_for >= HEARTBEAT_SECONDS:
                idle_for = 0.0
                self._say("idle")

    def stop(self) -> None:
        """End after the token under way; the reply keeps what it has."""
        self._stopping.set()

    def close(self) -> None:
        self._reader.close()
        self._writer.close()

    def _serve(self, reply: Message) -> None:
        assert reply.choice is not None
        try:
            loaded = self._load(reply.choice)
            # Imported here: the explorer's pages import this module, and need no torch.
            from oki_trace.answering import answer

            self._say("decoding", detail=loaded.description)
            answer(self._writer, self._reader, reply, loaded, should_stop=self._stopping.is_set)
        except OkiTraceError as error:
            self._fail(reply, str(error))
        self._say("idle")

    def _load(self, choice: ModelChoice) -> Any:
        if self._loaded is None or self._loaded.requested != choice:
            self._loaded = None  # two models at once may not fit
            self._say("loading", model_id=choice.model_id, detail=f"Loading {choice.model_id}")
            from oki_trace.llm.load import load

            def report(text: str, fraction: float | None) -> None:
                self._say("loading", model_id=choice.model_id, detail=text, progress=fraction)

            self._loaded = load(choice, progress=report)
        return self._loaded

    def _fail(self, reply: Message, reason: str) -> None:
        if self._reader.message(reply.id).status.is_live:
            asking.fail(self._writer, reply.id, reason)
        log.error("message %d failed: %s", reply.id, reason)

    def _say(self, state: str, **values: Any) -> None:
        if self._loaded is not None:
            values.setdefault("model_id", self._loaded.model_id)
            values.setdefault("detail", self._loaded.description)
        self._writer.set_worker_state(state, **values)


def main() -> None:
    """``python -m oki_trace.worker``: started by the explorer, not by hand."""
    parser = argparse.ArgumentParser(prog="oki_trace.worker", description=main.__doc__)
    parser.add_argument("--db", required=True)
    parser.add_argument("--parent", type=int)
    options = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    try:
        with FileLock(lock_path(options.db), blocking=False):
            worker = Worker(options.db, options.parent)
            signal.signal(signal.SIGTERM, lambda number, frame: worker.stop())
            try:
                worker.run()
            finally:
                worker.close()
    except Timeout:
        return


if __name__ == "__main__":
    main()
