"""A made-up conversation with a branch, for tests of what shows or moves it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from oki_trace.records import (
    CapturePolicy,
    ChatMessage,
    Forced,
    ModelChoice,
    Role,
    Sampling,
    Status,
    TurnEnd,
)
from oki_trace.store.writing.writer import TraceWriter
from tests import builders

STEPS = 4
FORK = 2


def build(writer: TraceWriter) -> tuple[int, int, int, int]:
    """(conversation, question, reply, branch); a second question follows the reply.

    The branch departs from the reply at step 2, and its first token is forced.
    """
    rng = np.random.default_rng(3)
    conversation = writer.create_conversation("Hello")
    question = writer.add_message(conversation, ChatMessage(Role.USER, "Hello"))
    request = (ModelChoice("tiny/model"), Sampling(), CapturePolicy(tensors="none"))
    reply = writer.queue_reply(conversation, *request, claim=True)
    start = builders.turn_start("none")
    writer.start_reply(reply, start)
    steps = [builders.coherent_step(i, rng) for i in range(STEPS)]
    writer.append(reply, steps)
    writer.finish_reply(reply, TurnEnd(Status.COMPLETE, "a reply", "end of turn", 1.0))
    branch = writer.queue_reply(
        conversation,
        *request,
        claim=True,
        parent_id=question,
        branch_of=reply,
        branch_step=FORK,
        forced=Forced((steps[0].token_id,)),
    )
    kept = steps[:FORK]
    prompt = replace(
        start.prompt,
        token_ids=(*start.prompt.token_ids, *(step.token_id for step in kept)),
        tokens=(*start.prompt.tokens, *(step.token for step in kept)),
        segments=(*start.prompt.segments, *("assistant" for _ in kept)),
    )
    writer.start_reply(branch, replace(start, prompt=prompt, prefix_len=FORK))
    own = [
        replace(step, position=step.position + FORK)
        for step in (builders.coherent_step(i, rng) for i in range(STEPS - 1))
    ]
    writer.append(branch, [replace(own[0], origin="forced", decision=None), *own[1:]])
    writer.finish_reply(branch, TurnEnd(Status.COMPLETE, "a branch", "end of turn", 1.0))
    writer.add_message(conversation, ChatMessage(Role.USER, "And then?"), parent_id=reply)
    return conversation, question, reply, branch
