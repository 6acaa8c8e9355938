"""Branches in the store: parents, siblings, the text of a branch that is cut short, deletion."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from oki_trace.errors import NotFound, StoreError
from oki_trace.message_tree import newest_path, path_to, siblings, subtree
from oki_trace.records import (
    NO_PARENT,
    CapturePolicy,
    ChatMessage,
    Forced,
    ModelChoice,
    Role,
    Sampling,
    Status,
)
from oki_trace.store.maintenance.verify import Verification
from oki_trace.store.reading.reader import TraceReader
from tests import builders
from tests.store.stores import DONE, Store


def ask(store: Store, conversation: int, said: str, parent: int | None = None) -> int:
    message = ChatMessage(Role.USER, said)
    return store.writer.add_message(conversation, message, parent_id=parent)


def answer(store: Store, conversation: int, parent: int, steps: int = 3, **branch: Any) -> int:
    """A reply to ``parent`` that is still running."""
    reply = store.writer.queue_reply(
        conversation,
        ModelChoice("tiny/model"),
        Sampling(),
        CapturePolicy(tensors="none"),
        claim=True,
        parent_id=parent,
        **branch,
    )
    prefix_len = branch.get("branch_step", 0)
    start = builders.turn_start("none")
    store.writer.start_reply(
        reply, replace(start, prefix_len=prefix_len, prefix_text="Before" if prefix_len else "")
    )
    rng = np.random.default_rng(reply)
    made = [builders.coherent_step(i, rng) for i in range(steps)]
    if branch.get("forced"):
        made[0] = replace(made[0], origin="forced")
    store.writer.append(reply, made)
    return reply


def talk(store: Store) -> tuple[int, int, int]:
    """(conversation, question, reply) of a finished turn."""
    conversation = store.writer.create_conversation("Hello")
    question = ask(store, conversation, "Hello")
    reply = answer(store, conversation, question)
    store.writer.finish_reply(reply, DONE)
    return conversation, question, reply


def test_a_message_follows_the_newest_one_unless_it_names_another(store: Store) -> None:
    conversation, question, reply = talk(store)
    second = ask(store, conversation, "And then?")
    edited = ask(store, conversation, "Hi", NO_PARENT)
    other = ask(store, conversation, "Or this?", reply)
    found = {message.id: message for message in store.reader.messages(conversation)}
    assert {i: found[i].parent_id for i in found} == {
        question: None,
        reply: question,
        second: reply,
        edited: None,
        other: reply,
    }
    assert [message.position for message in found.values()] == [0, 1, 2, 3, 4]
    with pytest.raises(NotFound):
        ask(store, store.writer.create_conversation("another"), "x", reply)


def test_paths_siblings_and_branches(store: Store) -> None:
    conversation, question, reply = talk(store)
    second = ask(store, conversation, "And then?")
    branch = answer(store, conversation, question, branch_of=reply, branch_step=2)
    messages = store.reader.messages(conversation)
    by_id = {message.id: message for message in messages}
    assert [m.id for m in path_to(messages, second)] == [question, reply, second]
    assert [m.id for m in newest_path(messages)] == [question, branch]
    assert [m.id for m in newest_path(messages, through=reply)] == [question, reply, second]
    assert [m.id for m in siblings(messages, by_id[reply])] == [reply, branch]
    assert [m.id for m in subtree(messages, reply)] == [reply, second]
    assert path_to(messages, 99) == []


@pytest.mark.parametrize("end", ["running", "killed"])
def test_a_branch_that_is_cut_short_has_its_whole_text(store: Store, end: str) -> None:
    conversation, question, reply = talk(store)
    forced = Forced(text=" the")
    branch = answer(store, conversation, question, branch_of=reply, branch_step=2, forced=forced)
    own = b"".join(step.token_bytes for step in store.reader.steps(branch)).decode()
    if end == "killed":
        store.writer.end_abandoned(branch, Status.INTERRUPTED, "killed")
    message = store.reader.message(branch)
    assert message.content == "Before" + own
    assert (message.branch_of, message.branch_step, message.prefix_len) == (reply, 2, 2)
    assert message.forced == forced
    assert [step.origin for step in store.reader.steps(branch)] == ["forced", *["sampled"] * 2]
    if end == "killed":
        assert [str(finding) for finding in Verification(store.reader)] == []


def test_deleting_a_branch_leaves_the_others_whole(store: Store) -> None:
    conversation, question, reply = talk(store)
    ask(store, conversation, "And then?", reply)
    branch = answer(store, conversation, question, branch_of=reply, branch_step=2)
    with pytest.raises(StoreError, match="being generated"):
        store.writer.delete_branch(branch)
    store.writer.finish_reply(branch, DONE)
    before = store.reader.message(branch)
    assert store.writer.delete_branch(reply) == 2
    after = store.reader.messages(conversation)
    assert [message.id for message in after] == [question, branch]
    assert replace(after[1], position=before.position) == before
    assert store.reader.prefix_steps(branch) == {}
    assert [str(finding) for finding in Verification(store.reader)] == []
    with pytest.raises(StoreError, match="whole conversation"):
        store.writer.delete_branch(question)
    with pytest.raises(NotFound):
        store.writer.delete_branch(reply)


def test_a_parent_that_is_not_before_its_message_is_found(tmp_path: Any) -> None:
    from oki_trace.store.writing.writer import TraceWriter

    db = tmp_path / "store.db"
    with TraceWriter(db) as writer, TraceReader(db) as reader:
        conversation, question, reply = talk(Store(str(db), writer, reader))
        with closing(sqlite3.connect(db)) as connection, connection:
            connection.execute("UPDATE message SET parent_id = ? WHERE id = ?", (reply, question))
        messages = reader.messages(conversation)
        assert [m.id for m in path_to(messages, reply)] == [question, reply], "a loop ends"
        assert [m.id for m in newest_path(messages)] == [question, reply]
        assert any("does not come before it" in str(one) for one in Verification(reader))
