"""A process that writes a store until it is killed: ``python victim.py STORE SEED``.

Each line it prints is an acknowledgement: what it names was committed before.
What it writes follows from the numbers alone, so it can be compared afterwards.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np

from oki_trace.records import (
    CapturePolicy,
    ChatMessage,
    ModelChoice,
    Role,
    Sampling,
    Status,
    Step,
    TurnEnd,
)
from oki_trace.store.writing.writer import TraceWriter
from tests import builders

# The lens comes so many steps after its step, as it may in a traced turn.
TRAILS = 2


def step_of(message: int, index: int) -> Step:
    """Step ``index`` of reply ``message``, with its lens."""
    return builders.coherent_step(index, np.random.default_rng((message, index)), vocab=2000)


def reply(writer: TraceWriter, message: int, length: int, rng: np.random.Generator) -> None:
    """Steps in transactions of one to three, their lenses behind them."""
    writer.start_reply(message, builders.turn_start())
    done = lenses = 0
    while done < length:
        until = min(length, done + int(rng.integers(1, 4)))
        steps = [step_of(message, index) for index in range(done, until)]
        ready = range(lenses, until if until == length else max(lenses, until - TRAILS))
        writer.append(
            message,
            [replace(step, lens=None) for step in steps],
            [lens for i in ready if (lens := step_of(message, i).lens) is not None],
        )
        done, lenses = until, ready.stop
        print("steps", message, done, lenses, flush=True)
    text = " the" * length
    writer.finish_reply(message, TurnEnd(Status.COMPLETE, text, "end of turn", 1.0))
    print("end", message, flush=True)


def main(db: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    written: list[tuple[int, int]] = []
    with TraceWriter(db) as writer:
        print("open", flush=True)
        writer.mark_interrupted()
        while True:
            conversation = writer.create_conversation("x")
            writer.add_message(conversation, ChatMessage(Role.USER, "and then?"))
            message = writer.queue_reply(
                conversation,
                ModelChoice("m"),
                Sampling(),
                CapturePolicy(tensors="exact"),
                claim=True,
            )
            print("reply", message, flush=True)
            reply(writer, message, int(rng.integers(3, 30)), rng)
            written.append((conversation, message))
            if len(written) > 2:
                old, its = written.pop(0)
                print("deleting", its, flush=True)
                writer.delete_conversation(old)
                print("deleted", its, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
