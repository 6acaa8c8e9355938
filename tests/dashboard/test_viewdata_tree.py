"""The tree of a conversation and the ways from a fork, as the page draws them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from dashboard.viewdata import branches, tree
from oki_trace.message_tree import branches_at
from oki_trace.records import Message, StepSummary
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.writer import TraceWriter
from tests import branch_store


@pytest.fixture
def built(tmp_path: Path) -> tuple[list[Message], dict[int, list[StepSummary]], dict[int, float]]:
    """Messages (question, reply, branch, question), the steps of each, the log-probabilities."""
    with TraceWriter(tmp_path / "store.db") as writer:
        conversation, *_ = branch_store.build(writer)
    with TraceReader(tmp_path / "store.db") as reader:
        messages = reader.messages(conversation)
        steps = {message.id: reader.steps(message.id) for message in messages}
        return messages, steps, reader.logprobs(conversation)


def test_the_probability_of_a_path_is_that_of_its_own_tokens(
    built: tuple[list[Message], dict[int, list[StepSummary]], dict[int, float]],
) -> None:
    messages, steps, logprobs = built
    _, reply, branch, _ = messages
    assert logprobs.keys() == {reply.id, branch.id}
    for message in (reply, branch):
        expected = sum(step.logprob for step in steps[message.id])
        assert logprobs[message.id] == pytest.approx(expected)


def test_a_tree_has_a_row_for_each_message(
    built: tuple[list[Message], dict[int, list[StepSummary]], dict[int, float]],
) -> None:
    messages, _, logprobs = built
    question, reply, branch, then = messages
    data = tree.tree_data(messages, logprobs, {question.id, reply.id, then.id})
    rows = data["rows"]
    columns = ("id", "depth", "from", "tokens", "shown")
    assert [tuple(row[name] for name in columns) for row in rows] == [
        (question.id, 0, None, "", True),
        (reply.id, 1, None, "4 tokens", True),
        (then.id, 1, None, "", True),
        (branch.id, 1, f"branch of message {reply.id} at step 2", "3 tokens", False),
    ]
    assert rows[1]["logprob"] == tree.path_text(logprobs[reply.id])
    assert tree.path_text(math.log(0.25)) == "-1.39 nats (0.25)"
    assert tree.path_text(None) == ""
    assert len(data["csv"]) == 1 + len(messages)
    json.dumps(data, allow_nan=False)


def test_the_ways_from_a_fork_are_side_by_side(
    built: tuple[list[Message], dict[int, list[StepSummary]], dict[int, float]],
) -> None:
    messages, steps, _ = built
    _, reply, branch, _ = messages
    assert tree.forks(messages) == [(reply.id, 2)]
    assert branches_at(messages, reply.id, 2) == [branch]
    ways = [(branch, steps[branch.id]), (reply, steps[reply.id][2:])]
    data = tree.paths_data("x" * 200, ways, reply.id)
    assert (len(data["kept"]), data["cut"]) == (tree.KEPT, True)
    cards = data["cards"]
    assert [card["prob"] for card in cards] == sorted((c["prob"] for c in cards), reverse=True)
    by_id = {card["id"]: card for card in cards}
    assert by_id[reply.id]["status"] == "original reply"
    assert len(by_id[reply.id]["tokens"]) == 2
    assert len(by_id[branch.id]["tokens"]) == 3
    total = sum(step.logprob for step in steps[branch.id])
    assert by_id[branch.id]["path"] == f"3 tokens · {tree.path_text(total)}"
    waiting = tree.paths_data("", [(branch, [])], reply.id)["cards"][0]
    assert (waiting["name"], waiting["prob"], waiting["path"]) == ("…", None, "")
    json.dumps(data, allow_nan=False)


def test_a_typed_text_is_shown_as_its_tokens() -> None:
    assert branches.typed_text([(5, " Ly"), (9, "on")]) == "2 tokens: ␣Ly (5)  on (9)"
    many = branches.typed_text([(n, "a") for n in range(branches.TOKENS_SHOWN + 3)])
    assert many.endswith("  and 3 more")
