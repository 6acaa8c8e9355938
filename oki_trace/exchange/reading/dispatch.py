"""Finds out what a path holds, and reads it into a staging store."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from oki_trace.exchange.reading.json_import import JsonImport
from oki_trace.exchange.reading.json_stream import JsonStream
from oki_trace.exchange.reading.source import CHUNK, is_zip, opened, refuse_unreadable, unpack
from oki_trace.exchange.reading.staging import Staging
from oki_trace.exchange.tensor_file import SUFFIX, TensorFile


def read(
    path: Path, staging: Staging, pulse: Callable[[], None], loaded: Callable[[], None]
) -> Path | None:
    """Read a file or a folder of tables into ``staging``; returns the file of its tensors.

    ``loaded`` is called once all libraries are loaded, before the first byte is
    parsed; ``pulse`` with every piece. Raises ExchangeError, and MemoryError.
    """
    with ExitStack() as closing:
        folder: Path | None = path if path.is_dir() else None
        if folder is None:
            file = closing.enter_context(opened(path, follow=True))
            start = file.read(CHUNK)
            file.seek(0)
            refuse_unreadable(start)
            folder = staging.path.parent / "unpacked" if is_zip(start) else None
        if folder is not None:
            # Here, because pyarrow takes a while to import.
            from oki_trace.exchange.reading.parquet_import import import_tables
            from oki_trace.exchange.tables import FILES

            loaded()
            if folder != path:
                folder.mkdir()
                unpack(file, folder, FILES, pulse)
            import_tables(folder, staging, pulse)
            return None
        loaded()
        beside = path.with_suffix(SUFFIX)
        tensors = None
        if beside != path and os.path.lexists(beside):
            tensors = closing.enter_context(TensorFile(beside))
        JsonImport(JsonStream(file, pulse), staging, tensors).run()
        return beside if tensors is not None else None
