"""A reply's way to the store while it is being generated: a queue and a thread.

The guarantees: nothing handed over is dropped, for a full queue makes the
caller wait; each step is visible to others as soon as it is written, with all
that belongs to it; and if writing fails, the caller learns why at its next call.
"""

from __future__ import annotations

import queue
import threading
from contextlib import suppress
from dataclasses import replace

from oki_trace.errors import OkiTraceError, StoreError
from oki_trace.records import Lens, Status, Step, TurnEnd, TurnStart
from oki_trace.store.writing.writer import TraceWriter

# A step of a small model is half a megabyte: enough to ride out a checkpoint,
# not enough to be felt in memory.
QUEUED_AT_MOST = 32


class Recorder:
    """Writes one reply: ``start`` once, then steps and lenses, then ``end`` once.

    It is the store's sink for a traced turn. Call it from one thread.
    """

    def __init__(
        self, writer: TraceWriter, message_id: int, *, maxsize: int = QUEUED_AT_MOST
    ) -> None:
        self._writer = writer
        self._message_id = message_id
        self._queue: queue.Queue[Step | Lens | None] = queue.Queue(maxsize)
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._told = False
        self._stop_requested = False

    @property
    def stop_requested(self) -> bool:
        """Whether someone asked for a stop, as of the last step written."""
        return self._stop_requested

    def start(self, start: TurnStart) -> None:
        """Write what is known before the first token, and be ready for steps."""
        self._writer.start_reply(self._message_id, start)
        self._thread = threading.Thread(
            target=self._run, name=f"recorder-{self._message_id}", daemon=True
        )
        self._thread.start()

    def step(self, step: Step) -> None:
        """Hand over a step; waits while the queue is full."""
        self._put(step)

    def lens(self, lens: Lens) -> None:
        """Hand over the lens of this or an earlier step; waits while the queue is full."""
        self._put(lens)

    def end(self, end: TurnEnd) -> None:
        """Write all that waits, then how the reply ended.

        When writing failed, the reply ends as failed with that reason, and the
        failure is raised unless an earlier call has raised it already.
        """
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
        if self._failure is None:
            self._writer.finish_reply(self._message_id, end)
            return
        error, told = self._error(self._failure), self._told
        # What broke the writing may break this too; the first error is the one to tell.
        with suppress(StoreError):
            self._writer.finish_reply(
                self._message_id, replace(end, status=Status.FAILED, reason=str(error))
            )
        if not told:
            raise error

    def _put(self, item: Step | Lens) -> None:
        if self._failure is not None:
            self._told = True
            raise self._error(self._failure)
        if self._thread is None:
            raise StoreError(
                f"The recorder of message {self._message_id} takes steps between start and end "
                "only: make a new one for another reply."
            )
        self._queue.put(item)

    def _error(self, failure: Exception) -> OkiTraceError:
        if isinstance(failure, OkiTraceError):
            return failure
        error = StoreError(
            f"A step of message {self._message_id} could not be written "
            f"({type(failure).__name__}: {failure}): run `oki-trace verify`."
        )
        error.__cause__ = failure
        return error

    def _run(self) -> None:
        """The thread: take what there is, write it, until None comes."""
        last = False
        while not last:
            batch = [self._queue.get()]
            # What has gathered meanwhile goes into the same transaction: a
            # writer that is behind catches up, one that is not writes each
            # step by itself.
            while not self._queue.empty():
                batch.append(self._queue.get())
            last = None in batch
            # After a failure the queue is still emptied, so that no caller
            # waits for ever; nothing more is written.
            if self._failure is None:
                try:
                    self._write([item for item in batch if item is not None])
                except Exception as error:
                    self._failure = error

    def _write(self, items: list[Step | Lens]) -> None:
        steps = [item for item in items if isinstance(item, Step)]
        lenses = [item for item in items if isinstance(item, Lens)]
        if items:
            self._stop_requested = self._writer.append(self._message_id, steps, lenses)
