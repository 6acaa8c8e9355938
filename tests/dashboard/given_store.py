"""A store with a reply whose prompt was traced, a second turn of it, and a scored text."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from oki_trace.records import (
    CapturePolicy,
    ChatMessage,
    Generation,
    ModelChoice,
    Prompt,
    Role,
    Sampling,
    Status,
    Step,
    TurnEnd,
    TurnStart,
)
from oki_trace.store.writing.writer import TraceWriter
from tests import builders

HOSTILE = "<img src=x onerror=alert(1)> **b** www.example.test"
SYSTEM = ("Be", " kind.")
ASKED = ("Who", HOSTILE, "?")
REPLY = ("I", " am")
THEN = ("Why", "?")
EDITED = ("What", " is", " this")
SCORED = ("The", " sky", " is", HOSTILE, " blue")

FIRST = Prompt(
    text="",
    token_ids=tuple(range(8)),
    tokens=("<|s|>", *SYSTEM, "<|u|>", *ASKED, "<|a|>"),
    segments=("template", "system", "system", "template", *("user",) * 3, "template"),
)
SECOND = Prompt(
    text="",
    token_ids=(*FIRST.token_ids, 40, 41, *range(50, 54)),
    tokens=(*FIRST.tokens, *REPLY, "<|u|>", *THEN, "<|a|>"),
    segments=(*FIRST.segments, *("assistant",) * 2, "template", *("user",) * 2, "template"),
)


@dataclass(frozen=True)
class GivenStore:
    """The replies as (conversation id, message id)."""

    db: str
    first: tuple[int, int]
    second: tuple[int, int]
    scored: tuple[int, int]
    failed: tuple[int, int]


def given_step(prompt: Prompt, at: int, rng: np.random.Generator, *, tensors: bool = False) -> Step:
    """A step of the prompt's token at a position."""
    step = builders.step(
        0, rng, prompt_len=at, token=prompt.tokens[at], with_lens=True, with_tensors=tensors
    )
    assert step.lens is not None
    return replace(
        step,
        token_id=prompt.token_ids[at],
        step_index=-1,
        origin="given",
        sampled_prob=None,
        decision=None,
        lens=replace(step.lens, step_index=-1),
    )


def build(db: str) -> GivenStore:
    rng = np.random.default_rng(5)
    with TraceWriter(db) as writer:
        conversation = writer.create_conversation("Who are you?")
        writer.add_message(conversation, ChatMessage(Role.SYSTEM, "".join(SYSTEM)))
        writer.add_message(conversation, ChatMessage(Role.USER, "".join(ASKED)))
        first = _turn(writer, rng, conversation, FIRST, 1, REPLY, tensors=True)
        writer.add_message(conversation, ChatMessage(Role.USER, "".join(THEN)))
        second = _turn(writer, rng, conversation, SECOND, len(FIRST) + 2, REPLY)
        scored = _scored(writer, rng)
        other = writer.create_conversation("It failed")
        writer.add_message(other, ChatMessage(Role.SYSTEM, "".join(SYSTEM)))
        writer.add_message(other, ChatMessage(Role.USER, "".join(ASKED)))
        failed = _turn(writer, rng, other, FIRST, 1, (), status=Status.FAILED)
    return GivenStore(
        db,
        (conversation, first),
        (conversation, second),
        scored,
        (other, failed),
    )


def live(writer: TraceWriter) -> tuple[int, int, int]:
    """(conversation, question, reply): the prompt is traced, and the reply has one token."""
    conversation = writer.create_conversation("Who?")
    writer.add_message(conversation, ChatMessage(Role.SYSTEM, "".join(SYSTEM)))
    asked = writer.add_message(conversation, ChatMessage(Role.USER, "".join(ASKED)))
    rng = np.random.default_rng(7)
    reply = _turn(writer, rng, conversation, FIRST, 1, REPLY[:1], status=Status.RUNNING)
    return conversation, asked, reply


def edit(writer: TraceWriter, built: GivenStore) -> int:
    """Another version of the first question, whose own tokens are traced; returns its reply."""
    conversation, _ = built.first
    system = 1
    prompt = replace(
        FIRST,
        token_ids=(*FIRST.token_ids[:4], *range(60, 63), FIRST.token_ids[-1]),
        tokens=(*FIRST.tokens[:4], *EDITED, FIRST.tokens[-1]),
    )
    message = ChatMessage(Role.USER, "".join(EDITED))
    writer.add_message(conversation, message, parent_id=system)
    return _turn(writer, np.random.default_rng(6), conversation, prompt, 4, REPLY)


def _turn(
    writer: TraceWriter,
    rng: np.random.Generator,
    conversation: int,
    prompt: Prompt,
    traced_from: int,
    words: tuple[str, ...],
    *,
    tensors: bool = False,
    status: Status = Status.COMPLETE,
) -> int:
    policy = CapturePolicy(tensors="exact", trace_prompt="full")
    reply = writer.queue_reply(
        conversation, ModelChoice("tiny/model"), Sampling(), policy, claim=True
    )
    report = replace(builders.report(), policy=policy)
    writer.start_reply(reply, TurnStart("tiny/model", prompt, builders.generation(), report))
    positions = range(traced_from, len(prompt))
    writer.append(reply, [given_step(prompt, at, rng, tensors=tensors) for at in positions])
    steps = [
        replace(
            builders.step(i, rng, prompt_len=len(prompt), token=word, with_lens=True),
            token_id=40 + i,
        )
        for i, word in enumerate(words)
    ]
    if steps:
        writer.append(reply, steps)
    if status is Status.RUNNING:
        return reply
    writer.finish_reply(reply, TurnEnd(status, "".join(words), "end of turn", 1.0))
    return reply


def _scored(writer: TraceWriter, rng: np.random.Generator) -> tuple[int, int]:
    prompt = Prompt("", tuple(range(len(SCORED))), SCORED, ("user",) * len(SCORED))
    policy = CapturePolicy(trace_prompt="full")
    conversation = writer.create_conversation("Score: The sky")
    message = writer.queue_reply(
        conversation, ModelChoice("tiny/model"), Sampling(max_new_tokens=0), policy, claim=True
    )
    generation: Generation = replace(builders.generation(), max_new_tokens=0)
    report = replace(builders.report(), policy=policy)
    writer.start_reply(message, TurnStart("tiny/model", prompt, generation, report))
    writer.append(message, [given_step(prompt, at, rng) for at in range(1, len(prompt))])
    writer.finish_reply(message, TurnEnd(Status.COMPLETE, "".join(SCORED), "scored", 1.0))
    return conversation, message
