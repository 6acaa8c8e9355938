"""The command line: arguments in, sentences and tables out; the work is elsewhere.

Exit status 0: done. 1: the work failed, one line on stderr names the fix.
2: wrong usage. 130: Ctrl-C (143: SIGTERM); what was decoded until then is kept.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

DEBUG = "--debug"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``oki-trace``. ``--debug``, anywhere, shows tracebacks."""
    try:
        with _ended_by_sigterm():
            _run(list(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:
        # While modules are still being imported; after that, commands see to it.
        raise SystemExit(128 + signal.SIGINT) from None


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does: what is half written is removed."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(arguments: list[str]) -> None:
    from oki_trace.cli.app import app
    from oki_trace.cli.output import print_error
    from oki_trace.errors import OkiTraceError, UsageError
    from oki_trace.input_text import require_storable

    given, debug = _without_debug(arguments)
    _take_any_text()
    if not debug:
        # What these libraries log of a failure, ours says in one line.
        for name in ("HF_HUB_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
            os.environ.setdefault(name, "error")
    try:
        for argument in given:
            require_storable(argument, "An argument")
        app(given, prog_name="oki-trace")
    except OkiTraceError as error:
        if debug:
            raise
        print_error(str(error))
        raise SystemExit(2 if isinstance(error, UsageError) else 1) from None
    except Exception as error:
        if debug:
            raise
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        print_error(f"This is a fault of oki-trace ({what}). Report it, with what --debug shows.")
        raise SystemExit(1) from None


def _without_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """The arguments less ``--debug``, and whether it was there; after ``--`` it is text."""
    options = arguments.index("--") if "--" in arguments else len(arguments)
    before, after = arguments[:options], arguments[options:]
    return [argument for argument in before if argument != DEBUG] + after, DEBUG in before


def _take_any_text() -> None:
    """No text from outside ends a command: what an encoding cannot hold is escaped.

    What was read so is refused by whoever takes it (``input_text``).
    """
    for stream, errors in (
        (sys.stdin, "surrogateescape"),
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
