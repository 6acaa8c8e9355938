"""Readings by installed lenses: written, read, added later, checked, copied, and removed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import delete, inspect, select, update

from oki_trace.errors import DamagedSteps, NotFound, StoreError, UsageError
from oki_trace.records import LOGIT, CapturePolicy, Lens, Step
from oki_trace.store.maintenance.prune import prune_tensors
from oki_trace.store.maintenance.verify import Verification
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.schema import migrate, models
from oki_trace.store.writing.copy import Fate, copy
from oki_trace.store.writing.readings import ReadingWriter
from oki_trace.store.writing.writer import TraceWriter
from tests import builders
from tests.store.stores import DONE, Store, assert_same, plain

STEPS = 4
LENSES = ("jlens", "tuned-1.0")


def steps(rng: np.random.Generator, count: int = STEPS) -> list[Step]:
    return [builders.read_by(builders.coherent_step(i, rng), rng) for i in range(count)]


def told(store: Store, written: list[Step], lenses: tuple[str, ...] = LENSES) -> int:
    """A finished reply whose policy names these lenses."""
    _, message = store.reply("half", begin=False)
    start = builders.turn_start("half")
    policy = CapturePolicy(tensors="half", lenses=lenses)
    store.writer.start_reply(message, replace(start, capture=replace(start.capture, policy=policy)))
    store.writer.append(message, written)
    store.writer.finish_reply(message, DONE)
    return message


def findings(store: Store) -> list[str]:
    return [str(finding) for finding in Verification(store.reader)]


def test_readings_and_experts_come_back_as_written(store: Store, rng: np.random.Generator) -> None:
    written = steps(rng)
    message = told(store, written)
    for step in written:
        assert_same(store.reader.step(message, step.step_index), step)
    assert store.reader.lens_names(message) == (LOGIT, *LENSES)
    assert store.reader.message(message).capture.policy.lenses == LENSES  # type: ignore[union-attr]
    assert findings(store) == []


def test_lenses_that_follow_their_steps_are_sorted_by_name(
    store: Store, rng: np.random.Generator
) -> None:
    written = steps(rng, 2)
    _, message = store.reply("half")
    store.writer.append(message, [replace(step, lens=None, lenses=()) for step in written])
    # The reading comes before the Logit Lens, and one of each step at a time.
    for lens in (written[0].lenses[1], written[1].lens, written[1].lenses[0], written[0].lens):
        assert lens is not None
        store.writer.append(message, [], [lens])
    first, second = store.reader.iter_steps(message)
    assert_same(first, replace(written[0], lenses=written[0].lenses[1:]))
    assert_same(second, replace(written[1], lenses=written[1].lenses[:1]))
    assert [step.settle_layer for step in store.reader.steps(message)] == [
        step.lens.settle_layer for step in written if step.lens
    ]
    store.writer.finish_reply(message, DONE)
    assert findings(store) == []


def test_the_readings_of_given_tokens_are_stored_with_them(
    store: Store, rng: np.random.Generator
) -> None:
    _, message = store.reply("exact")
    given = builders.given_step(3, rng)
    assert given.lens is not None
    reading = builders.reading("jlens", given.lens, rng, (2, 3))
    store.writer.append(message, [replace(given, lenses=(reading,))])
    (found,) = store.reader.iter_steps(message, given=True)
    assert plain(found.lenses) == plain((reading,))


def test_a_lens_is_applied_to_a_reply_that_has_ended(
    store: Store, rng: np.random.Generator
) -> None:
    written = [replace(step, lenses=()) for step in steps(rng)]
    message = told(store, written, lenses=())
    digest, before = store.reader.message(message).digest, store.reader.version()
    unread = list(store.reader.unread_steps(message, "jlens"))
    assert [(one.step_index, one.position) for one in unread] == [(i, 6 + i) for i in range(STEPS)]
    assert [one.token_id for one in unread] == [step.token_id for step in written]
    readings = ReadingWriter(store.writer)
    for one in unread[:3]:
        readings.add(one.id, reading(written[one.step_index], rng))
    assert [one.step_index for one in store.reader.unread_steps(message, "jlens")] == [3]
    assert len(list(store.reader.unread_steps(message, "other"))) == STEPS
    # Once more, with other numbers: the reading is replaced as a whole.
    again = replace(reading(written[0], rng), layers=None)
    assert again.layers is None
    whole = builders.reading("jlens", written[0].lens, rng)  # type: ignore[arg-type]
    readings.add(unread[0].id, whole)
    assert plain(store.reader.step(message, 0).lenses) == plain((whole,))
    after = store.reader.message(message)
    assert (after.digest, after.readings) == (digest, 4)
    assert store.reader.version() == before + 4
    assert findings(store) == []
    prune_tensors(store.writer, message)
    assert len(store.reader.step(message, 1).lenses) == 1
    assert list(store.reader.unread_steps(message, "jlens")) == []
    assert findings(store) == []
    readings.remove(message, "jlens")
    assert store.reader.lens_names(message) == (LOGIT,)
    readings.remove(message, "jlens")
    assert store.reader.message(message).readings == 5


def reading(step: Step, rng: np.random.Generator) -> Lens:
    assert step.lens is not None
    return builders.reading("jlens", step.lens, rng, (1, 3))


def test_what_cannot_be_applied(store: Store, rng: np.random.Generator) -> None:
    _, message = store.reply("exact")
    (written,) = steps(rng, 1)
    store.writer.append(message, [replace(written, lenses=())])
    (unread,) = store.reader.unread_steps(message, "jlens")
    readings = ReadingWriter(store.writer)
    with pytest.raises(StoreError, match="is being generated"):
        readings.add(unread.id, reading(written, rng))
    store.writer.finish_reply(message, DONE)
    with pytest.raises(NotFound, match="has been deleted"):
        readings.add(unread.id + 9, reading(written, rng))
    with pytest.raises(UsageError, match="not called logit"):
        readings.add(unread.id, replace(reading(written, rng), name=LOGIT))
    with pytest.raises(UsageError, match="not called logit"):
        readings.remove(message, LOGIT)
    assert store.reader.step(message, 0).lenses == ()
    assert store.reader.step(message, 0).lens is not None


def test_the_grid_of_a_lens_has_its_layers(store: Store, rng: np.random.Generator) -> None:
    written = steps(rng)
    message = told(store, written)
    own = store.reader.lens_grid(message)
    assert own.layers is not None and own.layers.tolist() == [0, 1, 2, 3]
    grid = store.reader.lens_grid(message, lens="jlens")
    assert grid.layers is not None and grid.layers.tolist() == [1, 3]
    assert grid.step_index.tolist() == [0, 1, 2, 3]
    for place, step in enumerate(written):
        np.testing.assert_array_equal(grid.kl[place], step.lenses[0].kl)
        np.testing.assert_array_equal(grid.top_id[place], step.lenses[0].token_ids[:, 0])
        assert step.lens is not None
        np.testing.assert_array_equal(own.kl[place], step.lens.kl)
    assert store.reader.lens_grid(message, lens="other").step_index.size == 0
    with store.writer.write() as connection:
        step_id = store.reader.step_ids(message, 0)[2]
        for table in (models.LensLayer.__table__, models.LensEntry.__table__):
            moved = (table.c.step_id == step_id, table.c.lens == "jlens", table.c.layer == 1)
            connection.execute(update(table).where(*moved).values(layer=2))
    with pytest.raises(DamagedSteps, match="different layers"):
        store.reader.lens_grid(message, lens="jlens")


def test_a_conversation_is_copied_with_its_readings(
    store: Store, rng: np.random.Generator, tmp_path: Path
) -> None:
    written = steps(rng)
    message = told(store, written)
    target = str(tmp_path / "target.db")
    assert [done.fate for done in copy(store.db, target)] == [Fate.COPIED]
    with TraceReader(target) as reader:
        for step in written:
            assert_same(reader.step(message, step.step_index), step)
        assert list(Verification(reader)) == []
    assert [done.fate for done in copy(store.db, target)] == [Fate.THERE]
    step_id = store.reader.step_ids(message, 0)[0]
    other = builders.reading("other", written[0].lens, rng)  # type: ignore[arg-type]
    ReadingWriter(store.writer).add(step_id, other)
    assert [done.fate for done in copy(store.db, target)] == [Fate.CHANGED]


# (columns that change, in which rows of the lens tuned-1.0, the problem that verify names)
CHANGES: list[tuple[str, dict[str, object], dict[str, object], str]] = [
    ("lens_layer", {"kl": 0.5}, {"layer": 3}, "tuned-1.0 is 0.5 nats from the model's own"),
    ("lens_layer", {"chosen_rank": 5}, {"layer": 3}, "last layer has its token at rank 5"),
    ("lens_layer", {"chosen_prob": 0.9}, {"layer": 3}, "gives its token another probability"),
    ("lens_entry", {"logit": 9.0}, {"layer": 3, "rank": 1}, "is not the model's own distribution"),
    ("lens_layer", {"chosen_prob": 1.5}, {"layer": 1}, "at layer 1 is no distribution"),
    ("lens_layer", {"chosen_prob": 0.9}, {"layer": 1}, "at layer 1 is no distribution"),
    ("lens_layer", {"entropy": -1.0}, {"layer": 0}, "at layer 0 is no distribution"),
    ("lens_layer", {"kl": -1.0}, {"layer": 2}, "at layer 2 is no distribution"),
    ("lens_entry", {"prob": 0.99}, {"layer": 2, "rank": 5}, "at layer 2 is no distribution"),
    ("lens_entry", {"token_id": 7}, {"layer": 2}, "at layer 2 is no distribution"),
    ("lens_entry", {"rank": 9}, {"layer": 2, "rank": 5}, "of layer 2 of the lens tuned-1.0 have"),
    ("lens_layer", {"layer": 9}, {"layer": 3}, "of the lens tuned-1.0, which it does not have"),
    ("lens_layer", {"lens": "Tuned"}, {}, "reading by tuned-1.0 is missing"),
]


@pytest.mark.parametrize(("table", "values", "where", "problem"), CHANGES, ids=str)
def test_a_change_of_a_reading_is_found(
    store: Store,
    rng: np.random.Generator,
    table: str,
    values: dict[str, object],
    where: dict[str, object],
    problem: str,
) -> None:
    message = told(store, steps(rng, 2))
    step_id = store.reader.step_ids(message, 0)[1]
    rows = models.Base.metadata.tables[table]
    own = {"step_id": step_id, "lens": "tuned-1.0", **where}
    conditions = [rows.c[name] == value for name, value in own.items()]
    with store.writer.write() as connection:
        assert connection.execute(update(rows).where(*conditions).values(**values)).rowcount
    lines = findings(store)
    assert any(problem in line for line in lines), lines
    assert all("step 1:" in line for line in lines), lines


def test_a_reading_that_the_policy_names_must_be_there(
    store: Store, rng: np.random.Generator
) -> None:
    written = steps(rng, 2)
    told(store, [written[0], replace(written[1], lenses=written[1].lenses[:1])])
    (line,) = findings(store)
    assert line.endswith("step 1: its reading by tuned-1.0 is missing")


def test_an_older_store_has_its_lens_as_logit_and_loses_the_others_on_the_way_back(
    db: str, rng: np.random.Generator
) -> None:
    with TraceWriter(db) as writer, TraceReader(db) as reader:
        message = told(Store(db, writer, reader), steps(rng, 2))
        before = [replace(step, lenses=(), router=()) for step in reader.iter_steps(message)]
    previous = "5e2c90b7d418"
    migrate.downgrade(db, previous)
    with migrate.migration(db) as connection:
        columns = {
            name: inspect(connection).get_columns(name) for name in ("lens_layer", "message")
        }
        names = {column["name"] for of_table in columns.values() for column in of_table}
        assert not {"lens", "readings"} & names
        assert not inspect(connection).has_table("router_entry")
    migrate.upgrade(db)
    with TraceReader(db) as reader:
        assert reader.lens_names(message) == (LOGIT,)
        for step, same in zip(reader.iter_steps(message), before, strict=True):
            assert plain(replace(step, digest=None)) == plain(replace(same, digest=None))
    with TraceWriter(db) as writer, writer.write() as connection:
        connection.execute(delete(models.Conversation))
        for table in models.STEP_CHILDREN:
            assert connection.execute(select(table.step_id)).first() is None
