"""The disk full, the file gone or not to be written, while a reply is being generated."""

from __future__ import annotations

import ctypes
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from oki_trace.errors import StoreBusy, StoreError
from oki_trace.records import CapturePolicy, ModelChoice, Sampling, Status, Step, TurnEnd
from oki_trace.store.db_errors import translate_errors
from oki_trace.store.maintenance.verify import Verification
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.recorder import Recorder
from oki_trace.store.writing.writer import TraceWriter
from tests import builders
from tests.store.stores import plain
from tests.waiting import until

DONE = TurnEnd(Status.COMPLETE, " the" * 3, "end of turn", 0.5)
KEPT = 12


def asked(writer: TraceWriter) -> int:
    conversation = writer.create_conversation("x")
    return writer.queue_reply(
        conversation, ModelChoice("m"), Sampling(), CapturePolicy(), claim=True
    )


def made(count: int, *, vocab: int = 2000) -> list[Step]:
    rng = np.random.default_rng(1)
    return [builders.coherent_step(index, rng, vocab=vocab) for index in range(count)]


def assert_kept(file: Path, message: int, steps: list[Step]) -> None:
    with TraceReader(file) as reader:
        found = list(reader.iter_steps(message))
        assert len(found) >= KEPT
        for one, written in zip(found, steps, strict=False):
            assert plain(one)["topk"] == plain(written)["topk"]
            assert plain(one)["lens"] == plain(written)["lens"]
            for tensor in written.tensors:
                read = reader.tensor(message, one.step_index, tensor.name)
                assert read.array.shape == tensor.array.shape
        assert list(Verification(reader)) == []
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []


def recorded(
    writer: TraceWriter, file: Path, message: int, steps: list[Step], *, first: int
) -> Recorder:
    """A recorder with the first steps written."""
    recorder = Recorder(writer, message)
    recorder.start(builders.turn_start())
    for step in steps[:first]:
        recorder.step(step)
    with TraceReader(file) as reader:
        until(lambda: reader.message(message).tokens == first, "the first steps")
    return recorder


def test_a_disk_that_fills_up_fails_the_reply_and_keeps_it(file: Path) -> None:
    steps = made(400)
    with TraceWriter(file) as writer:
        message = asked(writer)
        recorder = recorded(writer, file, message, steps, first=KEPT)
        with writer._transaction() as connection:
            # Less than there is: SQLite takes what there is.
            connection.execute(text("PRAGMA max_page_count = 1"))
        with pytest.raises(StoreError, match=r"disk is full\. Free some space"):
            for step in steps[KEPT:]:
                recorder.step(step)
            recorder.end(DONE)
        recorder.end(DONE)
        with TraceReader(file) as reader:
            seen = reader.message(message)
        assert seen.status is Status.FAILED
        assert "disk is full" in (seen.reason or "")
        assert_kept(file, message, steps)
        # There is room again: it goes on at once, in the same process.
        with writer._transaction() as connection:
            connection.execute(text("PRAGMA max_page_count = 1000000"))
        following = asked(writer)
        recorded(writer, file, following, steps, first=KEPT).end(DONE)
    assert_kept(file, following, steps)


@pytest.mark.skipif(os.name != "posix", reason="elsewhere an open file cannot be removed")
@pytest.mark.parametrize("how", ["deleted", "moved", "replaced"])
def test_a_store_that_vanishes_is_not_written_to_in_vain(
    file: Path, tmp_path: Path, how: str
) -> None:
    steps = made(KEPT + 1)
    away = tmp_path / "away"
    away.mkdir()
    with TraceWriter(file) as writer:
        message = asked(writer)
        recorder = recorded(writer, file, message, steps, first=KEPT)
        if how == "replaced":
            with TraceWriter(away / "other.db"):
                pass
            (away / "other.db").replace(file)
        elif how == "moved":
            for part in file.parent.glob("store.db*"):
                if part.suffix != ".lock":
                    shutil.move(part, away / part.name)
        else:
            file.unlink()
        with pytest.raises(StoreError, match="deleted, moved or replaced"):
            recorder.step(steps[KEPT])
            recorder.end(DONE)
    if how == "moved":
        assert_kept(away / file.name, message, steps)
        with TraceWriter(away / file.name) as writer:
            # Its process lives, so it is put to an end by hand as any other.
            writer.finish_reply(message, DONE)


