"""The command line: parses arguments and prints results; other packages do the work.

Exit status 0: done. 1: the work failed, and one line on stderr names the fix. 2: wrong
usage. 130: Ctrl-C (143: SIGTERM); the tokens so far are kept.
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
        with _sigterm_as_exit():
            _run(list(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:
        # During imports; later, the commands handle it.
        raise SystemExit(128 + signal.SIGINT) from None


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does, so that unfinished files are removed."""

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

    arguments, debug = _without_debug(arguments)
    _accept_any_text()
    if not debug:
        # Our one line replaces the log of these libraries.
        for name in ("HF_HUB_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
            os.environ.setdefault(name, "error")
    try:
        for argument in arguments:
            require_storable(argument, "An argument")
        app(arguments, prog_name="oki-trace")
    except OkiTraceError as error:
        if debug:
            raise
        print_error(str(error))
        raise SystemExit(2 if isinstance(error, UsageError) else 1) from None
    except Exception as error:
        if debug:
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        print_error(f"This is a bug in oki-trace ({reason}). Report it with the output of --debug.")
        raise SystemExit(1) from None


def _without_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """(arguments without ``--debug``, whether it was among them); after ``--`` it is text."""
    options = arguments.index("--") if "--" in arguments else len(arguments)
    before, after = arguments[:options], arguments[options:]
    return [argument for argument in before if argument != DEBUG] + after, DEBUG in before


def _accept_any_text() -> None:
    """Escape characters that an encoding cannot hold, so that no text ends a command.

    ``input_text`` refuses such text from the user.
    """
    for stream, errors in (
        (sys.stdin, "surrogateescape"),
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
