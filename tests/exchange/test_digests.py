"""Digests survive export and import, and every change to an exported file is reported."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sqlalchemy import update

from oki_trace.exchange.formats import Format
from oki_trace.records import (
    CapturePolicy,
    ChatMessage,
    ModelChoice,
    Role,
    Sampling,
    Status,
    TensorMode,
    TurnEnd,
)
from oki_trace.store.liveness import this_process
from oki_trace.store.maintenance.prune import prune_tensors
from oki_trace.store.maintenance.verify import Verification
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.schema import models
from oki_trace.store.writing.copy import copy
from oki_trace.store.writing.writer import TraceWriter
from tests import builders
from tests.cli.commands import start
from tests.exchange import stories
from tests.exchange.inline import import_inline
from tests.exchange.test_round_trip import NAMES, write


def digests(db: Path) -> list[Any]:
    with TraceReader(db) as reader:
        return [
            (message.digest, [(s.digest, s.tensor_digest) for s in reader.iter_steps(message.id)])
            for message in reader.messages(1)
        ]


def faults(db: Path) -> list[str]:
    with TraceReader(db) as reader:
        return [str(finding) for finding in Verification(reader)]


def good(db: Path, tensors: TensorMode = "half") -> Path:
    """A store with a reply of which nothing is a fault."""
    rng = np.random.default_rng(3)
    with TraceWriter(db) as writer:
        conversation = writer.create_conversation("gold")
        writer.add_message(conversation, ChatMessage(Role.USER, "What is gold?"))
        reply = writer.queue_reply(
            conversation,
            ModelChoice("tiny/model"),
            Sampling(seed=3),
            CapturePolicy(tensors=tensors),
            claim=True,
        )
        writer.start_reply(reply, builders.turn_start(tensors))
        writer.append(reply, [builders.coherent_step(i, rng) for i in range(3)])
        writer.finish_reply(reply, TurnEnd(Status.COMPLETE, " the the the", "token limit", 0.5))
    assert faults(db) == []
    return db


@pytest.mark.parametrize("tensors", ["half", "exact", "compact", "none"])
@pytest.mark.parametrize("format", list(NAMES))
def test_an_export_carries_what_was_recorded(
    format: Format, tensors: TensorMode, tmp_path: Path
) -> None:
    """Odd numbers, hostile text and failed replies too; with its tensors and without them."""
    stories.fill(tmp_path / "source.db", tensors=tensors)
    recorded = digests(tmp_path / "source.db")
    assert all(digest for digest, _ in recorded)
    for kept in (False, True) if format is not Format.PARQUET else (False,):
        file = write(tmp_path / "source.db", tmp_path / f"files{kept}", format, tensors=kept)
        target = tmp_path / f"target{kept}.db"
        assert import_inline(file, target).changed == 0
        assert digests(target) == recorded
        assert not [line for line in faults(target) if "digest" in line]


@pytest.mark.parametrize("format", list(NAMES))
def test_what_is_imported_is_as_good_as_what_was_recorded(format: Format, tmp_path: Path) -> None:
    source = good(tmp_path / "source.db")
    without = format is not Format.PARQUET
    file = write(source, tmp_path / "files", format, tensors=False)
    import_inline(file, tmp_path / "target.db")
    assert faults(tmp_path / "target.db") == []
    with TraceWriter(source) as writer:
        prune_tensors(writer, 2)
    assert faults(source) == []
    file = write(source, tmp_path / "pruned", format, tensors=without)
    import_inline(file, tmp_path / "again.db")
    assert faults(tmp_path / "again.db") == []
    assert digests(tmp_path / "again.db") == digests(source)


def _prob(text: str) -> str:
    return re.sub(r'"entropy": [0-9.]+', '"entropy": 0.25', text, count=1)


def _said(text: str) -> str:
    return text.replace("What is gold?", "What is lead?")


def _answer(text: str) -> str:
    return text.replace(" the the the", " no no no")


def _seed(text: str) -> str:
    return text.replace('"seed": 3', '"seed": 4')


def _prompt(text: str) -> str:
    return text.replace('"prompt_token_ids": [100', '"prompt_token_ids": [107')


@pytest.mark.parametrize("change", [_prob, _said, _answer, _seed, _prompt])
@pytest.mark.parametrize("format", [Format.JSON, Format.JSONL])
def test_a_changed_file_is_told_and_named(
    format: Format, change: Callable[[str], str], tmp_path: Path
) -> None:
    file = write(good(tmp_path / "source.db"), tmp_path / "files", format)
    text = file.read_text()
    assert change(text) != text
    file.write_text(change(text))
    assert import_inline(file, tmp_path / "target.db").changed == 1
    assert any("the digest differs" in line for line in faults(tmp_path / "target.db"))


def test_a_changed_table_is_told_and_named(tmp_path: Path) -> None:
    folder = write(good(tmp_path / "source.db"), tmp_path / "files", Format.PARQUET)
    table = pq.read_table(folder / "lens_layer.parquet")
    at = table.schema.get_field_index("kl")
    values = [value + 0.5 for value in table["kl"].to_pylist()]
    changed = table.set_column(at, table.schema.field(at), pa.array(values, pa.float32()))
    pq.write_table(changed, folder / "lens_layer.parquet")
    assert import_inline(folder, tmp_path / "target.db").changed == 1
    lines = faults(tmp_path / "target.db")
    assert [line for line in lines if "its rows are not those that were recorded" in line]


def test_the_command_says_that_a_trace_was_changed(tmp_path: Path) -> None:
    file = write(good(tmp_path / "source.db"), tmp_path / "files", Format.JSON)
    target = str(tmp_path / "target.db")
    done = start("import", str(file), "--db", target)
    assert "changed" not in done.err
    document = json.loads(file.read_text())
    document["messages"][0]["content"] = "What is lead?"
    file.write_text(json.dumps(document))
    done = start("import", str(file), "--db", target)
    assert "1 message changed after recording. For details: oki-trace verify 2" in done.err
    assert done.status == 0
    checked = start("verify", "2", "--db", target)
    assert "the digest differs" in checked.out
    assert checked.status == 1


@pytest.mark.parametrize("format", list(NAMES))
def test_a_reply_whose_process_was_killed_is_exported_without_a_fault(
    format: Format, tmp_path: Path
) -> None:
    """Nobody has closed it yet: neither the export nor a copy does so wrongly."""
    db = tmp_path / "source.db"
    rng = np.random.default_rng(3)
    with TraceWriter(db) as writer:
        conversation = writer.create_conversation("gold")
        reply = writer.queue_reply(
            conversation, ModelChoice("tiny"), Sampling(), CapturePolicy(), claim=True
        )
        writer.start_reply(reply, builders.turn_start("half"))
        writer.append(reply, [builders.coherent_step(i, rng) for i in range(3)])
        with writer.write() as connection:
            owner = f"{this_process().host}:1999999999:1"
            connection.execute(update(models.Message).values(owner=owner))
        assert faults(db) == []
        file = write(db, tmp_path / "files", format)
        assert import_inline(file, tmp_path / "target.db").changed == 0
        assert faults(tmp_path / "target.db") == []
        list(copy(db, tmp_path / "copy.db"))
        assert faults(tmp_path / "copy.db") == []
        assert writer.mark_interrupted() == [reply]
        assert faults(db) == []


def test_the_command_says_that_digests_are_missing(tmp_path: Path) -> None:
    """Whoever takes them out of a file can change it unseen, but not unsaid."""
    file = write(good(tmp_path / "source.db"), tmp_path / "files", Format.JSON)
    assert import_inline(file, tmp_path / "whole.db").without_digest == 0
    document = json.loads(file.read_text())
    for message in document["messages"]:
        del message["digest"]
        for step in message.get("trace", {}).get("steps", ()):
            del step["digest"], step["tensor_digest"]
    file.write_text(json.dumps(document))
    done = start("import", str(file), "--db", str(tmp_path / "target.db"))
    assert f"oki-trace: {len(document['messages'])} messages without a digest" in done.err
    assert faults(tmp_path / "target.db") == []
