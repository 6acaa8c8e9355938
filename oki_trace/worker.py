"""The explorer's background process, which serves the queued replies of one store.

Pages communicate with the worker through the store: a queued reply is the request, its steps
are the answer, and a stop request is a flag on the reply. A page can therefore be reloaded,
closed or opened twice while a reply is decoded. A machine has one worker per store; it exits
when the explorer that started it has ended and no reply is queued.

The model runs in a separate process (``model_process``), because a model's files may
contain anything. The worker kills that process when it ignores a stop or exceeds a limit;
the reply then ends with the reason, and a new process serves the next one.
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
from oki_trace.model_supervisor import ModelSupervisor
from oki_trace.records import Status
from oki_trace.settings import Settings
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.schema import identity
from oki_trace.store.writing.writer import TraceWriter

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1
HEARTBEAT_SECONDS = 2.0

# The workers that this process started, by store, so that they are reaped.
_started: dict[Path, subprocess.Popen[bytes]] = {}


def lock_path(db: str) -> Path:
    """The file that the worker of this store locks; its log is next to it.

    It is next to the store, so that every process finds it, from any folder.
    """
    url = identity.address(db)
    path = identity.file_of(url)
    if path is not None:
        return path.with_name(path.name + ".worker.lock")
    folder = Settings.from_environment().data_dir.absolute()
    return folder / f"worker-{hashlib.sha256(str(url).encode()).hexdigest()[:12]}.lock"


def ensure_running(db: str) -> None:
    """Start a worker for this store unless it has one; return at once.

    The worker exits some time after the calling process.
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
    # Two processes may both get here; the second worker finds the lock taken and exits.
    with _private(path.with_suffix(".log")) as output:
        _started[path] = subprocess.Popen(
            [*command("oki_trace.worker"), "--parent", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            # Not an argument: a URL may hold a password, and other users can read arguments.
            env={**os.environ, "OKI_TRACE_DB": db},
        )


def _private(path: Path) -> BinaryIO:
    """Open a file to append to, and make it readable by its user only."""
    path.touch(mode=0o600)
    path.chmod(0o600)
    return path.open("ab")


class Worker:
    """Serves the queued replies of one store, one after another."""

    def __init__(self, db: str, parent: int | None) -> None:
        self._db = db
        # The model process writes most, and checkpoints the write-ahead log.
        self._writer = TraceWriter(db, checkpoint=False)
        self._reader = TraceReader(db)
        self._parent = None if parent is None else _Parent(parent)
        self._stopping = threading.Event()
        self._state: dict[str, Any] = {}
        self._state_written_at = 0.0
        self._seen_version = -1

    def run(self) -> None:
        """Serve until ``stop``, or until the parent is gone and no reply is queued."""
        self._writer.mark_interrupted()
        self._write_state(state="idle")
        model = ModelSupervisor(self._db)
        try:
            while True:
                event = model.next_event(POLL_SECONDS) or {}
                if "worker" in event:
                    self._write_state(**event["worker"])
                elif time.monotonic() - self._state_written_at >= HEARTBEAT_SECONDS:
                    self._write_state(**self._state)
                if "done" in event or "again" in event:
                    self._seen_version = -1  # more may have been queued meanwhile
                if self._end_if_needed(model):
                    self._write_state(state="idle")
                    self._seen_version = -1
                    if self._stopping.is_set():
                        return
                    model = ModelSupervisor(self._db)
                elif not model.is_serving and self._is_done(model):
                    return
        finally:
            model.close()

    def stop(self) -> None:
        """End after the current token; the reply keeps its steps."""
        self._stopping.set()

    def close(self) -> None:
        self._reader.close()
        self._writer.close()

    def _is_done(self, model: ModelSupervisor) -> bool:
        """Whether to exit. Otherwise, serve the next reply if the store has changed."""
        if self._stopping.is_set():
            return True
        if self._has_changed():
            model.serve()
            return False
        return self._parent is not None and self._parent.is_gone()

    def _has_changed(self) -> bool:
        """Whether the store was written since the last call."""
        try:
            version = self._reader.version()
        except StoreBusy as error:
            log.warning("will read again: %s", error)
            return False
        changed, self._seen_version = version != self._seen_version, version
        return changed

    def _end_if_needed(self, model: ModelSupervisor) -> bool:
        """End the reply if the model process has ended or is overdue, and kill that process."""
        reply = model.reply
        if model.has_ended:
            if not model.has_begun:
                raise OkiTraceError("The model process did not start.")
            if reply is not None:
                self._end(reply, Status.FAILED, model.exit_reason())
            model.kill()
            # It may have claimed a reply without reporting it.
            self._writer.mark_interrupted()
            return True
        if reply is None:
            return False
        if self._stopping.is_set() or (self._has_changed() and self._reader.stop_requested(reply)):
            model.stop()
        overdue = model.overdue()
        if overdue is None:
            return False
        status = Status.STOPPED if overdue.stopped else Status.FAILED
        try:
            # Before the process ends, so that no reader takes the reply for interrupted.
            self._end(reply, status, overdue.reason)
            model.kill()
        except StoreBusy:  # perhaps held by that process
            model.kill()
            self._end(reply, status, overdue.reason)
        return True

    def _end(self, reply: int, status: Status, reason: str) -> None:
        # The reply may have been deleted meanwhile.
        with suppress(NotFound):
            if self._writer.end_abandoned(reply, status, reason):
                log.error("message %d: its process was ended: %s", reply, reason)

    def _write_state(self, **state: Any) -> None:
        self._state, self._state_written_at = state, time.monotonic()
        # A vacuum may hold the store for long. The state is written again later.
        try:
            self._writer.set_worker_state(**state)
        except StoreBusy as error:
            log.warning("state %s not written: %s", state["state"], error)


class _Parent:
    """The process that started the worker; a later one with the same number is another."""

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
                or self._process.status() == psutil.STATUS_ZOMBIE
            )
        except psutil.NoSuchProcess:
            return True


def main() -> None:
    """``python -m oki_trace.worker``: the explorer starts it."""
    parser = argparse.ArgumentParser(prog="oki_trace.worker", description=main.__doc__)
    parser.add_argument("--parent", type=int, help="Exit after this process.")
    # ``child_process`` puts the package's folder before these arguments.
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
