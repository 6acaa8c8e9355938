"""Steps of given tokens: addressed by position, apart from the generated ones."""

from __future__ import annotations

import dataclasses
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import create_engine, text

from oki_trace.errors import NotFound, StoreError
from oki_trace.records import (
    CapturePolicy,
    ChatMessage,
    ModelChoice,
    Role,
    Sampling,
    Status,
    Step,
    TurnEnd,
)
from oki_trace.store.maintenance.prune import prune_tensors
from oki_trace.store.maintenance.verify import Verification
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.schema import identity, migrate
from oki_trace.store.writing.copy import copy
from oki_trace.store.writing.recorder import Recorder
from oki_trace.store.writing.writer import TraceWriter
from tests import builders
from tests.store.stores import DONE, Store, assert_same, plain


def given_step(position: int, rng: np.random.Generator, *, with_lens: bool = True) -> Step:
    """A step of the token at ``position`` of a prompt."""
    step = builders.step(0, rng, prompt_len=position, with_lens=False)
    lens = dataclasses.replace(builders.lens(0, rng), step_index=-1) if with_lens else None
    return dataclasses.replace(
        step, step_index=-1, origin="given", sampled_prob=None, decision=None, lens=lens
    )


def test_given_steps_read_back_by_position(store: Store, rng: np.random.Generator) -> None:
    _, message = store.reply("exact")
    given = [given_step(position, rng, with_lens=position != 2) for position in range(1, 6)]
    generated = [builders.step(index, rng, with_lens=True) for index in range(3)]
    store.writer.append(message, given[:2])
    store.writer.append(message, [given[2], generated[0], *given[3:]])
    store.writer.append(message, generated[1:])
    for step in given:
        assert_same(store.reader.step(message, step.position, given=True), step)
        for tensor in step.tensors:
            stored = store.reader.tensor(message, step.position, tensor.name, given=True)
            assert plain(stored) == plain(tensor)
    summaries = store.reader.steps(message, given=True)
    assert [(s.position, s.step_index, s.origin) for s in summaries] == [
        (position, -1, "given") for position in range(1, 6)
    ]
    # The generated ones are as if there were no others.
    assert [s.step_index for s in store.reader.steps(message)] == [0, 1, 2]
    assert [s.step_index for s in store.reader.iter_steps(message)] == [0, 1, 2]
    assert store.reader.message(message).tokens == 3
    store.writer.finish_reply(message, DONE)
    assert store.reader.message(message).content == DONE.output


def test_many_given_steps_are_read_in_order(store: Store, rng: np.random.Generator) -> None:
    _, message = store.reply("none")
    order = list(range(1, 200))
    rng.shuffle(order)
    store.writer.append(message, [given_step(position, rng) for position in order])
    positions = [step.position for step in store.reader.iter_steps(message, given=True)]
    assert positions == list(range(1, 200))
    some = store.reader.iter_steps(message, 50, 130, given=True)
    assert [step.position for step in some] == list(range(50, 130))


def test_a_position_has_one_step(store: Store, rng: np.random.Generator) -> None:
    _, message = store.reply("none")
    store.writer.append(message, [given_step(3, rng)])
    with pytest.raises(StoreError):
        store.writer.append(message, [given_step(3, rng)])
    assert len(store.reader.steps(message, given=True)) == 1


def test_what_was_not_traced_is_named(store: Store, rng: np.random.Generator) -> None:
    _, message = store.reply("none")
    store.writer.append(message, [given_step(3, rng)])
    with pytest.raises(NotFound, match="no step for the given token at position 4"):
        store.reader.step(message, 4, given=True)
    with pytest.raises(NotFound, match=r"The given token at position 3 .* has no tensor logits"):
        store.reader.tensor(message, 3, "logits", given=True)
    with pytest.raises(NotFound, match="no step 3"):
        store.reader.step(message, 3)


def test_a_recorder_takes_both_kinds(file: Path, rng: np.random.Generator) -> None:
    with TraceWriter(file) as writer, TraceReader(file) as reader:
        conversation = writer.create_conversation("x")
        request = (ModelChoice("m"), Sampling(), CapturePolicy())
        message = writer.queue_reply(conversation, *request, claim=True)
        recorder = Recorder(writer, message, maxsize=2)
        recorder.start(builders.turn_start())
        for position in range(1, 6):
            recorder.step(given_step(position, rng))
        recorder.step(builders.step(0, rng))
        recorder.lens(builders.lens(0, rng))
        recorder.end(DONE)
        assert len(reader.steps(message, given=True)) == 5
        assert reader.step(message, 0).lens is not None


def test_the_text_of_a_killed_reply_leaves_the_prompt_out(
    store: Store, rng: np.random.Generator
) -> None:
    _, message = store.reply("none")
    store.writer.append(message, [given_step(position, rng) for position in range(1, 6)])
    store.writer.append(message, [builders.step(0, rng, token=" the")])
    store.writer.end_abandoned(message, Status.STOPPED, "killed")
    assert store.reader.message(message).content == " the"


# --------------------------------------------------------- the prompt of a second turn


