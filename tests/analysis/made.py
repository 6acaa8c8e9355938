"""Made-up replies, for tests of what is kept in step with what."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from oki_trace.records import (
    CapturePolicy,
    ChatMessage,
    ModelChoice,
    Role,
    Sampling,
    Status,
    TensorMode,
    TurnEnd,
)
from oki_trace.store.writing.writer import TraceWriter
from tests import builders


def begin(
    writer: TraceWriter,
    said: str = "Hello",
    steps: int = 3,
    tensors: TensorMode = "none",
    model: str = "tiny/model",
) -> tuple[int, int]:
    """(conversation, reply): a question and a reply that is still running."""
    conversation = writer.create_conversation(said)
    writer.add_message(conversation, ChatMessage(Role.USER, said))
    reply = writer.queue_reply(
        conversation,
        ModelChoice(model),
        Sampling(),
        CapturePolicy(tensors=tensors),
        claim=True,
    )
    writer.start_reply(reply, replace(builders.turn_start(tensors), model_id=model))
    more(writer, reply, 0, steps)
    return conversation, reply


def more(writer: TraceWriter, reply: int, first: int, end: int) -> None:
    rng = np.random.default_rng(reply * 1000 + first)
    steps = [builders.step(i, rng, with_lens=True, with_tensors=False) for i in range(first, end)]
    writer.append(reply, steps)


def finish(writer: TraceWriter, reply: int, said: str = "a reply") -> None:
    writer.finish_reply(reply, TurnEnd(Status.COMPLETE, said, "end of turn", 1.0))


def whole(
    writer: TraceWriter, said: str = "Hello", steps: int = 3, model: str = "tiny/model"
) -> tuple[int, int]:
    """(conversation, reply) of a finished one."""
    conversation, reply = begin(writer, said, steps, model=model)
    finish(writer, reply)
    return conversation, reply
