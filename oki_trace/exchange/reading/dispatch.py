"""What a path holds is found out and read into a staging store."""

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

    ``loaded`` is called before the first byte of it is parsed, ``pulse`` with
    every piece of it. Raises ExchangeError, and MemoryError.
    """
    if path.is_dir():
        import_tables = _table_reader()
        loaded()
        import_tables(path, staging, pulse)
        return None
    with ExitStack() as closing:
        file = closing.enter_context(opened(path, follow=True))
        start = file.read(CHUNK)
        file.seek(0)
        refuse_unreadable(start)
        if is_zip(start):
            from oki_trace.exchange.tables import FILES

            import_tables = _table_reader()
            loaded()
            folder = staging.path.parent / "unpacked"
            folder.mkdir()
            unpack(file, folder, FILES, pulse)
            import_tables(folder, staging, pulse)
            return None
        loaded()
        beside = path.with_suffix(SUFFIX)
        tensors = None
        if beside != path and os.path.lexists(beside):
            tensors = closing.enter_context(TensorFile(beside))
        JsonImport(JsonStream(file, path.name, pulse), staging, tensors).run()
        return beside if tensors is not None else None


def _table_reader() -> Callable[[Path, Staging, Callable[[], None]], None]:
    # Here, because pyarrow takes a while to import.
    from oki_trace.exchange.reading.parquet_import import import_tables

    return import_tables
