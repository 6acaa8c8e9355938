"""Which steps of two replies stand beside each other: a branch begins where it departs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from oki_trace.analysis import questions
from oki_trace.analysis.query_session import QuerySession
from oki_trace.analysis.reply_alignment import Alignment, align_replies
from oki_trace.analysis.step_distance import StepKey, step_distances
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
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.writer import TraceWriter
from tests import branch_store, builders


@pytest.fixture
def db(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


def align(db: Path, first: int, second: int) -> Alignment:
    with TraceReader(db) as reader:
        return align_replies(reader, reader.message(first), reader.message(second))


def branch_of_branch(db: Path, conversation: int, question: int, of: int, *, same: bool) -> int:
    """A branch with one more token in its prompt than ``of`` has; ``same``: the one ``of`` said."""
    with TraceReader(db) as reader:
        origin, prompt = reader.message(of), reader.prompt(of)
        first = reader.steps(of)[0]
        start = builders.turn_start("none")
    token = (first.token_id, first.token) if same else (first.token_id + 1, first.token + "!")
    longer = replace(
        prompt,
        token_ids=(*prompt.token_ids, token[0]),
        tokens=(*prompt.tokens, token[1]),
        segments=(*prompt.segments, "assistant"),
    )
    with TraceWriter(db) as writer:
        reply = writer.queue_reply(
            conversation,
            *(ModelChoice("tiny/model"), Sampling(), CapturePolicy(tensors="none")),
            claim=True,
            parent_id=question,
            branch_of=of,
            branch_step=1,
        )
        start = replace(start, prompt=longer, prefix_len=origin.prefix_len + 1)
        writer.start_reply(reply, start)
        step = builders.coherent_step(0, np.random.default_rng(8))
        writer.append(reply, [replace(step, position=len(longer))])
        writer.finish_reply(reply, TurnEnd(Status.COMPLETE, "more", "end of turn", 1.0))
    return reply


def test_a_branch_begins_beside_the_step_it_departs_from(db: Path) -> None:
    with TraceWriter(db) as writer:
        *_, reply, branch = branch_store.build(writer)
    aligned = align(db, reply, branch)
    assert aligned == Alignment(branch_store.FORK, 0, (True, True), True)
    assert align(db, branch, reply) == aligned.swapped == Alignment(0, 2, (True, True), True)
    assert align(db, reply, reply) == Alignment(0, 0, (), True)


@pytest.mark.parametrize("same", [True, False])
def test_a_branch_of_a_branch(db: Path, *, same: bool) -> None:
    with TraceWriter(db) as writer:
        conversation, question, reply, branch = branch_store.build(writer)
    last = branch_of_branch(db, conversation, question, branch, same=same)
    assert align(db, branch, last) == Alignment(1, 0, (same,), same)
    # The branch's first token, forced, is not the reply's, so neither is the last one's.
    with TraceReader(db) as reader:
        forced, said = reader.steps(branch)[0].token, reader.steps(reply)[branch_store.FORK].token
    kept = (True, True, same and forced == said)
    assert align(db, reply, last) == Alignment(3, 0, kept, all(kept))


def test_replies_to_other_messages_stand_side_by_side(db: Path) -> None:
    with TraceWriter(db) as writer:
        conversation, _, _, branch = branch_store.build(writer)
        writer.add_message(conversation, ChatMessage(Role.USER, "Bye"))
        other = writer.queue_reply(
            conversation,
            *(ModelChoice("tiny/model"), Sampling(), CapturePolicy(tensors="none")),
            claim=True,
            forced=Forced((3,)),
        )
        writer.start_reply(other, builders.turn_start("none"))
        writer.append(other, [builders.coherent_step(0, np.random.default_rng(5))])
        writer.finish_reply(other, TurnEnd(Status.COMPLETE, "bye", "end of turn", 1.0))
    assert align(db, branch, other) == Alignment(0, 0, (), False)


def test_the_question_compares_a_branch_from_where_it_departs(db: Path) -> None:
    with TraceWriter(db) as writer:
        *_, reply, branch = branch_store.build(writer)
    with QuerySession(str(db)) as session:
        answer = questions.answer(session, "compare", subjects=(str(reply), str(branch)))
        back = questions.answer(session, "compare", subjects=(str(branch), str(reply)))
    fork, steps = branch_store.FORK, branch_store.STEPS
    assert list(answer.column("step")) == list(range(fork, steps))
    assert list(back.column("step")) == list(range(steps - fork))
    pairs = [(StepKey(reply, fork + i), StepKey(branch, i)) for i in range(steps - fork)]
    with TraceReader(db) as reader:
        expected = [found.distance.tv for found in step_distances(reader, pairs) if found]
        tokens = [step.token for step in reader.steps(branch)]
    assert list(answer.column("tv")) == pytest.approx(expected)
    assert list(answer.column("other")) == tokens[: steps - fork]
    assert answer.column("same_before")[0] == "yes"
    beside = f"its step 0 stands beside step {fork} of the"
    assert f"has {fork} of the answer's tokens: {beside} first." in answer.about
    assert answer.about.startswith("The first ")
    assert f"The prompt of the first reply has {fork} of the answer's tokens" in back.about
