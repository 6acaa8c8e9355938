"""Folders for work in progress. One whose process was killed is removed by the next.

The process that works in a folder holds the lock in it, and a lock goes with
its process, however that ends.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

_PREFIX = ".oki-trace-import-"
_UNLOCKED = ".new"  # a folder between being made and being locked
_LOCK = "lock"
_NEW_SECONDS = 3600


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A new folder in ``parent`` for this process and its user alone, removed afterwards."""
    sweep(parent)
    made = Path(tempfile.mkdtemp(prefix=_PREFIX, suffix=_UNLOCKED, dir=parent))
    lock = FileLock(made / _LOCK, mode=0o600)
    folder = made
    try:
        with lock:
            # Only now may a sweep look at it.
            folder = made.rename(made.with_suffix(""))
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep(parent: Path) -> None:
    """Remove the folders of processes that are gone."""
    for folder in parent.glob(f"{_PREFIX}*"):
        # Another's, or another sweep takes it.
        with suppress(OSError, Timeout):
            if folder.suffix == _UNLOCKED:
                if time.time() - folder.stat().st_mtime > _NEW_SECONDS:
                    shutil.rmtree(folder)
            elif folder.is_dir() and not folder.is_symlink():
                with FileLock(folder / _LOCK, blocking=False):
                    shutil.rmtree(folder)
