"""A store under test, with both its ends open, and when two records are the same."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from oki_trace.records import (
    CapturePolicy,
    ModelChoice,
    Sampling,
    Status,
    Step,
    TensorMode,
    TurnEnd,
)
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.writer import TraceWriter
from tests import builders

DONE = TurnEnd(Status.COMPLETE, " the end", "end of sequence", 1.5)


@dataclass
class Store:
    """A store under test, open for writing and for reading."""

    db: str
    writer: TraceWriter
    reader: TraceReader

    def reply(
        self,
        tensors: TensorMode = "exact",
        *,
        begin: bool = True,
        conversation: int | None = None,
    ) -> tuple[int, int]:
        """(conversation id, message id) of a reply that takes steps."""
        if conversation is None:
            conversation = self.writer.create_conversation("a conversation")
        message = self.writer.queue_reply(
            conversation,
            ModelChoice("tiny/model"),
            Sampling(),
            CapturePolicy(tensors=tensors),
            claim=True,
        )
        if begin:
            self.writer.start_reply(message, builders.turn_start(tensors))
        return conversation, message


def plain(value: Any) -> Any:
    """A record as nested plain values; NaN equals NaN by being its name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.shape, [plain(item) for item in value.ravel().tolist()])
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, float) and np.isnan(value):
        return "nan"
    return value


def assert_same(found: Step, written: Step) -> None:
    """``found`` is ``written``, but that what was read has digests and no tensors."""
    alike = dataclasses.replace(found, digest=None, tensor_digest=None)
    assert plain(alike) == plain(dataclasses.replace(written, tensors=()))
