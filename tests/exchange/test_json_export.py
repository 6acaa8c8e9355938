"""A conversation as one JSON document: whole, plain, and true at one instant."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oki_trace.errors import ExchangeError, NotFound
from oki_trace.exchange.files import replacing
from oki_trace.exchange.json_export import write_conversation
from oki_trace.exchange.selection import selected
from oki_trace.records import (
    CapturePolicy,
    ChatMessage,
    ModelChoice,
    Role,
    Sampling,
    Status,
    TurnEnd,
)
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.writer import TraceWriter
from tests import builders

HOSTILE = "\x1b[31m red \x9b2J \u202e rtl é 日本 🙂 \u2028 </script>"


@dataclass
class Story:
    """A store with one conversation, open for writing and reading."""

    file: Path
    writer: TraceWriter
    reader: TraceReader
    conversation: int

    def say(self, content: str) -> int:
        return self.writer.add_message(self.conversation, ChatMessage(Role.USER, content))

    def queue(self) -> int:
        return self.writer.queue_reply(
            self.conversation, ModelChoice("tiny/model"), Sampling(), CapturePolicy(), claim=True
        )

    def answer(self, steps: int = 2) -> int:
        rng = np.random.default_rng(1)
        message = self.queue()
        self.writer.start_reply(message, builders.turn_start())
        self.writer.append(
            message, [builders.step(i, rng, with_lens=True, token=" é🙂") for i in range(steps)]
        )
        end = TurnEnd(Status.COMPLETE, " é🙂" * steps, "end of turn", 1.5)
        self.writer.finish_reply(message, end)
        return message

    def export(self, message: int | None = None, conversation: int | None = None) -> Any:
        file = io.StringIO()
        with selected(self.reader, conversation or self.conversation, message) as chosen:
            write_conversation(chosen, file)
        text = file.getvalue()
        assert text.isascii(), "the same in every encoding, and inert in a terminal"
        assert "\x1b" not in text and text.endswith("}\n")

        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is not JSON")

        return json.loads(text, parse_constant=refuse)


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Story]:
    file = tmp_path / "store.db"
    with TraceWriter(file) as writer, TraceReader(file) as reader:
        yield Story(file, writer, reader, writer.create_conversation(f"About {HOSTILE}"))


def test_a_conversation_has_the_shape_of_the_contract(story: Story) -> None:
    story.writer.add_message(story.conversation, ChatMessage(Role.SYSTEM, "Be brief."))
    story.say(HOSTILE)
    reply = story.answer()
    document = story.export()
    assert list(document) == ["format", "version", "conversation", "messages"]
    assert (document["format"], document["version"]) == ("oki-trace", 2)
    conversation = document["conversation"]
    assert conversation["id"] == story.conversation
    assert conversation["title"] == f"About {HOSTILE}"
    assert conversation["created_at"].endswith("+00:00")
    assert [(m["role"], m["content"], m["status"]) for m in document["messages"]] == [
        ("system", "Be brief.", "complete"),
        ("user", HOSTILE, "complete"),
        ("assistant", " é🙂 é🙂", "complete"),
    ]
    assert ["trace" in m for m in document["messages"]] == [False, False, True]
    trace = document["messages"][-1]["trace"]
    assert document["messages"][-1]["id"] == reply
    assert [s["chosen_token"] for s in trace["steps"]] == [" é🙂", " é🙂"]
    assert trace["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": HOSTILE},
    ]


def test_one_message_is_its_trace_object_alone(story: Story) -> None:
    story.say("one")
    first = story.answer(1)
    story.say("two")
    second = story.answer(3)
    whole = story.export()
    assert story.export(first) == whole["messages"][1]["trace"]
    assert story.export(second) == whole["messages"][3]["trace"]
    assert [m["content"] for m in story.export(second)["messages"]] == ["one", " é🙂", "two"]


def test_what_is_not_there_is_said_so(story: Story) -> None:
    question = story.say("one")
    queued = story.queue()
    other = story.writer.create_conversation("another")
    with pytest.raises(NotFound, match="no conversation 99"):
        story.export(conversation=99)
    with pytest.raises(NotFound, match="no conversation 99"):
        story.export(message=1, conversation=99)
    # Unknown, of another conversation, of the user, not begun: none has a trace.
    for message, conversation in ((99, None), (question, other), (question, None), (queued, None)):
        with pytest.raises(NotFound, match=f"no traced message {message}.*oki-trace show"):
            story.export(message, conversation)


def test_an_empty_conversation_is_a_document_too(story: Story) -> None:
    assert story.export()["messages"] == []


def test_a_reply_that_failed_before_it_began_is_exported_with_the_reason(story: Story) -> None:
    story.say("one")
    reply = story.queue()
    story.writer.finish_reply(reply, TurnEnd(Status.FAILED, "", "No such model.", 0.0))
    message = story.export()["messages"][-1]
    assert (message["status"], message["content"]) == ("failed", "")
    assert message["reason"] == "No such model."
    assert "trace" not in message


def test_a_reply_that_failed_halfway_is_exported_as_far_as_it_went(story: Story) -> None:
    story.say("one")
    reply = story.queue()
    story.writer.start_reply(reply, builders.turn_start())
    # The lens of a step trails it: a failure may leave a step without.
    story.writer.append(reply, [builders.step(0, np.random.default_rng(0))])
    story.writer.finish_reply(reply, TurnEnd(Status.FAILED, " the", "Out of memory.", 1.0))
    trace = story.export(reply)
    assert (trace["status"], trace["reason"]) == ("failed", "Out of memory.")
    assert (trace["output"], len(trace["steps"])) == (" the", 1)
    assert trace["steps"][0]["logit_lens"] == []


WRITE_AND_DIE = """
import os, sys
import numpy as np
from oki_trace.records import CapturePolicy, ModelChoice, Sampling
from oki_trace.store.writing.writer import TraceWriter
from tests import builders

