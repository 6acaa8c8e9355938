"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from oki_trace.errors import ExchangeError


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """Write beside ``path``, sync, and rename over it; on an error nothing is left.

    Raises ExchangeError when the folder cannot be written.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    except OSError as error:
        raise ExchangeError(
            f"Cannot write to {path.parent}: {error.strerror}. Choose another --output."
        ) from error
    part = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
