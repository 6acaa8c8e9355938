"""A disk without a byte left, and a medium that cannot be written: what is kept is still there.

On a small file system of its own, which only root can mount.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from oki_trace.errors import OkiTraceError, StoreError
from oki_trace.records import (
    CapturePolicy,
    ChatMessage,
    ModelChoice,
    Role,
    Sampling,
    Status,
    TurnEnd,
)
from oki_trace.store.maintenance.verify import Verification
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.writer import TraceWriter
from tests import builders
from tests.cli.commands import start

_MB = 1024 * 1024


def _mount(*arguments: str) -> None:
    try:
        subprocess.run(["mount", *arguments], check=True, capture_output=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here ({error})")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    _mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder))
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(db: Path, conversations: int = 3, steps: int = 40) -> None:
    """Conversations of 40 steps of 120 kB each."""
    rng = np.random.default_rng(2)
    step = builders.coherent_step
    with TraceWriter(db) as writer:
        for number in range(conversations):
            conversation = writer.create_conversation(f"conversation {number}")
            writer.add_message(conversation, ChatMessage(Role.USER, "What is gold?"))
            reply = writer.queue_reply(
                conversation,
                ModelChoice("tiny"),
                Sampling(),
                CapturePolicy(tensors="exact"),
                claim=True,
            )
            writer.start_reply(reply, builders.turn_start("exact"))
            writer.append(reply, [step(i, rng, vocab=30_000) for i in range(steps)])
            writer.finish_reply(reply, TurnEnd(Status.COMPLETE, " the" * steps, "limit", 0.5))


def leave_log(db: Path, crashed: Path) -> None:
    """A store whose last changes are in its log, as a process that was killed leaves it."""
    fill(db, 1, 2)
    with TraceReader(db) as reader:
        reader.conversations()
        fill(db, 1, 8)
        for suffix in ("", "-wal"):
            shutil.copyfile(f"{db}{suffix}", f"{crashed}{suffix}")
    assert crashed.with_name("crashed.db-wal").stat().st_size


def leave(folder: Path, free: int) -> None:
    """Fill the disk up, but for so many bytes."""
    with (folder / "ballast").open("wb") as file:
        while (room := shutil.disk_usage(folder).free - free) > 0:
            file.write(bytes(min(room, _MB)))
            file.flush()
    assert shutil.disk_usage(folder).free <= free


@pytest.mark.parametrize("free", [0, 4096, _MB // 2, _MB])
def test_on_a_full_disk_everything_is_shown_and_can_be_deleted(disk: Path, free: int) -> None:
    db = disk / "store.db"
    fill(db)
    leave(disk, free)
    shown = start("list", "--db", db)
    assert shown.status == 0 and "conversation 2" in shown.out, shown.err
    assert start("show", 1, "--db", db).status == 0
    pruned = start("prune", "--max-size", "9MB", "--yes", "--db", db)
    assert pruned.status == 0 and "Pruned" in pruned.out, pruned.err
    deleted = start("delete", 1, 2, "--yes", "--db", db)
    assert deleted.status == 0, deleted.err
    with TraceReader(db) as reader:
        assert [c.id for c in reader.conversations()] == [3]
        assert list(Verification(reader)) == []
    # What it had room for once it has room for again: the disk is as full as before.
    assert (disk / "store.db.reserve").exists()


def test_the_explorers_own_writer_deletes_on_a_full_disk(disk: Path) -> None:
    """One that is open all the time, beside a reader."""
    db = disk / "store.db"
    fill(db)
    with TraceWriter(db, checkpoint=False) as writer, TraceReader(db) as reader:
        leave(disk, 0)
        writer.delete_conversation(2)
        assert {c.id for c in reader.conversations()} == {1, 3}
        assert list(Verification(reader)) == []


def test_a_log_that_was_left_behind_is_read_on_a_full_disk(disk: Path) -> None:
    """There is no room for the shared memory that reading it takes."""
    db, crashed = disk / "store.db", disk / "crashed.db"
    leave_log(db, crashed)
    with TraceWriter(disk / "another.db"):
        pass
    shutil.copyfile(disk / "another.db.reserve", disk / "crashed.db.reserve")
    leave(disk, 0)
    for _ in range(2):
        shown = start("list", "--db", crashed)
        assert shown.status == 0 and "conversation 0" in shown.out, shown.err


def test_what_was_read_without_a_log_is_read_anew_once_it_changes(disk: Path) -> None:
    db = disk / "store.db"
    fill(db, 1, 4)
    db.with_name("store.db.reserve").unlink()
    leave(disk, 0)
    with TraceReader(db) as reader:
        before = reader.version()
        assert len(reader.conversations()) == 1
        (disk / "ballast").unlink()
        with TraceWriter(db) as writer:
            writer.create_conversation("another")
            assert len(reader.conversations()) == 2
            assert reader.version() > before
        assert list(Verification(reader)) == []


def test_a_reply_that_finds_the_disk_full_says_how_to_make_room(disk: Path) -> None:
    db = disk / "store.db"
    fill(db, 1)
    rng = np.random.default_rng(2)
    with TraceWriter(db) as writer:
        conversation = writer.create_conversation("too much")
        reply = writer.queue_reply(
            conversation,
            ModelChoice("tiny"),
            Sampling(),
            CapturePolicy(tensors="exact"),
            claim=True,
        )
        writer.start_reply(reply, builders.turn_start("exact"))
        leave(disk, _MB)
        steps = [builders.coherent_step(i, rng, vocab=30_000) for i in range(100)]
        with pytest.raises(StoreError, match=r"the disk is full\. Free some space, or delete"):
            for step in steps:
                writer.append(reply, [step])
        writer.delete_conversation(1)
        # What was deleted is room for what comes next, once the log has any.
        (disk / "ballast").unlink()
        writer.append(reply, steps[len(writer._replies[reply].step_ids) :][:3])


# ------------------------------------------------------------------------- read-only


def _read_only(disk: Path) -> None:
    _mount("-o", "remount,ro", str(disk))


def test_a_store_on_a_read_only_medium_is_read(disk: Path) -> None:
    db = disk / "store.db"
    fill(db, 2, 4)
    _read_only(disk)
    with TraceReader(db) as reader:
        assert {c.id for c in reader.conversations()} == {1, 2}
        assert list(Verification(reader)) == []
    for arguments in (("list",), ("show", 1), ("info",), ("verify",), ("ask", "uncertainty")):
        done = start(*arguments, "--db", db)
        assert done.status == 0, (arguments, done.err)
    done = start("delete", 1, "--yes", "--db", db)
    assert done.status == 1 and len(done.err.strip().splitlines()) == 1, done.err


def test_a_log_on_a_read_only_medium_is_told(disk: Path) -> None:
    db, crashed = disk / "store.db", disk / "crashed.db"
    leave_log(db, crashed)
    _read_only(disk)
    done = start("list", "--db", crashed)
    assert done.status == 1
    assert "its last changes are still in crashed.db-wal" in done.err
    assert len(done.err.strip().splitlines()) == 1


@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_store_that_may_not_be_written_is_read(what: str) -> None:
    """By another user, in a folder that everybody can get to."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    folder = Path(tempfile.mkdtemp())
    db = folder / "store.db"
    try:
        fill(db, 1, 3)
        db.chmod(0o444)
        folder.chmod(0o555 if what == "folder" else 0o777)
        assert _as_nobody(db) == "conversation 0"
    finally:
        shutil.rmtree(folder)


def _as_nobody(db: Path) -> str:
    """The title of the first conversation, as a process of another user reads it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setuid(65534)
            with TraceReader(db) as reader:
                os.write(writing, reader.conversations()[-1].title.encode())
        except OkiTraceError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as told:
        said = told.read()
    os.waitpid(child, 0)
    return said
