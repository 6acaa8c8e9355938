"""Importing: a separate process reads and checks a whole file before the store is touched.

A file may come from anyone. The reading process limits the memory, disk and
time that it takes, and ends with this process.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from oki_trace.errors import StoreError
from oki_trace.exchange.reading.process import Request
from oki_trace.exchange.reading.source import CHUNK, refuse_unreadable
from oki_trace.exchange.reading.supervisor import Reader, Tick, started
from oki_trace.exchange.refusal import refused
from oki_trace.exchange.scratch import scratch_folder

if TYPE_CHECKING:
    from oki_trace.store.schema.identity import Db

# The memory that reading may take beyond the program itself.
MEMORY_BYTES = 400_000_000
# The staging store may grow to this many times the size of the file, and half of the free disk.
MAX_STAGED_RATIO = 50
MAX_STAGED_FLOOR = 100_000_000


@dataclass(frozen=True, slots=True)
class Imported:
    """The new conversations, and how many messages and steps they have.

    ``changed`` messages differ from what was recorded, by their digests;
    ``without_digest`` have none, so a change would not be noticed.
    """

    conversations: tuple[int, ...]
    messages: int
    steps: int
    tensors_from: Path | None
    changed: int = 0
    without_digest: int = 0


def import_path(
    path: Path, db: Db, progress: Tick | None = None, *, memory_bytes: int = MEMORY_BYTES
) -> Imported:
    """Import a file or a folder; its conversations get new ids.

    Raises ExchangeError if it cannot be imported, StoreError when the store fails.
    """
    with started() as reader, _scratch(db) as folder:
        return _import(reader, path, folder, db, progress, memory_bytes)


def import_stream(
    stream: BinaryIO, db: Db, progress: Tick | None = None, *, memory_bytes: int = MEMORY_BYTES
) -> Imported:
    """Import a file of any format from a pipe."""
    with started() as reader, _scratch(db) as folder:
        path = folder / "standard-input"
        _spool(stream, path, progress)
        return _import(reader, path, folder, db, progress, memory_bytes)


def import_files(files: Mapping[str, BinaryIO], db: Db, progress: Tick | None = None) -> Imported:
    """Import an upload: a file, with its safetensors if it has any, by their suffixes."""
    with started() as reader, _scratch(db) as folder:
        for suffix, source in files.items():
            with (folder / f"upload{suffix}").open("wb") as file:
                shutil.copyfileobj(source, file, CHUNK)
        first = next(suffix for suffix in files if suffix != ".safetensors" or len(files) == 1)
        return _import(reader, folder / f"upload{first}", folder, db, progress, MEMORY_BYTES)


@contextmanager
def _scratch(db: Db) -> Iterator[Path]:
    """A folder beside the store, on a disk meant for such sizes; else a temporary one."""
    from oki_trace.store.schema import identity

    store = identity.file_of(identity.address(db))
    beside = store is not None and store.parent.is_dir() and os.access(store.parent, os.W_OK)
    parent = store.parent if store is not None and beside else Path(tempfile.gettempdir())
    try:
        with scratch_folder(parent) as folder:
            yield folder
    except OSError as error:
        raise StoreError(
            f"Cannot write to {parent}: {error.strerror or error}. Free some disk space, or set "
            "TMPDIR."
        ) from error


def _import(
    reader: Reader, path: Path, folder: Path, db: Db, progress: Tick | None, memory_bytes: int
) -> Imported:
    from oki_trace.store.writing.copy import copy

    staging = folder / "staging.db"
    limit = _most_staged(path, folder)
    request = Request(str(path.absolute()), str(staging), limit, memory_bytes)
    read = reader.serve(request, progress or (lambda done, total: None))
    copied = [conversation.new_id for conversation in copy(staging, db, None, progress)]
    ids = tuple(number for number in copied if number is not None)
    if len(ids) < len(copied):
        raise StoreError("A conversation could not be copied from the import: import it again.")
    tensors_from = None if read.tensors_from is None else Path(read.tensors_from)
    return Imported(ids, read.messages, read.steps, tensors_from, read.changed, read.without_digest)


def _spool(stream: BinaryIO, path: Path, progress: Tick | None) -> None:
    """Write a pipe into a file of at most half of the free disk."""
    most = shutil.disk_usage(path.parent).free // 2
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
