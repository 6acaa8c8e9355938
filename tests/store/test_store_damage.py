"""One damaged row marks its own conversation; all others are as if nothing had happened."""

from __future__ import annotations

import datetime as dt
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from oki_trace.errors import OkiTraceError, StoreError
from oki_trace.records import (
    CapturePolicy,
    ChatMessage,
    ConversationFilter,
    ModelChoice,
    Role,
    Sampling,
    Status,
    TurnEnd,
)
from oki_trace.store.maintenance.prune import plan
from oki_trace.store.maintenance.verify import Verification
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.copy import Fate, copy
from oki_trace.store.writing.writer import TraceWriter
from tests import builders


@pytest.fixture
def three(file: Path) -> Path:
    """A store with three conversations of two messages; the second, 2, has messages 3 and 4."""
    with TraceWriter(file) as writer:
        for name in ("lead", "gold", "iron"):
            conversation = writer.create_conversation(name)
            writer.add_message(conversation, ChatMessage(Role.USER, f"What is {name}?"))
            reply = writer.queue_reply(
                conversation, ModelChoice("tiny"), Sampling(), CapturePolicy(), claim=True
            )
            writer.start_reply(reply, builders.turn_start("half"))
            rng = np.random.default_rng(5)
            writer.append(reply, [builders.coherent_step(i, rng) for i in range(2)])
            writer.finish_reply(reply, TurnEnd(Status.COMPLETE, " the the", "token limit", 0.5))
    return file


def damage(file: Path, statement: str) -> None:
    with closing(sqlite3.connect(file)) as connection, connection:
        assert connection.execute(statement).rowcount > 0


OF_MESSAGE = {
    "status = 'dancing' WHERE id = 4": "its status is 'dancing'",
    "role = 'dancer' WHERE id = 4": "its role is 'dancer'",
    "created_at = 'yesterday' WHERE id = 4": "its created_at is 'yesterday'",
    "created_at = 20.5 WHERE id = 3": "its created_at is 20.5",
    "tensors_pruned_at = 'x' WHERE id = 4": "its tensors_pruned_at is 'x'",
    "capture = '{' WHERE id = 4": "its capture is invalid",
    "capture = '[1]' WHERE id = 4": "its capture is invalid",
    "generation = '{\"eos_token_ids\": 4}' WHERE id = 4": "its generation is invalid",
    "sampling = '{\"top_p\": 9}' WHERE id = 4": "its sampling is invalid",
    "choice = '{}' WHERE id = 4": "its choice is invalid",
    "checks = 'null and void' WHERE id = 4": "its checks is invalid",
    "seconds = 'long' WHERE id = 4": "its seconds is 'long'",
    "prompt_len = 'x' WHERE id = 4": "its prompt_len is 'x'",
    "position = 'x' WHERE id = 4": "its position is 'x'",
    "content = 7.5 WHERE id = 4": "",
    "content = x'ff' WHERE id = 4": "its content is not text",
    "owner = 'nobody:knows', status = 'running' WHERE id = 4": "",
}


@pytest.mark.parametrize("change", OF_MESSAGE)
def test_a_damaged_message_marks_its_conversation_alone(three: Path, change: str) -> None:
    damage(three, f"UPDATE message SET {change}")
    with TraceReader(three) as reader:
        assert {c.id for c in reader.conversations()} == {1, 2, 3}
        assert reader.conversation_count(by=ConversationFilter(status=Status.COMPLETE)) >= 2
        for number in (1, 3):
            assert reader.conversation(number).damage is None
            assert [m.damage for m in reader.messages(number)] == [None, None]
        found = [m for m in reader.messages(2) if m.damage]
        what = OF_MESSAGE[change]
        if what:
            (message,) = found
            assert what in (message.damage or "")
            assert message.status is Status.FAILED
            assert (message.reason or "").startswith("damaged: ")
        lines = [str(one) for one in Verification(reader)]
        assert lines and all("conversation 2, message" in line for line in lines)
        assert any(what in line for line in lines)
        marks = reader.message_marks()
        assert [mark.id for mark in marks] == [1, 2, 3, 4, 5, 6]
    with TraceWriter(three) as writer:
        writer.delete_conversation(2)
    with TraceReader(three) as reader:
        assert list(Verification(reader)) == []
        assert [c.id for c in reader.conversations()] == [3, 1]


