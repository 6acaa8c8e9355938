"""Writes files and folders atomically."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from oki_trace.errors import ExchangeError


@contextmanager
def replacing(path: Path, mode: Literal["w", "wb"] = "w") -> Iterator[Any]:
    """A file that replaces ``path`` once all is written and synced; nothing is left on an error.

    Text is UTF-8. Raises ExchangeError when it cannot be written.
    """
    part: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        part = Path(name)
        text: Any = {"encoding": "utf-8", "newline": "\n"} if mode == "w" else {}
        with os.fdopen(handle, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # A temporary file is private, which the export need not be.
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
    """A folder that replaces ``path`` once all of its files are written.

    ``names`` are the files it may hold. Raises ExchangeError for a ``path`` with
    any other file, which is not an export, and when it cannot be written.
    """
    part: Path | None = None
    try:
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise ExchangeError(f"{path} exists and is not a folder. Choose another --output.")
        if path.exists() and (other := sorted({p.name for p in path.iterdir()} - names)):
            raise ExchangeError(
                f"{path} holds files of no export, such as {other[0]}. Choose another --output."
            )
        part = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
        yield part
        for file in part.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        part.chmod(0o777 & ~_umask())
        if path.exists():
            # A folder cannot be renamed over another one.
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
    umask = os.umask(0o022)
    os.umask(umask)
    return umask


def _cannot_write(path: Path, error: OSError) -> ExchangeError:
    return ExchangeError(
        f"Cannot write {path}: {error.strerror or error}. Choose another --output."
    )
