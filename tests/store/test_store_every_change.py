"""Whatever one value of a store is changed to, ``verify`` names it."""

from __future__ import annotations

import json
import shutil
import sqlite3
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import JSON, Boolean, Float, Integer, LargeBinary

from oki_trace.records import (
    CapturePolicy,
    ChatMessage,
    Forced,
    ModelChoice,
    ReplyChecks,
    Role,
    Sampling,
    Status,
    Step,
    TurnEnd,
)
from oki_trace.store.codecs.tensors import _checksum
from oki_trace.store.maintenance.verify import Verification
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.schema import models
from oki_trace.store.schema.column_types import UtcTime
from oki_trace.store.writing.writer import TraceWriter
from tests import builders

STEPS = 5
REPLY, STEP = 2, 3
CHECKS = ReplyChecks((0, 4), 1e-6, 2e-5, 1e-7, None, ("the graph stepped aside",))

# What a user or a running process may change at any time, or what is of one store alone.
FREE = {
    "store_state": {"id", "version"},
    "conversation": {"title", "updated_at", "uid"},
    # Ids of this store alone, of messages that may be gone.
    "message": {"owner", "heartbeat_at", "stop_requested", "score_of", "branch_of", "readings"},
    "worker": set(models.Worker.__table__.columns.keys()),
    "tensor": {"id"},
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two conversations with a sampled reply each, of which nothing is a fault."""
    path = tmp_path_factory.mktemp("recorded") / "store.db"
    with TraceWriter(path) as writer:
        for _ in range(2):
            conversation = writer.create_conversation("What is gold?")
            writer.add_message(conversation, ChatMessage(Role.USER, "What is gold?"))
            reply = writer.queue_reply(
                conversation,
                ModelChoice("tiny/model"),
                Sampling(max_new_tokens=STEPS, temperature=0.7, seed=3),
                CapturePolicy(tensors="half"),
                claim=True,
                branch_of=REPLY,
                branch_step=2,
                forced=Forced(text=" the"),
            )
            writer.start_reply(reply, replace(builders.turn_start("half"), prefix_len=2))
            rng = np.random.default_rng(5)
            writer.append(reply, [step(i, rng) for i in range(STEPS)])
            writer.finish_reply(
                reply, TurnEnd(Status.COMPLETE, " the" * STEPS, "token limit", 0.5, CHECKS)
            )
            # Any chosen by a model: the one that follows.
            writer.add_message(conversation, ChatMessage(Role.USER, "And then?"))
    assert faults(path) == []
    return path


def step(index: int, rng: np.random.Generator) -> Step:
    """One with experts, read by the lenses that the policy names."""
    coherent = builders.read_by(drawn(builders.coherent_step(index, rng)), rng)
    return replace(coherent, router=builders.routing(rng, k=3))


def drawn(step: Step) -> Step:
    """The same step, drawn where greedy decoding would have said another token."""
    greedy = int(step.topk.token_ids[0])
    return replace(step, decision=builders.decision(step.token_id, greedy))


def faults(path: Path) -> list[str]:
    with TraceReader(path) as reader:
        return [str(finding) for finding in Verification(reader)]


def changed(recorded: Path, folder: Path, change: Callable[[sqlite3.Connection], None]) -> Path:
    """A copy of the store with this change."""
    path = folder / "changed.db"
    shutil.copyfile(recorded, path)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.row_factory = sqlite3.Row
        before = connection.total_changes
        change(connection)
        assert connection.total_changes > before
    return path


# ------------------------------------------------------------------- every column

# Changed to what no other row has.
_LINKS = {"position", "step_index", "step_id", "conversation_id", "parent_id"}


def columns() -> Iterator[Any]:
    for table in models.Base.metadata.sorted_tables:
        for column in table.columns:
            if column.name not in FREE.get(table.name, ()):
                yield pytest.param(table, column, id=f"{table.name}.{column.name}")


def another(column: Any, value: Any) -> Any:
    """Another value that the column can hold."""
    if isinstance(column.type, JSON):
        return json.dumps(_another_document(None if value is None else json.loads(value)))
    if isinstance(column.type, Boolean):
        return not value
    if isinstance(column.type, LargeBinary):
        return b"\x07" if not value else bytes([value[0] ^ 1]) + value[1:]
    if isinstance(column.type, Float):
        return 0.25 if value is None else value * 1.25 + 0.01
    if isinstance(column.type, Integer):
        return 1 if value is None else value + 1
    if isinstance(column.type, UtcTime):
        return "2001-02-03 04:05:06.000007"
    if column.name == "status":
        return "stopped"
    if column.name == "role":
        return "system"
    if column.name == "segment":
        return "system"
    return "x" if value is None else f"{value}x"


def _another_document(value: Any) -> Any:
    """With one value changed, as deep as it goes."""
    if value is None:
        return {"steps": [7]}
    if isinstance(value, dict):
        name = sorted(value)[-1]
        return {**value, name: _another_document(value[name])}
    if isinstance(value, list):
        return [*value[:-1], _another_document(value[-1])] if value else [9]
    if isinstance(value, str):
        return f"{value}x"
    return not value if isinstance(value, bool) else value + 1


def where(table: Any) -> str:
    """One row, neither the first nor the last of its kind where there are several."""
    names = table.columns.keys()
    if "step_id" in names:
        of_list = [f"{name} = 3" for name in ("layer", "rank") if name in names]
        of_list += ["lens = 'logit'"] if "lens" in names else []
        return " AND ".join([f"step_id = {STEP}", *of_list])
    if table.name in ("prompt_token",):
        return f"message_id = {REPLY} AND position = 3"
    return f"id = {STEP if table.name == 'step' else REPLY if table.name == 'message' else 1}"


@pytest.mark.parametrize(("table", "column"), list(columns()))
def test_no_column_can_be_changed_unnoticed(
    recorded: Path, tmp_path: Path, table: Any, column: Any
) -> None:
    def change(connection: sqlite3.Connection) -> None:
        row = connection.execute(f"SELECT * FROM {table.name} WHERE {where(table)}").fetchone()
        value = another(column, row[column.name])
        if column.name in {key.name for key in table.primary_key} | _LINKS:
            value = f"{value}x" if isinstance(value, str) else value + 1000
        connection.execute(
            f"UPDATE {table.name} SET {column.name} = ? "
            f"WHERE rowid = (SELECT rowid FROM {table.name} WHERE {where(table)} LIMIT 1)"
            if "id" in table.columns
            else f"UPDATE {table.name} SET {column.name} = ? WHERE {where(table)}",
            (value,),
        )

    assert faults(changed(recorded, tmp_path, change)), f"{table.name}.{column.name}"


@pytest.mark.parametrize("table", ["step", "message"])
@pytest.mark.parametrize("column", ["digest", "tensor_digest"])
def test_a_digest_cannot_be_left_out(
    recorded: Path, tmp_path: Path, table: str, column: str
) -> None:
    if (table, column) == ("message", "tensor_digest"):
        pytest.skip("a message has one digest")
    for row in (REPLY, 3):
        change = _sql(f"UPDATE {table} SET {column} = NULL WHERE id = {row}")
        lines = faults(changed(recorded, tmp_path, change))
        assert any("missing" in line for line in lines), lines


# ------------------------------------------------------- changes of several values


def _swap(name: str) -> Callable[[sqlite3.Connection], None]:
    """A tensor of two steps, each with all that tells of it."""

    def change(connection: sqlite3.Connection) -> None:
        rows = connection.execute(
            "SELECT * FROM tensor WHERE name = ? AND step_id IN (2, 3) ORDER BY step_id", (name,)
        ).fetchall()
        for row, other in zip(rows, reversed(rows), strict=True):
            connection.execute(
                "UPDATE tensor SET shape = ?, layers = ?, key_offset = ?, codec = ?, "
                "checksum = ?, raw_bytes = ?, data = ? WHERE id = ?",
                (*tuple(other)[4:], row["id"]),
            )
            size = len(other["data"]) - len(row["data"])
            connection.execute(
                "UPDATE step SET tensor_bytes = tensor_bytes + ? WHERE id = ?",
                (size, row["step_id"]),
            )

    return change


def _rewrite(
    name: str, edit: Callable[[np.ndarray[Any, Any]], None]
) -> Callable[[sqlite3.Connection], None]:
    """Other numbers in a tensor, with the checksum that belongs to them."""

    def change(connection: sqlite3.Connection) -> None:
        row = connection.execute(
            "SELECT * FROM tensor WHERE name = ? AND step_id = ?", (name, STEP)
        ).fetchone()
        assert row["codec"] == "half"
        halves = np.frombuffer(row["data"][8:], dtype="<f2").copy()
        shape = tuple(json.loads(row["shape"]))
        edit(halves.reshape(shape))
        data = row["data"][:8] + halves.tobytes()
        checksum = _checksum(
            name,
            row["dtype"],
            shape,
            tuple(json.loads(row["layers"])),
            row["key_offset"],
            "half",
            data,
        )
        assert checksum.startswith("crc32:") and zlib.crc32(data)
        connection.execute(
            "UPDATE tensor SET data = ?, checksum = ? WHERE id = ?", (data, checksum, row["id"])
        )

    return change


def _zero(array: np.ndarray[Any, Any]) -> None:
    array[:] = 0


def _swap_heads(array: np.ndarray[Any, Any]) -> None:
    array[:, [0, 1]] = array[:, [1, 0]]


def _sql(*statements: str) -> Callable[[sqlite3.Connection], None]:
    def change(connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA foreign_keys = ON")
        for statement in statements:
            connection.execute(statement)

    return change


def _document(column: str, name: str, value: Any) -> Callable[[sqlite3.Connection], None]:
    table, row = ("step", STEP) if column == "decision" else ("message", REPLY)
    told = json.dumps(value).replace("'", "''")
    return _sql(
        f"UPDATE {table} SET {column} = json_set({column}, '$.{name}', json('{told}')) "
        f"WHERE id = {row}"
    )


CHANGES: dict[str, Callable[[sqlite3.Connection], None]] = {
    "the hidden states of two steps swapped": _swap("hidden_states"),
    "the logits of two steps swapped": _swap("logits"),
    "hidden states zeroed": _rewrite("hidden_states", _zero),
    "two heads swapped": _rewrite("attentions", _swap_heads),
    "the last step deleted": _sql(f"DELETE FROM step WHERE message_id = {REPLY} AND step_index=4"),
    "every step deleted": _sql(f"DELETE FROM step WHERE message_id = {REPLY}"),
    "a lens deleted": _sql(
        f"DELETE FROM lens_layer WHERE step_id = {STEP}",
        f"DELETE FROM lens_entry WHERE step_id = {STEP}",
        f"UPDATE step SET settle_layer = NULL WHERE id = {STEP}",
    ),
    "the last candidate deleted": _sql(
        f"DELETE FROM topk_entry WHERE step_id = {STEP} AND rank = 10"
    ),
    "the noise of a draw": _document("decision", "noise", 0.5),
    "a token that was greedy": _sql(
        f"UPDATE step SET greedy_id = 9, decision = json_set(decision, '$.greedy.token_id', 9) "
        f"WHERE id = {STEP}"
    ),
    "the seed": _document("generation", "seed", 4),
    "the seed that was asked for": _document("sampling", "seed", 4),
    "the temperature": _document("generation", "temperature", 0.8),
    "the lens check": _document("capture", "lens_check", 0.0),
    "what went wrong": _document("checks", "fault", "nothing"),
    "the model": _sql(f"UPDATE message SET model_id = 'another' WHERE id = {REPLY}"),
    "the model that was asked for": _document("choice", "model_id", "another"),
    "the reply's text": _sql(f"UPDATE message SET content = 'No.' WHERE id = {REPLY}"),
    "the user's text": _sql("UPDATE message SET content = 'What is lead?' WHERE id = 1"),
    "a token's text": _sql(f"UPDATE step SET token = ' no' WHERE id = {STEP}"),
    "a token's bytes": _sql(f"UPDATE step SET token_bytes = x'206e6f' WHERE id = {STEP}"),
    "a lens entry of an inner layer": _sql(
        f"UPDATE lens_entry SET token_id = 1, token = 'x' WHERE step_id = {STEP} AND layer = 1 "
        "AND rank = 2"
    ),
    "two steps exchanged": _sql(
        f"UPDATE step SET step_index = 99 WHERE message_id = {REPLY} AND step_index = 1",
        f"UPDATE step SET step_index = 1 WHERE message_id = {REPLY} AND step_index = 2",
        f"UPDATE step SET step_index = 2 WHERE message_id = {REPLY} AND step_index = 99",
    ),
    "a reply cut short": _sql(
        f"DELETE FROM step WHERE message_id = {REPLY} AND step_index > 2",
        f"UPDATE message SET status = 'interrupted' WHERE id = {REPLY}",
    ),
    "although they were pruned": _sql(
        f"UPDATE message SET tensors_pruned_at = '2026-11-01 00:00:00.000000' WHERE id = {REPLY}"
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_was_recorded_cannot_be_changed_unnoticed(
    recorded: Path, tmp_path: Path, what: str
) -> None:
    assert faults(changed(recorded, tmp_path, CHANGES[what])), what
