"""A store under test, with both its ends open."""

from __future__ import annotations

from dataclasses import dataclass

import builders

from oki_trace.records import CapturePolicy, ModelChoice, Sampling, TensorMode
from oki_trace.store.reader import TraceReader
from oki_trace.store.writer import TraceWriter


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
