"""Export, import, export: what a format holds comes back bit for bit."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oki_trace.errors import ExchangeError
from oki_trace.exchange.exporting import export
from oki_trace.exchange.formats import Format
from oki_trace.exchange.importing import import_path, import_stream
from oki_trace.records import Status, TensorMode
from oki_trace.store.maintenance.verify import Verification
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.writer import TraceWriter
from tests.exchange import stories

NAMES = {Format.JSON: "a.json", Format.JSONL: "a.jsonl", Format.PARQUET: "tables"}


def write(db: Path, into: Path, format: Format, conversation: int = 1, **options: Any) -> Path:
    into.mkdir(exist_ok=True)
    target = into / NAMES.get(format, "a.json")
    tensors = options.pop("tensors", format in (Format.JSON, Format.JSONL))
    with TraceReader(db) as reader:
        export(reader, conversation, format, target, sys.stdout, tensors=tensors, **options)
    return target


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("tensors", ["half", "exact", "compact", "none"])
@pytest.mark.parametrize("format", list(NAMES))
def test_a_conversation_comes_back_byte_for_byte(
    format: Format, tensors: TensorMode, tmp_path: Path
) -> None:
    """Into an empty store, where it gets the numbers it had: the files are the same bytes."""
    stories.fill(tmp_path / "source.db", tensors=tensors, steps=70)
    first = write(tmp_path / "source.db", tmp_path / "one", format)
    imported = import_path(first, tmp_path / "target.db")
    assert (imported.conversations, imported.messages, imported.steps) == ((1,), 8, 72)
    write(tmp_path / "target.db", tmp_path / "two", format)
    assert content(tmp_path / "one") == content(tmp_path / "two")


@pytest.mark.parametrize("format", list(NAMES))
def test_in_a_store_with_others_only_the_numbers_differ(format: Format, tmp_path: Path) -> None:
    stories.fill(tmp_path / "source.db")
    first = write(tmp_path / "source.db", tmp_path / "one", format)
    before = write(tmp_path / "source.db", tmp_path / "before", Format.JSON)
    again = tmp_path / "source.db"
    assert import_path(first, again).conversations == (2,), "each import is one more"
    after = write(again, tmp_path / "after", Format.JSON, conversation=2)
    old, new = json.loads(before.read_text()), json.loads(after.read_text())
    for document in (old, new):
        for holder in (document["conversation"], *document["messages"]):
            del holder["id"]
    assert old == new
    with TraceReader(again) as reader:
        for step in range(3):
            for name in reader.tensor_names(3, step):
                one, two = reader.tensor(3, step, name), reader.tensor(11, step, name)
                assert one.array.tobytes() == two.array.tobytes()
                assert (one.layers, one.key_offset, one.dtype) == (
                    *(two.layers, two.key_offset),
                    two.dtype,
                )


def test_infinities_survive_in_tables_and_are_null_in_json(tmp_path: Path) -> None:
    from dataclasses import replace

    from oki_trace.records import CapturePolicy, ModelChoice, Sampling, TurnEnd
    from tests import builders

    rng = np.random.default_rng(0)
    step = builders.step(0, rng, with_tensors=False)
    logits = step.topk.logits.copy()
    logits[-1] = -np.inf
    with TraceWriter(tmp_path / "s.db") as writer:
        conversation = writer.create_conversation("x")
        reply = writer.queue_reply(
            conversation, ModelChoice("m"), Sampling(), CapturePolicy(), claim=True
        )
        writer.start_reply(reply, builders.turn_start("none"))
        writer.append(reply, [replace(step, topk=replace(step.topk, logits=logits))])
        writer.finish_reply(reply, TurnEnd(Status.COMPLETE, "x", "end of turn", 1.0))
    for format, kept in ((Format.PARQUET, -np.inf), (Format.JSON, np.nan)):
        target = tmp_path / f"{format}.db"
        import_path(write(tmp_path / "s.db", tmp_path / format, format, tensors=False), target)
        with TraceReader(target) as reader:
            assert np.array_equal(reader.step(1, 0).topk.logits[-1], kept, equal_nan=True)


def test_a_zip_of_the_folder_is_as_good(tmp_path: Path) -> None:
    stories.fill(tmp_path / "source.db")
    folder = write(tmp_path / "source.db", tmp_path / "one", Format.PARQUET)
    for root, base in ((folder, None), (folder.parent, folder.name)):
        shutil.make_archive(str(tmp_path / "packed"), "zip", root, base)
        target = tmp_path / f"{base}.db"
        import_path(tmp_path / "packed.zip", target)
        write(target, tmp_path / "two", Format.PARQUET)
        assert content(tmp_path / "one") == content(tmp_path / "two")


@pytest.mark.parametrize("format", [Format.JSON, Format.JSONL, Format.TRACE_V1])
def test_a_pipe_is_as_good_as_a_file(format: Format, tmp_path: Path) -> None:
    stories.fill(tmp_path / "source.db", tensors="none")
    file = write(tmp_path / "source.db", tmp_path / "one", format, tensors=False)
    import_path(file, tmp_path / "by-name.db")
    with file.open("rb") as stream:
        import_stream(stream, tmp_path / "by-pipe.db")
    for name in ("by-name", "by-pipe"):
        write(tmp_path / f"{name}.db", tmp_path / name, format, tensors=False)
    assert content(tmp_path / "by-name") == content(tmp_path / "by-pipe")


def test_one_message_is_a_conversation_of_its_own(tmp_path: Path) -> None:
    stories.fill(tmp_path / "source.db")
    file = write(tmp_path / "source.db", tmp_path / "one", Format.JSON, message_id=3, tensors=False)
    assert import_path(file, tmp_path / "target.db").messages == 3
    again = write(
        tmp_path / "target.db", tmp_path / "two", Format.JSON, message_id=3, tensors=False
    )
    assert file.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("rearranged", [True, False])
def test_names_may_stand_in_any_order(rearranged: bool, tmp_path: Path) -> None:
    """What another program wrote anew, with its own order and spaces, is the same document."""

    def turned(value: Any) -> Any:
        if isinstance(value, dict):
            # The names of arguments and tools are the user's; a template writes them in order.
            return {
                name: value[name] if name in ("arguments", "tools") else turned(value[name])
                for name in sorted(value, reverse=rearranged)
            }
        return [turned(item) for item in value] if isinstance(value, list) else value

    stories.fill(tmp_path / "source.db", tensors="none")
    file = write(tmp_path / "source.db", tmp_path / "one", Format.JSON, tensors=False)
    other = tmp_path / "other.json"
    other.write_text(json.dumps(turned(json.loads(file.read_text())), indent=3))
    import_path(other, tmp_path / "target.db")
    again = write(tmp_path / "target.db", tmp_path / "two", Format.JSON, tensors=False)
    assert file.read_bytes() == again.read_bytes()


def test_a_reply_under_way_arrives_as_interrupted(tmp_path: Path) -> None:
    from oki_trace.records import CapturePolicy, ModelChoice, Sampling
    from tests import builders

    with TraceWriter(tmp_path / "s.db") as writer:
        conversation = writer.create_conversation("x")
        for begun in (True, False):
            reply = writer.queue_reply(
                conversation, ModelChoice("m"), Sampling(), CapturePolicy(), claim=begun
            )
            if begun:
                writer.start_reply(reply, builders.turn_start("none"))
                writer.append(reply, [builders.step(0, np.random.default_rng(0))])
        file = write(tmp_path / "s.db", tmp_path / "one", Format.JSON, tensors=False)
    import_path(file, tmp_path / "t.db")
    with TraceReader(tmp_path / "t.db") as reader:
        assert [(m.status, m.content, m.tokens) for m in reader.messages(1)] == [
            (Status.INTERRUPTED, " the", 1),
            (Status.INTERRUPTED, "", 0),
        ]


def test_what_is_imported_verifies(tmp_path: Path) -> None:
    """The tables, the tensors and their checksums hold as those of a reply traced here do."""
    from oki_trace.records import CapturePolicy, ModelChoice, Sampling, TurnEnd
    from tests import builders

    rng = np.random.default_rng(3)
    with TraceWriter(tmp_path / "s.db") as writer:
        conversation = writer.create_conversation("x")
        reply = writer.queue_reply(
            conversation,
            ModelChoice("m"),
            Sampling(),
            CapturePolicy(tensors="exact"),
            claim=True,
        )
        writer.start_reply(reply, builders.turn_start("exact"))
        writer.append(reply, [builders.coherent_step(i, rng) for i in range(3)])
        writer.finish_reply(reply, TurnEnd(Status.COMPLETE, " the the the", "end of turn", 1.0))
    for format in NAMES:
        target = tmp_path / f"{format}.db"
        import_path(write(tmp_path / "s.db", tmp_path / format, format), target)
        with TraceReader(target) as reader:
            assert [str(finding) for finding in Verification(reader)] == []


def test_tensors_that_belong_to_nothing_are_refused(tmp_path: Path) -> None:
    stories.fill(tmp_path / "source.db")
    file = write(tmp_path / "source.db", tmp_path / "one", Format.JSON)
    document = json.loads(file.read_text())
    del document["messages"][2]["trace"]["steps"][-1]
    document["messages"][2].pop("tokens")
    document["messages"][2]["trace"].pop("parts")
    file.write_text(json.dumps(document))
    with pytest.raises(ExchangeError, match="belong to no step"):
        import_path(file, tmp_path / "target.db")
    assert not (tmp_path / "target.db").exists()
