"""A store with something to see: what a model said, and what seldom happens.

All is written through the public writer, as the command line and the worker do.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from oki_trace import queueing
from oki_trace.generate import generate_reply
from oki_trace.llm.loading.load import load
from oki_trace.records import (
    CapturePolicy,
    ChatMessage,
    ModelChoice,
    Role,
    Sampling,
    Status,
    Step,
    TensorMode,
    TurnEnd,
    TurnStart,
)
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.schema import migrate
from oki_trace.store.writing.writer import TraceWriter
from tests import builders

QUESTIONS = ("What is the capital of France?", "And what river flows through it?")

# Each would do harm, or spoil the page, if it were read as anything but text.
HOSTILE = (
    "<script>window.pwned = 1</script>",
    # Where Markdown is read, each of these is a link without any marks.
    "www.example.test/x https://example.test/y me@example.test",
    '<img src="/x" onerror="window.pwned = 2">',
    ":red[x] :material/delete: **b** $a$ `c` ~s~",
    "![x](http://evil.test/x.png)",
    "[x](javascript:window.pwned=3) <b>b</b>",
    "\u202ethgir ot tfel\u200f",
    "\x1b[31mred\x1b[0m\x07",
)
LONG = "W" * 20_000
# Wherever a title is cut off, it may end in a space.
CUT_AT_A_SPACE = "a " * 60

WORDS = (" the", " cat", " sat")
LINES = ("One", "\n\n", "two")

LENS_REASON = "the final norm was not found"
NO_ATTENTION = "not available: this model has no attention"
FAILURE = "Out of memory while decoding. Shorten the prompt, or load the model in 4-bit."


@dataclass(frozen=True)
class Samples:
    """The store, and by name the conversations in it; a reply is (conversation id, message id)."""

    db: str
    first: tuple[int, int]
    second: tuple[int, int]
    hostile: tuple[int, int]
    long: tuple[int, int]
    bare: tuple[int, int]
    without_tensors: tuple[int, int]
    unknown: tuple[int, int]
    failed: tuple[int, int]
    failed_at_once: tuple[int, int]


def build(db: str, models_dir: Path) -> Samples:
    """Fill the store ``db``; the last conversation in it is the real one."""
    rng = np.random.default_rng(11)
    with TraceWriter(db) as writer, TraceReader(db) as reader:
        bare = _bare(writer, rng)
        without_tensors = _reply(
            writer, "No tensors", builders.turn_start("none"), _steps(rng, LINES, tensors=False)
        )
        first_step, step, last_step = _steps(rng)
        unknown = _reply(
            writer,
            "Not a number",
            builders.turn_start(),
            [first_step, without_numbers(step), last_step],
        )
        failed = _reply(
            writer,
            "Ran out of memory",
            builders.turn_start(),
            _steps(rng),
            TurnEnd(Status.FAILED, "the cat", FAILURE, 0.5),
        )
        request = queueing.ReplyRequest(
            queueing.new_messages("Are you there?"), ModelChoice("no/such")
        )
        failed_at_once = queueing.submit(writer, request, claim=True)
        queueing.fail(writer, failed_at_once[1], "There is no model no/such: check the name.")
        # The list of recent conversations is short, so what it has to stand comes late.
        for text in reversed(HOSTILE[1:]):
            _say(writer, text, text)
        _say(writer, CUT_AT_A_SPACE, "A short message.")
        hostile = _hostile(writer, rng, HOSTILE[0], HOSTILE)
        long = _hostile(writer, rng, LONG, (LONG,))
        first, second = _talk(writer, reader, models_dir)
    return Samples(
        db=db,
        first=first,
        second=second,
        hostile=hostile,
        long=long,
        bare=bare,
        without_tensors=without_tensors,
        unknown=unknown,
        failed=failed,
        failed_at_once=failed_at_once,
    )


def _talk(
    writer: TraceWriter, reader: TraceReader, models_dir: Path
) -> tuple[tuple[int, int], tuple[int, int]]:
    choice = ModelChoice("smollm2", dtype="float32", device="cpu")
    loaded = load(choice, models_dir=models_dir)
    sampling = Sampling(max_new_tokens=30)
    conversation: int | None = None
    replies = []
    for question in QUESTIONS:
        request = queueing.ReplyRequest(queueing.new_messages(question), choice, sampling)
        conversation, reply = queueing.submit(writer, request, conversation, claim=True)
        generate_reply(writer, reader, reader.message(reply), loaded)
        replies.append((conversation, reply))
    return replies[0], replies[1]


def _say(writer: TraceWriter, title: str, *said: str) -> int:
    conversation = writer.create_conversation(title)
    for text in said:
        writer.add_message(conversation, ChatMessage(Role.USER, text))
    return conversation


def _reply(
    writer: TraceWriter,
    title: str,
    start: TurnStart,
    steps: Sequence[Step],
    end: TurnEnd | None = None,
    said: Sequence[str] = ("Say something.",),
) -> tuple[int, int]:
    conversation = _say(writer, title, *said)
    policy = start.capture.policy
    reply = writer.queue_reply(
        conversation, ModelChoice(start.model_id), Sampling(), policy, claim=True
    )
    writer.start_reply(reply, start)
    writer.append(reply, steps)
    output = "".join(step.token for step in steps)
    writer.finish_reply(reply, end or TurnEnd(Status.COMPLETE, output, "end of turn", 1.0))
    return conversation, reply


def _steps(
    rng: np.random.Generator, words: Sequence[str] = WORDS, *, tensors: bool = True
) -> list[Step]:
    return [
        builders.step(i, rng, token=word, with_lens=True, with_tensors=tensors)
        for i, word in enumerate(words)
    ]


def without_numbers(step: Step) -> Step:
    """``step`` with the numbers that an import may lack, or that overflowed."""
    assert step.lens is not None
    lens, topk, nan = step.lens, step.topk, float("nan")
    return replace(
        step,
        logit=nan,
        prob=nan,
        logprob=nan,
        entropy=nan,
        margin=nan,
        topk=replace(topk, logits=topk.logits * nan, probs=topk.probs * nan),
        attention=tuple(replace(one, weights=one.weights * nan) for one in step.attention),
        lens=replace(
            lens,
            logits=lens.logits * nan,
            probs=lens.probs * nan,
            entropy=lens.entropy * nan,
            chosen_prob=lens.chosen_prob * nan,
            kl=lens.kl * nan,
        ),
    )


def _bare(writer: TraceWriter, rng: np.random.Generator) -> tuple[int, int]:
    """A model of which only the logits can be seen."""
    tensors: TensorMode = "none"
    report = replace(
        builders.report(tensors),
        policy=CapturePolicy(tensors=tensors),
        attention_layers=(),
        attention_check=None,
        evidence_provenance=NO_ATTENTION,
        logit_lens_available=False,
        lens_reason=LENS_REASON,
        lens_check=None,
    )
    steps = [replace(step, attention=(), tensors=(), lens=None) for step in _steps(rng)]
    return _reply(writer, "A bare model", replace(builders.turn_start(), capture=report), steps)


def _hostile(
    writer: TraceWriter, rng: np.random.Generator, title: str, texts: Sequence[str]
) -> tuple[int, int]:
    """``texts`` as messages, as the prompt's tokens, as the reply's, and as all it considered."""
    prompt = replace(builders.prompt(len(texts)), text="".join(texts), tokens=tuple(texts))
    steps = []
    for index, text in enumerate((*texts, " end")):
        step = builders.step(
            index, rng, prompt_len=len(texts), token=text, topk=len(texts) + 1, with_lens=True
        )
        assert step.lens is not None
        lens = replace(step.lens, tokens=tuple((text, *row[1:]) for row in step.lens.tokens))
        steps.append(replace(step, topk=replace(step.topk, tokens=(*texts, text)), lens=lens))
    start = replace(builders.turn_start(), prompt=prompt, model_id=f"www.example.test/{title[:40]}")
    return _reply(writer, title, start, steps, said=texts)


# Files that are no store of ours; each returns what is to be said of it.


def strangers(path: Path) -> str:
    path.write_text("Dear diary", encoding="utf-8")
    return "is not an oki-trace store"


def newer(path: Path) -> str:
    migrate.ensure(str(path))
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")
    return "was written by a newer oki-trace"


def another_database(path: Path) -> str:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE notes (text)")
    return "is not an oki-trace store"
