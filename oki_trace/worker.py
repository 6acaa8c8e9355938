"""The process that owns the model for the explorer.

Pages ask through the store: a queued reply is the request, its steps are the
answer, a stop is a flag on it. So a page may be reloaded, closed or opened
twice while a reply is decoded, and nothing of it is lost. One worker serves
one store on a machine; it leaves when the explorer that started it is gone and
no reply is waiting. Nothing that a model or a request does ends it: the reply
fails with the reason, and the next one is served.
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
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import psutil
from filelock import FileLock, Timeout

from oki_trace import asking
from oki_trace.errors import NotFound, OkiTraceError, StoreBusy
from oki_trace.records import Message, ModelChoice
from oki_trace.settings import Settings
from oki_trace.store import identity
from oki_trace.store.reader import TraceReader
from oki_trace.store.writer import TraceWriter

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1
HEARTBEAT_SECONDS = 2.0

# The workers this process has started, by store. One that has ended is reaped here.
_started: dict[Path, subprocess.Popen[bytes]] = {}


def lock_path(db: str) -> Path:
    """The file whose lock the worker of this store holds; its log stands beside it.

    Beside the store, so that all who use one meet, from whatever folder.
    """
    url = identity.address(db)
    path = identity.file_of(url)
    if path is not None:
        return path.with_name(path.name + ".worker.lock")
    folder = Settings.from_environment().data_dir.absolute()
    return folder / f"worker-{hashlib.sha256(str(url).encode()).hexdigest()[:12]}.lock"


def ensure_running(db: str) -> None:
    """Start a worker for this store unless it has one; returns at once.

    The worker belongs to the calling process and follows it when it ends.
    """
    path = lock_path(db)
    mine = _started.get(path)
    if mine is not None and mine.poll() is None:
        return
    identity.create_folder(path)
    try:
        with FileLock(path, blocking=False, mode=0o600):
            pass
    except Timeout:
        return
    # Two processes may both get here; the worker that comes second finds the
    # lock taken and leaves.
    with _private(path.with_suffix(".log")) as output:
        _started[path] = subprocess.Popen(
            [sys.executable, "-m", "oki_trace.worker", "--parent", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            # Not an argument: an address may hold a password, and arguments are for all to see.
            env={**os.environ, "OKI_TRACE_DB": db},
        )


def _private(path: Path) -> BinaryIO:
    """A file to append to that only its user can read, also when others could until now."""
    path.touch(mode=0o600)
    path.chmod(0o600)
    return path.open("ab")


class Worker:
    """Answers the queued replies of one store, one after another."""

    def __init__(self, db: str, parent: int | None) -> None:
        self._writer = TraceWriter(db)
        self._reader = TraceReader(db)
        self._parent = None if parent is None else _Parent(parent)
        self._loaded: Any = None
        self._stopping = threading.Event()

    def run(self) -> None:
        """Serve until told to stop, or until the parent is gone and nothing waits."""
        self._writer.mark_interrupted()
        self._say("idle")
        seen = -1
        idle_for = 0.0
        while not self._stopping.is_set():
            try:
                version = self._reader.version()
                reply_id = self._writer.claim_next_reply() if version != seen else None
            except StoreBusy as error:
                log.warning("asking again: %s", error)
            else:
                if reply_id is not None:
                    self._serve(self._reader.message(reply_id))
                    continue
                seen = version
            if self._parent is not None and self._parent.is_gone():
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
        except Exception as error:
            log.exception("a fault of oki-trace")
            self._fail(reply, f"This is a fault of oki-trace ({type(error).__name__}: {error}).")
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
        log.error("message %d failed: %s", reply.id, reason)
        # It may have been deleted meanwhile, and that may be why.
        with suppress(NotFound):
            if self._reader.message(reply.id).status.is_live:
                asking.fail(self._writer, reply.id, reason)

    def _say(self, state: str, **values: Any) -> None:
        if self._loaded is not None:
            values.setdefault("model_id", self._loaded.model_id)
            values.setdefault("detail", self._loaded.description)
        # A vacuum may hold the store for long. What is said here is news only,
        # and is said again: no reason to end, or to fail a reply.
        try:
            self._writer.set_worker_state(state, **values)
        except StoreBusy as error:
            log.warning("not told that it is %s: %s", state, error)


class _Parent:
    """The process that is followed. A later one with its number is not taken for it."""

    def __init__(self, pid: int) -> None:
        try:
            self._process = psutil.Process(pid)
        except psutil.NoSuchProcess:
            self._process = None

    def is_gone(self) -> bool:
        try:
            return (
                self._process is None
                or not self._process.is_running()
                # Ended, and whoever started it has not asked how.
                or self._process.status() == psutil.STATUS_ZOMBIE
            )
        except psutil.NoSuchProcess:
            return True


def main() -> None:
    """``python -m oki_trace.worker``: started by the explorer, not by hand."""
    parser = argparse.ArgumentParser(prog="oki_trace.worker", description=main.__doc__)
    parser.add_argument("--parent", type=int, help="The process it follows.")
    parent = parser.parse_args().parent
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    db = Settings.from_environment().db
    try:
        with FileLock(lock_path(db), blocking=False, mode=0o600):
            worker = Worker(db, parent)
            signal.signal(signal.SIGTERM, lambda number, frame: worker.stop())
            try:
                worker.run()
            finally:
                worker.close()
    except Timeout:
        return


if __name__ == "__main__":
    main()
