"""Conversations and their messages: listed, narrowed, told in full, deleted; on every engine."""

from __future__ import annotations

import datetime as dt
from typing import Any

import numpy as np
import pytest
from sqlalchemy import update

from oki_trace.errors import NotFound
from oki_trace.records import (
    CapturePolicy,
    ChatMessage,
    ConversationFilter,
    ConversationTotals,
    ModelChoice,
    Role,
    Sampling,
    Status,
)
from oki_trace.store.owner import this_process
from oki_trace.store.schema.models import Message as MessageRow
from tests import builders
from tests.store.stores import DONE, Store


def test_a_list_shows_the_last_changed_first(store: Store, rng: np.random.Generator) -> None:
    first, message = store.reply()
    second = store.writer.create_conversation("50% off_")
    store.writer.add_message(second, ChatMessage(Role.USER, "where is the Cat?"))
    store.writer.append(message, [builders.step(0, rng), builders.step(1, rng)])
    assert [c.id for c in store.reader.conversations()] == [second, first]
    store.writer.finish_reply(message, DONE)
    listed = store.reader.conversations()
    assert [c.id for c in listed] == [first, second]
    assert listed[0] == store.reader.conversation(first)
    assert (listed[0].messages, listed[0].tokens) == (1, 2)
    assert listed[0].model_ids == ("tiny/model",)
    assert listed[0].status is Status.COMPLETE
    assert [c.id for c in store.reader.conversations(limit=1, offset=1)] == [second]
    assert [c.id for c in store.reader.conversations("the cat")] == [second]
    assert [c.id for c in store.reader.conversations("50% off_")] == [second]
    assert store.reader.conversations("%off") == []


def test_a_list_is_narrowed_by_model_status_and_date(
    store: Store, rng: np.random.Generator
) -> None:
    def found(search: str | None = None, **by: Any) -> list[int]:
        narrow = ConversationFilter(**by)
        ids = [c.id for c in store.reader.conversations(search, by=narrow)]
        assert store.reader.conversation_count(search, by=narrow) == len(ids)
        return ids

    done, message = store.reply()
    store.writer.append(message, [builders.step(0, rng)])
    store.writer.finish_reply(message, DONE)
    running, _ = store.reply()
    old = dt.datetime(2020, 5, 1, tzinfo=dt.UTC)
    empty = store.writer.create_conversation("old", created_at=old)
    assert found() == [running, done, empty]
    assert found(model_id="tiny/model") == [running, done]
    assert found(model_id="tiny/mod") == []
    assert found(status=Status.RUNNING) == [running]
    assert found(status=Status.COMPLETE) == [done, empty]
    assert found(status=Status.FAILED) == []
    day = dt.timedelta(days=1)
    assert found(until=old + day) == [empty]
    assert found(since=old, until=old) == []
    assert found(since=old + day) == [running, done]
    assert found("OLD", since=old, status=Status.COMPLETE) == [empty]
    assert found("the end", model_id="tiny/model") == [done]


def test_what_a_dead_process_left_running_is_found_as_interrupted(store: Store) -> None:
    conversation, _ = store.reply()
    with store.writer.write() as connection:
        gone = str(this_process()._replace(pid=2**30))
        connection.execute(update(MessageRow).values(owner=gone))
    (only,) = store.reader.conversations(by=ConversationFilter(status=Status.INTERRUPTED))
    assert (only.id, only.status) == (conversation, Status.INTERRUPTED)
    assert not store.reader.conversations(by=ConversationFilter(status=Status.RUNNING))


def test_a_conversation_tells_what_its_replies_took(store: Store, rng: np.random.Generator) -> None:
    first, message = store.reply()
    steps = [builders.step(i, rng) for i in range(3)]
    store.writer.append(message, steps)
    store.writer.finish_reply(message, DONE)
    _, unfinished = store.reply(conversation=first)
    store.writer.append(unfinished, steps[:1])
    empty = store.writer.create_conversation("empty")
    totals = store.reader.conversation_totals([first, empty])
    assert (totals[first].timed_tokens, totals[first].seconds) == (3, 1.5)
    assert totals[first].tokens_per_second == 2
    held = [store.reader.message_bytes(one) for one in (message, unfinished)]
    assert totals[first].tensor_bytes == sum(held) > 0
    assert totals[empty] == ConversationTotals(0, 0.0, 0)
    assert totals[empty].tokens_per_second is None
    assert store.reader.conversation_totals([]) == {}


