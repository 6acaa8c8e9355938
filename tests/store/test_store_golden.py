"""A store of each released revision is upgraded when opened, and then used."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from oki_trace.records import CapturePolicy, Forced, ModelChoice, Role, Sampling, Status, TurnEnd
from oki_trace.store.maintenance.verify import Verification
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.schema import identity, migrate
from oki_trace.store.writing.writer import TraceWriter
from tests import builders
from tests.store.golden import build

REBUILD = (
    "The schema and the golden store of {revision} are not the same. If that revision has been "
    "released, do not edit it: add another. If not, build it again: "
    "python -m tests.store.golden.build"
)


def schema(path: Path) -> dict[str, str]:
    with closing(sqlite3.connect(path)) as connection:
        return dict(
            connection.execute("SELECT name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'")
        )


def test_every_revision_has_a_golden_store() -> None:
    for revision in identity.HISTORY:
        assert build.golden(revision).is_file(), REBUILD.format(revision=revision)
        assert build.golden(revision).stat().st_size < 60_000


@pytest.mark.parametrize("revision", identity.HISTORY)
def test_a_golden_store_is_upgraded_and_used(file: Path, revision: str) -> None:
    build.unpack(revision, file)
    assert migrate.current(file) == revision
    with TraceWriter(file) as writer, TraceReader(file) as reader:
        number = identity.HISTORY.index(revision) + 1
        _read_everything(reader, branches=int(number >= 4), has_lenses=number >= 5)
        recorded = reader.info().messages
        _go_on(writer, reader)
        check = Verification(reader)
        assert [str(finding) for finding in check] == []
        # The first revision knew no digests; what goes on with it has them.
        assert check.without_digest == (recorded if revision == identity.HISTORY[0] else 0)
    backup = file.with_name(f"{file.name}.schema-{number}.bak")
    assert backup.exists() == (revision != migrate.head())
    fresh = file.with_name("fresh.db")
    migrate.ensure(fresh)
    assert schema(file) == schema(fresh), REBUILD.format(revision=revision)


def _read_everything(reader: TraceReader, branches: int, *, has_lenses: bool) -> None:
    empty, full = reader.conversations()[-1], reader.conversation(1)
    size = (8 + branches, 12 + 2 * branches)
    assert (full.title, full.messages, full.tokens) == ("What is gold? 🙂", *size)
    assert full.created_at == build.WHEN
    assert (empty.title, empty.messages) == ("empty", 0)
    assert [c.id for c in reader.conversations(search="and compact")] == [1]
    messages = reader.messages(1)
    for before, message in pairwise(messages[:8]):
        assert message.parent_id == before.id
    for branch in messages[8:]:
        assert (branch.parent_id, branch.branch_of, branch.branch_step) == (7, 8, 2)
        assert branch.prefix_len == 2 and branch.forced == Forced((7,))
        assert [step.origin for step in reader.steps(branch.id)] == ["forced", "sampled"]
        lenses = ("logit", "jlens", "tuned-1.0") if has_lenses else ("logit",)
        assert reader.lens_names(branch.id) == lenses
        assert len(reader.step(branch.id, 1).lenses) == len(lenses) - 1
        assert len(reader.step(branch.id, 1).router) == (3 if has_lenses else 0)
    replies = [m for m in messages[:8] if m.role is Role.ASSISTANT]
    assert [m.status for m in replies] == [Status.COMPLETE] * 3 + [Status.STOPPED]
    for reply, mode in zip(replies, build.MODES, strict=True):
        assert reply.policy is not None and reply.policy.tensors == mode
        assert reply.capture is not None and reply.generation is not None
        assert (reply.content, reply.reason) == (" the" * 3, "token limit")
        assert len(reader.prompt(reply.id)) == reply.prompt_len
        steps = list(reader.iter_steps(reply.id))
        assert len(steps) == len(reader.steps(reply.id)) == build.STEPS
        for step in steps:
            assert step.lens is not None and len(step.attention) == 3
            for name in reader.tensor_names(reply.id, step.step_index):
                assert np.isfinite(reader.tensor(reply.id, step.step_index, name).array).all()
        assert len(reader.tensor_names(reply.id, 0)) == (0 if mode == "none" else 3)
    info = reader.info()
    assert (info.conversations, info.messages, info.steps) == (2, *size)
    assert reader.worker() is not None


def _go_on(writer: TraceWriter, reader: TraceReader) -> None:
    rng = np.random.default_rng(0)
    reply = writer.queue_reply(
        1, ModelChoice("tiny/model"), Sampling(), CapturePolicy(tensors="compact"), claim=True
    )
    assert reply > 8, "no id is given again"
    writer.start_reply(reply, builders.turn_start("compact"))
    writer.append(reply, [builders.coherent_step(i, rng) for i in range(2)])
    writer.finish_reply(reply, TurnEnd(Status.COMPLETE, " the the", "end of sequence", 1.0))
    assert len(list(reader.iter_steps(reply))) == 2
    writer.delete_conversation(2)
    assert [c.id for c in reader.conversations()] == [1]
