"""Writes files and folders atomically."""

from __future__ import annotations

import os
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
    text: Any = {"encoding": "utf-8", "newline": "\n"} if mode == "w" else {}
    with _folder_beside(path) as private:
        part = private / path.name
        with part.open(mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)


@contextmanager
def replacing_folder(path: Path, names: frozenset[str]) -> Iterator[Path]:
    """A folder that replaces ``path`` once all of its files are written.

    ``names`` are the files it may hold. Raises ExchangeError for a ``path`` with
    any other file, which is not an export, and when it cannot be written.
    """
    with _folder_beside(path) as private:
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise ExchangeError(f"{path} exists and is not a folder. Choose another --output.")
        if path.exists() and (other := sorted({p.name for p in path.iterdir()} - names)):
            raise ExchangeError(
                f"{path} contains files that are not part of an export, such as {other[0]}. "
                "Choose another --output."
            )
        part, old = private / "new", private / "old"
        part.mkdir()
        yield part
        for file in part.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        if not path.exists():
            part.replace(path)
            return
        # A folder cannot be renamed over another one.
        path.replace(old)
        try:
            part.replace(path)
        except OSError:
            old.replace(path)
            raise


@contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """A folder for unfinished files on the disk of ``path``, which no other user can read."""
    try:
        with tempfile.TemporaryDirectory(
            dir=path.parent, prefix=f".{path.name}.", suffix=".part", ignore_cleanup_errors=True
        ) as folder:
            yield Path(folder)
    except OSError as error:
        raise ExchangeError(
            f"Cannot write {path}: {error.strerror or error}. Choose another --output."
        ) from error
