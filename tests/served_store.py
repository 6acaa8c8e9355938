"""A store with a writer and a reader, as the explorer has it, and the workers that serve it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from oki_trace import queueing, worker
from oki_trace.records import CapturePolicy, Message, ModelChoice, Sampling, WorkerState
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.writer import TraceWriter
from tests.waiting import until

ROOT = Path(__file__).resolve().parent.parent
STEPS = 5
FOREVER = 1_000_000


@dataclass(frozen=True)
class ServedStore:
    """A store with both ends open, as the explorer has it."""

    db: str
    writer: TraceWriter
    reader: TraceReader

    def ask(self, model: Path | str, tokens: int = 4, text: str = "the fox") -> int:
        """Queue a reply in a conversation of its own; returns its id."""
        request = queueing.ReplyRequest(
            queueing.new_messages(text),
            ModelChoice(str(model)),
            Sampling(max_new_tokens=tokens),
            CapturePolicy(tensors="none"),
        )
        return queueing.submit(self.writer, request)[1]

    def ended(self, reply: int) -> Message:
        """The reply once it has ended."""

        def look() -> Message | None:
            message = self.reader.message(reply)
            return None if message.status.is_live else message

        return until(look, f"the end of reply {reply}")

    def under_way(self, reply: int) -> Message:
        """The reply once it has a few steps; it is one that goes on for ever."""

        def look() -> Message | None:
            message = self.reader.message(reply)
            assert message.status.is_live, message.reason
            return message if message.tokens >= STEPS else None

        return until(look, f"the first steps of reply {reply}")

    def state(self) -> WorkerState:
        found = self.reader.worker()
        assert found is not None
        return found

    def idle(self) -> WorkerState:
        until(lambda: self.state().state == "idle", "an idle worker")
        return self.state()

    def workers(self, module: str = "oki_trace.worker") -> list[psutil.Process]:
        """The living worker processes of this store, whoever started them."""
        found = []
        for process in psutil.process_iter():
            try:
                mine = module in process.cmdline()
                if mine and process.environ().get("OKI_TRACE_DB") == self.db:
                    found.append(process)
            except psutil.Error:
                continue  # ended meanwhile, or not ours to look at
        return found


@contextmanager
def store_at(folder: Path) -> Iterator[ServedStore]:
    """A store whose workers are gone afterwards, whatever happened."""
    db = str(folder / "store.db")
    with TraceWriter(db, checkpoint=False) as writer, TraceReader(db) as reader:
        store = ServedStore(db, writer, reader)
        try:
            yield store
        finally:
            left = store.workers()
            for process in left:
                process.kill()
            psutil.wait_procs(left, timeout=30)
            mine = worker._started.pop(worker.lock_path(db), None)
            if mine is not None:
                mine.wait()  # else Python complains of it when it ends
    assert store.workers() == []
    until(lambda: not store.workers("oki_trace.model_process"), "their models to be gone")


@contextmanager
def serving(store: ServedStore) -> Iterator[threading.Thread]:
    """A worker in this process, whose limits a test can set; its model is in another."""
    here = worker.Worker(store.db, None)
    thread = threading.Thread(target=here.run)
    thread.start()
    try:
        yield thread
    finally:
        here.stop()
        thread.join()
        here.close()
