"""What any store promises, on every engine it can be kept in."""

from __future__ import annotations

import dataclasses
import datetime as dt
import threading
from typing import Any

import builders
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import update
from stores import Store

from oki_trace.errors import NotFound, StoreError
from oki_trace.records import (
    CapturePolicy,
    ChatMessage,
    ConversationFilter,
    ConversationTotals,
    Effect,
    ModelChoice,
    Role,
    Sampling,
    Status,
    Step,
    TurnEnd,
)
from oki_trace.store.models import Message as MessageRow
from oki_trace.store.owner import this_process
from oki_trace.store.reader import TraceReader
from oki_trace.store.writer import TraceWriter

DONE = TurnEnd(Status.COMPLETE, " the end", "end of sequence", 1.5)


def plain(value: Any) -> Any:
    """A record as nested plain values; NaN equals NaN by being its name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.shape, [plain(item) for item in value.ravel().tolist()])
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, float) and np.isnan(value):
        return "nan"
    return value


def assert_same(found: Step, written: Step) -> None:
    assert plain(found) == plain(dataclasses.replace(written, tensors=()))


class TestSteps:
    def test_a_step_reads_back_as_it_was(self, store: Store, rng: np.random.Generator) -> None:
        _, message = store.reply()
        steps = [builders.step(i, rng, with_lens=i != 1) for i in range(3)]
        for step in steps:
            assert store.writer.append(message, [step]) is False
        for step in steps:
            assert_same(store.reader.step(message, step.step_index), step)
        considered = store.reader.candidates(message)
        assert plain(list(considered.items())) == plain([(s.step_index, s.topk) for s in steps])
        for found, written in zip(store.reader.iter_steps(message), steps, strict=True):
            assert_same(found, written)

    def test_tensors_read_back_bit_for_bit(self, store: Store, rng: np.random.Generator) -> None:
        _, message = store.reply("exact")
        step = builders.step(0, rng)
        store.writer.append(message, [step])
        assert store.reader.tensor_names(message, 0) == ["attentions", "hidden_states", "logits"]
        for tensor in step.tensors:
            assert plain(store.reader.tensor(message, 0, tensor.name)) == plain(tensor)

    def test_mode_none_keeps_the_rows_alone(self, store: Store, rng: np.random.Generator) -> None:
        _, message = store.reply("none")
        store.writer.append(message, [builders.step(0, rng)])
        assert store.reader.tensor_names(message, 0) == []
        assert store.reader.message_bytes(message) == 0
        with pytest.raises(NotFound, match="no tensor logits"):
            store.reader.tensor(message, 0, "logits")

    def test_a_lens_may_trail_its_step(self, store: Store, rng: np.random.Generator) -> None:
        _, message = store.reply()
        steps = [builders.step(i, rng) for i in range(2)]
        lens = dataclasses.replace(
            builders.lens(0, rng), chosen_rank=np.array([9, 2, 1, 1], dtype=np.int64)
        )
        store.writer.append(message, steps)
        assert store.reader.step(message, 0).lens is None
        assert store.reader.steps(message)[0].settle_layer is None
        store.writer.append(message, [], [lens])
        assert plain(store.reader.step(message, 0).lens) == plain(lens)
        assert store.reader.steps(message)[0].settle_layer == 2
        assert store.reader.step(message, 1).lens is None

    def test_another_writer_may_go_on(self, store: Store, rng: np.random.Generator) -> None:
        _, message = store.reply()
        store.writer.append(message, [builders.step(0, rng)])
        with TraceWriter(store.db, checkpoint=False) as second:
            second.append(message, [builders.step(1, rng)], [builders.lens(0, rng)])
        assert len(store.reader.steps(message)) == 2
        assert store.reader.step(message, 0).lens is not None

    def test_steps_come_in_order_or_not_at_all(
        self, store: Store, rng: np.random.Generator
    ) -> None:
        _, message = store.reply()
        store.writer.append(message, [builders.step(0, rng)])
        for index in (0, 2):
            with pytest.raises(StoreError, match="write step 1 first"):
                store.writer.append(message, [builders.step(index, rng)])
        with pytest.raises(NotFound, match="no step 5 for its lens"):
            store.writer.append(message, [builders.step(1, rng)], [builders.lens(5, rng)])
        assert [step.step_index for step in store.reader.steps(message)] == [0]
        store.writer.append(message, [builders.step(1, rng)])
        assert [step.step_index for step in store.reader.steps(message, since=0)] == [1]

    def test_what_is_not_a_number_is_null_and_nan_again(
        self, store: Store, rng: np.random.Generator
    ) -> None:
        _, message = store.reply()
        step = builders.step(0, rng, with_lens=True)
        assert step.lens is not None
        nan = float("nan")
        logits, kl = step.topk.logits.copy(), step.lens.kl.copy()
        logits[-1], kl[0], kl[1] = -np.inf, np.inf, nan
        weights = np.full_like(step.attention[0].weights, np.nan)
        step = dataclasses.replace(
            step,
            prob=nan,
            entropy=nan,
            logprob=-np.inf,
            topk=dataclasses.replace(step.topk, logits=logits),
            attention=(
                dataclasses.replace(step.attention[0], weights=weights, missing=nan),
                *step.attention[1:],
            ),
            lens=dataclasses.replace(step.lens, kl=kl),
        )
        store.writer.append(message, [step])
        assert_same(store.reader.step(message, 0), step)
        assert np.isnan(store.reader.steps(message)[0].prob)

    def test_greedy_steps_and_steps_without_attention_or_candidates(
        self, store: Store, rng: np.random.Generator
    ) -> None:
        _, message = store.reply()
        bare = builders.step(0, rng, topk_lens=1, topk_attention=0)
        bare = dataclasses.replace(
            bare,
            sampled_prob=None,
            topk=dataclasses.replace(bare.topk, sampled_probs=None, noise=None),
            decision=None,
            attention=(),
        )
        no_entries = builders.step(1, rng, topk_attention=0, with_lens=True, topk_lens=0)
        store.writer.append(message, [bare, no_entries])
        assert_same(store.reader.step(message, 0), bare)
        assert_same(store.reader.step(message, 1), no_entries)

    def test_a_decision_reads_back_as_it_was(self, store: Store, rng: np.random.Generator) -> None:
        """With a draw, without one, and with numbers that are none."""
        _, message = store.reply()
        drawn = builders.step(0, rng)
        assert drawn.decision is not None
        penalised = dataclasses.replace(
            drawn.decision,
            drawn=False,
            noise=None,
            runner_up=None,
            effects=(),
            greedy=dataclasses.replace(drawn.decision.greedy, noise=None),
        )
        nan = float("nan")
        broken = dataclasses.replace(
            drawn.decision, effects=(Effect("top-k", "5", 3, nan, nan),), noise=-0.1
        )
        steps = [
            drawn,
            dataclasses.replace(builders.step(1, rng), decision=penalised),
            dataclasses.replace(builders.step(2, rng), decision=broken),
            dataclasses.replace(builders.step(3, rng), decision=None),
        ]
        store.writer.append(message, steps)
        for found, written in zip(store.reader.iter_steps(message), steps, strict=True):
            assert_same(found, written)
        told = [summary.greedy_id for summary in store.reader.steps(message)]
        assert told == [s.decision and s.decision.greedy.token_id for s in steps]
        assert [s.differs_from_greedy for s in steps] == [True, True, True, False]

    @settings(
        max_examples=25,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(data=st.data())
    def test_any_text_can_be_kept(self, store: Store, data: st.DataObject) -> None:
        hostile = st.text(
            st.one_of(
                st.characters(codec="utf-8"),
                st.sampled_from("\x00\x1b\u202e\u200f\ufeff\ud83d\ude00'\"%\\;<>"),
            ),
            max_size=12,
        )
        rng = np.random.default_rng(0)
        words = data.draw(st.lists(hostile, min_size=5, max_size=5))
        raw = data.draw(st.binary(max_size=8))
        step = builders.step(0, rng, topk=5, token=words[0], with_lens=True, topk_lens=5)
        assert step.lens is not None
        step = dataclasses.replace(
            step,
            token_bytes=raw,
            topk=dataclasses.replace(step.topk, tokens=tuple(words)),
            lens=dataclasses.replace(step.lens, tokens=(tuple(words),) * 4),
        )
        conversation, message = store.reply()
        store.writer.rename_conversation(conversation, words[1])
        said = store.writer.add_message(conversation, ChatMessage(Role.USER, words[2]))
        store.writer.append(message, [step])

        def shown(word: str) -> str:
            return "".join(
                "\u2400" if c == "\x00" else "\ufffd" if 0xD800 <= ord(c) <= 0xDFFF else c
                for c in word
            )

        found = store.reader.step(message, 0)
        assert found.token == shown(words[0])
        assert found.token_bytes == raw
        assert found.topk.tokens == tuple(map(shown, words))
        assert found.lens is not None and found.lens.tokens[3] == tuple(map(shown, words))
        assert store.reader.message(said).content == shown(words[2])
        assert store.reader.conversation(conversation).title == shown(words[1])

    def test_large_prompts_take_several_statements(self, store: Store) -> None:
        _, message = store.reply(begin=False)
        start = builders.turn_start(tokens=20_000)
        store.writer.start_reply(message, start)
        found = store.reader.prompt(message)
        assert found == start.prompt
        assert len(found) == 20_000


class TestConversations:
    def test_a_list_shows_the_last_changed_first(
        self, store: Store, rng: np.random.Generator
    ) -> None:
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
        self, store: Store, rng: np.random.Generator
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

    def test_what_a_dead_process_left_running_is_found_as_interrupted(self, store: Store) -> None:
        conversation, _ = store.reply()
        with store.writer.write() as connection:
            gone = str(this_process()._replace(pid=2**30))
            connection.execute(update(MessageRow).values(owner=gone))
        (only,) = store.reader.conversations(by=ConversationFilter(status=Status.INTERRUPTED))
        assert (only.id, only.status) == (conversation, Status.INTERRUPTED)
        assert not store.reader.conversations(by=ConversationFilter(status=Status.RUNNING))

    def test_a_conversation_tells_what_its_replies_took(
        self, store: Store, rng: np.random.Generator
    ) -> None:
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
        self, store: Store, rng: np.random.Generator
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

    def test_a_deleted_conversation_leaves_nothing(
        self, store: Store, rng: np.random.Generator
    ) -> None:
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

    def test_what_is_not_there_is_named(self, store: Store) -> None:
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

    def test_totals(self, store: Store, rng: np.random.Generator) -> None:
        _, message = store.reply()
        store.writer.append(message, [builders.step(i, rng) for i in range(3)])
        info = store.reader.info()
        assert (info.conversations, info.messages, info.steps) == (1, 1, 3)
        assert info.tensor_bytes == store.reader.message_bytes(message) > 0
        assert info.bytes > info.tensor_bytes
        assert info.tensor_steps == 3 and info.row_bytes > 0


class TestReplies:
    def test_every_write_counts_the_version_up(
        self, store: Store, rng: np.random.Generator
    ) -> None:
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

    def test_a_failed_write_leaves_nothing(self, store: Store, rng: np.random.Generator) -> None:
        _, message = store.reply()
        version = store.reader.version()
        bad = dataclasses.replace(builders.step(1, rng), step_index=7)
        with pytest.raises(StoreError):
            store.writer.append(message, [builders.step(0, rng), bad])
        assert store.reader.version() == version
        assert store.reader.steps(message) == []

    def test_each_queued_reply_is_claimed_once(self, store: Store) -> None:
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

    def test_messages_added_at_once_get_positions_of_their_own(self, store: Store) -> None:
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

    def test_a_stop_reaches_who_generates(self, store: Store, rng: np.random.Generator) -> None:
        conversation, message = store.reply()
        assert store.writer.stop_requested(message) is False
        store.writer.request_stop(message)
        assert store.writer.stop_requested(message) is True
        assert store.writer.append(message, [builders.step(0, rng)]) is True
        queued = store.writer.queue_reply(
            conversation, ModelChoice("m"), Sampling(), CapturePolicy()
        )
        store.writer.request_stop(queued)
        assert store.reader.message(queued).status is Status.STOPPED
        assert store.writer.claim_next_reply() is None

    def test_what_has_ended_takes_no_more(self, store: Store, rng: np.random.Generator) -> None:
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

    def test_a_reply_that_has_not_begun_takes_no_steps(
        self, store: Store, rng: np.random.Generator
    ) -> None:
        _, message = store.reply(begin=False)
        with pytest.raises(StoreError, match="start_reply first"):
            store.writer.append(message, [builders.step(0, rng)])

    def test_the_worker_tells_what_it_does(self, store: Store) -> None:
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


class TestSnapshots:
    def test_a_step_is_never_seen_without_its_children(
        self, store: Store, rng: np.random.Generator
    ) -> None:
        _, message = store.reply()
        steps = [builders.step(i, rng, with_lens=True) for i in range(60)]
        done = threading.Event()
        faults: list[str] = []

        def look() -> None:
            with TraceReader(store.db) as reader:
                last = False
                while not last:
                    last = done.is_set()
                    for step in reader.iter_steps(message):
                        if not (len(step.topk.tokens) == 10 and len(step.attention) == 3):
                            faults.append(f"step {step.step_index} is incomplete")
                        if step.lens is None or len(step.lens.tokens) != 4:
                            faults.append(f"step {step.step_index} has half a lens")

        threads = [threading.Thread(target=look) for _ in range(3)]
        for thread in threads:
            thread.start()
        for step in steps:
            store.writer.append(message, [step])
        done.set()
        for thread in threads:
            thread.join()
        assert faults == []
        assert len(store.reader.steps(message)) == 60

    def test_all_that_a_snapshot_reads_is_of_one_instant(
        self, store: Store, rng: np.random.Generator
    ) -> None:
        _, message = store.reply()
        store.writer.append(message, [builders.step(0, rng)])
        with store.reader.snapshot() as page:
            before = page.version()
            store.writer.append(message, [builders.step(1, rng)])
            assert page.version() == before
            assert len(page.steps(message)) == 1
        assert len(store.reader.steps(message)) == 2