def test_messages_come_in_order_with_all_their_settings(
    store: Store, rng: np.random.Generator
) -> None:
    when = dt.datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=dt.timezone(dt.timedelta(hours=9)))
    conversation = store.writer.create_conversation("title", created_at=when)
    assert store.reader.conversation(conversation).created_at == when
    assert store.reader.conversation(conversation).created_at.tzinfo is dt.UTC
    user = store.writer.add_message(conversation, ChatMessage(Role.USER, "hello"))
    choice = ModelChoice("tiny/model", use_4bit=True, dtype="float32", device="cpu")
    sampling = Sampling(max_new_tokens=9, temperature=0.5, top_k=3, seed=1)
    policy = CapturePolicy(topk_lens=7, tensors="exact")
    reply = store.writer.queue_reply(conversation, choice, sampling, policy)
    queued = store.reader.message(reply)
    assert (queued.choice, queued.sampling, queued.policy) == (choice, sampling, policy)
    assert (queued.status, queued.position, queued.tokens) == (Status.QUEUED, 1, 0)
    start = builders.turn_start()
    store.writer.start_reply(reply, start)
    store.writer.append(reply, [builders.step(0, rng, token=" hi")])
    assert store.reader.message(reply).content == " hi"
    store.writer.finish_reply(reply, DONE)
    messages = store.reader.messages(conversation)
    assert [m.id for m in messages] == [user, reply]
    done = messages[1]
    assert (done.generation, done.capture) == (start.generation, start.capture)
    assert (done.content, done.reason, done.seconds) == (" the end", "end of sequence", 1.5)
    assert (done.status, done.prompt_len, done.tokens) == (Status.COMPLETE, 6, 1)
    assert store.reader.prompt(reply) == start.prompt


def test_a_deleted_conversation_leaves_nothing(store: Store, rng: np.random.Generator) -> None:
    conversation, message = store.reply()
    store.writer.append(message, [builders.step(0, rng, with_lens=True)])
    store.writer.finish_reply(message, DONE)
    store.writer.delete_conversation(conversation)
    info = store.reader.info()
    assert (info.conversations, info.messages, info.steps, info.tensor_bytes) == (0, 0, 0, 0)
    with pytest.raises(NotFound, match="no message"):
        store.writer.append(message, [builders.step(1, rng)])
    again, _ = store.reply()
    assert again > conversation, "an id is never given twice"


def test_what_is_not_there_is_named(store: Store) -> None:
    _, message = store.reply(begin=False)
    for call in (
        lambda: store.reader.conversation(99),
        lambda: store.reader.messages(99),
        lambda: store.reader.message(99),
        lambda: store.reader.prompt(message),
        lambda: store.reader.step(message, 0),
        lambda: store.writer.rename_conversation(99, "x"),
        lambda: store.writer.delete_conversation(99),
        lambda: store.writer.add_message(99, ChatMessage(Role.USER, "x")),
        lambda: store.writer.request_stop(99),
        lambda: store.writer.stop_requested(99),
    ):
        with pytest.raises(NotFound):
            call()


def test_totals(store: Store, rng: np.random.Generator) -> None:
    _, message = store.reply()
    store.writer.append(message, [builders.step(i, rng) for i in range(3)])
    info = store.reader.info()
    assert (info.conversations, info.messages, info.steps) == (1, 1, 3)
    assert info.tensor_bytes == store.reader.message_bytes(message) > 0
    assert info.bytes > info.tensor_bytes
    assert info.tensor_steps == 3 and info.row_bytes > 0
