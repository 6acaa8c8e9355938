"""Writes a reply to the store while it is being generated: a queue and a thread.

Guarantees: no step is dropped, because a full queue makes the caller wait; each step
is visible to others as soon as it is written, complete; and if writing fails, the
next call raises the reason.
"""

from __future__ import annotations

import queue
import threading
from contextlib import suppress
from dataclasses import replace

from oki_trace.errors import OkiTraceError, StoreError
from oki_trace.records import Lens, Status, Step, TurnEnd, TurnStart
from oki_trace.store.writing.writer import TraceWriter

# Steps of half a megabyte each: enough to bridge a checkpoint, little memory.
QUEUE_SIZE = 32


class Recorder:
    """Writes one reply: ``start`` once, then steps and lenses, then ``end`` once.

    The store's sink for a traced turn. Call it from one thread.
    """

    def __init__(self, writer: TraceWriter, message_id: int, *, maxsize: int = QUEUE_SIZE) -> None:
        self._writer = writer
        self._message_id = message_id
        self._queue: queue.Queue[Step | Lens | None] = queue.Queue(maxsize)
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._raised = False
        self._stop_requested = False

    @property
    def stop_requested(self) -> bool:
        """Whether somebody asked for a stop, as of the last step written."""
        return self._stop_requested

    def start(self, start: TurnStart) -> None:
        """Write what is known before the first token, and get ready for steps."""
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
        """Write the rest of the queue, then how the reply ended.

        If writing failed, the reply ends as failed with that reason, and the failure is
        raised unless an earlier call has raised it.
        """
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
        if self._failure is None:
            self._writer.finish_reply(self._message_id, end)
            return
        error = self._error(self._failure)
        # This may fail for the same cause; the first error is the one to raise.
        with suppress(StoreError):
            self._writer.finish_reply(
                self._message_id, replace(end, status=Status.FAILED, reason=str(error))
            )
        if not self._raised:
            raise error

    def _put(self, item: Step | Lens) -> None:
        if self._failure is not None:
            self._raised = True
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
        """The thread: write what is in the queue, until None arrives."""
        last = False
        while not last:
            batch = [self._queue.get()]
            # Everything queued meanwhile goes into the same transaction, so a writer that is
            # behind catches up, and one that is not writes each step by itself.
            while not self._queue.empty():
                batch.append(self._queue.get())
            last = None in batch
            # After a failure nothing is written, but the queue is still emptied, so that no
            # caller waits for ever.
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