def turn(
    store: Store,
    conversation: int,
    tokens: list[int],
    reply: list[int],
    rng: np.random.Generator,
    *,
    level: str | None = "light",
    first: int = 1,
    model: str = "tiny/model",
) -> int:
    """A finished reply to a prompt of these tokens, traced from position ``first`` on."""
    policy = CapturePolicy(tensors="none", trace_prompt=level)  # type: ignore[arg-type]
    store.writer.add_message(conversation, ChatMessage(Role.USER, "and?"))
    message = store.writer.queue_reply(
        conversation, ModelChoice(model), Sampling(), policy, claim=True
    )
    start = builders.turn_start("none", len(tokens))
    prompt = dataclasses.replace(start.prompt, token_ids=tuple(tokens))
    store.writer.start_reply(message, dataclasses.replace(start, model_id=model, prompt=prompt))
    if level is not None:
        steps = [given_step(position, rng) for position in range(first, len(tokens))]
        steps = [dataclasses.replace(s, token_id=tokens[s.position], tensors=()) for s in steps]
        store.writer.append(message, steps)
    for index, token in enumerate(reply):
        step = builders.step(index, rng, prompt_len=len(tokens), with_tensors=False)
        store.writer.append(message, [dataclasses.replace(step, token_id=token)])
    store.writer.finish_reply(message, TurnEnd(Status.COMPLETE, "x", "token limit", 1.0))
    return message


def test_a_prompt_is_made_of_the_steps_of_all_turns(store: Store, rng: np.random.Generator) -> None:
    conversation = store.writer.create_conversation("turns")
    first = turn(store, conversation, [1, 2, 3], [4, 5], rng)
    second_prompt = [1, 2, 3, 4, 5, 6, 7]
    waiting = dataclasses.replace(store.reader.message(first), position=99, id=0)
    assert store.reader.traced_prefix(waiting, second_prompt) == (first, 5)
    second = turn(store, conversation, second_prompt, [8], rng, first=5)
    third_prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    third = turn(store, conversation, third_prompt, [10], rng, first=8)
    steps = store.reader.prompt_steps(third)
    assert [step.message_id for step in steps.values()] == [first] * 4 + [second] * 3 + [third]
    assert list(steps) == list(range(1, 9))
    assert [step.step.token_id for step in steps.values()] == third_prompt[1:]


def test_steps_of_another_model_or_a_lighter_trace_are_not_taken(
    store: Store, rng: np.random.Generator
) -> None:
    conversation = store.writer.create_conversation("turns")
    untraced = turn(store, conversation, [1, 2, 3], [4], rng, level=None)
    assert store.reader.prompt_steps(untraced) == {}
    light = turn(store, conversation, [1, 2, 3], [4], rng)
    other = turn(store, conversation, [1, 2, 3, 4, 9], [5], rng, model="other/model")
    assert {step.message_id for step in store.reader.prompt_steps(other).values()} == {other}
    full = turn(store, conversation, [1, 2, 3, 4, 9], [5], rng, level="full")
    assert {step.message_id for step in store.reader.prompt_steps(full).values()} == {full}
    again = turn(store, conversation, [1, 2, 3, 4, 9, 9], [5], rng, first=5)
    owners = [step.message_id for step in store.reader.prompt_steps(again).values()]
    assert owners == [full] * 4 + [again] and light not in owners


def test_a_trace_that_was_stopped_stands_for_no_more_than_it_has(
    store: Store, rng: np.random.Generator
) -> None:
    conversation = store.writer.create_conversation("turns")
    stopped = turn(store, conversation, [1, 2, 3, 4, 5], [6], rng, level=None)
    policy = CapturePolicy(tensors="none", trace_prompt="light")
    request = (ModelChoice("tiny/model"), Sampling(), policy)
    message = store.writer.queue_reply(conversation, *request, claim=True)
    start = builders.turn_start("none", 5)
    prompt = dataclasses.replace(start.prompt, token_ids=(1, 2, 3, 4, 5))
    store.writer.start_reply(message, dataclasses.replace(start, prompt=prompt))
    store.writer.append(message, [given_step(1, rng), given_step(2, rng)])
    store.writer.end_abandoned(message, Status.INTERRUPTED, "killed")
    waiting = dataclasses.replace(store.reader.message(message), position=99, id=0)
    assert store.reader.traced_prefix(waiting, [1, 2, 3, 4, 5, 6]) == (message, 3)
    assert store.reader.prompt_steps(stopped) == {}


# ------------------------------------------------------------- maintenance, old stores


def coherent(store: Store, rng: np.random.Generator) -> int:
    """A finished reply with five given steps and two generated ones, all tensors kept."""
    conversation = store.writer.create_conversation("whole")
    policy = CapturePolicy(tensors="exact", trace_prompt="full")
    request = (ModelChoice("tiny/model"), Sampling(), policy)
    message = store.writer.queue_reply(conversation, *request, claim=True)
    start = builders.turn_start("exact")
    capture = dataclasses.replace(start.capture, policy=policy)
    store.writer.start_reply(message, dataclasses.replace(start, capture=capture))
    for position in range(1, 6):
        step = builders.coherent_step(0, rng, prompt_len=position)
        lens = step.lens and dataclasses.replace(step.lens, step_index=-1)
        given = {"step_index": -1, "origin": "given", "sampled_prob": None, "decision": None}
        store.writer.append(message, [dataclasses.replace(step, lens=lens, **given)])
    store.writer.append(message, [builders.coherent_step(index, rng) for index in range(2)])
    store.writer.finish_reply(message, DONE)
    return message


