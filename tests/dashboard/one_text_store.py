"""A store with nothing but scores: one text by two models with one vocabulary, and by a third."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np

from oki_trace.records import (
    CapturePolicy,
    ModelChoice,
    Prompt,
    Sampling,
    Status,
    TurnEnd,
    TurnStart,
)
from oki_trace.store.writing.writer import TraceWriter
from tests import builders
from tests.dashboard import given_store

HOSTILE = given_store.HOSTILE
WORDS = ("The", " sky", " is", HOSTILE, " blue", "\n", ".")
PIECES = ("T", "he", " sk", "y", " is", HOSTILE[:5], HOSTILE[5:] + " blue\n.")


@dataclass(frozen=True)
class OneTextStore:
    """The messages: ``split`` has the same text in other tokens, ``different`` another text."""

    db: str
    first: int
    second: int
    split: int
    different: int
    conversation: int


def build(db: str, *, tensors: bool = False) -> OneTextStore:
    with TraceWriter(db) as writer:
        first = score(writer, 1, WORDS, tensors=tensors)
        second = score(writer, 2, WORDS, tensors=tensors)
        split = score(writer, 3, PIECES)
        different = score(writer, 4, ("Nothing", " of", " that"))
    return OneTextStore(db, first[1], second[1], split[1], different[1], first[0])


def score(
    writer: TraceWriter, seed: int, words: tuple[str, ...], *, tensors: bool = False
) -> tuple[int, int]:
    """(conversation, message) of a scored text; equal tokens have one id, in every message."""
    rng = np.random.default_rng(seed)
    ids = tuple(100 + zlib.crc32(word.encode()) % 10_000 for word in words)
    prompt = Prompt("".join(words), ids, words, ("user",) * len(words))
    policy = CapturePolicy(tensors="exact" if tensors else "none", trace_prompt="full")
    model = f"tiny/model-{seed}"
    conversation = writer.create_conversation("Score: The sky")
    sampling = Sampling(max_new_tokens=0)
    message = writer.queue_reply(conversation, ModelChoice(model), sampling, policy, claim=True)
    generation = replace(builders.generation(), max_new_tokens=0, do_sample=False)
    report = replace(builders.report(), policy=policy)
    writer.start_reply(message, TurnStart(model, prompt, generation, report))
    steps = [given_store.given_step(prompt, at, rng, tensors=tensors) for at in range(1, len(ids))]
    writer.append(message, steps)
    writer.finish_reply(message, TurnEnd(Status.COMPLETE, "".join(words), "scored", 1.0))
    return conversation, message
