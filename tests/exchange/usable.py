"""Checks that an accepted import can be shown, verified, queried, exported and imported again."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from oki_trace.errors import OkiTraceError
from oki_trace.exchange.exporting import export
from oki_trace.exchange.formats import Format
from oki_trace.store.maintenance.verify import Verification
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.schema import models
from oki_trace.store.schema.engine import reader_engine
from oki_trace.store.schema.identity import address
from tests.cli.commands import Oki
from tests.exchange.inline import import_inline

# The receiving store's own ids and times, and columns that are derived from others.
_OWN = {
    *("id", "uid", "updated_at", "conversation_id", "message_id", "step_id"),
    *("owner", "heartbeat_at", "stop_requested", "checksum", "codec", "raw_bytes", "tensor_bytes"),
}
_CHILDREN = ("topk_entry", "attention_layer", "attention_entry", "lens_layer", "lens_entry")
FORMATS = {Format.JSON: "x.json", Format.JSONL: "x.jsonl", Format.PARQUET: "tables"}


def rows(db: Path, *, infinities: bool = True) -> list[Any]:
    """The content of a store's conversations, in order, without its own numbers."""

    def plain(value: Any) -> Any:
        if isinstance(value, float) and math.isinf(value) and not infinities:
            return None
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list) else value

    def all_of(table: str, **owner: int) -> Iterator[tuple[int, list[Any]]]:
        columns = models.Base.metadata.tables[table]
        query = sa.select(columns).order_by(*columns.primary_key)
        for name, number in owner.items():
            query = query.where(columns.c[name] == number)
        for row in connection.execute(query):
            values = row._asdict()
            own = [plain(value) for name, value in values.items() if name not in _OWN | {"data"}]
            yield values.get("id", 0), own

    engine = reader_engine(address(db))
    with engine.connect() as connection, TraceReader(db) as reader:
        content: list[Any] = []
        for conversation, values in all_of("conversation"):
            content.append(values)
            for message, values in all_of("message", conversation_id=conversation):
                content += [values, [row for _, row in all_of("prompt_token", message_id=message)]]
                for step, values in all_of("step", message_id=message):
                    content.append(values)
                    content += [list(all_of(child, step_id=step)) for child in _CHILDREN]
                    content += [values for _, values in all_of("tensor", step_id=step)]
                content += [
                    (
                        *(index, head.name),
                        reader.tensor(message, index, head.name, given=given).array.tobytes(),
                    )
                    for given in (True, False)
                    for index, head in reader.tensor_heads(message, given=given)
                ]
    engine.dispose()
    return content


def check_usable(db: Path, folder: Path, oki: Oki) -> None:
    """Use every conversation of ``db`` in every way."""
    with TraceReader(db) as reader:
        conversations = sorted(c.id for c in reader.conversations(limit=1000))
        replies = [
            (number, message)
            for number in conversations
            for message in reader.messages(number)
            if message.capture is not None
        ]
        for finding in Verification(reader):
            assert "\n" not in str(finding)
            assert "cannot be read" not in str(finding) and "fit together" not in str(finding)
        for _, message in replies:
            reader.lens_grid(message.id)
            for layer in message.capture.attention_layers if message.capture else ():
                reader.attention_points(message.id, layer)
    works(oki("list", "--db", db))
    for number in conversations:
        works(oki("show", number, "--db", db))
        works(oki("show", number, "--json", "--db", db))
    for number, message in replies:
        for step in range(message.tokens):
            one = ("show", number, "--message", message.id, "--step", step, "--db", db)
            works(oki(*one))
            works(oki(*one, "--json"))
    for number in conversations:
        exports(db, number, folder, traced=bool(replies))
    if len(conversations) == 1:
        comes_back(db, conversations[0], folder)


def works(done: Any) -> None:
    assert done.status == 0, done.err


def exports(db: Path, number: int, folder: Path, *, traced: bool) -> None:
    with TraceReader(db) as reader:
        for format in Format:
            if format is Format.TRACE_V1 and not traced:
                continue
            export(reader, number, format, folder / f"out-{format}", sys.stdout)
            if format is Format.PARQUET:
                continue
            text = (folder / f"out-{format}").read_text(encoding="utf-8")
            if format in (Format.JSON, Format.TRACE_V1):
                json.loads(text, parse_constant=lambda name: 1 / 0)


def comes_back(db: Path, number: int, folder: Path) -> None:
    """Export and import give the same rows, in every format that is imported."""
    for format, name in FORMATS.items():
        target, back = folder / format / name, folder / f"back-{format}.db"
        target.parent.mkdir(exist_ok=True)
        back.unlink(missing_ok=True)
        exact = format is Format.PARQUET
        with TraceReader(db) as reader:
            export(reader, number, format, target, sys.stdout, tensors=not exact)
        import_inline(target, back)
        assert rows(back, infinities=exact) == rows(db, infinities=exact), format


def ask_all(db: Path, oki: Oki) -> None:
    """Every question has an answer, or one sentence that says why not."""
    from oki_trace.analysis.questions import QUESTIONS

    for name in QUESTIONS:
        what = ("1:0", "1:0") if name == "compare" else ()
        done = oki("ask", name, *what, "--format", "json", "--db", db)
        assert done.status in (0, 1), done.err
        assert "bug in oki-trace" not in done.err, done.err


def outcome(path: Path, db: Path) -> str | None:
    """Import a file: the sentence that refuses it, or None."""
    db.unlink(missing_ok=True)
    try:
        import_inline(path, db)
    except OkiTraceError as error:
        assert "\n" not in str(error) and len(str(error)) < 500, error
        assert not db.exists()
        return str(error)
    return None


__all__ = ["ask_all", "check_usable", "comes_back", "io", "outcome", "rows"]