def test_verify_checks_given_steps(store: Store, rng: np.random.Generator) -> None:
    coherent(store, rng)
    check = Verification(store.reader)
    assert [str(finding) for finding in check] == []
    assert (check.steps, check.tensors) == (7, 21)


@pytest.mark.parametrize(
    ("statement", "problem"),
    [
        ("UPDATE step SET prob = 0.5 WHERE position = 3", "position 3: "),
        ("UPDATE step SET origin = 'sampled' WHERE position = 3", "its origin is sampled"),
        ("DELETE FROM step WHERE position = 3", "list of steps"),
    ],
)
def test_a_change_of_a_given_step_is_found(
    file: Path, rng: np.random.Generator, statement: str, problem: str
) -> None:
    with TraceWriter(file) as writer, TraceReader(file) as reader:
        coherent(Store(str(file), writer, reader), rng)
        with closing(sqlite3.connect(file)) as connection, connection:
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute(statement)
        assert any(problem in str(finding) for finding in Verification(reader))


def test_pruning_removes_the_tensors_of_given_steps_too(
    store: Store, rng: np.random.Generator
) -> None:
    message = coherent(store, rng)
    assert prune_tensors(store.writer, message) > 0
    assert store.reader.message_bytes(message) == 0
    assert store.reader.tensor_names(message, 3, given=True) == []
    assert [str(finding) for finding in Verification(store.reader)] == []


def test_a_copy_has_the_given_steps(store: Store, file: Path, rng: np.random.Generator) -> None:
    message = coherent(store, rng)
    target = file.with_name("target.db")
    (made,) = copy(store.db, target)
    assert made.new_id is not None
    with TraceReader(target) as copied:
        (new,) = copied.messages(made.new_id)
        for position in range(1, 6):
            one, other = (
                reader.step(number, position, given=True)
                for reader, number in ((store.reader, message), (copied, new.id))
            )
            assert plain(one) == plain(other)
        assert [str(finding) for finding in Verification(copied)] == []
        assert new.digest == store.reader.message(message).digest


def test_a_copied_score_names_the_copy_of_its_reply(
    store: Store, file: Path, rng: np.random.Generator
) -> None:
    first = coherent(store, rng)
    reply = coherent(store, rng)
    conversation = store.writer.create_conversation("score")
    request = (ModelChoice("tiny/model"), Sampling(), CapturePolicy())
    score = store.writer.queue_reply(conversation, *request, claim=True, score_of=reply)
    store.writer.finish_reply(score, DONE)
    whole, alone = file.with_name("whole.db"), file.with_name("alone.db")
    numbers = [store.reader.message(m).conversation_id for m in (reply, score)]
    assert first < reply
    made = [copied.new_id for copied in copy(store.db, whole, numbers)]
    (only,) = [copied.new_id for copied in copy(store.db, alone, numbers[1:])]
    with TraceReader(whole) as reader:
        (copied_reply,), (copied_score,) = (reader.messages(number or 0) for number in made)
        assert copied_score.score_of == copied_reply.id != reply
    with TraceReader(alone) as reader:
        assert reader.messages(only or 0)[0].score_of is None


def test_a_downgrade_drops_them_and_keeps_the_rest(db: str, rng: np.random.Generator) -> None:
    with TraceWriter(db) as writer, TraceReader(db) as reader:
        coherent(Store(db, writer, reader), rng)
    migrate.downgrade(db, identity.HISTORY[1])
    engine = create_engine(db if "://" in db else f"sqlite:///{db}")
    if db.startswith("postgresql"):
        engine = create_engine(db.replace("postgresql://", "postgresql+psycopg://"))
    with engine.connect() as connection:
        steps = connection.execute(text("SELECT step_index FROM step ORDER BY 1")).scalars().all()
        orphans = connection.execute(
            text("SELECT count(*) FROM tensor WHERE step_id NOT IN (SELECT id FROM step)")
        ).scalar()
    engine.dispose()
    assert steps == [0, 1] and orphans == 0
    migrate.upgrade(db)
    with TraceReader(db) as reader:
        assert [step.origin for step in reader.steps(1)] == ["sampled", "sampled"]


def test_ids_of_steps_are_not_used_again_after_the_upgrade(
    file: Path, rng: np.random.Generator
) -> None:
    with TraceWriter(file) as writer, TraceReader(file) as reader:
        store = Store(str(file), writer, reader)
        coherent(store, rng)
        last = store.reader.steps(1)[-1].id
        writer.delete_conversation(1)
    migrate.downgrade(str(file), identity.HISTORY[1])
    with TraceWriter(file) as writer, TraceReader(file) as reader:
        message = coherent(Store(str(file), writer, reader), rng)
        assert min(step.id for step in reader.steps(message, given=True)) > last
