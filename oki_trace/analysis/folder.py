"""Where the cache lies, and the two things that keep it whole: a lock and a manifest.

A part is a folder of Parquet files, a file a table, made under another name and
renamed when it is complete; it never changes again. The manifest lists the parts
that count, and is replaced in one go: whoever reads it sees all of a change or
nothing. What it does not list is waste, and is swept away by the next change.
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

# What the files hold, and how: another number, and everything is written anew.
FORMAT = 2

_MANIFEST = "manifest.json"
_MESSAGES = "messages.json"
# A first question about a large store takes minutes; others wait for it.
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
    """``stamp``: the state of the store that the parts were compared with last."""

    stamp: str
    parts: tuple[Part, ...]


EMPTY = Manifest("", ())


def folder_of(db: Db) -> Path:
    """Beside a SQLite file; in the data folder on PostgreSQL, and where that cannot be written."""
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
        """One process at a time changes the folder; readers need no lock."""
        with self._told_plainly():
            identity.create_folder(self.path / _MANIFEST)
            lock = FileLock(self.path / "lock", mode=0o600)
            try:
                lock.acquire(timeout=_LOCK_SECONDS)
            except Timeout as error:
                raise StoreError(
                    f"The cache {self.path} is being written by another process: wait for it to "
                    "finish."
                ) from error
            try:
                yield
            finally:
                lock.release()

    def manifest(self) -> Manifest:
        """What counts. EMPTY when there is none, or it is torn, or a file of it is not whole."""
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
        """Make this what counts, and sweep away the rest. Under the lock."""
        document = {"format": FORMAT, **asdict(manifest)}
        self._write(self.path / _MANIFEST, json.dumps(document))
        kept = {part.name for part in manifest.parts}
        for entry in self.path.iterdir():
            if entry.is_dir() and entry.name not in kept:
                shutil.rmtree(entry, ignore_errors=True)

    @contextmanager
    def new_part(self) -> Iterator[NewPart]:
        """A folder to fill; a part once ``NewPart.keep`` was called, and swept away otherwise."""
        made = self.path / f".new-{uuid.uuid4().hex}"
        made.mkdir(mode=0o700)
        try:
            yield NewPart(self, made)
        finally:
            shutil.rmtree(made, ignore_errors=True)

    def marks(self, part: Part) -> dict[str, str]:
        """The messages of a part: what tells each from another that is given its number."""
        text = (self.path / part.name / _MESSAGES).read_text(encoding="utf-8")
        try:
            found: dict[str, str] = json.loads(text)
        except ValueError as error:
            raise StoreError(
                f"The cache {self.path} is damaged: run `oki-trace sql --rebuild`."
            ) from error
        return found

    def file(self, part: Part, table: str) -> str:
        return str(self.path / part.name / f"{table}.parquet")

    def _write(self, path: Path, text: str) -> None:
        fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        descriptor = os.open(fresh, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)

    @contextmanager
    def _told_plainly(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"The cache {self.path} cannot be written ({error.strerror or error}): check the "
                "folder's permissions and the room on the disk."
            ) from error


class NewPart:
    """A part being made."""

    def __init__(self, folder: Folder, path: Path) -> None:
        self._folder = folder
        self.path = path

    def file(self, table: str) -> Path:
        return self.path / f"{table}.parquet"

    def keep(self, steps: int, marks: dict[str, str]) -> Part:
        """Complete: on the disk, private, and under its final name."""
        self._folder._write(self.path / _MESSAGES, json.dumps(marks))
        sizes = {}
        for file in sorted(self.path.iterdir()):
            file.chmod(0o600)
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            sizes[file.name] = file.stat().st_size
        name = uuid.uuid4().hex
        self.path.rename(self._folder.path / name)
        return Part(name, len(marks), steps, sizes)
