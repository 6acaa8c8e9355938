"""A process keeps its locks on the store, whatever it calls and whoever comes and goes.

POSIX drops every lock that a process holds on a file when it closes any descriptor
of that file (sqlite.org, "How To Corrupt An SQLite Database File", section 2.2). The
next process then takes the store for unused, and deletes the log under the readers.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import io
import os
import pkgutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import oki_trace
from oki_trace.errors import SchemaError, StoreError
from oki_trace.records import CapturePolicy, ModelChoice, Sampling
from oki_trace.store.maintenance import vacuum
from oki_trace.store.maintenance.verify import Verification
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.schema import identity, migrate
from oki_trace.store.writing import copy
from oki_trace.store.writing.writer import TraceWriter
from tests.store.golden import build

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc/locks is Linux's")

_opened: list[str] = []
_watched: list[str] = []


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _watched and isinstance(arguments[0], str | bytes | os.PathLike):
        name = str(Path(os.fsdecode(arguments[0])).absolute())
        if name in _watched and not arguments[2] & os.O_EXCL:
            _opened.append(name)


sys.addaudithook(_note)


def locks(store: Path) -> set[tuple[str, str, str]]:
    """The POSIX locks this process holds on the store and on its shared memory."""
    files = {str(Path(f).stat().st_ino): f for f in _files(store) if Path(f).exists()}
    held = set()
    for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
        _, _, _, mode, pid, file, first, *_ = line.split()
        inode = file.rpartition(":")[2]
        if pid == str(os.getpid()) and inode in files:
            held.add((files[inode], mode, first))
    return held


def _files(store: Path) -> list[str]:
    return [str(store), f"{store}-wal", f"{store}-shm"]


@contextlib.contextmanager
def in_use(store: Path) -> Iterator[Callable[[str], None]]:
    """A reader and a writer that stay open; call it to check that they still hold the store."""
    with TraceReader(store) as reader, TraceWriter(store) as writer:
        assert reader.conversations()
        writer.create_conversation("kept in use")
        before = locks(store)
        log = Path(f"{store}-wal").stat().st_ino
        assert {name for name, _, _ in before} == {str(store), f"{store}-shm"}
        _watched[:] = _files(store)
        _opened.clear()

        def check(after: str) -> None:
            gc.collect()
            assert locks(store) >= before, f"{after} dropped locks"
            assert Path(f"{store}-wal").stat().st_ino == log, f"{after} let the log be deleted"
            assert not _opened, f"{after} opened {_opened} beside SQLite"
            assert reader.conversations()

        try:
            yield check
        finally:
            _watched.clear()


@pytest.fixture
def golden(file: Path) -> Path:
    """A store with a reply in each tensor mode."""
    build.unpack(migrate.head(), file)
    return file


def _open_all(db: str) -> None:
    with TraceReader(db) as reader, TraceWriter(db), TraceWriter(db, checkpoint=False):
        list(reader.iter_steps(2))
        with reader.snapshot() as instant:
            instant.info()


def _export(db: str, folder: Path, *formats: str) -> list[Path]:
    from oki_trace.exchange.exporting import export
    from oki_trace.exchange.formats import Format

    written = []
    with TraceReader(db) as reader:
        for name in formats:
            target = folder / f"export-{name}"
            export(reader, 1, Format(name), target, io.StringIO(), tensors=name == "json")
            written.append(target)
    return written


def _import_path(db: str, folder: Path) -> None:
    from oki_trace.exchange.importing import import_path

    for path in _export(db, folder, "json", "parquet"):
        import_path(path, db)


def _import_stream(db: str, folder: Path) -> None:
    from oki_trace.exchange.importing import import_stream

    path = _export(db, folder, "jsonl", "html")[0]
    with path.open("rb") as stream:
        import_stream(stream, db)


def _import_files(db: str, folder: Path) -> None:
    from oki_trace.exchange.importing import import_files

    (path,) = _export(db, folder, "json")
    with path.open("rb") as file:
        import_files({".json": file}, db)


def _questions(db: str) -> None:
    from oki_trace.analysis.background_sync import BackgroundSync
    from oki_trace.analysis.query_session import QuerySession

    with QuerySession(db) as session:
        session.sql("SELECT count(*) FROM step")
        session.rebuild()
    with TraceReader(db) as reader:
        assert BackgroundSync(db, reader).behind(60) is None


# By the place where the function is: a public one that takes a store's address.
ENTRIES: dict[str, Callable[[str, Path], object]] = {
    "oki_trace.store.reading.reader.TraceReader": lambda db, _: TraceReader(db).close(),
    "oki_trace.store.writing.writer.TraceWriter": lambda db, _: _open_all(db),
    "oki_trace.store.schema.migrate.ensure": lambda db, _: migrate.ensure(db),
    "oki_trace.store.schema.migrate.upgrade": lambda db, _: migrate.upgrade(db),
    "oki_trace.store.schema.migrate.downgrade": lambda db, _: migrate.downgrade(db, migrate.head()),
    "oki_trace.store.schema.migrate.current": lambda db, _: migrate.current(db),
    "oki_trace.store.schema.migrate.migration": lambda db, _: _enter(migrate.migration(db)),
    "oki_trace.store.schema.migrate.prepare": lambda db, _: migrate.prepare(db),
    "oki_trace.store.maintenance.vacuum.vacuum": lambda db, _: vacuum.vacuum(db),
    "oki_trace.store.writing.copy.copy": lambda db, to: (
        list(copy.copy(db, to / "copy.db")),
        list(copy.copy(to / "copy.db", db)),
    ),
    "oki_trace.store.schema.identity.address": lambda db, _: identity.address(db),
    "oki_trace.exchange.importing.import_path": _import_path,
    "oki_trace.exchange.importing.import_stream": _import_stream,
    "oki_trace.exchange.importing.import_files": _import_files,
    "oki_trace.analysis.query_session.QuerySession": lambda db, _: _questions(db),
    "oki_trace.analysis.folder.folder_of": lambda db, _: _questions(db),
    "oki_trace.analysis.cache.Cache": lambda db, _: _questions(db),
    "oki_trace.analysis.background_sync.BackgroundSync": lambda db, _: _questions(db),
}


def _enter(context: contextlib.AbstractContextManager[object]) -> None:
    with context:
        pass


def _entries() -> set[str]:
    """Every public function and class with a parameter that is a store's address."""
    found = set()
    for module in pkgutil.walk_packages(oki_trace.__path__, "oki_trace."):
        if module.name.startswith(("oki_trace._", "oki_trace.cli", "oki_trace.__")):
            continue
        members = vars(import_module(module.name))
        for name, member in members.items():
            here = getattr(member, "__module__", None) == module.name
            if here and not name.startswith("_") and callable(member):
                with contextlib.suppress(ValueError, TypeError):
                    parameters = inspect.signature(member).parameters.values()
                    if any(parameter.annotation == "Db" for parameter in parameters):
                        found.add(f"{module.name}.{name}")
    return found