LOOK = """
import sys
from oki_trace.errors import OkiTraceError
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.writer import TraceWriter
try:
    with TraceReader(sys.argv[1]) as reader:
        print(reader.info().steps, "steps")
except OkiTraceError as error:
    print(error)
try:
    with TraceWriter(sys.argv[1]) as writer:
        writer.create_conversation("x")
    print("written")
except OkiTraceError as error:
    print(error)
"""


def without_privileges() -> None:
    """Let the child of a superuser be held to permissions as everyone is."""
    if os.geteuid() == 0:
        drop = 24  # PR_CAPBSET_DROP, linux/prctl.h; 1 and 2: CAP_DAC_OVERRIDE, _READ_SEARCH
        for capability in (1, 2):
            ctypes.CDLL(None).prctl(drop, capability, 0, 0, 0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="drops privileges as Linux has it")
@pytest.mark.parametrize("which", ["file", "folder", "neither may be read"])
def test_what_may_not_be_written_is_told_and_left_as_it_is(tmp_path: Path, which: str) -> None:
    folder = tmp_path / "locked"
    file = folder / "store.db"
    steps = made(KEPT)
    with TraceWriter(file) as writer:
        message = asked(writer)
        recorded(writer, file, message, steps, first=KEPT).end(DONE)
    before = file.read_bytes()
    modes = {"file": (0o700, 0o400), "folder": (0o500, 0o400), "neither may be read": (0o700, 0)}
    for lock in folder.glob("*.lock"):
        lock.unlink()
    file.chmod(modes[which][1])
    folder.chmod(modes[which][0])
    try:
        done = subprocess.run(
            [sys.executable, "-c", LOOK, str(file)],
            capture_output=True,
            text=True,
            preexec_fn=without_privileges,
            timeout=60,
            check=False,
        )
    finally:
        folder.chmod(0o700)
        file.chmod(0o600)
    print(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    read, written = done.stdout.splitlines()
    assert "permissions" in written
    if which == "neither may be read":
        assert "permissions" in read
    else:
        assert read == f"{KEPT} steps"
    assert file.read_bytes() == before
    assert_kept(file, message, steps)


@pytest.mark.parametrize(
    ("state", "sentence", "kind"),
    [
        ("55P03", "another process is using it", StoreBusy),
        ("53100", "the disk is full", StoreError),
        ("25006", "it is not writable", StoreError),
        ("42P01", "its tables are missing", StoreError),
        ("08006", "the server does not answer", StoreError),
        ("57P01", "the server does not answer", StoreError),
        ("22012", "ein Text in einer anderen Sprache", StoreError),
    ],
)
def test_a_servers_error_is_told_by_its_code(
    state: str, sentence: str, kind: type[StoreError]
) -> None:
    error = Exception("ein Text in einer anderen Sprache")
    error.sqlstate = state  # type: ignore[attr-defined]
    with pytest.raises(kind, match=sentence) as caught, translate_errors("x"):
        raise DBAPIError("SELECT secret", {}, error)
    assert "secret" not in str(caught.value)
    assert type(caught.value) is kind


def sqlite_error(path: Path, *statements: str) -> sqlite3.Error:
    """What SQLite raises for the last of these statements."""
    connection = sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=0)
    with closing(connection), pytest.raises(sqlite3.Error) as caught:
        for statement in statements:
            connection.execute(statement)
    return caught.value


def test_sqlites_errors_are_told_by_their_codes(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.db", tmp_path / "bad.db"
    bad.write_bytes(b"not a database" * 100)
    with closing(sqlite3.connect(good, isolation_level=None)) as other:
        other.execute("CREATE TABLE present (x)")
        errors = {
            "its tables are missing": sqlite_error(good, "SELECT * FROM absent"),
            "it is not writable": sqlite_error(
                good, "PRAGMA query_only = ON", "DELETE FROM present"
            ),
            "not a database": sqlite_error(bad, "SELECT * FROM present"),
        }
        other.execute("BEGIN IMMEDIATE")
        errors["another process is writing"] = sqlite_error(good, "BEGIN IMMEDIATE")
    for sentence, error in errors.items():
        with pytest.raises(StoreError, match=sentence) as caught, translate_errors("x"):
            raise DBAPIError("SELECT secret", {}, error)
        assert (type(caught.value) is StoreBusy) == ("writing" in sentence)
