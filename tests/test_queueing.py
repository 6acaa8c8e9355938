"""Queueing a reply: what is stored, and which messages the model gets."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from oki_trace.errors import NotFound, UsageError
from oki_trace.queueing import (
    ReplyRequest,
    fail,
    history,
    new_messages,
    require_call,
    submit,
    title_of,
    unanswered_calls,
)
from oki_trace.records import (
    CapturePolicy,
    ChatMessage,
    Message,
    ModelChoice,
    Part,
    Role,
    Sampling,
    Status,
)
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.writer import TraceWriter


@pytest.fixture
def store(tmp_path: Path) -> Iterator[tuple[TraceWriter, TraceReader]]:
    file = tmp_path / "store.db"
    with TraceWriter(file) as writer, TraceReader(file) as reader:
        yield writer, reader


def conversation(*said: str) -> list[Message]:
    """Messages with these texts, one after another.

    ``u`` is a user's, ``a`` an assistant's, ``s`` the system's.
    """
    roles = {"u": Role.USER, "a": Role.ASSISTANT, "s": Role.SYSTEM}
    now = dt.datetime.now(dt.UTC)
    made = [
        Message(i, 1, i, roles[text[0]], text[2:], Status.COMPLETE, now)
        for i, text in enumerate(said)
    ]
    return [replace(one, parent_id=one.id - 1 if one.id else None) for one in made]


@pytest.mark.parametrize(
    ("said", "given"),
    [
        (["u one", "a "], ["one"]),
        (["s sys", "u one", "a first", "u two", "a "], ["sys", "one", "first", "two"]),
        # The question whose reply came to nothing goes with it.
        (["u one", "a ", "u two", "a "], ["two"]),
        (["s sys", "u one", "a ", "u two", "a ", "u three", "a "], ["sys", "three"]),
        (["u one", "a first", "u two", "a ", "u three", "a "], ["one", "first", "three"]),
        # Given so from the start, as by run_traced(messages=…): nothing was tried and failed.
        (["u one", "u two", "a "], ["one", "two"]),
        (["s sys", "a ", "u one", "a "], ["sys", "one"]),
    ],
)
def test_the_model_is_given_what_was_said_and_answered(said: list[str], given: list[str]) -> None:
    messages = conversation(*said)
    before = history(messages, messages[-1].id)
    assert [m.content for m in before] == given


def test_a_reply_to_what_was_begun_for_it_is_one_turn_with_it() -> None:
    messages = conversation("u one", "a The capital is", "a Paris.", "u two", "a ")
    messages[2] = replace(messages[2], parts=(Part("answer", " Paris.", 0, 2),))
    assert [m.content for m in history(messages, 4)] == ["one", "The capital is Paris.", "two"]


def test_a_reply_of_nothing_but_an_end_came_to_nothing() -> None:
    messages = conversation("u one", "a ", "u two", "a ")
    messages[1] = replace(messages[1], parts=(Part("answer", "", 0, 1),))
    assert [m.content for m in history(messages, 3)] == ["two"]


def test_what_was_only_thought_is_given_to_the_template() -> None:
    messages = conversation("u one", "a ", "u two", "a ")
    thought = (Part("thinking", "Hm", 0, 1),)
    messages[1] = replace(messages[1], parts=thought)
    assert history(messages, 3)[1] == ChatMessage(Role.ASSISTANT, "", thought)


def test_calls_wait_for_their_answers() -> None:
    messages = conversation("u one", "a ")
    calls = tuple(Part("tool_call", "", name=name) for name in ("f", "g"))
    messages[1] = replace(messages[1], parts=calls)
    assert unanswered_calls(messages) == list(calls)
    answer = replace(messages[0], id=2, position=2, role=Role.TOOL, tool_name="f")
    assert unanswered_calls([*messages, answer]) == [calls[1]]
    with pytest.raises(UsageError, match=r"did not call 'h'\. It called g\."):
        require_call([*messages, answer], "h")


def test_what_comes_after_a_reply_is_not_of_it() -> None:
    messages = conversation("u one", "a first", "u two", "a second")
    assert history(messages, 1) == [ChatMessage(Role.USER, "one")]


@pytest.mark.parametrize(
    ("content", "title"),
    [
        ("What is this?", "What is this?"),
        ("\n  \n  the first line \nthe second", "the first line"),
        ("x" * 60, "x" * 60),
        ("x" * 61, "x" * 59 + "…"),
        ("word " * 30, "word " * 11 + "word…"),
        ("", "Untitled"),
        (" \n\t", "Untitled"),
    ],
)
def test_a_conversation_is_called_by_its_first_line(content: str, title: str) -> None:
    assert title_of(content) == title
    assert len(title_of(content)) <= 60


def test_what_is_asked_is_kept_with_the_reply(store: tuple[TraceWriter, TraceReader]) -> None:
    writer, reader = store
    choice = ModelChoice("m", use_4bit=True, dtype="bfloat16", device="cpu")
    sampling = Sampling(7, 0.5, 0.9, 40, 1.1, 3)
    policy = CapturePolicy(3, 4, 2, "exact")
    first = ReplyRequest(new_messages("one", system="be brief"), choice, sampling, policy)
    conversation_id, reply_id = submit(writer, first)
    second = ReplyRequest(new_messages("one"), choice, sampling, policy)
    assert submit(writer, second, conversation_id)[0] == conversation_id
    messages = reader.messages(conversation_id)
    assert [(str(m.role), m.content, str(m.status)) for m in messages] == [
        ("system", "be brief", "complete"),
        ("user", "one", "complete"),
        ("assistant", "", "queued"),
        ("user", "one", "complete"),
        ("assistant", "", "queued"),
    ]
    reply = reader.message(reply_id)
    assert (reply.choice, reply.sampling, reply.policy) == (choice, sampling, policy)
    with pytest.raises(NotFound, match="no conversation 99"):
        submit(writer, second, 99)


def test_a_claimed_reply_is_no_workers(store: tuple[TraceWriter, TraceReader]) -> None:
    writer, reader = store
    _, reply_id = submit(writer, ReplyRequest(new_messages("one"), ModelChoice("m")), claim=True)
    assert reader.message(reply_id).status is Status.RUNNING
    assert writer.claim_next_reply() is None
    fail(writer, reply_id, "No such model.")
    reply = reader.message(reply_id)
    assert (reply.status, reply.reason) == (Status.FAILED, "No such model.")
