"""Files and folders that are written atomically."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from oki_trace.errors import ExchangeError


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """Write text beside ``path``, sync, and rename over it; on an error nothing is left.

    Raises ExchangeError when it cannot be written there.
    """
    with _replacing(path, "w", encoding="utf-8", newline="\n") as file:
        yield file


@contextmanager
def replacing_bytes(path: Path) -> Iterator[BinaryIO]:
    """The same for a file of bytes."""
    with _replacing(path, "wb") as file:
        yield file


@contextmanager
def _replacing(path: Path, mode: str, **options: Any) -> Iterator[Any]:
    part: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        part = Path(name)
        with os.fdopen(handle, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # What a temporary file has of privacy is not what was asked for.
        part.chmod(0o666 & ~_umask())
        part.replace(path)
    except BaseException as error:
        if part is not None:
            part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _cannot_write(path, error) from error
        raise


@contextmanager
def replacing_folder(path: Path, names: frozenset[str]) -> Iterator[Path]:
    """A folder to write into, which takes the place of ``path`` when all is written.

    ``names`` are the files it may hold. A folder that holds anything else was
    not written by this, and is left alone: ExchangeError.
    """
    part: Path | None = None
    try:
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise ExchangeError(f"{path} is there and is no folder. Choose another --output.")
        if path.exists() and (other := sorted({p.name for p in path.iterdir()} - names)):
            raise ExchangeError(
                f"{path} holds files that are no export, such as {other[0]}. Choose another "
                "--output."
            )
        part = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
        yield part
        for file in part.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        part.chmod(0o777 & ~_umask())
        if path.exists():
            # A folder is not renamed over another: the old one steps aside for that moment.
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".old"))
            path.replace(old / path.name)
            part.replace(path)
            shutil.rmtree(old)
        else:
            part.replace(path)
    except BaseException as error:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError):
            raise _cannot_write(path, error) from error
        raise


def _umask() -> int:
    now = os.umask(0o022)
    os.umask(now)
    return now


def _cannot_write(path: Path, error: OSError) -> ExchangeError:
    return ExchangeError(
        f"Cannot write {path}: {error.strerror or error}. Choose another --output."
    )
