"""What a reply goes through, with several writers at once, on every engine."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest

from oki_trace.errors import StoreError
from oki_trace.records import (
    CapturePolicy,
    ChatMessage,
    ModelChoice,
    Role,
    Sampling,
    Status,
)
from oki_trace.store.writing.writer import TraceWriter
from tests import builders
from tests.store.stores import DONE, Store


def test_every_write_counts_the_version_up(store: Store, rng: np.random.Generator) -> None:
    seen = [store.reader.version()]
    conversation, message = store.reply()
    seen.append(store.reader.version())
    store.writer.append(message, [builders.step(0, rng)])
    seen.append(store.reader.version())
    store.writer.request_stop(message)
    seen.append(store.reader.version())
    store.writer.finish_reply(message, DONE)
    seen.append(store.reader.version())
    store.writer.delete_conversation(conversation)
    seen.append(store.reader.version())
    assert seen == sorted(set(seen))
    assert store.writer.claim_next_reply() is None
    assert store.writer.mark_interrupted() == []
    assert store.reader.version() == seen[-1], "looking is not a change"


def test_a_failed_write_leaves_nothing(store: Store, rng: np.random.Generator) -> None:
    _, message = store.reply()
    version = store.reader.version()
    bad = dataclasses.replace(builders.step(1, rng), step_index=7)
    with pytest.raises(StoreError):
        store.writer.append(message, [builders.step(0, rng), bad])
    assert store.reader.version() == version
    assert store.reader.steps(message) == []


def test_each_queued_reply_is_claimed_once(store: Store) -> None:
    conversation = store.writer.create_conversation("x")
    queued = [
        store.writer.queue_reply(conversation, ModelChoice("m"), Sampling(), CapturePolicy())
        for _ in range(6)
    ]
    store.writer.queue_reply(
        conversation, ModelChoice("m"), Sampling(), CapturePolicy(), claim=True
    )
    claimed: list[int] = []

    def work() -> None:
        with TraceWriter(store.db, checkpoint=False) as writer:
            while (message := writer.claim_next_reply()) is not None:
                claimed.append(message)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == queued
    assert store.reader.message(queued[0]).status is Status.RUNNING


def test_messages_added_at_once_get_positions_of_their_own(store: Store) -> None:
    conversation = store.writer.create_conversation("x")

    def work() -> None:
        with TraceWriter(store.db, checkpoint=False) as writer:
            for _ in range(5):
                writer.add_message(conversation, ChatMessage(Role.USER, "x"))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    positions = [m.position for m in store.reader.messages(conversation)]
    assert positions == list(range(15))


def test_a_stop_reaches_who_generates(store: Store, rng: np.random.Generator) -> None:
    conversation, message = store.reply()
    assert store.writer.stop_requested(message) is False
    store.writer.request_stop(message)
    assert store.writer.stop_requested(message) is True
    assert store.writer.append(message, [builders.step(0, rng)]) is True
    queued = store.writer.queue_reply(conversation, ModelChoice("m"), Sampling(), CapturePolicy())
    store.writer.request_stop(queued)
    assert store.reader.message(queued).status is Status.STOPPED
    assert store.writer.claim_next_reply() is None


def test_what_has_ended_takes_no_more(store: Store, rng: np.random.Generator) -> None:
    _, message = store.reply()
    with pytest.raises(StoreError, match="cannot end as running"):
        store.writer.finish_reply(message, dataclasses.replace(DONE, status=Status.RUNNING))
    store.writer.finish_reply(message, DONE)
    store.writer.request_stop(message)
    for call in (
        lambda: store.writer.append(message, [builders.step(0, rng)]),
        lambda: store.writer.finish_reply(message, DONE),
        lambda: store.writer.start_reply(message, builders.turn_start()),
    ):
        with pytest.raises(StoreError, match="is complete"):
            call()


def test_a_reply_that_has_not_begun_takes_no_steps(store: Store, rng: np.random.Generator) -> None:
    _, message = store.reply(begin=False)
    with pytest.raises(StoreError, match="start_reply first"):
        store.writer.append(message, [builders.step(0, rng)])


def test_the_worker_tells_what_it_does(store: Store) -> None:
    assert store.reader.worker() is None
    store.writer.set_worker_state("loading", model_id="m", detail="half way", progress=0.5)
    worker = store.reader.worker()
    assert worker is not None and worker.updated_at is not None
    assert (worker.state, worker.model_id, worker.progress) == ("loading", "m", 0.5)
    version = store.reader.version()
    store.writer.set_worker_state("loading", model_id="m", detail="half way", progress=0.5)
    again = store.reader.worker()
    assert again is not None and again.updated_at is not None
    assert again.updated_at >= worker.updated_at
    assert store.reader.version() == version, "a heartbeat is no change"
    store.writer.set_worker_state("idle", model_id="m")
    assert store.reader.version() == version + 1
