"""Importing: what a path holds is found out, checked whole, and then kept or not at all.

A file may be anyone's. Nothing in it names a place to read or write; what it
unpacks to is bounded by its own size; and no check is left for after the first
row has reached the store.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from oki_trace.errors import ExchangeError, OkiTraceError, StoreError
from oki_trace.exchange.fields import wrong
from oki_trace.exchange.json_import import JsonImport
from oki_trace.exchange.json_stream import JsonStream
from oki_trace.exchange.staging import Staging
from oki_trace.exchange.tensor_file import SUFFIX, TensorFile
from oki_trace.store.copy import copy
from oki_trace.store.identity import Db

Tick = Callable[[int, int], None]  # steps done, of all (as far as known)

# A zip may hold this many times its own size: Parquet is compressed already.
MAX_UNPACKED_RATIO = 20
MAX_UNPACKED_FLOOR = 100_000_000
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Imported:
    """The conversations as the store now has them."""

    conversations: tuple[int, ...]
    messages: int
    steps: int
    tensors_from: Path | None


def import_path(path: Path, db: Db, progress: Tick | None = None) -> Imported:
    """Import a file or a folder; its conversations get new ids.

    Raises ExchangeError for what cannot be imported, StoreError when the store fails.
    """
    with tempfile.TemporaryDirectory(prefix="oki-trace-import-") as room:
        staging = Staging(Path(room) / "staging.db")
        tensors_from = None
        try:
            with _said_plainly():
                tensors_from = _read(path, Path(room), staging, progress)
        finally:
            staging.close()
        if not staging.messages and not staging.began:
            raise wrong("there is no conversation in it")
        new = [one.new_id for one in copy(Path(room) / "staging.db", db, None, progress)]
    if None in new:
        raise StoreError("A conversation could not be copied from the import: import it again.")
    ids = tuple(number for number in new if number is not None)
    return Imported(ids, staging.messages, staging.steps, tensors_from)


def import_stream(stream: BinaryIO, db: Db, progress: Tick | None = None) -> Imported:
    """Import what comes from a pipe: a file of any format, a zip too."""
    with tempfile.TemporaryDirectory(prefix="oki-trace-import-") as room:
        path = Path(room) / "standard-input"
        with path.open("wb") as file:
            shutil.copyfileobj(stream, file, _CHUNK)
        return import_path(path, db, progress)


def _read(path: Path, room: Path, staging: Staging, progress: Tick | None) -> Path | None:
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, 0)

    if path.is_dir():
        _read_tables(path, staging, tick)
        return None
    with ExitStack() as closing:
        file = closing.enter_context(_opened(path))
        start = file.read(4)
        file.seek(0)
        if start[:2] == b"PK":
            folder = room / "unpacked"
            folder.mkdir()
            _unpack(file, folder)
            _read_tables(folder, staging, tick)
            return None
        if start == b"PAR1":
            raise wrong("it is one table of an export: give the folder it stands in")
        if start[:2] == b"\x1f\x8b" or start == b"\x28\xb5\x2f\xfd":
            raise wrong("it is compressed: unpack it first")
        beside = path.with_suffix(SUFFIX)
        tensors = None
        if beside != path and os.path.lexists(beside):
            if beside.is_symlink() or not beside.is_file():
                raise wrong(f"{beside.name} beside it is no file")
            tensors = closing.enter_context(TensorFile(beside))
        JsonImport(JsonStream(file, path.name), staging, tensors, tick).run()
        return beside if tensors is not None else None


def _read_tables(folder: Path, staging: Staging, tick: Callable[[], None]) -> None:
    # Here, because pyarrow takes a while to import.
    from oki_trace.exchange.parquet_import import import_tables

    import_tables(folder, staging, tick)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A regular file: a pipe or a device might never end."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise ExchangeError(f"{path} is no file. Pipe what it says into: import -")
            yield file
    except OSError as error:
        raise ExchangeError(
            f"Cannot read {path}: {error.strerror or error}. Give a file or folder of an export."
        ) from error


def _unpack(file: BinaryIO, folder: Path) -> None:
    """The tables of a zip, at its top or in one folder of it, and nothing else."""
    from oki_trace.exchange.tables import FILES

    size = os.fstat(file.fileno()).st_size
    most = MAX_UNPACKED_FLOOR + MAX_UNPACKED_RATIO * size
    try:
        with zipfile.ZipFile(file) as packed:
            members = [member for member in packed.infolist() if not member.is_dir()]
            if len(members) > len(FILES):
                raise wrong("the zip holds more files than an export has")
            for member in members:
                name = _table_name(member)
                if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise wrong("the zip is packed in another way than deflate")
                if name not in FILES or (folder / name).exists():
                    raise wrong(f"the zip holds {member.filename[:80]!r}, which is no table")
                # Not what it says of itself counts, but what comes out.
                with packed.open(member) as source, (folder / name).open("xb") as target:
                    while chunk := source.read(_CHUNK):
                        most -= len(chunk)
                        if most < 0:
                            raise wrong("the zip unpacks to far more than an export would")
                        target.write(chunk)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, RuntimeError, EOFError) as error:
        raise wrong(f"the zip is damaged or locked ({error})") from error
    except (NotImplementedError, ValueError) as error:
        raise wrong(f"the zip is of an unknown kind ({error})") from error


def _table_name(member: zipfile.ZipInfo) -> str:
    path = PurePosixPath(member.filename)
    tricks = path.is_absolute() or ".." in path.parts or "\\" in member.filename
    linked = stat.S_ISLNK(member.external_attr >> 16)
    if tricks or linked or len(path.parts) > 2:
        raise wrong(f"the zip holds {member.filename[:80]!r}, which is no place for a table")
    return path.name


@contextmanager
def _said_plainly() -> Iterator[None]:
    """Whatever a hostile file brings about is one line; a full disk says its own."""
    try:
        yield
    except OkiTraceError:
        raise
    except RecursionError as error:
        raise wrong("it is nested too deeply") from error
    except MemoryError as error:
        raise wrong("it needs more memory than there is") from error
    except OSError as error:
        raise wrong(f"{error.strerror or error}") from error
    except (ValueError, TypeError, LookupError, OverflowError, ArithmeticError) as error:
        raise wrong(f"it makes no sense ({type(error).__name__}: {error})") from error
