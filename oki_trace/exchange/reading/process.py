"""The process that reads a file that may be malicious; ``supervisor`` starts and ends it.

It reads one request from standard input, a line of JSON, limits its own memory
before the first byte of the file is parsed, and ends when its input is closed,
which means that its parent has ended. It writes lines of JSON to standard
output: its progress, then the outcome.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from oki_trace.child_process import limit_memory
from oki_trace.errors import OkiTraceError
from oki_trace.exchange.reading.source import CHUNK, is_zip, opened, refuse_unreadable, unpack
from oki_trace.exchange.refusal import refused

_PROGRESS_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Request:
    """The file to read, and ``staging``, the file to write, in a separate folder.

    ``memory_bytes``: the memory that reading may take beyond the program itself.
    """

    path: str
    staging: str
    staging_bytes: int
    memory_bytes: int


@dataclass(frozen=True)
class Outcome:
    """The result of reading. ``tensors_from``: the file of the tensors.

    ``changed`` counts the messages that do not match their digests, ``without_digest``
    those that have none, so that a change would not be noticed. ``error``: the class
    and the sentence of the error that refuses the file.
    """

    messages: int = 0
    steps: int = 0
    tensors_from: str | None = None
    changed: int = 0
    without_digest: int = 0
    error: tuple[str, str] | None = None


class Progress:
    """Reports progress to the parent now and then; every call counts as progress."""

    def __init__(self, channel: TextIO) -> None:
        self._channel = channel
        self._steps = 0
        self._reported = 0.0

    def step(self) -> None:
        self._steps += 1
        self.pulse()

    def pulse(self) -> None:
        now = time.monotonic()
        if now - self._reported >= _PROGRESS_SECONDS:
            self._reported = now
            self._write({"steps": self._steps})

    def end(self, outcome: Outcome) -> None:
        self._write({"outcome": asdict(outcome)})

    def _write(self, value: Any) -> None:
        self._channel.write(json.dumps(value) + "\n")
        self._channel.flush()


def main() -> None:
    """Serve one request."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    # Anything that a library prints must not get into the channel.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    # Libraries are loaded while the parent prepares the request.
    import_module("oki_trace.exchange.reading.json_import")
    request = Request(**json.loads(sys.stdin.readline()))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    progress = Progress(channel)
    progress.end(serve(request, progress, limit_memory))


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def serve(request: Request, progress: Progress, limit: Callable[[int], None]) -> Outcome:
    """Read the file. Any error that a malicious file causes becomes one sentence."""
    try:
        return _read(request, progress, limit)
    except MemoryError:
        error: OkiTraceError = refused(
            f"it needs more than {request.memory_bytes / 1e6:,.0f} MB of memory (if you trust it, "
            "allow more with `oki-trace import --memory`)"
        )
    except OkiTraceError as caught:
        error = caught
    except RecursionError:
        error = refused("it is nested too deeply")
    except OSError as caught:
        error = refused(f"{caught.strerror or caught}")
    except (ValueError, TypeError, LookupError, OverflowError, ArithmeticError) as caught:
        error = refused(f"its content is invalid ({type(caught).__name__}: {str(caught)[:200]})")
    return Outcome(error=(type(error).__name__, str(error)))


def _read(request: Request, progress: Progress, limit: Callable[[int], None]) -> Outcome:
    """Detect the format of the path, and read it into the staging store."""
    from oki_trace.exchange.reading.json_import import JsonImport
    from oki_trace.exchange.reading.json_stream import JsonStream
    from oki_trace.exchange.reading.staging import Staging
    from oki_trace.exchange.tensor_file import SUFFIX, TensorFile

    path = Path(request.path)
    tensors_from = None
    with ExitStack() as closing:
        staging = Staging(Path(request.staging), request.staging_bytes, progress.step)
        closing.callback(staging.close)
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

            # Memory is limited once libraries are loaded: theirs is not the file's.
            limit(request.memory_bytes)
            if folder != path:
                folder.mkdir()
                unpack(file, folder, FILES, progress.pulse)
            import_tables(folder, staging, progress.pulse)
        else:
            limit(request.memory_bytes)
            beside = path.with_suffix(SUFFIX)
            tensors = None
            if beside != path and os.path.lexists(beside):
                tensors = closing.enter_context(TensorFile(beside))
                tensors_from = str(beside)
            JsonImport(JsonStream(file, progress.pulse), staging, tensors).run()
    if not staging.began:
        raise refused("it contains no conversation")
    counts = (staging.messages, staging.steps, tensors_from)
    return Outcome(*counts, staging.changed, staging.without_digest)


if __name__ == "__main__":
    main()