def test_every_entry_is_tried() -> None:
    assert _entries() == set(ENTRIES)


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_keeps_the_locks(golden: Path, tmp_path: Path, name: str) -> None:
    with in_use(golden) as check:
        for _ in range(2):
            folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
            folder.mkdir()
            ENTRIES[name](str(golden), folder)
            check(name)


def test_verification_and_a_reply_keep_the_locks(golden: Path) -> None:
    with in_use(golden) as check:
        with TraceReader(golden) as reader:
            assert [str(finding) for finding in Verification(reader)] == []
        check("verify")
        with TraceWriter(golden) as writer:
            writer.queue_reply(1, ModelChoice("m"), Sampling(), CapturePolicy(), claim=True)
            writer.mark_interrupted()
        check("a reply")


def test_readers_that_come_and_go_leave_no_descriptors(golden: Path) -> None:
    with in_use(golden) as check:
        TraceReader(golden).close()
        before = len(list(Path("/proc/self/fd").iterdir()))
        for _ in range(50):
            TraceReader(golden).close()
        assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2
        check("fifty readers")


def test_the_log_survives_other_processes(golden: Path) -> None:
    """What a terminal does beside an open explorer, which made its reader and writer before."""
    with in_use(golden) as check, TraceReader(golden) as late:
        for number in range(3):
            done = subprocess.run(
                [sys.executable, "-m", "oki_trace", "rename", "1", f"title {number}"],
                env={**os.environ, "OKI_TRACE_DB": str(golden)},
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            check("rename in another process")
            assert late.conversation(1).title == f"title {number}"


# ------------------------------------------------------------------ what is not ours


def _sqlite_of_others(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE theirs (x)")


@pytest.mark.parametrize("kind", ["a database in WAL mode", "garbage", "a few bytes"])
def test_a_file_of_others_is_left_as_it_is(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "theirs.db"
    if kind.startswith("a database"):
        _sqlite_of_others(path)
    else:
        path.write_bytes(b"x" * (5000 if kind == "garbage" else 9))
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
    for open_it in (TraceReader, TraceWriter, migrate.current):
        with pytest.raises(SchemaError, match="not an oki-trace store"):
            open_it(path)
    after = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) <= {"theirs.db.migrate.lock"}


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path):
        with pytest.raises(StoreError, match="it is not a file"):
            TraceReader(path)


def test_a_mark_is_read_while_another_process_checkpoints(golden: Path) -> None:
    """Its first page is copied from the log before the file has grown to what that page says."""
    first_page = (
        "import sys; file = open(sys.argv[1], 'r+b'); file.seek(28);"
        "file.write((1 << 20).to_bytes(4, 'big'))"
    )
    with TraceWriter(golden) as writer:
        for _ in range(20):  # the file grows, so the log holds its first page
            writer.create_conversation("x" * 1000)
        subprocess.run([sys.executable, "-c", first_page, str(golden)], check=True)
        with pytest.raises(sqlite3.DatabaseError, match="malformed"):
            identity._read_application_id(golden, "mode=ro&immutable=1")
        assert identity.is_ours(golden)
        TraceReader(golden).close()
