"""A store that keeps its promises is told so; each broken promise is found and named."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import delete, update

from oki_trace.errors import NotFound
from oki_trace.records import ChatMessage, Role, Status, TensorMode, TurnEnd
from oki_trace.store.maintenance import verify
from oki_trace.store.maintenance.prune import prune_tensors
from oki_trace.store.maintenance.verify import Verification
from oki_trace.store.reading.connection import ReadConnection
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.schema import models
from oki_trace.store.writing.writer import TraceWriter
from tests import builders
from tests.store.stores import Store

DONE = TurnEnd(Status.COMPLETE, " the end", "end of sequence", 1.5)
STEPS = 20


def told(store: Store, tensors: TensorMode = "half", *, end: bool = True) -> tuple[int, int]:
    """(conversation, reply) that keep every promise."""
    conversation, message = store.reply(tensors)
    rng = np.random.default_rng(5)
    store.writer.append(message, [builders.coherent_step(i, rng) for i in range(STEPS)])
    if end:
        store.writer.finish_reply(message, DONE)
    store.writer.add_message(conversation, ChatMessage(Role.USER, "and then?"))
    return conversation, message


def found(store: Store, conversation: int | None = None) -> list[str]:
    return [str(finding) for finding in Verification(store.reader, conversation)]


@pytest.mark.parametrize("tensors", ["exact", "half", "compact", "none"])
@pytest.mark.parametrize("end", [True, False])
def test_nothing_is_found_in_a_good_store(store: Store, tensors: TensorMode, end: bool) -> None:
    conversation, _ = told(store, tensors, end=end)
    seen: list[tuple[int, int]] = []
    check = Verification(store.reader, progress=lambda done, total: seen.append((done, total)))
    assert list(check) == []
    assert (check.messages, check.steps) == (2, STEPS)
    assert check.tensors == (0 if tensors == "none" else 3 * STEPS)
    assert seen[-1] == (STEPS, STEPS)
    assert found(store, conversation) == []


def test_pruned_and_interrupted_replies_are_no_fault(store: Store) -> None:
    _, message = told(store)
    prune_tensors(store.writer, message)
    _, cut = store.reply("half")
    rng = np.random.default_rng(1)
    # Killed before the lens of the last step was written.
    last = replace(builders.coherent_step(1, rng), lens=None)
    store.writer.append(cut, [builders.coherent_step(0, rng), last])
    store.writer.finish_reply(cut, TurnEnd(Status.INTERRUPTED, "", "killed", 1.0))
    store.reply("half", begin=False)
    assert found(store) == []


def test_what_is_not_there_is_not_verified(store: Store) -> None:
    with pytest.raises(NotFound):
        Verification(store.reader, 9)


def of(model: type[models.Base], **values: object) -> Callable[[Store, int], None]:
    """Change these columns of all rows of one step."""

    def change(store: Store, step: int) -> None:
        key = "id" if model is models.Step else "step_id"
        with store.writer.write() as connection:
            table = model.__table__
            connection.execute(update(table).where(table.c[key] == step).values(**values))

    return change


def without(model: type[models.Base], **where: object) -> Callable[[Store, int], None]:
    """Delete the rows of one step that have these values."""

    def change(store: Store, step: int) -> None:
        with store.writer.write() as connection:
            table = model.__table__
            these = [table.c[name] == value for name, value in where.items()]
            key = "id" if model is models.Step else "step_id"
            connection.execute(delete(table).where(table.c[key] == step, *these))

    return change


@pytest.fixture
def good_file(file: Path) -> Iterator[Store]:
    with TraceWriter(file) as writer, TraceReader(file) as reader:
        yield Store(str(file), writer, reader)


def test_a_changed_blob_is_found(store: Store) -> None:
    _, message = told(store)
    of(models.Tensor, data=b"x")(store, store.reader.steps(message)[3].id)
    assert sum("is damaged (checksum" in line for line in found(store)) == 3


BROKEN = [
    (of(models.Step, position=90), "it is at position 90"),
    (of(models.Step, prob=0.9), "its probability"),
    (of(models.Step, entropy=9.0), "its entropy"),
    (of(models.Step, token_id=77), "its token is 77"),
    (of(models.Step, token_id=3), "its logits give"),
    (of(models.Step, rank=1), "rank 1 is not the token"),
    (of(models.Step, settle_layer=1), "its lens does not settle at layer 1"),
    (of(models.Step, tensor_bytes=5), "bytes instead of 5"),
    (without(models.Step), "step 7 is missing before it"),
    (without(models.TopkEntry), "it has no candidates"),
    (without(models.TopkEntry, rank=1), "ranks 2 to 10, 9 in all"),
    (without(models.TopkEntry, rank=4), "ranks 1 to 10, 9 in all"),
    (of(models.TopkEntry, logit=1.5), "are not those of the full logits"),
    (without(models.AttentionLayer, layer=2), "of layers 1, 3 instead of 1, 2, 3"),
    (without(models.AttentionEntry, layer=2, rank=1), "attention rows of layer 2 have ranks 2 to"),
    (of(models.AttentionEntry, position=60), "impossible positions"),
    (of(models.AttentionEntry, weight=0.21), "is not the mean of its heads"),
    (of(models.AttentionLayer, missing=0.3), "its missing share add up to 1.3"),
    (without(models.LensLayer), "its lens is missing"),
    (without(models.LensLayer, layer=3), "its rows do not fit together"),
    (of(models.LensEntry, logit=1.0), "is not the model's own distribution"),
    (of(models.LensLayer, chosen_prob=0.2), "gives its token another probability"),
    (of(models.LensLayer, chosen_rank=4), "its token at rank 4"),
    (without(models.Tensor), "it has no attentions and no logits"),
    (without(models.Tensor, name="logits"), "it has no logits"),
    (of(models.Tensor, data=b"changed"), "is damaged (checksum"),
    (of(models.Tensor, shape=[1, 2]), "is damaged (checksum"),
]


@pytest.mark.parametrize(("change", "what"), BROKEN, ids=[what for _, what in BROKEN])
def test_a_broken_promise_is_found_and_named(
    good_file: Store, change: Callable[[Store, int], None], what: str
) -> None:
    store = good_file
    good, _ = told(store)
    conversation, message = told(store)
    index = 7
    change(store, store.reader.steps(message)[index].id)
    lines = found(store)
    assert any(what in line for line in lines), lines
    where = f"conversation {conversation}, message {message}, step "
    if len(store.reader.steps(message)) < STEPS:
        whole = lines.pop(0)
        assert "list of steps is not what was recorded" in whole
    assert all(line.startswith(where) for line in lines), lines
    assert {line.removeprefix(where).partition(":")[0] for line in lines} <= {"7", "8"}
    assert found(store, good) == []
    assert found(store, conversation)[-len(lines) :] == lines


def test_a_changed_prompt_or_order_is_found(store: Store) -> None:
    conversation, message = told(store)
    with store.writer.write() as connection:
        connection.execute(delete(models.PromptToken).where(models.PromptToken.position == 0))
        connection.execute(
            update(models.Message).where(models.Message.id != message).values(position=4)
        )
    where = f"conversation {conversation}, message {message}:"
    assert found(store) == [
        f"{where} its text, settings, prompt or list of steps is not what was recorded (the "
        "digest differs)",
        f"{where} the tokens of its prompt are at 1 to 5",
        f"{where} its prompt has 5 tokens instead of 6",
        f"conversation {conversation}, message {message + 1}: it is at position 4 instead of 1",
    ]


def test_an_orphan_is_found(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with TraceWriter(file) as writer, TraceReader(file) as reader:
        told(Store(str(file), writer, reader))
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("DELETE FROM conversation")
        connection.commit()
    with TraceReader(file) as reader:
        assert "store: a row of message belongs to a row of conversation that is missing" in [
            str(finding) for finding in Verification(reader)
        ]


def test_a_damaged_file_is_found(file: Path) -> None:
    with TraceWriter(file) as writer, TraceReader(file) as reader:
        for _ in range(3):
            told(Store(str(file), writer, reader))
    content = bytearray(file.read_bytes())
    middle = len(content) // 2 // 4096 * 4096
    content[middle : middle + 20 * 4096] = bytes(20 * 4096)
    file.write_bytes(content)
    with TraceReader(file) as reader:
        lines = [str(finding) for finding in Verification(reader)]
    assert any("the file is damaged" in line for line in lines), lines


def test_a_few_steps_are_in_memory_at_a_time(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    told(store)
    monkeypatch.setattr(verify, "_BATCH", 3)
    most = 0
    rows = ReadConnection.rows

    def counting(reader: ReadConnection, query: object) -> object:
        nonlocal most
        result = rows(reader, query)  # type: ignore[arg-type]
        most = max(most, len(result))
        return result

    monkeypatch.setattr(ReadConnection, "rows", counting)
    assert found(store) == []
    assert most <= 3 * 4, "a lens has four layers"
