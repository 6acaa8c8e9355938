"""Making room: what goes, what stays, and what is never touched."""

from __future__ import annotations

import datetime as dt
import shutil
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from oki_trace.errors import NotFound, StoreError, UsageError
from oki_trace.records import Status, TurnEnd
from oki_trace.store.maintenance import vacuum as vacuuming
from oki_trace.store.maintenance.prune import plan, prune, prune_tensors
from oki_trace.store.maintenance.vacuum import vacuum
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.writer import TraceWriter
from tests import builders
from tests.store.stores import Store

DONE = TurnEnd(Status.COMPLETE, " the end", "end of sequence", 1.5)
DAY = dt.timedelta(days=1)


class Told(NamedTuple):
    """A conversation and its reply."""

    conversation: int
    message: int


def told(store: Store, rng: np.random.Generator, steps: int = 3, *, end: bool = True) -> Told:
    """A conversation with one reply of so many steps."""
    conversation, message = store.reply("exact")
    store.writer.append(
        message, [builders.step(i, rng, with_lens=True, vocab=4000) for i in range(steps)]
    )
    if end:
        store.writer.finish_reply(message, DONE)
    return Told(conversation, message)


class TestPruning:
    def test_tensors_go_and_every_row_stays(self, store: Store, rng: np.random.Generator) -> None:
        done = told(store, rng, steps=300)
        before = list(store.reader.iter_steps(done.message))
        version, kept = store.reader.version(), store.reader.message_bytes(done.message)
        later = dt.datetime.now(dt.UTC) + 2 * DAY
        planned = plan(store.reader, older_than=DAY, now=later)
        assert [(item.conversation_id, item.message_id) for item in planned.items] == [done]
        assert planned.frees_bytes == kept > 0
        assert store.reader.version() == version, "a plan changes nothing"
        seen: list[tuple[int, int]] = []
        went = prune(store.writer, planned, lambda at, total: seen.append((at, total)))
        assert went.items == planned.items and seen == [(0, 1), (1, 1)]
        assert store.reader.version() > version
        assert store.reader.message_bytes(done.message) == 0
        assert store.reader.info().tensor_bytes == 0
        assert store.reader.tensor_names(done.message, 299) == []
        after = list(store.reader.iter_steps(done.message))
        assert [s.topk.tokens for s in after] == [s.topk.tokens for s in before]
        assert all(s.lens is not None for s in after)

    def test_pruned_is_told_from_never_kept(self, store: Store, rng: np.random.Generator) -> None:
        done = told(store, rng)
        _, never = store.reply("none")
        store.writer.append(never, [builders.step(0, rng)])
        store.writer.finish_reply(never, DONE)
        assert store.reader.message(done.message).tensors_pruned_at is None
        for message in (done.message, never):
            prune_tensors(store.writer, message)
        at = store.reader.message(done.message).tensors_pruned_at
        assert at is not None and dt.datetime.now(dt.UTC) - at < DAY
        assert store.reader.message(never).tensors_pruned_at is None
        with pytest.raises(NotFound, match=f"pruned on {at:%Y-%m-%d}"):
            store.reader.tensor(done.message, 0, "logits")
        with pytest.raises(NotFound, match="generate with --tensors"):
            store.reader.tensor(never, 0, "logits")

    def test_the_oldest_go_until_the_rest_fits(
        self, store: Store, rng: np.random.Generator
    ) -> None:
        many = [told(store, rng) for _ in range(4)]
        info = store.reader.info()
        one = store.reader.message_bytes(many[0].message)
        budget = info.row_bytes + info.tensor_bytes - one - 1
        planned = plan(store.reader, max_bytes=budget)
        assert [item.message_id for item in planned.items] == [many[0].message, many[1].message]
        assert planned.left_bytes <= budget
        prune(store.writer, planned)
        assert plan(store.reader, max_bytes=budget).items == (), "what is gone is not counted"

    def test_whole_conversations_go_with_everything(
        self, store: Store, rng: np.random.Generator
    ) -> None:
        old, new = told(store, rng), told(store, rng)
        changed = store.reader.conversation(new.conversation).updated_at
        planned = plan(store.reader, older_than=DAY, tensors_only=False, now=changed + DAY)
        assert [item.conversation_id for item in planned.items] == [old.conversation]
        prune(store.writer, planned)
        assert [c.id for c in store.reader.conversations()] == [new.conversation]
        with pytest.raises(NotFound):
            store.reader.message(old.message)
        everything = plan(store.reader, max_bytes=0, tensors_only=False)
        assert everything.left_bytes < store.reader.info().row_bytes
        prune(store.writer, everything)
        info = store.reader.info()
        assert (info.conversations, info.messages, info.steps, info.tensor_bytes) == (0, 0, 0, 0)

    @pytest.mark.parametrize("tensors_only", [True, False])
    def test_what_is_being_written_is_spared(
        self, store: Store, rng: np.random.Generator, tensors_only: bool
    ) -> None:
        live = told(store, rng, end=False)
        planned = plan(store.reader, max_bytes=0, tensors_only=tensors_only)
        assert (planned.items, planned.spared) == ((), 1)
        assert prune_tensors(store.writer, live.message) == 0
        with pytest.raises(StoreError, match=f"message {live.message} is being generated"):
            store.writer.delete_conversation(live.conversation)
        assert store.reader.tensor_names(live.message, 0)
        store.writer.append(live.message, [builders.step(3, rng, vocab=4000)])

    def test_what_changed_since_the_plan_stays(
        self, store: Store, rng: np.random.Generator
    ) -> None:
        done = told(store, rng)
        planned = plan(store.reader, max_bytes=0, tensors_only=False)
        store.writer.rename_conversation(done.conversation, "wanted after all")
        went = prune(store.writer, planned)
        assert (went.items, went.spared) == ((), 1)
        assert store.reader.conversation(done.conversation).title == "wanted after all"
        store.writer.delete_conversation(done.conversation)
        assert prune(store.writer, planned).items == ()

    def test_what_is_deleted_since_the_plan_is_no_error(
        self, store: Store, rng: np.random.Generator
    ) -> None:
        gone, kept = told(store, rng), told(store, rng)
        planned = plan(store.reader, max_bytes=0)
        store.writer.delete_conversation(gone.conversation)
        went = prune(store.writer, planned)
        assert [item.message_id for item in went.items] == [kept.message]

    def test_a_dead_writer_spares_nothing(self, store: Store, rng: np.random.Generator) -> None:
        script = (
            "import sys; from oki_trace.store.writing.writer import TraceWriter\n"
            "from oki_trace.records import *\n"
            "with TraceWriter(sys.argv[1]) as writer:\n"
            "    conversation = writer.create_conversation('x')\n"
            "    writer.queue_reply(\n"
            "        conversation, ModelChoice('m'), Sampling(), CapturePolicy(), claim=True)\n"
            "    print(conversation)\n"
        )
        made = subprocess.run(
            [sys.executable, "-c", script, store.db], check=True, stdout=subprocess.PIPE
        )
        store.writer.delete_conversation(int(made.stdout))
        assert store.reader.conversations() == []

    def test_a_plan_needs_a_reason(self, store: Store) -> None:
        with pytest.raises(UsageError, match="an age, a size, or both"):
            plan(store.reader)

    def test_ids_are_not_given_again(self, store: Store, rng: np.random.Generator) -> None:
        last = told(store, rng)
        step = store.reader.steps(last.message)[-1].id
        prune(store.writer, plan(store.reader, max_bytes=0, tensors_only=False))
        vacuum(store.db)
        again = told(store, rng)
        assert again.conversation > last.conversation and again.message > last.message
        assert store.reader.steps(again.message)[0].id > step

    def test_a_reply_goes_on_while_others_are_pruned(
        self, store: Store, rng: np.random.Generator
    ) -> None:
        for _ in range(8):
            told(store, rng)
        live = told(store, rng, steps=0, end=False)
        planned = plan(store.reader, max_bytes=0)

        def work() -> None:
            with TraceWriter(store.db, checkpoint=False) as other:
                prune(other, planned)

        pruning = threading.Thread(target=work)
        pruning.start()
        for index in range(20):
            store.writer.append(live.message, [builders.step(index, rng)])
        pruning.join()
        assert len(store.reader.steps(live.message)) == 20
        assert store.reader.tensor_names(live.message, 19)
        assert plan(store.reader, max_bytes=0).items == ()


