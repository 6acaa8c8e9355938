"""The question about branches, against branches whose tokens and texts are known."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oki_trace.analysis import questions
from oki_trace.analysis.query_session import QuerySession
from oki_trace.analysis.results import objects
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

LOGPROB = math.log(0.5)


def add(
    writer: TraceWriter, conversation: int, ids: Sequence[int], said: str, **branch: Any
) -> int:
    """A reply of these tokens, each with the probability 0.5."""
    policy = CapturePolicy(tensors="none")
    model = ModelChoice("tiny/model")
    reply = writer.queue_reply(conversation, model, Sampling(), policy, claim=True, **branch)
    prefix_len = branch.get("branch_step", 0)
    start = builders.turn_start("none", tokens=6 + prefix_len)
    writer.start_reply(reply, replace(start, prefix_len=prefix_len))
    rng = np.random.default_rng(reply)
    for index, token_id in enumerate(ids):
        step = builders.step(index, rng, prompt_len=6 + prefix_len, with_lens=False)
        step = replace(step, token_id=token_id, token=f"t{token_id}", prob=0.5, logprob=LOGPROB)
        writer.append(reply, [replace(step, tensors=())])
    writer.finish_reply(reply, TurnEnd(Status.COMPLETE, said, "end of turn", 1.0))
    return reply


@pytest.fixture
def session(tmp_path: Path) -> Iterator[QuerySession]:
    db = tmp_path / "store.db"
    with TraceWriter(db) as writer:
        conversation = writer.create_conversation("Hello")
        question = writer.add_message(conversation, ChatMessage(Role.USER, "Hello"))
        origin = add(writer, conversation, [1, 2, 3, 4, 5], "one")
        fork: dict[str, Any] = {"parent_id": question, "branch_of": origin, "branch_step": 1}
        add(writer, conversation, [9, 3, 4, 5], "other", forced=Forced((9,)), **fork)
        add(writer, conversation, [8, 7], "other ", forced=Forced((8,)), **fork)
        add(writer, conversation, [2, 3, 4, 5], "one", **fork)
        add(writer, conversation, [1, 2], "again", **{**fork, "branch_step": 0})
    with QuerySession(str(db)) as opened:
        yield opened


def rows(session: QuerySession, view: str) -> list[dict[str, Any]]:
    answer = questions.answer(session, "forks", view=view)
    found: list[dict[str, Any]] = objects([c.name for c in answer.columns], answer.rows)
    return found


def test_where_branches_depart_and_agree_again(session: QuerySession) -> None:
    found = {row["branch"]: row for row in rows(session, "branch")}
    columns = ("reply", "step", "left_token", "token", "tokens", "apart", "left_apart", "agreed")
    assert {key: tuple(row[name] for name in columns) for key, row in found.items()} == {
        3: (2, 1, "t2", "t9", 4, 1, 1, 3),
        4: (2, 1, "t2", "t8", 2, 2, 4, 0),
        5: (2, 1, "t2", "t2", 4, 0, 0, 4),
        6: (2, 0, "t1", "t1", 2, 2, 5, 0),
    }
    assert found[3]["logprob"] == pytest.approx(4 * LOGPROB)
    assert found[4]["logprob"] == pytest.approx(2 * LOGPROB)


@pytest.mark.parametrize(
    ("reply", "branch", "apart", "left_apart", "agreed"),
    [
        ([1, 2, 3, 4, 5, 6, 7], [9, 9, 9, 3, 4, 5, 8], 3, 2, 3),  # later, and apart once more
        ([1, 2, 3, 4, 5, 6, 7], [9, 2, 3, 8, 8, 8, 8], 7, 7, 0),  # two in a row are chance
        ([1, 2, 3, 4], [9, 8, 7, 3, 4], 3, 2, 2),  # but not where both end with them
        ([1, 2, 3, 4, 2, 3, 4], [9, 2, 3, 4], 1, 1, 3),  # the first place of several
        ([1], [1], 0, 0, 1),
    ],
)
def test_where_two_texts_agree_again(
    tmp_path: Path,
    reply: list[int],
    branch: list[int],
    apart: int,
    left_apart: int,
    agreed: int,
) -> None:
    db = tmp_path / "store.db"
    with TraceWriter(db) as writer:
        conversation = writer.create_conversation("Hello")
        question = writer.add_message(conversation, ChatMessage(Role.USER, "Hello"))
        origin = add(writer, conversation, reply, "one")
        fork: dict[str, Any] = {"parent_id": question, "branch_of": origin, "branch_step": 0}
        add(writer, conversation, branch, "other", **fork)
    with QuerySession(str(db)) as opened:
        (found,) = rows(opened, "branch")
    assert (found["apart"], found["left_apart"], found["agreed"]) == (apart, left_apart, agreed)


def test_what_the_branches_of_a_step_answer(session: QuerySession) -> None:
    columns = ("reply", "step", "answer", "branches", "share", "logprob")
    assert [tuple(row[name] for name in columns) for row in rows(session, "answer")] == [
        (2, 0, "again", 1, 1.0, pytest.approx(2 * LOGPROB)),
        (2, 1, "other", 2, pytest.approx(2 / 3), pytest.approx(math.log(0.5**4 + 0.5**2))),
        (2, 1, "one", 1, pytest.approx(1 / 3), pytest.approx(4 * LOGPROB)),
    ]


def test_a_branch_is_no_other_reply_to_the_same_prompt(session: QuerySession) -> None:
    table = session.sql("SELECT id, prompt_hash FROM message WHERE role = 'assistant' ORDER BY id")
    hashes = dict(table.rows)
    assert len({hashes[2], hashes[3], hashes[4], hashes[5]}) == 4
    assert hashes[6] == hashes[2], "a regenerated reply answers the same messages"