@pytest.mark.parametrize("change", ["status = 'dancing'", "created_at = 'x'", "capture = '{'"])
def test_what_is_damaged_is_said_in_the_list(three: Path, change: str) -> None:
    damage(three, f"UPDATE message SET {change} WHERE id = 4")
    with TraceReader(three) as reader:
        damages = {c.id: c.damage for c in reader.conversations()}
    assert damages[1] is None and damages[3] is None
    assert (damages[2] or "").startswith("message 4: ")


@pytest.mark.parametrize("column", ["created_at", "updated_at"])
def test_a_conversation_without_a_time_is_marked_and_not_pruned(three: Path, column: str) -> None:
    damage(three, f"UPDATE conversation SET {column} = 'long ago' WHERE id = 2")
    with TraceReader(three) as reader:
        assert reader.conversation(2).damage == f"its {column} is 'long ago'"
        assert f"conversation 2: its {column} is 'long ago'" in map(str, Verification(reader))
        going = plan(reader, older_than=dt.timedelta(days=-1), tensors_only=False)
        assert {item.conversation_id for item in going.items} == (
            {1, 3} if column == "updated_at" else {1, 2, 3}
        )
    with TraceWriter(three) as writer:
        writer.delete_conversation(2)


OF_STEP = [
    "step SET token_id = 'x'",
    "step SET decision = '{'",
    "step SET decision = '{}'",
    "step SET prob = 'likely'",
    "step SET token_bytes = 'text'",
    "topk_entry SET token_id = 'x'",
    "topk_entry SET prob = 'x'",
    "topk_entry SET token = x'00ff'",
    "attention_entry SET position = 'x'",
    "attention_layer SET missing = 'x'",
    "lens_layer SET chosen_rank = 'x'",
    "lens_entry SET logit = 'x'",
]


@pytest.mark.parametrize("change", OF_STEP)
def test_a_damaged_step_is_one_sentence(three: Path, change: str) -> None:
    key = "id" if change.startswith("step") else "step_id"
    damage(three, f"UPDATE {change} WHERE {key} = 4")
    with TraceReader(three) as reader:
        assert len(reader.conversations()) == 3
        try:
            list(reader.iter_steps(4))
        except StoreError as error:
            assert "The steps of message 4 are damaged" in str(error)
        for read in (reader.candidates, reader.lens_grid, reader.steps):
            try:
                read(4)
            except OkiTraceError as error:
                assert "\n" not in str(error)
        lines = [str(one) for one in Verification(reader)]
        assert lines and all("conversation 2, message 4" in line for line in lines), lines
        assert len(list(reader.iter_steps(2))) == 2


def test_a_damaged_conversation_is_left_out_of_a_copy(three: Path, tmp_path: Path) -> None:
    damage(three, "UPDATE message SET status = 'dancing' WHERE id = 4")
    done = list(copy(three, tmp_path / "copy.db"))
    assert [one.fate for one in done] == [Fate.COPIED, Fate.DAMAGED, Fate.COPIED]


def test_messages_whose_conversation_is_gone_can_be_deleted(three: Path) -> None:
    damage(three, "DELETE FROM conversation WHERE id = 2")
    with TraceReader(three) as reader:
        assert [c.id for c in reader.conversations()] == [3, 1]
        assert any("is missing" in str(one) for one in Verification(reader))
    with TraceWriter(three) as writer:
        writer.delete_conversation(2)
    with TraceReader(three) as reader:
        assert list(Verification(reader)) == []
