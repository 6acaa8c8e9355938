"""A large store to measure the explorer on: ``python -m tests.benchmarks.big_store PATH``.

Written through the public writer, with the rows of a model as large as SmolLM2
(30 layers, the top 5 of each for the lens, 10 attended positions each), and no
real words. Run again, it goes on where it stopped; ``--seconds`` ends it early.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
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
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.writer import TraceWriter
from tests import builders

LAYERS = 30
PROMPT = 40
STEPS = 100
LONG_STEPS = 600
WORDS = (" the", " lighthouse", " keeper", " was", ",", " a", " of", ".", "\n", " sea", " light")


def steps(count: int, rng: np.random.Generator, *, tensors: bool = False) -> list[Step]:
    """A reply's steps, as wide as SmolLM2's."""
    return [
        builders.step(
            index,
            rng,
            prompt_len=PROMPT,
            layers=LAYERS,
            heads=9,
            width=576,
            vocab=49_152,
            topk_attention=10,
            token=WORDS[int(rng.integers(len(WORDS)))],
            with_lens=True,
            with_tensors=tensors,
        )
        for index in range(count)
    ]


def add(writer: TraceWriter, title: str, made: Sequence[Step], *, tensors: bool = False) -> int:
    """One conversation of one turn; returns its id."""
    mode = "half" if tensors else "none"
    conversation = writer.create_conversation(title)
    writer.add_message(conversation, ChatMessage(Role.USER, title))
    reply = writer.queue_reply(
        conversation,
        ModelChoice("tiny/model"),
        Sampling(),
        CapturePolicy(tensors=mode),
        claim=True,
    )
    writer.start_reply(reply, builders.turn_start(mode, PROMPT, LAYERS))
    writer.append(reply, made)
    text = "".join(step.token for step in made)
    writer.finish_reply(reply, TurnEnd(Status.COMPLETE, text, "end of turn", len(made) / 20))
    return conversation


def fill(db: str, conversations: int, seconds: float) -> int:
    """Bring the store to so many conversations; returns how many it has."""
    rng = np.random.default_rng(3)
    deadline = time.monotonic() + seconds
    with TraceWriter(db) as writer, TraceReader(db) as reader:
        have = reader.info().conversations
        if have == 0:
            add(writer, "A long reply", steps(LONG_STEPS, rng))
            add(writer, "With tensors", steps(STEPS, rng, tensors=True), tensors=True)
            have = 2
        made = steps(STEPS, rng)
        while have < conversations and time.monotonic() < deadline:
            turned = int(rng.integers(len(made)))
            order = made[turned:] + made[:turned]
            add(
                writer,
                f"Conversation {have + 1} about the sea",
                [
                    replace(
                        step,
                        step_index=index,
                        position=PROMPT + index,
                        lens=step.lens and replace(step.lens, step_index=index),
                    )
                    for index, step in enumerate(order)
                ],
            )
            have += 1
    return have


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("db", help="The store, made when there is none.")
    parser.add_argument("--conversations", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=1e9, help="Stop after so long.")
    given = parser.parse_args()
    print(fill(given.db, given.conversations, given.seconds), "conversations")
