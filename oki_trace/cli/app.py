"""The commands, gathered."""

from __future__ import annotations

import os
import re
import select
import shlex
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from oki_trace.cli import (
    ask,
    bench,
    browse,
    copy,
    explorer,
    export,
    importing,
    maintain,
    store,
    talk,
    verify,
)

_SHORT_OPTION = re.compile("No such option: -[^-]")
# Its own name is private to typer.
_UsageError: Any = typer.BadParameter.__mro__[1]


class _Commands(TyperGroup):
    """All commands. When the reader of their output goes away (``| head``), they just end."""

    def invoke(self, ctx: Any) -> Any:
        given = list(ctx.args)
        try:
            try:
                return super().invoke(ctx)
            except _UsageError as error:
                error.message += _about_dashes(error.message, given, _command_of(error))
                raise
            finally:
                sys.stdout.flush()
        except BrokenPipeError:
            if not _reader_is_gone():
                # Another pipe broke, such as that of a child process: the command has failed.
                raise
            # What is still buffered goes nowhere, and no complaint is made of it at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None


def _reader_is_gone() -> bool:
    """Whether nobody reads standard output any more, as far as the system can tell."""
    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return bool(poll.poll(0))


def _command_of(error: Any) -> str:
    """The command whose arguments are wrong."""
    name = getattr(error.ctx, "info_name", None)
    return name if name in ("chat", "ask", "sql") else "run"


def _about_dashes(said: str, given: list[str], command: str) -> str:
    """What is added to a complaint about options where a text may have been taken for one."""
    texts = [one for one in given if one.startswith("-") and " " in one]
    if not texts and not _SHORT_OPTION.match(said):
        return ""
    text = texts[0] if texts else "-5 + 3"
    return (
        "" if not said else " " if said.endswith(".") else ". "
    ) + f"A text that begins with - goes after --: oki-trace {command} -- {shlex.quote(text)}"


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from oki_trace import __version__

        typer.echo(f"oki-trace {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """See what a local language model does at every step and every layer.

    Every command takes --debug, which shows tracebacks. Exit status: 0 done,
    1 the work failed, 2 wrong usage, 130 ended by Ctrl-C.

    Example: oki-trace demo
    """


MODULES = (
    *(talk, browse, ask, export, importing),
    *(store, maintain, verify, copy, explorer, bench),
)
for _module in MODULES:
    _module.register(app)
