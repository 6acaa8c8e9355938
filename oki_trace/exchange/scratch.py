"""Folders for work in progress; the folder of a killed process is removed by the next import.

The process that uses a folder holds the lock in it, and the system releases the
lock when that process ends.
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
_UNLOCKED = ".new"  # a folder that is not locked yet
_LOCK = "lock"
_NEW_SECONDS = 3600


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A new folder in ``parent`` that only this user can read, removed afterwards."""
    sweep(parent)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, suffix=_UNLOCKED, dir=parent))
    try:
        with FileLock(folder / _LOCK, mode=0o600):
            # From here on the lock protects it from a sweep.
            folder = folder.rename(folder.with_suffix(""))
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep(parent: Path) -> None:
    """Remove the folders of processes that have ended."""
    for folder in parent.glob(f"{_PREFIX}*"):
        # It belongs to another user or a running process, or another sweep removes it.
        with suppress(OSError, Timeout):
            if folder.suffix == _UNLOCKED:
                if time.time() - folder.stat().st_mtime > _NEW_SECONDS:
                    shutil.rmtree(folder)
            elif folder.is_dir() and not folder.is_symlink():
                with FileLock(folder / _LOCK, blocking=False):
                    shutil.rmtree(folder)
