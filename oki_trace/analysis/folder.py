"""The cache's folder: its location, its lock and its manifest.

A part is a folder of Parquet files, one for each table. It is written under another name, renamed
when it is complete, and never changed. The manifest lists the valid parts and is replaced
atomically, so a reader sees a change completely or not at all. The next change removes folders that
the manifest does not list.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from oki_trace.errors import StoreError
from oki_trace.settings import Settings
from oki_trace.store.schema import identity
from oki_trace.store.schema.identity import Db

# The format of the files: with another number, everything is written again.
FORMAT = 5

_MANIFEST = "manifest.json"
_MESSAGES = "messages.json"
# The first question about a large store takes minutes, and others wait for it.
_LOCK_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class Part:
    """``messages`` messages with ``steps`` steps; ``sizes``: bytes by file name."""

    name: str
    messages: int
    steps: int
    sizes: dict[str, int]


@dataclass(frozen=True, slots=True)
class Manifest:
    """``stamp``: the state of the store that the parts were last compared with."""

    stamp: str
    parts: tuple[Part, ...]


EMPTY = Manifest("", ())


def folder_of(db: Db) -> Path:
    """Next to a SQLite file; in the data folder for PostgreSQL, or when that is not writable."""
    url = identity.address(db)
    path = identity.file_of(url)
    if path is not None and (os.access(path.parent, os.W_OK) or not path.parent.exists()):
        return path.with_name(path.name + ".cache")
    if path is not None:
        kind, where = "file", str(path)
    else:
        kind = "postgresql"
        where = f"{url.host}:{url.port or 5432}/{url.database}?{sorted(url.query.items())}"
    name = hashlib.sha256(where.encode()).hexdigest()[:16]
    return (Settings.from_environment().data_dir / "cache" / f"{kind}-{name}").absolute()


class Folder:
    """The cache's folder, readable by its user alone."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time changes the folder; readers need no lock. Raises StoreError."""
        try:
            identity.create_folder(self.path / _MANIFEST)
            with FileLock(self.path / "lock", mode=0o600).acquire(timeout=_LOCK_SECONDS):
                yield
        except Timeout as error:
            raise StoreError(
                f"Another process is writing the cache {self.path}: wait until it has finished."
            ) from error
        except OSError as error:
            raise StoreError(
                f"The cache {self.path} cannot be written ({error.strerror or error}): check the "
                "folder's permissions and the free disk space."
            ) from error

    def manifest(self) -> Manifest:
        """The valid parts. EMPTY when there is no manifest, or it or a file is incomplete."""
        try:
            document = json.loads((self.path / _MANIFEST).read_text(encoding="utf-8"))
            if document["format"] != FORMAT:
                return EMPTY
            parts = tuple(Part(**part) for part in document["parts"])
            for part in parts:
                for name, size in part.sizes.items():
                    if (self.path / part.name / name).stat().st_size != size:
                        return EMPTY
            return Manifest(document["stamp"], parts)
        except (OSError, ValueError, KeyError, TypeError):
            return EMPTY

    def commit(self, manifest: Manifest) -> None:
        """Replace the manifest, and remove folders that it does not list. Needs the lock."""
        document = {"format": FORMAT, **asdict(manifest)}
        fresh = self.path / f".{_MANIFEST}.{uuid.uuid4().hex}"
        _write(fresh, json.dumps(document))
        fresh.replace(self.path / _MANIFEST)
        valid = {part.name for part in manifest.parts}
        for entry in self.path.iterdir():
            if entry.is_dir() and entry.name not in valid:
                shutil.rmtree(entry, ignore_errors=True)

    @contextmanager
    def new_part(self) -> Iterator[NewPart]:
        """A folder to fill; it is removed unless ``NewPart.keep`` makes it a part."""
        path = self.path / f".new-{uuid.uuid4().hex}"
        path.mkdir(mode=0o700)
        try:
            yield NewPart(path)
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def marks(self, part: Part) -> dict[str, str]:
        """The messages of a part by id, each with a mark that identifies it beyond its id."""
        text = (self.path / part.name / _MESSAGES).read_text(encoding="utf-8")
        try:
            marks: dict[str, str] = json.loads(text)
        except ValueError as error:
            raise StoreError(
                f"The cache {self.path} is damaged: run `oki-trace sql --rebuild`."
            ) from error
        return marks

    def file(self, part: Part, table: str) -> str:
        return str(self.path / part.name / f"{table}.parquet")


class NewPart:
    """A part that is being written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def file(self, table: str) -> Path:
        return self.path / f"{table}.parquet"

    def keep(self, steps: int, marks: dict[str, str]) -> Part:
        """Flush the files to the disk, make them private, and give the part its final name."""
        _write(self.path / _MESSAGES, json.dumps(marks))
        sizes = {}
        for file in sorted(self.path.iterdir()):
            file.chmod(0o600)
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
            sizes[file.name] = file.stat().st_size
        part = self.path.rename(self.path.with_name(uuid.uuid4().hex))
        return Part(part.name, len(marks), steps, sizes)


def _write(path: Path, text: str) -> None:
    """Write a new private file, and flush it to the disk."""
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
