"""The command line: arguments in, sentences and tables out; the work is elsewhere.

Exit status 0: done. 1: the work failed, one line on stderr names the fix.
2: wrong usage.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

DEBUG = "--debug"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``oki-trace``. ``--debug``, anywhere, shows tracebacks."""
    from oki_trace.cli.app import app
    from oki_trace.cli.output import complain
    from oki_trace.errors import OkiTraceError, UsageError

    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = DEBUG in given
    try:
        app([argument for argument in given if argument != DEBUG], prog_name="oki-trace")
    except OkiTraceError as error:
        if debug:
            raise
        complain(str(error))
        raise SystemExit(2 if isinstance(error, UsageError) else 1) from None
    except BrokenPipeError:
        # The reader of our output went away (``| head``): nothing more to say.
        sys.stderr.close()
        raise SystemExit(0) from None
