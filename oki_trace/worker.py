"""The process that has the explorer's replies answered.

Pages ask through the store: a queued reply is the request, its steps are the
answer, a stop is a flag on it. So a page may be reloaded, closed or opened
twice while a reply is decoded, and nothing of it is lost. One worker serves
one store on a machine; it leaves when the explorer that started it is gone and
no reply is waiting.

Whatever a model's files bring with them runs in a process of its own
(``model_process``), which keeps the model loaded. The worker watches it, and ends it
when it does not obey a stop or exceeds a limit: that reply has ended then, with the
reason, and the next one is served by a new process.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import psutil
from filelock import FileLock, Timeout

from oki_trace.child_process import command
from oki_trace.errors import NotFound, OkiTraceError, StoreBusy
from oki_trace.model_supervisor import Watched
from oki_trace.records import Status
from oki_trace.settings import Settings
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.schema import identity
from oki_trace.store.writing.writer import TraceWriter

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
            [*command("oki_trace.worker"), "--parent", str(os.getpid())],
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
    """Has the queued replies of one store answered, one after another."""

    def __init__(self, db: str, parent: int | None) -> None:
        self._db = db
        # The process that holds the model writes more, and folds the log.
        self._writer = TraceWriter(db, checkpoint=False)
        self._reader = TraceReader(db)
        self._parent = None if parent is None else _Parent(parent)
        self._stopping = threading.Event()
        self._state: dict[str, Any] = {}
        self._said_at = 0.0
        self._seen = -1

    def run(self) -> None:
        """Serve until told to stop, or until the parent is gone and nothing waits."""
        self._writer.mark_interrupted()
        self._say(state="idle")
        watched = Watched(self._db)
        try:
            while True:
                told = watched.news(POLL_SECONDS)
                if told is not None and "worker" in told:
                    self._say(**told["worker"])
                elif time.monotonic() - self._said_at >= HEARTBEAT_SECONDS:
                    self._say(**self._state)
                if told is not None and ("done" in told or "again" in told):
                    self._seen = -1  # more may have been asked for meanwhile
                ended = self._ended(watched)
                if not watched.is_asked and not ended and self._is_done(watched):
                    return
                if ended:
                    self._say(state="idle")
                    self._seen = -1
                    if self._stopping.is_set():
                        return
                    watched = Watched(self._db)
        finally:
            watched.close()

    def stop(self) -> None:
        """End after the token under way; the reply keeps what it has."""
        self._stopping.set()

    def close(self) -> None:
        self._reader.close()
        self._writer.close()

    def _is_done(self, watched: Watched) -> bool:
        """Whether there is nothing to do and nobody to do it for; asks for what there is."""
        if self._stopping.is_set():
            return True
        if self._has_changed():
            watched.ask()
            return False
        return self._parent is not None and self._parent.is_gone()

    def _has_changed(self) -> bool:
        """Whether anything was written since the last time that this was asked."""
        try:
            version = self._reader.version()
        except StoreBusy as error:
            log.warning("asking again: %s", error)
            return False
        changed, self._seen = version != self._seen, version
        return changed

    def _ended(self, watched: Watched) -> bool:
        """Whether the process that held the model has ended, or had to be; its reply then has."""
        reply = watched.reply
        if watched.has_ended:
            if not watched.has_begun:
                raise OkiTraceError("The process that holds the model did not begin.")
            if reply is not None:
                self._end(reply, Status.FAILED, watched.ending())
            watched.kill()
            # It may have taken a reply without a word of it.
            self._writer.mark_interrupted()
            return True
        if reply is None:
            return False
        if self._stopping.is_set() or (self._has_changed() and self._reader.stop_requested(reply)):
            watched.stop()
        late = watched.overdue()
        if late is None:
            return False
        status = Status.STOPPED if late.stopped else Status.FAILED
        try:
            # Before its process ends, so that nobody reads that it was interrupted.
            self._end(reply, status, late.reason)
            watched.kill()
        except StoreBusy:  # by that process, perhaps
            watched.kill()
            self._end(reply, status, late.reason)
        return True

    def _end(self, reply: int, status: Status, reason: str) -> None:
        # It may have been deleted meanwhile.
        with suppress(NotFound):
            if self._writer.end_abandoned(reply, status, reason):
                log.error("message %d: its process was ended: %s", reply, reason)

    def _say(self, **state: Any) -> None:
        self._state, self._said_at = state, time.monotonic()
        # A vacuum may hold the store for long. What is said here is news only,
        # and is said again: no reason to end, or to fail a reply.
        try:
            self._writer.set_worker_state(**state)
        except StoreBusy as error:
            log.warning("not told that it is %s: %s", state["state"], error)


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
    # What stands before it says where the package is (``child_process``).
    parent = parser.parse_known_args()[0].parent
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
