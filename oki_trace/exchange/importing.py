"""Imports files: a separate process reads and checks the whole file before the store changes.

A file may come from anyone. The reading process has limits on memory, disk and time,
and ends with this process.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from filelock import FileLock, Timeout

from oki_trace.errors import StoreError
from oki_trace.exchange.reading.process import Outcome, Request
from oki_trace.exchange.reading.source import CHUNK, refuse_unreadable
from oki_trace.exchange.reading.supervisor import Tick, started
from oki_trace.exchange.refusal import refused

if TYPE_CHECKING:
    from oki_trace.store.schema.identity import Db

# The memory that reading may take beyond the program itself.
MEMORY_BYTES = 400_000_000
# The staging store may grow to this many times the size of the file, and half of the free disk.
MAX_STAGED_RATIO = 50
MAX_STAGED_FLOOR = 100_000_000
_PREFIX = ".oki-trace-import-"
_LOCK = "lock"
_UNLOCKED = ".new"  # the suffix of a folder that is not locked yet, and for how long at most
_UNLOCKED_SECONDS = 3600


@dataclass(frozen=True)
class Imported(Outcome):
    """The ids of the new conversations, and what was read."""

    conversations: tuple[int, ...] = ()


def import_path(
    path: Path, db: Db, progress: Tick | None = None, *, memory_bytes: int = MEMORY_BYTES
) -> Imported:
    """Import a file or a folder; its conversations get new ids.

    Raises ExchangeError if it cannot be imported, StoreError when the store fails.
    """
    return _import(lambda folder: path, db, progress, memory_bytes)


def import_stream(
    stream: BinaryIO, db: Db, progress: Tick | None = None, *, memory_bytes: int = MEMORY_BYTES
) -> Imported:
    """Import a file of any format from a pipe."""
    return _import(partial(_spool, stream, progress), db, progress, memory_bytes)


def import_files(files: Mapping[str, BinaryIO], db: Db, progress: Tick | None = None) -> Imported:
    """Import an upload: a file, with its safetensors if it has any, by their suffixes."""

    def save(folder: Path) -> Path:
        for suffix, source in files.items():
            with (folder / f"upload{suffix}").open("wb") as file:
                shutil.copyfileobj(source, file, CHUNK)
        first = next(suffix for suffix in files if suffix != ".safetensors" or len(files) == 1)
        return folder / f"upload{first}"

    return _import(save, db, progress, MEMORY_BYTES)


@contextmanager
def _scratch(db: Db) -> Iterator[Path]:
    """A new folder beside the store, on a disk meant for such sizes; else a temporary one.

    Only this user can read it, and it is removed afterwards. This process holds
    the lock in it; the system releases a lock when its process ends, so the next
    import removes the folder of a killed one.
    """
    from oki_trace.store.schema import identity

    store = identity.file_of(identity.address(db))
    beside = store is not None and store.parent.is_dir() and os.access(store.parent, os.W_OK)
    parent = store.parent if store is not None and beside else Path(tempfile.gettempdir())
    try:
        _sweep(parent)
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, suffix=_UNLOCKED, dir=parent))
        try:
            with FileLock(folder / _LOCK, mode=0o600):
                # From here on the lock protects it from a sweep.
                folder = folder.rename(folder.with_suffix(""))
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise StoreError(
            f"Cannot write to {parent}: {error.strerror or error}. Free some disk space, or set "
            "TMPDIR."
        ) from error


def _sweep(parent: Path) -> None:
    """Remove the folders of processes that have ended."""
    for folder in parent.glob(f"{_PREFIX}*"):
        # It belongs to another user or a running process, or another sweep removes it.
        with suppress(OSError, Timeout):
            if folder.suffix == _UNLOCKED:
                if time.time() - folder.stat().st_mtime > _UNLOCKED_SECONDS:
                    shutil.rmtree(folder)
            elif folder.is_dir() and not folder.is_symlink():
                with FileLock(folder / _LOCK, blocking=False):
                    shutil.rmtree(folder)


def _import(
    prepare: Callable[[Path], Path], db: Db, progress: Tick | None, memory_bytes: int
) -> Imported:
    """``prepare`` returns the path to read, given a scratch folder."""
    from oki_trace.store.writing.copy import copy

    with started() as reader, _scratch(db) as folder:
        path = prepare(folder)
        staging = folder / "staging.db"
        limit = _most_staged(path, folder)
        request = Request(str(path.absolute()), str(staging), limit, memory_bytes)
        outcome = reader.serve(request, progress or (lambda done, total: None))
        copied = [conversation.new_id for conversation in copy(staging, db, None, progress)]
    ids = tuple(number for number in copied if number is not None)
    if len(ids) < len(copied):
        raise StoreError("A conversation could not be copied from the import: import it again.")
    return Imported(**asdict(outcome), conversations=ids)


def _spool(stream: BinaryIO, progress: Tick | None, folder: Path) -> Path:
    """Write a pipe into a file of at most half of the free disk."""
    path = folder / "standard-input"
    most = shutil.disk_usage(folder).free // 2
    start = b""
    with path.open("wb") as file:
        while chunk := stream.read(CHUNK):
            if len(start) < CHUNK:
                start += chunk
                if len(start) >= CHUNK:
                    refuse_unreadable(start[:CHUNK])
            most -= len(chunk)
            if most < 0:
                raise refused("the pipe would fill more than half of the free disk")
            file.write(chunk)
            if progress is not None:
                progress(0, 0)
    return path


def _most_staged(path: Path, folder: Path) -> int:
    """The limit for the staging store, from the disk space of the files: a sparse one has less."""
    files = [path, path.with_suffix(".safetensors")]
    with suppress(OSError):
        files.extend(path.iterdir() if path.is_dir() else ())
    size = 0
    for file in files:
        with suppress(OSError):
            info = file.stat()
            size += min(info.st_size, getattr(info, "st_blocks", info.st_size) * 512)
    return min(MAX_STAGED_FLOOR + MAX_STAGED_RATIO * size, shutil.disk_usage(folder).free // 2)
