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

    Raises ExchangeError when it cannot be written there.
    """
    part: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        part = Path(name)
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException as error:
        if part is not None:
            part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ExchangeError(
                f"Cannot write {path}: {error.strerror or error}. Choose another --output."
            ) from error
        raise