class TestVacuum:
    def test_the_disk_has_it_back(self, store: Store, rng: np.random.Generator) -> None:
        kept = told(store, rng)
        gone = told(store, rng, steps=60)
        store.writer.delete_conversation(gone.conversation)
        step = store.reader.step(kept.message, 2)
        done = vacuum(store.db)
        assert done.after < done.before
        info = store.reader.info()
        assert (info.bytes, info.free_bytes, info.log_bytes) == (done.after, 0, 0)
        assert store.reader.step(kept.message, 2).topk.tokens == step.topk.tokens
        assert store.reader.tensor(kept.message, 2, "logits").array.shape == (4000,)

    def test_not_while_a_reply_is_generated(self, store: Store, rng: np.random.Generator) -> None:
        live = told(store, rng, end=False)
        version = store.reader.version()
        with pytest.raises(StoreError, match=f"message {live.message} is being generated"):
            vacuum(store.db)
        assert store.reader.version() == version

    def test_readers_are_not_in_the_way(self, store: Store, rng: np.random.Generator) -> None:
        told(store, rng)
        with TraceReader(store.db) as other, other.snapshot() as instant:
            seen = instant.conversations()
        vacuum(store.db)
        assert store.reader.conversations() == seen


def filled(file: Path, rng: np.random.Generator) -> Store:
    """A file with a conversation deleted from it, open."""
    store = Store(str(file), TraceWriter(file), TraceReader(file))
    gone = told(store, rng, steps=40)
    told(store, rng)
    store.writer.delete_conversation(gone.conversation)
    return store


def test_free_room_and_the_log_are_no_data(file: Path, rng: np.random.Generator) -> None:
    store = filled(file, rng)
    info = store.reader.info()
    assert info.free_bytes > 500_000 and info.log_bytes > 0
    assert info.row_bytes + info.tensor_bytes < 500_000
    assert info.bytes_per_token == (info.row_bytes + info.tensor_bytes) / info.steps
    store.writer.close()
    store.reader.close()


def test_a_vacuum_that_has_no_room_is_not_begun(
    file: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = filled(file, rng)
    full = shutil._ntuple_diskusage(10**12, 10**12, 0)
    monkeypatch.setattr(vacuuming.shutil, "disk_usage", lambda folder: full)
    with pytest.raises(StoreError, match="bytes for a copy in"):
        vacuum(file)
    assert store.reader.info().free_bytes > 0
    store.writer.close()
    store.reader.close()


def test_a_vacuum_can_be_ended_at_any_moment(
    file: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = filled(file, rng)
    monkeypatch.setattr(vacuuming, "_INSTRUCTIONS_A_TICK", 100)

    def enough() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vacuum(file, enough)
    assert len(store.reader.conversations()) == 1
    store.writer.close()
    store.reader.close()
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    with TraceReader(file) as reader:
        assert reader.info().free_bytes > 0