writer = TraceWriter(sys.argv[1])
choice = ModelChoice("tiny/model")
reply = writer.queue_reply(int(sys.argv[2]), choice, Sampling(), CapturePolicy(), claim=True)
writer.start_reply(reply, builders.turn_start())
writer.append(reply, [builders.step(i, np.random.default_rng(i)) for i in range(3)])
os._exit(9)
"""


def test_an_interrupted_reply_is_exported_as_far_as_it_went(story: Story) -> None:
    story.say("one")
    done = subprocess.run(
        [sys.executable, "-c", WRITE_AND_DIE, str(story.file), str(story.conversation)],
        check=False,
    )
    assert done.returncode == 9
    message = story.export()["messages"][-1]
    assert (message["status"], message["content"]) == ("interrupted", " the the the")
    assert message["trace"]["status"] == "interrupted"
    assert [s["step"] for s in message["trace"]["steps"]] == [0, 1, 2]


def test_a_reply_that_came_to_nothing_is_not_what_the_next_was_given(story: Story) -> None:
    """The messages of a trace are those the model was given, not all messages before it."""
    story.say("far too long")
    failed = story.queue()
    story.writer.finish_reply(failed, TurnEnd(Status.FAILED, "", "Too long.", 0.0))
    story.say("shorter")
    reply = story.answer()
    document = story.export()
    assert [m["content"] for m in document["messages"]][:3] == ["far too long", "", "shorter"]
    assert story.export(reply)["messages"] == [{"role": "user", "content": "shorter"}]


def test_what_is_not_a_number_is_null(story: Story) -> None:
    story.say("one")
    reply = story.queue()
    story.writer.start_reply(reply, builders.turn_start())
    step = builders.step(0, np.random.default_rng(0), with_lens=True)
    nothing = np.array([math.nan, -math.inf], dtype=np.float32)
    assert step.lens is not None
    broken = replace(
        step,
        logprob=-math.inf,
        entropy=math.nan,
        topk=replace(
            step.topk,
            token_ids=step.topk.token_ids[:2],
            tokens=step.topk.tokens[:2],
            logits=nothing,
            probs=nothing,
            sampled_probs=None,
            noise=nothing,
        ),
        lens=replace(step.lens, entropy=np.full_like(step.lens.entropy, math.nan)),
    )
    story.writer.append(reply, [broken])
    story.writer.finish_reply(reply, TurnEnd(Status.COMPLETE, "", "end of turn", 1.0))
    (exported,) = story.export(reply)["steps"]
    assert (exported["logprob"], exported["entropy"]) == (None, None)
    assert exported["prob"] == step.prob
    missing = [(c["logit"], c["prob"], c["noise"]) for c in exported["logits_topk"]]
    assert missing == [(None, None, None)] * 2
    assert {row["entropy"] for row in exported["logit_lens"]} == {None}


def test_an_export_of_a_reply_under_way_is_of_one_instant(story: Story) -> None:
    """The message and its steps are read in one transaction."""
    story.say("one")
    reply = story.queue()
    story.writer.start_reply(reply, builders.turn_start("none"))
    enough = threading.Event()
    written = 0

    def write() -> None:
        nonlocal written
        rng = np.random.default_rng(0)
        while not enough.is_set():
            step = builders.step(written, rng, with_lens=True, with_tensors=False)
            story.writer.append(reply, [step])
            written += 1

    thread = threading.Thread(target=write)
    thread.start()
    try:
        counts: list[int] = []
        while len(set(counts)) < 10:
            assert thread.is_alive()
            trace = story.export()["messages"][-1].get("trace")
            assert trace["status"] == "running"
            assert trace["output"] == " the" * len(trace["steps"])
            counts.append(len(trace["steps"]))
    finally:
        enough.set()
        thread.join()
    assert counts == sorted(counts) and counts[-1] <= written


# ------------------------------------------------------------------------- files


def test_a_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    path.write_text("old")
    with replacing(path) as file:
        file.write("new é\n")
        file.flush()
        assert path.read_text() == "old", "until all is written"
    assert path.read_bytes() == "new é\n".encode()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [NotFound("gone"), KeyboardInterrupt(), ValueError("bug")])
@pytest.mark.parametrize("before", ["old", None])
def test_an_error_leaves_what_was_there(
    tmp_path: Path, error: BaseException, before: str | None
) -> None:
    path = tmp_path / "out.json"
    if before is not None:
        path.write_text(before)
    with pytest.raises(type(error)), replacing(path) as file:
        file.write("half of it")
        raise error
    assert [p.read_text() for p in tmp_path.iterdir()] == ([] if before is None else [before])


def test_where_nothing_can_be_written_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept").write_text("")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none" / "out", tmp_path / "file" / "out", tmp_path / "folder"):
        error = pytest.raises(ExchangeError, match=r"Cannot write .*: .*\. Choose another --output")
        with error, replacing(path) as file:
            file.write("text")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder", "kept"]
