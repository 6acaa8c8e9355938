"""The process that reads a file which may be hostile; ``supervisor`` starts and ends it.

It reads one request from standard input, a line of JSON, limits its own memory
before the first byte of the file is parsed, and ends when its input is closed:
when the process that started it is gone. It writes lines of JSON to standard
output: how far it is, and what came of it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from oki_trace.child_process import limit_memory
from oki_trace.errors import OkiTraceError
from oki_trace.exchange.refusal import refused

_NEWS_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Request:
    """What to read, and where to keep it: ``staging`` is a file in a folder for it alone.

    ``memory_bytes``: what reading may take beyond the program itself.
    """

    path: str
    staging: str
    staging_bytes: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What has been read.

    ``changed``: the messages that are not what the file's own digests say;
    ``without_digest`` those that the file has no digest of.
    ``error``: its kind and its sentence, when it cannot be imported.
    """

    messages: int = 0
    steps: int = 0
    tensors_from: str | None = None
    changed: int = 0
    without_digest: int = 0
    error: tuple[str, str] | None = None


class News:
    """How far the reading is, told now and then; every call shows that it goes on."""

    def __init__(self, channel: TextIO) -> None:
        self._channel = channel
        self._steps = 0
        self._told = 0.0

    def step(self) -> None:
        self._steps += 1
        self.pulse()

    def pulse(self) -> None:
        now = time.monotonic()
        if now - self._told >= _NEWS_SECONDS:
            self._told = now
            self._say({"steps": self._steps})

    def end(self, outcome: Outcome) -> None:
        self._say({"outcome": asdict(outcome)})

    def _say(self, value: Any) -> None:
        self._channel.write(json.dumps(value) + "\n")
        self._channel.flush()


def main() -> None:
    """Serve one request."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    # What a library prints is not part of what is told.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    # Libraries are loaded while the request is prepared.
    import_module("oki_trace.exchange.reading.dispatch")
    request = Request(**json.loads(sys.stdin.readline()))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    news = News(channel)
    news.end(serve(request, news, limit_memory))


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def serve(request: Request, news: News, limit: Callable[[int], None]) -> Outcome:
    """Read what is asked for. Whatever a hostile file brings about is one sentence."""
    try:
        return _read(request, news, limit)
    except MemoryError:
        error: OkiTraceError = refused(
            f"it needs more than {request.memory_bytes / 1e6:,.0f} MB of memory (if you trust it, "
            "give more to `oki-trace import --memory`)"
        )
    except OkiTraceError as caught:
        error = caught
    except RecursionError:
        error = refused("it is nested too deeply")
    except OSError as caught:
        error = refused(f"{caught.strerror or caught}")
    except (ValueError, TypeError, LookupError, OverflowError, ArithmeticError) as caught:
        error = refused(f"it makes no sense ({type(caught).__name__}: {str(caught)[:200]})")
    return Outcome(error=(type(error).__name__, str(error)))


def _read(request: Request, news: News, limit: Callable[[int], None]) -> Outcome:
    from oki_trace.exchange.reading.dispatch import read
    from oki_trace.exchange.reading.staging import Staging

    path = Path(request.path)
    staging = Staging(Path(request.staging), request.staging_bytes, news.step)
    try:
        # Libraries are loaded before memory is limited: they are not the file's.
        tensors_from = read(path, staging, news.pulse, lambda: limit(request.memory_bytes))
    finally:
        staging.close()
    if not staging.began:
        raise refused("there is no conversation in it")
    told = None if tensors_from is None else str(tensors_from)
    return Outcome(staging.messages, staging.steps, told, staging.changed, staging.without_digest)


if __name__ == "__main__":
    main()
