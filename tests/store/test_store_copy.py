"""A store copied to another engine is the same store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select, update

from oki_trace.errors import NotFound, StoreError
from oki_trace.records import ChatMessage, Role, Status, TurnEnd
from oki_trace.store.maintenance.verify import Verification
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.schema import models
from oki_trace.store.writing import copy as copying
from oki_trace.store.writing.copy import Copied, Fate, copy
from oki_trace.store.writing.writer import TraceWriter
from tests import builders
from tests.store.stores import Store

DONE = TurnEnd(Status.COMPLETE, " the end", "end of sequence", 1.5)


@pytest.fixture(params=["to the other engine", "back to a file"])
def ends(request: pytest.FixtureRequest, db: str, tmp_path: Path) -> Iterator[tuple[Store, str]]:
    """A store to copy from, on a file or on either engine, and where to copy to."""
    other = str(tmp_path / "other.db")
    source, target = (other, db) if request.param == "to the other engine" else (db, other)
    with TraceWriter(source) as writer, TraceReader(source) as reader:
        yield Store(source, writer, reader), target


def told(store: Store, steps: int = 3, *, end: bool = True) -> int:
    conversation = store.writer.create_conversation("Käse 🙂\x00")
    store.writer.add_message(conversation, ChatMessage(Role.USER, "hello\ud83d"))
    _, message = store.reply("exact", conversation=conversation)
    rng = np.random.default_rng(steps)
    store.writer.append(message, [builders.step(i, rng, with_lens=i != 1) for i in range(steps)])
    if end:
        store.writer.finish_reply(message, DONE)
    return conversation


def contents(reader: TraceReader, conversation: int) -> list[Any]:
    """Every row that hangs on a conversation, without its ids."""
    found: list[Any] = []
    table = models.Conversation.__table__
    found += [row[1:] for row in reader.rows(select(table).where(table.c.id == conversation))]
    for message in reader.messages(conversation):
        table = models.Message.__table__
        (row,) = reader.rows(select(table).where(table.c.id == message.id))
        found.append(row[2:])
        table = models.PromptToken.__table__
        found += [
            row[1:]
            for row in reader.rows(
                select(table).where(table.c.message_id == message.id).order_by(table.c.position)
            )
        ]
        for step in reader.steps(message.id):
            table = models.Step.__table__
            (row,) = reader.rows(select(table).where(table.c.id == step.id))
            found.append(row[2:])
            for model in (*copying._CHILDREN, models.Tensor):
                table = model.__table__
                skipped = 2 if model is models.Tensor else 1
                found += [
                    tuple(row)[skipped:]
                    for row in reader.rows(
                        select(table).where(table.c.step_id == step.id).order_by(*table.primary_key)
                    )
                ]
    return found


def test_every_row_arrives(ends: tuple[Store, str], monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = ends
    monkeypatch.setattr(copying, "_BATCH", 2)
    with TraceWriter(target) as writer:
        writer.create_conversation("was here before")
    old = [told(source, steps) for steps in (5, 0)]
    seen: list[tuple[int, int]] = []
    done = list(copy(source.db, target, progress=lambda at, total: seen.append((at, total))))
    assert [(c.conversation_id, c.fate, c.steps) for c in done] == [
        (old[0], Fate.COPIED, 5),
        (old[1], Fate.COPIED, 0),
    ]
    assert seen[-1] == (5, 5)
    with TraceReader(target) as reader:
        assert len(reader.conversations()) == 3
        for one in done:
            assert one.new_id is not None
            assert contents(reader, one.new_id) == contents(source.reader, one.conversation_id)


def test_copying_again_copies_nothing_twice(ends: tuple[Store, str]) -> None:
    source, target = ends
    first, second = told(source), told(source)
    (one,) = copy(source.db, target, [first])
    assert one == Copied(first, one.new_id, Fate.COPIED, 3)
    source.writer.rename_conversation(first, "another title")
    again = list(copy(source.db, target))
    assert [(c.conversation_id, c.fate) for c in again] == [
        (first, Fate.CHANGED),
        (second, Fate.COPIED),
    ]
    assert again[0].new_id == one.new_id
    assert [c.fate for c in copy(source.db, target, [second])] == [Fate.THERE]
    # And back again: what came from here is here.
    assert {c.fate for c in copy(target, source.db)} == {Fate.CHANGED, Fate.THERE}
    assert len(source.reader.conversations()) == 2


def test_what_is_being_written_is_left_for_later(ends: tuple[Store, str]) -> None:
    source, target = ends
    live = told(source, end=False)
    assert [c.fate for c in copy(source.db, target)] == [Fate.LIVE]
    with source.writer.write() as connection:
        connection.execute(
            update(models.Message)
            .where(models.Message.conversation_id == live)
            .values(owner="another-host:1:1", seen_at=None)
        )
    assert [c.fate for c in copy(source.db, target)] == [Fate.LIVE]
    reply = source.reader.messages(live)[-1].id
    source.writer._replies.clear()
    me = copying.lifecycle.this_process()
    with source.writer.write() as connection:
        connection.execute(
            update(models.Message)
            .where(models.Message.id == reply)
            .values(owner=str(me._replace(start="1")))
        )
    (one,) = copy(source.db, target)
    assert one.fate is Fate.COPIED and one.new_id is not None
    with TraceReader(target) as reader:
        cut = reader.messages(one.new_id)[-1]
        assert (cut.status, cut.content) == (Status.INTERRUPTED, " the" * 3)


def test_a_copy_that_is_broken_off_leaves_nothing_of_a_conversation(
    ends: tuple[Store, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = ends
    told(source), told(source)
    whole = copying._Copier._tensors
    calls = 0

    def breaks(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        whole(*arguments)

    monkeypatch.setattr(copying._Copier, "_tensors", breaks)
    with pytest.raises(KeyboardInterrupt):
        list(copy(source.db, target))
    with TraceReader(target) as reader:
        info = reader.info()
        assert (info.conversations, info.messages, info.steps) == (1, 2, 3)
    assert [c.fate for c in copy(source.db, target)] == [Fate.THERE, Fate.COPIED]


def test_coherent_steps_verify_on_the_other_side(ends: tuple[Store, str]) -> None:
    source, target = ends
    _, message = source.reply("compact")
    rng = np.random.default_rng(2)
    source.writer.append(message, [builders.coherent_step(i, rng) for i in range(4)])
    source.writer.finish_reply(message, DONE)
    list(copy(source.db, target))
    with TraceReader(target) as reader:
        assert list(Verification(reader)) == []


def test_what_cannot_be_copied_is_refused(file: Path) -> None:
    with TraceWriter(file):
        pass
    with pytest.raises(StoreError, match="into itself"):
        list(copy(file, f"sqlite:///{file}"))
    with pytest.raises(NotFound):
        list(copy(file, file.with_name("other.db"), [7]))


def test_what_is_deleted_meanwhile_is_left_out(ends: tuple[Store, str]) -> None:
    store, target = ends
    first, second = told(store), told(store)
    copying_all = copy(store.db, target)
    assert next(copying_all).conversation_id == first
    store.writer.delete_conversation(second)
    assert list(copying_all) == []
    with pytest.raises(NotFound):
        list(copy(store.db, target, [second]))
