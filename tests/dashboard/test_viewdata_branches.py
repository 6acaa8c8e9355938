"""Which reply a branch is compared with, and what can be done with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dashboard.viewdata.branches import compared_with, first_live
from oki_trace.message_tree import siblings
from oki_trace.records import CapturePolicy, Status
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.writer import TraceWriter
from tests import branch_store


def test_a_branch_is_compared_with_the_reply_it_departs_from(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "store.db") as writer:
        conversation, question, reply, branch = branch_store.build(writer)
    with TraceReader(tmp_path / "store.db") as reader:
        messages = reader.messages(conversation)
    by_id = {message.id: message for message in messages}
    others = siblings(messages, by_id[branch])
    assert [other.id for other in others] == [reply, branch]
    assert compared_with(by_id[branch], others) == reply
    assert compared_with(by_id[reply], others) == branch, "a reply that departs from none"
    assert compared_with(by_id[reply], others[:1]) is None
    assert compared_with(by_id[question], [by_id[question]]) is None


def test_a_live_reply_is_drawn_anew_with_the_prompt_that_is_traced(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "store.db") as writer:
        conversation, *_ = branch_store.build(writer)
    with TraceReader(tmp_path / "store.db") as reader:
        question, reply, *_ = reader.messages(conversation)
    assert first_live([question, reply]) is None
    live = replace(reply, status=Status.RUNNING)
    assert first_live([question, reply, question, live]) == 3
    traced = replace(live, policy=CapturePolicy(trace_prompt="light"))
    assert first_live([question, reply, question, traced]) == 2
    assert first_live([question, traced, question, live]) == 0
